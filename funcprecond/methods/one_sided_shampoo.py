"""One-sided Shampoo and ASGO: one factor, of the shorter axis of a parameter."""

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
    refresh_every: int = 10,
    start: int = 25,
    dtype: torch.dtype | None = None,
) -> Transform:
    """One-sided Shampoo (Xie et al., ICML 2025, arXiv 2503.10537).

    Only one axis of a parameter has a factor. ASGO (An et al., arXiv 2503.20762) is the same method
    with other options. For a matrix whose first axis is the shorter one, with n entries::

        L <- L + G Gᵀ
        d  = (L + ε λ_max I)^(-1/2) G            one-sided Shampoo, ridge="inner"
        d  = (L^½ + ε λ_max^½ I)^(-1) G          ASGO, ridge="outer"

    The exponent is 1/2, where Shampoo's is 1/4, because a single factor takes the whole root. A
    tensor of higher order is treated as a matrix of that axis by all others. Vectors and scalars
    get diagonal AdaGrad.

    Args:
        epsilon: ε, relative to the largest eigenvalue of L, or of its root.
        decay: "sum", or the weight of the old value in a bias-corrected moving average.
        momentum: the weight of the old value in a running mean of the gradient, which is then
            preconditioned in place of the gradient (practical ASGO); None means no momentum.
        side: the axis that has the factor. The first axis of a linear layer's weight is the
            outputs'.
        ridge: whether the ridge is added before the root ("inner") or after it ("outer").
        every, refresh_every, start: the intervals of the statistics and of the roots, as for
            :func:`funcprecond.shampoo`.
        dtype: the dtype of the decompositions, see :func:`funcprecond.linalg.inverse_root`.

    Returns:
        A method that needs the gradient only. Its state is 2 n² numbers for each parameter. A step
        takes one matrix product, a refresh an eigendecomposition.

    Raises:
        ValueError: an option has a value that is not allowed.

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
