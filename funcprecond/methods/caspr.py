"""CASPR: axis preconditioners combined by a Kronecker sum instead of a Kronecker product."""

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
    refresh_every: int = 1,
    start: int = 0,
    stagger: bool = False,
    merge: int = 0,
    block: int = 0,
    max_dim: int = 0,
    dtype: torch.dtype | None = None,
    method: Method = "auto",
    state_dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Transform:
    """CASPR (Duvvuri, Devvrit, Anil, Hsieh & Dhillon, ICLR 2024).

    With Shampoo's factors S_i of a parameter with k axes, each root acting along its own axis::

        S_i <- S_i + C_i(G)
        X    = ( (1/k) Σ_i S_i^(-1/2p) )^p,    p = k
        d    = X G

    For a matrix this is ``U = (L^(-1/4) G + G R^(-1/4)) / 2``, then the same of ``U``: the square of
    ``(L^(-1/4) ⊗ I + I ⊗ R^(-1/4)) / 2``. X lies between Shampoo's preconditioner (p → ∞) and the
    one of full-matrix AdaGrad. Vectors and scalars get diagonal AdaGrad.

    Args:
        epsilon: the ridge, relative to each factor's largest eigenvalue. CASPR is more sensitive to
            it than Shampoo, see :class:`funcprecond.solver.kronecker_sum.KroneckerSum`.
        decay: "sum", or the weight of the old value of a bias-corrected moving average.
        p: the order of the mean, the number of axes by default; 1 averages the one-sided
            preconditioners, and ``math.inf`` multiplies them, which is Shampoo.
        every, refresh_every, start: the intervals, as for :func:`funcprecond.shampoo`.
        stagger: refresh a few factors at each step instead of all at one, as for
            :func:`funcprecond.shampoo`.
        merge, block, max_dim: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole.
        dtype, method: what roots are computed in and how, see
            :mod:`funcprecond.linalg.inverse_roots`.
        state_dtype, packed: what the state is kept in, and whether half of each symmetric matrix
            is, see :func:`funcprecond.transforms.stored.stored`.

    Returns:
        A method that needs the gradient only. Its memory and refresh are Shampoo's; each step takes
        2 k products in the factors' eigenbases, where Shampoo takes k.

    Raises:
        ValueError: an option has a value that it cannot have.

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
