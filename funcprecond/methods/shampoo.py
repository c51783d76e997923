"""Shampoo: one Kronecker factor for each axis of a parameter, and an inverse root of each."""

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
    """Shampoo (Gupta, Koren & Singer, arXiv 1802.09568).

    A parameter has k axes that are longer than 1, with n_i entries each. C_i(G) is the (n_i, n_i)
    Gram matrix of the slices of the gradient G along axis i::

        S_i <- S_i + C_i(G)
        d    = G ×_1 S_1^(-1/2k) ×_2 S_2^(-1/2k) … ×_k S_k^(-1/2k)

    For a matrix this is ``L^(-1/4) G R^(-1/4)`` with ``L = Σ G Gᵀ`` and ``R = Σ Gᵀ G``. Before a
    root is taken, a ridge of epsilon times the largest eigenvalue is added to the factor. Vectors
    and scalars get diagonal AdaGrad.

    Args:
        epsilon: the ridge of each root, relative to the factor's largest eigenvalue.
        decay: "sum", or the weight of the old value in a bias-corrected moving average.
        exponent: the power of each inverse factor; None means 1 / (2 k), and 1/2 is known as
            "Shampoo squared".
        every, refresh_every, start: the intervals of the statistics and of the roots, in steps, see
            :func:`funcprecond.compose`. New roots at each step, as in the paper, cost tens of
            gradients on small batches, and statistics change little within 10 steps. The first
            statistics have the rank of one gradient and their roots are poor, so that the roots
            are new at each step before ``start``.
        stagger: refresh a few factors at each step instead of all of them at one step, see
            :func:`funcprecond.compose`. One factor is always decomposed in one step, so ``block``
            limits how long the slowest step takes.
        merge, block, max_dim: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`. By default they are not cut, and an axis
            that is longer than ``max_dim``, such as that of a vocabulary, has no factor.
        dtype, method: the dtype and the algorithm of the roots, see
            :func:`funcprecond.linalg.inverse_root`.
        state_dtype, packed: the dtype in which the state is stored, and whether only one half of
            each symmetric matrix is stored, see :func:`funcprecond.transforms.stored.stored`.

    Returns:
        A method that needs the gradient only. Its state is 2 Σ n_i² numbers for each parameter. A
        step takes two matrix products for each axis, a refresh an eigendecomposition.

    Raises:
        ValueError: an option has a value that is not allowed.

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
