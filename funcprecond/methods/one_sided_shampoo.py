"""One-sided Shampoo and ASGO: one factor, for the shorter axis of a parameter, and its square root."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.composition import compose
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.linalg.blocking import Blocking
from funcprecond.linalg.inverse_roots import Ridge
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.transform import Transform

__all__ = ["one_sided_shampoo"]


@card(
    "One-sided Shampoo (Xie 2025)",
    curvature="(F̂_emp^batch)^½",
    representation="layer, one KF-dim factor",
    solver="G direct, eigendecomposition",
    learning_rate=0.3,
)
def one_sided_shampoo(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    momentum: float | Tensor | None = None,
    side: Literal["shortest", "first", "last"] = "shortest",
    ridge: Ridge = "inner",
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Transform:
    """One-sided Shampoo (Xie et al., ICML 2025, arXiv 2503.10537).

    With ASGO (An et al., arXiv 2503.20762) by its options. For a matrix with the shorter axis
    first, of n entries::

        L <- L + G Gᵀ
        d  = (L + ε λ_max I)^(-1/2) G            one-sided Shampoo, ridge="inner"
        d  = (L^½ + ε λ_max^½ I)^(-1) G          ASGO, ridge="outer"

    The exponent is 1/2, not Shampoo's 1/4, because a single axis carries the whole root. A tensor
    of other order is the matrix of that axis by all the others. Vectors and scalars get diagonal
    AdaGrad.

    Args:
        epsilon: the ridge ε, relative to L's largest eigenvalue, or its root's.
        decay: "sum", or the weight of the old value of a bias-corrected moving average.
        momentum: the weight of the old value of a running mean that takes the gradient's place
            under the root (practical ASGO), or None.
        side: which axis has the factor; of a linear layer's weight the first is the output's.
        ridge: where it is added, before the root ("inner") or after it ("outer").
        every, refresh_every, start: the intervals, as for :func:`funcprecond.shampoo`.
        dtype: what the decompositions run in, see :mod:`funcprecond.linalg.inverse_roots`.

    Returns:
        A method that needs the gradient only. It keeps 2 n² numbers for a parameter; each step
        takes a product, each refresh an eigendecomposition.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt, grads = fp.one_sided_shampoo(), {"w": torch.tensor([[3.0, 0.0], [0.0, 5.0]])}
        >>> opt.update(opt.init(grads), grads)[1]["w"]
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])
    """
    one_of(("shortest", "first", "last"), side=side)
    one_of(("inner", "outer"), ridge=ridge)
    blocking = Blocking(side=side)
    return compose(
        BatchGradient(),
        KroneckerDim,
        InverseRoot(epsilon, dtype=dtype, ridge=ridge),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        momentum=momentum,
        initial=lambda params: KroneckerDim.init(params, blocking),
    )
