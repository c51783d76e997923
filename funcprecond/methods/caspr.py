"""CASPR: Shampoo's factors, combined by a Kronecker sum instead of a Kronecker product."""

import torch
from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Method
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.kronecker_sum import KroneckerSum
from funcprecond.transform import Transform
from funcprecond.transforms.stored import stored

__all__ = ["caspr"]


@card(
    "CASPR (Duvvuri 2024)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, KF-dim, Kronecker sum",
    solver="G direct, eigendecomposition",
    learning_rate=0.02,
)
def caspr(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    p: float | None = None,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 25,
    stagger: bool = False,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 10000,
    dtype: torch.dtype | None = None,
    method: Method = "auto",
    state_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Transform:
    """CASPR (Duvvuri, Devvrit, Anil, Hsieh & Dhillon, ICLR 2024).

    CASPR keeps the factors of :func:`funcprecond.shampoo`, one for each of the k axes of a
    parameter. It averages their roots, where Shampoo multiplies them. Each root acts along its own
    axis::

        S_i <- S_i + C_i(G)                              C_i(G): the Gram matrix along axis i
        X    = ( (1/k) Σ_i S_i^(-1/2p) )^p,    p = k
        d    = X G

    For a matrix with the factors L and R, X is applied in two passes,
    ``U = (L^(-1/4) G + G R^(-1/4)) / 2`` and ``d = (L^(-1/4) U + U R^(-1/4)) / 2``. X lies between
    Shampoo's preconditioner (p → ∞) and that of full-matrix AdaGrad. Vectors and scalars get
    diagonal AdaGrad.

    Args:
        epsilon: the ridge of each root, relative to the factor's largest eigenvalue. CASPR is more
            sensitive to it than Shampoo, see :class:`funcprecond.solver.KroneckerSum`.
        decay: "sum", or the weight of the old value in a bias-corrected moving average.
        p: the order of the mean; None means the number of axes. With 1 the one-sided
            preconditioners are averaged; with ``math.inf`` they are multiplied, as in Shampoo.
        every, refresh_every, start, stagger: the intervals of the statistics and of the roots, as
            for :func:`funcprecond.shampoo`.
        merge, block, max_dim: how parameters are cut into blocks, as for
            :func:`funcprecond.shampoo`.
        dtype, method: the dtype and the algorithm of the roots, as for :func:`funcprecond.shampoo`.
        state_dtype, packed: how the state is stored, as for :func:`funcprecond.shampoo`.

    Returns:
        A method that needs the gradient only. Its state and its refresh are those of Shampoo. A
        step takes 2 k matrix products in the factors' eigenbases; Shampoo takes k.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.caspr(), {"w": torch.diag(torch.tensor([4.0, 9.0]))}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])
    """
    blocking = Blocking(merge, block, max_dim)
    whole = compose(
        BatchGradient(),
        KroneckerDim,
        KroneckerSum(epsilon, p, dtype, method),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        stagger=stagger,
        initial=lambda params: KroneckerDim.init(params, blocking),
    )
    symmetric = ("representation.average.total.factors", "factor.roots")
    return stored(whole, state_dtype, symmetric if packed else ())
