r"""The polar factor of a matrix by odd polynomials, with matrix products and no decomposition.

The polar factor of :math:`M = U \Sigma V^T` is :math:`U V^T`. A step
:math:`X \leftarrow a X + (b A + c A^2) X` with :math:`A = X X^T` leaves U and V unchanged and maps
each singular value s to :math:`a s + b s^3 + c s^5`. A sequence of triples (a, b, c) is therefore
good if the composition of its polynomials maps (0, 1] close to 1. For a matrix whose sides have the
lengths r <= n, a step costs ``4 r^2 n + 2 r^3`` operations.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Polynomial", "polar", "triples"]

Polynomial = Literal["jordan", "cubic", "quintic", "polar_express", "svd"]
Triple = tuple[float, float, float]

# Each of these repeats one triple. Jordan's iteration does not converge: five steps map s >= 0.01
# into [0.68, 1.14]. The other two converge, but they raise small s more slowly.
_CONSTANT: dict[str, Triple] = {
    "jordan": (3.4445, -4.7750, 2.0315),
    "cubic": (3 / 2, -1 / 2, 0.0),
    "quintic": (15 / 8, -10 / 8, 3 / 8),
}

# Each triple is optimal for the interval to which the previous steps have mapped [1e-3, 1]
# (Amsel et al., arXiv 2505.16932).
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# This margin keeps rounding from raising a singular value above 1, where those polynomials grow.
_SAFETY = 1.01


def triples(polynomial: Polynomial, steps: int) -> tuple[Triple, ...]:
    """The coefficients (a, b, c) of each step.

    Args:
        polynomial: "jordan", "cubic" or "quintic", which repeat one triple, or "polar_express",
            which has a triple for each step.
        steps: the number of steps.

    Returns:
        A tuple of ``steps`` triples.

    Raises:
        ValueError: ``polynomial`` is none of these names.
    """
    if polynomial == "polar_express":
        last = len(_POLAR_EXPRESS) - 1
        found = []
        for i in range(steps):
            a, b, c = _POLAR_EXPRESS[min(i, last)]
            s = _SAFETY if i < last else 1.0
            found.append((a / s, b / s**3, c / s**5))
        return tuple(found)
    if polynomial not in _CONSTANT:
        known = [*_CONSTANT, "polar_express"]
        msg = f"polynomial must be one of {known}, not {polynomial!r}"
        raise ValueError(msg)
    return (_CONSTANT[polynomial],) * steps


def polar(
    matrices: Tensor,
    polynomial: Polynomial = "jordan",
    steps: int = 5,
    *,
    epsilon: float | Tensor = 1e-7,
) -> Tensor:
    """The polar factor of each matrix of a stack, and zero for a matrix of zeros.

    Args:
        matrices: (..., m, n).
        polynomial: the iteration, see :func:`triples`; "svd" computes the exact factor by a
            decomposition.
        steps: the number of steps of the iteration.
        epsilon: a matrix whose Frobenius norm is smaller than this is not scaled up to norm 1
            before the iteration.

    Returns:
        (..., m, n).
    """
    if polynomial == "svd":
        return _exact(matrices)
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    if polynomial == "polar_express":
        x = x / (_SAFETY * norm + epsilon)
    else:
        x = x / norm.clamp_min(epsilon)
    for a, b, c in triples(polynomial, steps):
        gram = x @ x.mT
        inner = b * gram if c == 0 else _fused(gram, gram, gram, b, c)
        x = _fused(x, inner, x, a, 1.0)
    return x.mT if tall else x


def _exact(matrices: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    # The part of U V^T in the null space is omitted, because rounding alone would determine it.
    rounding = max(matrices.shape[-2:]) * torch.finfo(s.dtype).eps
    kept = (s > rounding * s[..., :1]).to(s.dtype)
    return (u * kept.unsqueeze(-2)) @ vt


def _fused(x: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta x + alpha a b``, in one pass over memory where torch has such an operation."""
    if x.ndim == 2:
        return torch.addmm(x, a, b, beta=beta, alpha=alpha)
    if x.ndim == 3:
        return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)
    return beta * x + alpha * (a @ b)
