"""AdaHessian: Adam with the Hessian's diagonal in place of the gradient's square.

Row: |H|, element, division. Yao, Gholami, Shen, Keutzer & Mahoney, arXiv 2006.00719. With a vector
z of random signs, t counted from 1 and s the number of measurements so far::

    D  = z ⊙ H z,  averaged in absolute value over the kernel of each convolution
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) D²
    d  = (m / (1 - b1^t)) / ((v / (1 - b2^s))^(power/2) + damping)

Needs Hessian probes: one product, 1.3 to 2.6 gradients, each ``every`` steps. Two copies of the
parameters. ``E |z ⊙ H z|`` exceeds ``|diag H|`` wherever H is not diagonal.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from funcprecond.curvature.hessian import HessianProbes
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.linalg.precision import factor_dtype, wide
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.transform import Transform, counter
from funcprecond.tree import Params, state

__all__ = ["AdaHessianState", "adahessian", "spatial_average"]

Block = Literal["kernel", "row"] | int
KERNELS: Mapping[int, Block] = {3: "kernel", 4: "kernel", 5: "kernel"}


@state
class AdaHessianState:
    """The running means and their counts.

    Attributes:
        mean, second_moment: of the gradient and of the diagonal, shaped like the parameters, in
            float32 or wider.
        step, measured: how many gradients and how many diagonals they have seen, 0-d integers.
    """

    mean: Params
    second_moment: Params
    step: Tensor
    measured: Tensor


def adahessian(
    *,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    damping: float | Tensor = 1e-4,
    power: float = 1.0,
    average: Literal["abs", "signed"] = "abs",
    block: Mapping[int, Block] = KERNELS,
    every: int = 1,
    samples: int = 1,
) -> Transform:
    """AdaHessian's direction.

    Args:
        betas: the weights of the old mean and of the old second moment.
        damping: added outside the power.
        power: the Hessian power, 1 for a Newton-like step, down to 0 for momentum SGD.
        average: what is averaged over a block: absolute values, as all public code does, or the
            signed diagonal, as the paper writes.
        block: what is averaged by a parameter's number of axes: "kernel" is all axes from the third
            on, "row" all from the second on, a number n is n consecutive entries of a row (the last
            of a row may be shorter). Axes not named have no averaging.
        every: the diagonal is measured each so many steps.
        samples: probes for one measurement; their signed mean is Hutchinson's estimate.

    Raises:
        ValueError: an option is out of range.
    """
    if average not in ("abs", "signed"):
        msg = f"average must be 'abs' or 'signed', not {average!r}"
        raise ValueError(msg)
    if bad := [b for b in block.values() if b not in ("kernel", "row") and not _positive(b)]:
        msg = f"a block must be 'kernel', 'row' or a number of entries, not {bad[0]!r}"
        raise ValueError(msg)
    b1, b2 = betas
    need, measure = HessianProbes(samples), Every("measure", every)

    def init(params: Params) -> AdaHessianState:
        def zeros() -> Params:
            return {k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()}

        return AdaHessianState(zeros(), zeros(), counter(params), counter(params))

    def update(
        state: AdaHessianState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[AdaHessianState, Params]:
        if evidence is None:
            msg = f"adahessian needs {need} beside the gradient: pass the evidence of fp.observe"
            raise MissingEvidence(msg)
        v, measured = state.second_moment, state.measured
        if measure in evidence:
            measured = measured + 1
            diagonal = evidence[need].diagonal()
            v = {k: b2 * v[k] + (1 - b2) * squared(diagonal[k].to(v[k].dtype)) for k in grads}
        step = state.step + 1
        m = {k: b1 * state.mean[k] + (1 - b1) * g.to(v[k].dtype) for k, g in grads.items()}
        # A power of an integer tensor would be taken in torch's default dtype.
        correct1, correct2 = 1 - b1 ** wide(step), 1 - b2 ** wide(measured)
        direction = {
            k: ((m[k] / correct1) / ((v[k] / correct2) ** (power / 2) + damping)).to(g.dtype)
            for k, g in grads.items()
        }
        return AdaHessianState(m, v, step, measured), direction

    def squared(d: Tensor) -> Tensor:
        kind = block.get(d.ndim)
        return spatial_average(d.abs() if average == "abs" else d, kind).square()

    def needs(t: int) -> tuple[Need, ...]:
        due = measure.due(t)
        return (need, *due) if due else ()

    return Transform(init, update, needs)


def spatial_average(diagonal: Tensor, block: Block | None) -> Tensor:
    """Each entry's mean over its block, shaped like ``diagonal``; see :func:`adahessian`."""
    if block is None or diagonal.numel() == 0:
        return diagonal
    if isinstance(block, str):
        axes = tuple(range(2 if block == "kernel" else 1, diagonal.ndim))
        return diagonal.mean(axes, keepdim=True).expand_as(diagonal) if axes else diagonal
    rows = diagonal.reshape(diagonal.shape[0] if diagonal.ndim > 1 else 1, -1)
    means = [part.mean(1, keepdim=True).expand_as(part) for part in rows.split(block, 1)]
    return torch.cat(means, 1).reshape(diagonal.shape)


def _positive(block: object) -> bool:
    return isinstance(block, int) and not isinstance(block, bool) and block > 0


CARDS = (
    Card(
        "adahessian",
        "AdaHessian (Yao 2020)",
        r"\|H\|",
        "element",
        "G direct, element-wise division",
        adahessian,
        learning_rate=0.15,
        momentum=True,
    ),
)
