"""SPlus: the sign of the momentum in the eigenbasis of Shampoo's factors."""

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.linalg.axes import axes_of
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.eigenbases import Bases, rotate, rotate_back
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.solver.followed_eigenbases import FollowedEigenbases
from funcprecond.transform import Transform, fitted
from funcprecond.transforms.in_blocks import in_blocks
from funcprecond.tree import Params, map, state

__all__ = ["SPlusState", "splus"]

# The authors use this fraction of the learning rate for vectors.
VECTOR = 1e-3
# An entry below this many rounding errors of the norm is taken as zero.
ROUNDINGS = 4


@state
class SPlusState:
    """The state of SPlus, in float32 or wider.

    Attributes:
        mean: m, shaped like the parameters.
        statistics, bases: for each parameter, a tuple of S_i and a tuple of Q_i, one for each axis.
    """

    mean: Params
    statistics: Bases
    bases: Bases


@card(
    "SPlus (Frans 2025)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, KF-dim eigenbasis",
    solver="G direct, sign",
    learning_rate=0.2,
    carries_momentum=True,
)
def splus(
    *,
    momentum: float | Tensor = 0.9,
    decay: float | Tensor = 0.999,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 10000,
    every: int = 1,
    refresh_every: int = 100,
    start: int = 0,
) -> Transform:
    """SPlus (Frans, Levine & Abbeel, arXiv 2506.07254).

    A parameter has k axes that are longer than 1, with n_i entries each. Q_i is the eigenbasis of
    the factor S_i, and C_i(G) the Gram matrix of the gradient's slices along axis i::

        m <- b1 m + (1 - b1) G
        d  = k / (Σ n_i) · sign(m ×_i Q_iᵀ) ×_i Q_i        2 / (n_1 + n_2) for a matrix
        S_i <- b2 S_i + (1 - b2) C_i(G)
        at each refresh  Q_i <- eigenvectors of S_i

    The bases change after the step. The eigenvalues are not used: taking the sign divides each
    coordinate by its own magnitude, so that the length of the direction depends on the shape alone.
    Vectors and scalars get ``0.001 sign(m)``. The authors train with a high learning rate and
    evaluate at a moving average of the weights (decay 0.999), which is left to the training loop.

    Args:
        momentum: b1, the weight of the old mean.
        decay: b2, the weight of the old statistics.
        merge, block: how parameters are cut into blocks, as for :func:`funcprecond.shampoo`.
        max_dim: an axis that is longer than this has no basis.
        every, refresh_every, start: the intervals of the statistics and of the bases, in steps, see
            :func:`funcprecond.compose`. The first step is taken with ``Q_i = I``.

    Returns:
        A method that needs the gradient only. Its state is 2 Σ n_i² numbers and one copy of each
        parameter. A step takes three matrix products for each axis, a refresh an
        eigendecomposition.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.splus(), {"w": torch.tensor([[3.0, -4.0], [5.0, 1.0]])}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([[ 0.5000, -0.5000],
                [ 0.5000,  0.5000]])
    """
    basis = FollowedEigenbases(every, refresh_every, start, "eigh", max_dim=max_dim)

    def init(params: Params) -> SPlusState:
        eyes = basis.identities(params)
        return SPlusState(treemath.zeros_like(params), map(torch.zeros_like, eyes), eyes)

    def update(
        state: SPlusState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[SPlusState, Params]:
        mean, statistics, direction = {}, {}, {}
        for name, old in state.mean.items():
            bases, axes = state.bases[name], basis.axes(old.shape)
            g = grads[name].to(old.dtype)
            mean[name] = accumulate(old, g, momentum)
            signs = _sign(rotate(mean[name], bases, axes))
            d = _scale(old.shape) * rotate_back(signs, bases, axes)
            direction[name] = d.to(grads[name].dtype)
            statistics[name] = basis.statistics(state.statistics[name], g, decay, evidence)
        bases, _ = basis.refreshed(statistics, state.bases, evidence)
        return SPlusState(mean, statistics, bases), {k: direction[k] for k in grads}

    inner = fitted(Transform(init, update, basis.needs), lambda state: state.mean)
    return in_blocks(inner, Blocking(merge, block))


def _sign(x: Tensor) -> Tensor:
    """The sign, with 0 where x is a rounding error, which must not become a full step."""
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x)
    return torch.where(x.abs() > rounding, x.sign(), 0.0)


def _scale(shape: torch.Size) -> float:
    axes = axes_of(shape)
    return len(axes) / sum(shape[i] for i in axes) if axes else VECTOR
