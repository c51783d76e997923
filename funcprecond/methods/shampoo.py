"""Shampoo: one factor for each dimension of a parameter, and a root of each."""

import torch
from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Method
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.transform import Transform
from funcprecond.transforms.stored import stored

__all__ = ["shampoo"]


@card(
    "Shampoo (Gupta 2018)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, KF-dim",
    solver="G direct, eigendecomposition",
    learning_rate=0.02,
    starred=True,
)
def shampoo(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    exponent: float | None = None,
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
    """Shampoo (Gupta, Koren & Singer, arXiv 1802.09568).

    For a parameter with k axes longer than 1, of n_i entries, and C_i(G) the (n_i, n_i) Gram matrix
    of the slices of the gradient along axis i::

        S_i <- S_i + C_i(G)
        d    = G ×_1 S_1^(-1/2k) ×_2 S_2^(-1/2k) … ×_k S_k^(-1/2k)

    which is ``L^(-1/4) G R^(-1/4)`` for a matrix. Every root has a ridge of epsilon times the
    factor's largest eigenvalue. Vectors and scalars get diagonal AdaGrad.

    Args:
        epsilon: the ridge, relative to each factor's largest eigenvalue.
        decay: "sum", or the weight of the old value of a bias-corrected moving average.
        exponent: of each factor, 1 / (2 k) by default; 1/2 for "Shampoo squared".
        every, refresh_every, start: the intervals of the statistics and of the roots, see
            :func:`funcprecond.compose`. With ``refresh_every`` above 1 give ``start`` a few steps:
            the first statistic has the rank of one gradient, and its root is a poor one to keep.
        stagger: refresh a few factors at each step instead of all at one, see
            :func:`funcprecond.compose`. A factor is decomposed in one step, so the longest axis
            sets the slowest one: ``block`` cuts it.
        merge, block, max_dim: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole.
        dtype, method: what roots are computed in and how, see
            :mod:`funcprecond.linalg.inverse_roots`.
        state_dtype, packed: what the state is kept in, and whether half of each symmetric matrix
            is, see :func:`funcprecond.transforms.stored.stored`.

    Returns:
        A method that needs the gradient only. It keeps 2 Σ n_i² numbers for a parameter; each step
        takes two products for each axis, each refresh an eigendecomposition.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.shampoo(), {"w": torch.diag(torch.tensor([4.0, 9.0]))}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])
    """
    blocking = Blocking(merge, block, max_dim)
    whole = compose(
        BatchGradient(),
        KroneckerDim,
        InverseRoot(epsilon, exponent, dtype, method),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        stagger=stagger,
        initial=lambda params: KroneckerDim.init(params, blocking),
    )
    symmetric = ("representation.average.total.factors", "factor.roots")
    return stored(whole, state_dtype, symmetric if packed else ())
