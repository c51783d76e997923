r"""Kronecker-factored curvature as an operator: K-FAC, EKFAC, KFLR and FOOF.

A layer's block is :math:`L \otimes R`, acting on ``[W | b]`` as ``M -> L M R^T``, or in the
factors' eigenbases a diagonal: ``M -> U_L (s * (U_L^T M U_R)) U_R^T``. Powers, inverses with exact
damping and determinants are those of s. Norm layers have exact 2 x 2 blocks, and what no layer
covers its diagonal.
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
    """The Kronecker-factored Fisher matrix of a problem's loss on data.

    Args:
        problem, params: whose, and where.
        batch, batches: one batch, or an iterable of them that can be gone through again; the
            factors do not depend on how the data are split.
        kind: "kfac"; "ekfac", with the exact second moments in the factors' eigenbases; "kflr",
            K-FAC with exact labels; "foof", inputs only, with the identity for the outputs.
        labels, samples, sharing: see :class:`funcprecond.curvature.layer_statistics.LayerStatistics`.
        buffers: the model's buffers; the problem's own by default.
        generator: draws labels and dropout masks.

    Attributes:
        factors: the :class:`KroneckerIO`, a tree of tensors that can be saved.
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
                # EKFAC takes its layers twice; else no two cotangents need be in memory.
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

        Args:
            damping: λ, in the loss's units.
            split: "joint" is ``(L ⊗ R + λ I)^-1``, exactly; "pi" is ``(L + √λ/π I)^-1 ⊗ (R + √λ π
                I)^-1`` with π² the ratio of the factors' mean eigenvalues, and "equal" the same
                with π = 1: both damp more strongly than "joint" by their cross terms.
        """
        if split == "joint":
            return self.power(-1.0, damping)
        if any(isinstance(b, Rotated) for b in self.layers.values()):
            msg = "EKFAC's blocks are no product of two factors: use split='joint'"
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
