r"""Kronecker-factored curvature as an operator: K-FAC, EKFAC, KFLR and FOOF.

A layer's block is :math:`L \otimes R`, which acts on ``M = [W | b]`` as ``M -> L M R^T``. In the
factors' eigenbases it is a diagonal s, ``M -> U_L (s * (U_L^T M U_R)) U_R^T``, so that powers,
inverses with exact damping, and determinants are computed from s entry by entry. Norm layers have
exact 2 x 2 blocks. For parameters that no layer covers, only the diagonal is kept.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.layer_call import Sharing
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.block_forms import Factors, Rotated
from funcprecond.operators.data import (
    batch_weight,
    check_data,
    each_batch,
    is_sum,
    seed_of,
    seeded,
)
from funcprecond.operators.layer_blocks import LayerBlocks
from funcprecond.operators.measured_factors import (
    corrected_blocks,
    factors_of_inputs,
    factors_of_parts,
    factors_over_batches,
    inputs_only,
)
from funcprecond.problems import Problem
from funcprecond.solver.cholesky import Cholesky
from funcprecond.tree import Buffers, Params

__all__ = ["KroneckerFactored", "Split"]

Kind = Literal["kfac", "ekfac", "kflr", "foof"]
Split = Literal["joint", "pi", "equal"]


class KroneckerFactored(LayerBlocks):
    """The Kronecker-factored Fisher matrix of a problem's loss, on one batch or on many.

    The factors are computed when the object is made. This costs one forward pass, and pull-backs to
    the layers' outputs of a third of a gradient each: ``samples`` with ``labels="mc"``, one with
    "empirical", one per output entry of an example with "exact", and none with ``kind="foof"``.
    "ekfac" on many batches makes two passes over the data.

    Args:
        problem, params: the problem, and the parameters at which its loss is differentiated.
        batch: one batch. Pass either this or ``batches``.
        batches: an iterable of batches that can be read repeatedly, such as a list or a
            ``DataLoader``. The factors do not depend on how the data are split into batches.
        kind: "kfac" (Martens & Grosse, arXiv 1503.05671); "ekfac", which replaces the eigenvalues
            of K-FAC's blocks by the exact second moments in the factors' eigenbases (George et al.,
            arXiv 1806.03884); "kflr", which is K-FAC with exact labels (Botev et al., arXiv
            1706.03662); "foof", which measures the inputs only and takes the identity for the
            outputs (Benzing, arXiv 2201.12250).
        labels: "mc", "exact" or "empirical", see :class:`funcprecond.curvature.LayerStatistics`;
            not used by "kflr" and "foof".
        samples: the number of sampled labels per term of the loss, with "mc".
        sharing: how the positions of an example are combined, "expand" or "reduce", see
            :class:`funcprecond.curvature.LayerStatistics`.
        buffers: the model's buffers; those of the problem by default.
        generator: draws the sampled labels and the dropout masks.

    Attributes:
        factors: the Kronecker factors as a :class:`funcprecond.representation.KroneckerIO`, a tree
            of tensors that can be saved.

    Raises:
        TypeError: the loss is not a known likelihood and ``labels`` needs one, or ``batches`` is an
            iterator.
        ValueError: ``kind``, ``labels`` or ``samples`` is out of range, neither or both of
            ``batch`` and ``batches`` are given, ``batches`` is empty, random numbers are needed
            and there is no generator, or some parameter is in no layer and the model couples the
            examples of a batch.
        RuntimeError: some parameter is in no layer, and ``vmap`` cannot compute its per-sample
            gradients.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(2, 1, bias=False), fp.losses.mse)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> kfac = fp.KroneckerFactored(problem, problem.params, batch, labels="exact")
        >>> kfac.inverse(damping=1.0) @ {"weight": torch.tensor([[2.0, 5.0]])}
        {'weight': tensor([[1., 1.]])}
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        batch: Any = None,
        *,
        batches: Iterable[Any] | None = None,
        kind: Kind = "kfac",
        labels: Labels = "mc",
        samples: int = 1,
        sharing: Sharing = "expand",
        buffers: Buffers | None = None,
        generator: torch.Generator | None = None,
    ):
        check_data(batch, batches)
        check_labels(labels, samples)
        if kind not in ("kfac", "ekfac", "kflr", "foof"):
            msg = f"kind must be 'kfac', 'ekfac', 'kflr' or 'foof', not {kind!r}"
            raise ValueError(msg)
        labels = "exact" if kind == "kflr" else "empirical" if kind == "foof" else labels
        need = LayerStatistics(labels, samples, sharing=sharing, per_sample=kind == "ekfac")
        seed = seed_of(generator)

        def measured():
            for i, b in enumerate(each_batch(batch, batches)):
                g = seeded(seed, i)
                options = {"buffers": buffers, "generator": g, "layers": True}
                if kind == "foof":
                    e = Evaluation(problem, params, b, forward_only=True, **options)
                    yield (inputs_only(e),), batch_weight(e), is_sum(e)
                    continue
                noise = need.draw(problem, params, b, g)
                e = Evaluation(problem, params, b, **options)
                # EKFAC uses the measured layers twice. The other kinds need the cotangents only
                # once, so that each() keeps one part of them in memory at a time.
                parts = (need.measure(e, noise),) if kind == "ekfac" else need.each(e, noise)
                share, total = batch_weight(e), is_sum(e)
                del e  # the run's graph, which the parts do not need
                yield parts, share, total

        if batches is None:
            first = list(measured())
            parts = first[0][0]
            if kind == "foof":
                (layers,) = parts
                self.factors = factors_of_inputs(layers, params, sharing, keep_thin=True)
            else:
                self.factors = factors_of_parts(parts, params, sharing, thin=True)[0]
        else:
            first = measured()
            self.factors = factors_over_batches(first, params, sharing, forward_only=kind == "foof")
        blocks: dict[str, Any] = {
            k: Factors(x, self.factors.right[k]) for k, x in self.factors.left.items()
        }
        super().__init__(params, blocks, self.factors.units, self.factors.others)
        if kind == "ekfac":
            second = first if batches is None else measured()
            self.layers = corrected_blocks(second, self._rotated())

    def inverse(self, damping: float | Tensor, *, split: Split = "joint") -> LayerBlocks:
        r"""A damped inverse.

        "pi" and "equal" split the damping between the factors (Martens & Grosse, arXiv 1503.05671,
        section 6.3). They damp more strongly than "joint", by the cross terms of the product.

        Args:
            damping: λ, in the units of the loss.
            split: "joint" for the exact inverse ``(L ⊗ R + λ I)^-1``; "pi" for ``(L + √λ/π I)^-1 ⊗
                (R + √λ π I)^-1``, where π² is the ratio of the mean eigenvalues of R and L; "equal"
                for the same with π = 1.

        Returns:
            An operator. Costs one eigendecomposition per factor with "joint", and one Cholesky
            decomposition per factor otherwise. Its products take two matrix products per factor
            with "joint", and one otherwise.

        Raises:
            ValueError: ``split`` is unknown, or it is not "joint" for the kind "ekfac".
        """
        if split == "joint":
            return self.power(-1.0, damping)
        if any(isinstance(b, Rotated) for b in self.layers.values()):
            msg = (
                f"split={split!r} needs blocks that are Kronecker products of two factors, and the "
                "blocks of kind='ekfac' are not: use split='joint'"
            )
            raise ValueError(msg)
        if split not in ("pi", "equal"):
            msg = f"split must be 'joint', 'pi' or 'equal', not {split!r}"
            raise ValueError(msg)
        factor = Cholesky(damping, split).prepare(self.factors, None)  # pyright: ignore
        blocks = {
            k: Factors(x, factor.right[k], factor.left_ridge[k], factor.right_ridge[k])
            for k, x in factor.left.items()
        }
        others = {k: 1 / (d + damping) for k, d in self._rest().items()}
        return LayerBlocks(self.like, blocks, factor.units, others)
