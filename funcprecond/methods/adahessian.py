"""AdaHessian: Adam with the Hessian's diagonal in place of the gradient's square."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.curvature.hessian import HessianProbes
from funcprecond.evidence import Evidence, is_due, required
from funcprecond.linalg import treemath
from funcprecond.linalg.block_mean import Block, block_mean
from funcprecond.linalg.differentiable import power as raised
from funcprecond.linalg.precision import wide
from funcprecond.methods.card import card
from funcprecond.need import Every, Need
from funcprecond.transform import Transform, counter, fitted
from funcprecond.tree import Params, state

__all__ = ["AdaHessianState", "adahessian"]

KERNELS: Mapping[int, Block] = {3: "kernel", 4: "kernel", 5: "kernel"}


@state
class AdaHessianState:
    """The state of AdaHessian.

    Attributes:
        mean, second_moment: m and v, shaped like the parameters, in float32 or wider.
        step, measured: the numbers of gradients in m and of diagonals in v, 0-d integer tensors.
    """

    mean: Params
    second_moment: Params
    step: Tensor
    measured: Tensor


@card(
    "AdaHessian (Yao 2020)",
    curvature="|H|",
    representation="element",
    solver="G direct, element-wise division",
    learning_rate=0.15,
    carries_momentum=True,
)
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
    """AdaHessian (Yao, Gholami, Shen, Keutzer & Mahoney, arXiv 2006.00719).

    z is a vector of random signs, t counts the steps from 1, and s is the number of measurements so
    far. All operations are element-wise::

        D  = z ⊙ H z,    |D| averaged over the kernel of each convolution
        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) D²
        d  = (m / (1 - b1^t)) / ((v / (1 - b2^s))^(power/2) + damping)

    The mean of D is the diagonal of H, but the mean of |D| is larger wherever H has off-diagonal
    entries.

    Args:
        betas: (b1, b2), the weights of the old mean and of the old second moment.
        damping: added after the power is taken.
        power: the Hessian power: 1 for a Newton-like step, 0 for SGD with momentum.
        average: whether absolute values are averaged over a block, as in all public code, or the
            signed diagonal, as in the paper.
        block: for each number of axes of a parameter, the block to average over, see
            :func:`funcprecond.linalg.block_mean.block_mean`. Other parameters are not averaged.
        every: the number of steps between two measurements of the diagonal.
        samples: the number of probes z for each measurement, whose signed mean is taken.

    Returns:
        A method that needs Hessian probes: every ``every`` steps, one Hessian-vector product for
        each probe, which costs 1.3 to 2.6 gradients. Its state is two copies of the parameters.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.adahessian(every=2), fp.scale(0.15))
    """
    one_of(("abs", "signed"), average=average)
    if bad := [b for b in block.values() if b not in ("kernel", "row") and not _positive(b)]:
        msg = f"a block must be 'kernel', 'row' or a positive number of entries, not {bad[0]!r}"
        raise ValueError(msg)
    b1, b2 = betas
    need, measure = HessianProbes(samples), Every("measure", every)

    def init(params: Params) -> AdaHessianState:
        m, v = treemath.zeros_like(params), treemath.zeros_like(params)
        return AdaHessianState(m, v, counter(params), counter(params))

    def update(
        state: AdaHessianState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[AdaHessianState, Params]:
        evidence = required(evidence, need)
        v, measured = state.second_moment, state.measured
        if is_due(measure, evidence, need):
            measured = measured + 1
            diagonal = evidence[need].diagonal()
            v = {k: b2 * v[k] + (1 - b2) * squared(diagonal[k].to(v[k].dtype)) for k in grads}
        step = state.step + 1
        m = {k: b1 * state.mean[k] + (1 - b1) * g.to(v[k].dtype) for k, g in grads.items()}
        # In float64: torch takes a power of an integer tensor in its default dtype.
        correct1, correct2 = 1 - b1 ** wide(step), 1 - b2 ** wide(measured)
        direction = {
            k: ((m[k] / correct1) / (raised(v[k] / correct2, power / 2) + damping)).to(g.dtype)
            for k, g in grads.items()
        }
        return AdaHessianState(m, v, step, measured), direction

    def squared(d: Tensor) -> Tensor:
        return block_mean(d.abs() if average == "abs" else d, block.get(d.ndim)).square()

    def needs(t: int) -> tuple[Need, ...]:
        return (*((need,) if measure.due(t) else ()), *measure.marks(t))

    return fitted(Transform(init, update, needs), lambda state: state.mean)


def _positive(block: object) -> bool:
    return isinstance(block, int) and not isinstance(block, bool) and block > 0
