"""AdaGrad, diagonal and full-matrix: the inverse root of the sum of all outer products."""

import torch
from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.dense import Dense
from funcprecond.representation.diagonal import Diagonal
from funcprecond.solver.divide import Divide
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.transform import Transform

__all__ = ["adagrad", "adagrad_full"]


@card(
    "AdaGrad (Duchi 2011)",
    curvature="(F̂_emp^batch)^½",
    representation="element",
    solver="G direct, division",
    learning_rate=0.03,
)
def adagrad(*, damping: float | Tensor = 1e-10, decay: Decay = "sum") -> Transform:
    """Diagonal AdaGrad (Duchi, Hazan & Singer, JMLR 2011).

    All operations are element-wise::

        S <- S + g²
        d  = g / (sqrt(S) + damping)

    Args:
        damping: added to the root, as in ``torch.optim.Adagrad``.
        decay: "sum", or the weight of the old value in a bias-corrected moving average (RMSprop).

    Returns:
        A method that needs the gradient only. Its state is two copies of the parameters.

    Raises:
        ValueError: the decay is out of range.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.adagrad(), {"w": torch.tensor([3.0, -4.0])}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([ 1., -1.])
    """
    return compose(BatchGradient(), Diagonal, Divide(damping, power=0.5), decay=decay)


@card(
    "AdaGrad, full matrix (Duchi 2011)",
    curvature="(F̂_emp^batch)^½",
    representation="full, dense",
    solver="G direct, eigendecomposition",
    learning_rate=0.1,
)
def adagrad_full(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Transform:
    """Full-matrix AdaGrad (Duchi, Hazan & Singer, JMLR 2011), for tensors of up to 4096 entries.

    The gradient of each parameter is a vector g of n entries, and H is an (n, n) matrix::

        H <- H + g gᵀ
        d  = (H + epsilon λ_max(H) I)^(-1/2) g

    Shampoo and CASPR approximate this method.

    Args:
        epsilon: the ridge, relative to the largest eigenvalue of H.
        decay: "sum", or the weight of the old value in a bias-corrected moving average.
        every, refresh_every, start: the intervals of the statistics and of the roots, in steps, see
            :func:`funcprecond.compose`.
        dtype: the dtype of the decomposition, see :func:`funcprecond.linalg.inverse_root`.

    Returns:
        A method that needs the gradient only. Its state is two (n, n) matrices for each parameter.
        A step takes one matrix-vector product for each, a refresh an eigendecomposition.

    Raises:
        ValueError: an interval or the decay is out of range. ``init`` raises it for a parameter
            with more than 4096 entries.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.adagrad_full(), {"w": torch.tensor([3.0, -4.0])}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([ 0.6000, -0.8000])
    """
    return compose(
        BatchGradient(),
        Dense,
        InverseRoot(epsilon, dtype=dtype),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
    )
