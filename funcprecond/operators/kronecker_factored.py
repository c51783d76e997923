r"""Kronecker-factored curvature as an operator: K-FAC, EKFAC, KFLR and FOOF.

A layer's block is :math:`L \otimes R`, acting on ``[W | b]`` as ``M -> L M R^T``, or in the
factors' eigenbases a diagonal: ``M -> U_L (s * (U_L^T M U_R)) U_R^T``. Powers, inverses with exact
damping and determinants are those of s. Norm layers have exact 2 x 2 blocks, and what no layer
covers its diagonal.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics, layer_uses
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.base import LayerUse, Sharing
from funcprecond.layers.kinds.scale import Scale
from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.treemath import scalar_like
from funcprecond.losses.base import Labels, check_labels
from funcprecond.operators.data import (
    batch_weight,
    check_data,
    each_batch,
    is_sum,
    seed_of,
    seeded,
)
from funcprecond.operators.layer_blocks import Factors, Layerwise, Rotated
from funcprecond.problems import Problem
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky
from funcprecond.tree import Buffers, Params

__all__ = ["KroneckerFactored", "Split"]

Kind = Literal["kfac", "ekfac", "kflr", "foof"]
Split = Literal["joint", "pi", "equal"]


class KroneckerFactored(Layerwise):
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
                    yield (_inputs_only(e),), batch_weight(e), is_sum(e)
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
                self.factors = _from_inputs(layers, params, sharing, keep_thin=True)
            else:
                self.factors = _of_parts(parts, params, sharing, thin=True)[0]
        else:
            first = measured()
            self.factors = _factors(first, params, sharing, forward_only=kind == "foof")
        blocks: dict[str, Any] = {
            k: Factors(x, self.factors.right[k]) for k, x in self.factors.left.items()
        }
        super().__init__(params, blocks, self.factors.units, self.factors.others)
        if kind == "ekfac":
            second = first if batches is None else measured()
            self.layers = _corrected(second, self._rotated())

    def inverse(self, damping: float | Tensor, *, split: Split = "joint") -> Layerwise:
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
        return Layerwise(self.like, blocks, factor.units, others)


def _inputs_only(evaluation: Evaluation) -> Layers:
    """The layers with output gradients of zero, which take no backward pass."""
    like = next(iter(evaluation.params.values()))
    grads = [like.new_zeros(()).expand(1, *call.shape) for call in evaluation.calls]
    return Layers(layer_uses(evaluation, grads), {}, evaluation.constant)


def _of_parts(
    parts: Iterable[Layers], params: Params, sharing: Sharing, thin: bool = False
) -> tuple[KroneckerIO, dict[str, tuple[LayerUse, ...]]]:
    """The factors of all cotangents, and the layers' uses without these."""
    found, uses = KroneckerIO.init(params, thin), {}
    for part in parts:
        found = found.with_cotangents(part)
        uses = {
            name: tuple(dataclasses.replace(use, grads=use.grads[:0].clone()) for use in block)
            for name, block in part.uses.items()
        }
        del part  # so that it is gone while the next is made
    # Inputs come last, when the run's graph is gone.
    return found.with_inputs(uses, sharing), uses


def _factors(
    measured: Iterable[tuple[Iterable[Layers], Tensor, bool]],
    params: Params,
    sharing: Sharing,
    forward_only: bool,
) -> KroneckerIO:
    """The factors over all batches.

    What is made of output gradients is averaged over the batches as the loss is, the inputs' second
    moments by their number of positions.
    """
    # By block or name: a batch's value, with what it counts.
    inputs, outputs = _Mean(), _Mean()
    units, others = _Mean(), _Mean()
    inputs_left: dict[str, bool] = {}
    for parts, share, is_total in measured:
        if forward_only:
            (layers,) = parts
            one, uses_of = _from_inputs(layers, params, sharing), layers.uses
        else:
            one, uses_of = _of_parts(parts, params, sharing)
        is_mean = not is_total
        for name in one.left:
            uses = uses_of[name]
            inputs_left[name] = uses[0].call.inputs_first
            a, g = one.left[name], one.right[name]
            a, g = (a, g) if inputs_left[name] else (g, a)
            inputs.add(
                name, a, share.new_full((), sum(u.call.positions(u.inputs, sharing) for u in uses))
            )
            outputs.add(name, g, share, is_mean or forward_only)
        for name, x in one.units.items():
            units.add(name, x, share, is_mean or forward_only)
        for name, x in one.others.items():
            others.add(name, x, share, is_mean or forward_only)
    if not inputs.totals and not units.totals and not others.totals:
        msg = "there are no batches, or no parameters: pass a list or a DataLoader, no iterator"
        raise ValueError(msg)
    a, g = inputs.means(), outputs.means()
    left = {k: a[k] if inputs_left[k] else g[k] for k in a}
    right = {k: g[k] if inputs_left[k] else a[k] for k in a}
    one = scalar_like(params, 1.0)
    return KroneckerIO(left, right, units.means(), others.means(), one, tuple(params))


class _Mean:
    """Weighted means by name, or sums."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, weight: Tensor, is_mean: bool = True) -> None:
        weight = weight.to(x.dtype)
        # A batch whose every term is ignored has a mean of 0 / 0, and no share.
        x = torch.where(weight > 0, x * weight, 0.0)
        if name in self.totals:
            x = self.totals[name] + x
            weight = self.weights[name] + weight if is_mean else weight
        self.totals[name], self.weights[name] = x, weight

    def means(self) -> dict[str, Tensor]:
        return {k: x / self.weights[k] for k, x in self.totals.items()}


def _from_inputs(
    layers: Layers, params: Params, sharing: Sharing, keep_thin: bool = False
) -> KroneckerIO:
    """FOOF's factors: the inputs' second moments, and the identity everywhere else."""
    left, right, units = {}, {}, {}
    for name, uses in layers.uses.items():
        call, bias = uses[0].call, split_block(name)[1] is not None
        if isinstance(call, Scale):
            eye = _identity(2 if bias else 1, uses[0])
            units[name] = eye.expand(params[call.weight].numel(), *eye.shape)
            continue
        inputs = call.input_factor(uses, bias, sharing, thin=keep_thin)
        outputs = _identity(call.fan_out, uses[0])
        outputs = outputs if call.groups == 1 else outputs.expand(call.groups, -1, -1)
        first, last = (inputs, outputs) if call.inputs_first else (outputs, inputs)
        left[name], right[name] = first, last
    covered = {k for name in layers.uses for k in split_block(name) if k}
    others = {k: torch.ones_like(p) for k, p in params.items() if k not in covered}
    one = torch.ones((), dtype=layers.scale.dtype, device=layers.scale.device)
    return KroneckerIO(left, right, units, others, one, tuple(params))


def _identity(size: int, use: LayerUse) -> Tensor:
    return torch.eye(size, dtype=factor_dtype(use.grads), device=use.grads.device)


def _corrected(
    measured: Iterable[tuple[Iterable[Layers], Tensor, bool]], bases: dict[str, Rotated]
) -> dict[str, Any]:
    """EKFAC: the exact second moments in the factors' eigenbases."""
    moments = _Mean()
    for (layers,), share, is_total in measured:
        for name, uses in layers.uses.items():
            if name in bases:
                bias = split_block(name)[1] is not None
                basis = bases[name]
                found = uses[0].call.second_moments(uses, bias, basis.left, basis.right)
                moments.add(name, found * layers.scale, share, not is_total)
    return {
        k: Rotated(bases[k].left, bases[k].right, x.reshape(bases[k].values.shape), bases[k].rest)
        for k, x in moments.means().items()
    }
