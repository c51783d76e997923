"""TNT: natural gradient under a tensor normal model of the gradient at sampled labels."""

from typing import Literal

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.sampled_gradient import SampledGradient
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.tensor_normal import TensorNormal
from funcprecond.solver.axis_inverse import AxisInverse
from funcprecond.transform import Transform, chain
from funcprecond.transforms.scale import scale

__all__ = ["tnt"]


@card(
    "TNT (Ren & Goldfarb 2021)",
    curvature="F̂_nmc, F̂_emp",
    representation="layer, KF-dim",
    solver="L direct, Cholesky inverse",
    learning_rate=2e-3,
    carries_momentum=True,
)
def tnt(
    *,
    damping: float | Tensor = 0.1,
    labels: Literal["mc", "empirical"] = "mc",
    samples: int = 1,
    decay: Decay = 0.9,
    momentum: float | Tensor = 0.9,
    per_sample: bool = False,
    every: int = 1,
    refresh_every: int = 20,
    start: int = 10,
) -> Transform:
    """TNT (Ren & Goldfarb, NeurIPS 2021, arXiv 2106.02925).

    This is the "same trace" variant of the authors' code. For a parameter of N entries with k axes
    longer than 1, of n_i entries, and D the gradient of the mini-batch's loss at labels y ~
    p(y|x), with C_i(D) the (n_i, n_i) Gram matrix of its slices along axis i::

        H_i <- β H_i + (1 - β) C_i(D)
        c    = (tr(H_1) / N)^(1/k)
        U_i  = H_i / (c^(k-1) Π_{j≠i} n_j)                 of mean eigenvalue c, whatever i
        m   <- μ m + G
        d    = m ×_1 (U_1 + λ I)^(-1) ×_2 … ×_k (U_k + λ I)^(-1)

    U_1 ⊗ … ⊗ U_k is the covariance of D if that is a Kronecker product, and has its trace in any
    case; the scale is split evenly, so that one λ damps all axes alike. The power is 1, where
    Shampoo's is 1/2. Vectors have one axis, so that theirs is a full n x n matrix, as in the paper.

    Args:
        damping: λ, added to every U_i, which has the units of the curvature's k-th root. What was
            never seen is multiplied by ``λ^-k``.
        labels, samples: see :class:`funcprecond.curvature.SampledGradient`.
        decay: β: None for the newest batch alone, or the weight of the old value of a
            bias-corrected moving average.
        momentum: μ, of the gradient.
        per_sample: estimate the Fisher matrix itself. By default it is that of the mini-batch's
            gradient, smaller by the batch size, as in the authors' code: λ is then relative to it.
        every, refresh_every, start: the intervals of the measurement and of the inverses, see
            :func:`funcprecond.compose`.

    Returns:
        A method that needs one more backward pass for a measurement. It keeps 2 Σ n_i² numbers and
        one copy for a parameter; each step takes a product for each axis.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.tnt(damping=0.1), fp.scale(2e-3))
    """
    preconditioned = compose(
        SampledGradient(labels, samples, per_sample),
        TensorNormal,
        AxisInverse(damping),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        momentum=momentum,
    )
    # The sum m is so many times the running mean that a composed method applies its factor to.
    return chain(preconditioned, scale(1 / (1 - momentum)))
