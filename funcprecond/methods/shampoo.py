"""Shampoo: one factor for each dimension of a parameter, and a root of each.

Row: (F̂_emp^batch)^½, layer, KF-dim, eigendecomposition. Gupta, Koren & Singer, arXiv 1802.09568.
For a parameter with k axes longer than 1, with C_i(G) the Gram matrix of the slices along axis i::

    S_i <- S_i + C_i(G)
    d    = G ×_1 S_1^(-1/2k) ×_2 S_2^(-1/2k) … ×_k S_k^(-1/2k)

for a matrix ``L^(-1/4) G R^(-1/4)``. Vectors and scalars get diagonal AdaGrad. Needs the gradient
only; 2 Σ n_i² numbers a parameter; each step two products an axis, each refresh an
eigendecomposition an axis.
"""

import torch
from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Method
from funcprecond.methods.table import Card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.transform import Transform
from funcprecond.transforms.stored import stored

__all__ = ["shampoo"]


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
    """Shampoo's direction.

    Args:
        epsilon: the ridge, relative to each factor's largest eigenvalue.
        decay: "sum", or the weight of the old value of a bias-corrected moving average.
        exponent: of each factor, 1 / (2 k) by default; 1/2 for "Shampoo squared".
        every, refresh_every, start: the intervals, see :func:`funcprecond.composition`. With
            ``refresh_every`` above 1 give ``start`` a few steps: the first statistic has the rank
            of one gradient, and its root is a poor one to keep.
        stagger: refresh a few factors at each step instead of all at one, see
            :func:`funcprecond.composition`. A factor is decomposed in one step, so the longest axis
            sets the slowest one: ``block`` cuts it.
        merge, block, max_dim: how parameters are cut into blocks, see
            :class:`funcprecond.linalg.blocking.Blocking`; by default they are whole.
        dtype, method: what roots are computed in and how, see :mod:`funcprecond.linalg.inverse_roots`.
        state_dtype, packed: in what the state is kept, and whether of symmetric matrices by half,
            see :func:`funcprecond.transforms.stored.stored`.
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
    symmetric = ("representation.totals", "factor.roots")
    return stored(whole, state_dtype, symmetric if packed else ())


CARDS = (
    Card(
        "shampoo",
        "Shampoo (Gupta 2018)",
        "(F̂_emp^batch)^½",
        "layer, KF-dim",
        "G direct, eigendecomposition",
        shampoo,
        learning_rate=0.02,
        intervals=True,
        starred=True,
    ),
)
