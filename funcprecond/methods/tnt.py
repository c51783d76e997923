"""TNT: natural gradient under a tensor-normal model of the gradient at sampled labels."""

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

    TNT models the gradient D of the mini-batch's loss, at labels sampled from p(y|x), by a normal
    distribution whose covariance is a Kronecker product. A parameter of N entries has k axes that
    are longer than 1, with n_i entries each, and C_i(D) is the (n_i, n_i) Gram matrix of D's slices
    along axis i. This is the "same trace" variant of the authors' code::

        H_i <- β H_i + (1 - β) C_i(D)
        c    = (tr(H_1) / N)^(1/k)
        U_i  = H_i / (c^(k-1) Π_{j≠i} n_j)                 of mean eigenvalue c, whatever i
        m   <- μ m + G
        d    = m ×_1 (U_1 + λ I)^(-1) ×_2 … ×_k (U_k + λ I)^(-1)

    U_1 ⊗ … ⊗ U_k equals the covariance of D if that is a Kronecker product, and always has its
    trace. All U_i have the same mean eigenvalue, so that one λ damps all axes alike. The inverses
    have the power 1, where Shampoo's have 1/2. A vector has one axis and gets a full (n, n) matrix.

    Args:
        damping: λ, added to every U_i, in units of the k-th root of the curvature. Where no
            curvature was measured, m is multiplied by ``λ^-k``.
        labels, samples: see :class:`funcprecond.curvature.SampledGradient`.
        decay: β, the weight of the old value in a bias-corrected moving average, or None to use the
            newest batch alone.
        momentum: μ, the factor of the old value in the sum of gradients.
        per_sample: whether to estimate the Fisher matrix itself. By default D is the mini-batch's
            gradient, as in the authors' code, whose covariance is smaller by the batch size.
        every, refresh_every, start: the intervals of the measurement and of the inverses, in steps,
            see :func:`funcprecond.compose`.

    Returns:
        A method that needs one more backward pass for each measurement. Its state is 2 Σ n_i²
        numbers and one copy of each parameter. A step takes one matrix product for each axis.

    Raises:
        ValueError: an option has a value that is not allowed.

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
    # A composed method preconditions a running mean; the sum m is 1 / (1 - μ) times as large.
    return chain(preconditioned, scale(1 / (1 - momentum)))
