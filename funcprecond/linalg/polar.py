r"""The polar factor of a matrix by odd polynomials: products only, no decomposition.

With :math:`M = U \Sigma V^T` the polar factor is :math:`U V^T`. A step :math:`X \leftarrow a X + (b
A + c A^2) X`, :math:`A = X X^T`, leaves U and V alone and maps each singular value by the scalar
polynomial :math:`a s + b s^3 + c s^5`; so a sequence of triples is good if its composition takes
(0, 1] close to 1. A step costs ``4 r^2 c + 2 r^3`` operations for a short side r and a long side c.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Polynomial", "polar", "triples"]

Polynomial = Literal["jordan", "cubic", "quintic", "polar_express", "svd"]
Triple = tuple[float, float, float]

# One triple for all steps. Jordan's does not converge: it takes s >= 0.01 into [0.68, 1.14] in five
# steps, and small s faster than any that does. The other two converge, slowly from small s.
_CONSTANT: dict[str, Triple] = {
    "jordan": (3.4445, -4.7750, 2.0315),
    "cubic": (3 / 2, -1 / 2, 0.0),
    "quintic": (15 / 8, -10 / 8, 3 / 8),
}

# Each step the best one for where the last has left [1e-3, 1]. Amsel et al., arXiv 2505.16932.
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
# Rounding may carry a singular value above 1, where those polynomials grow.
_SAFETY = 1.01


def triples(polynomial: Polynomial, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each step.

    Raises:
        ValueError: there is no such polynomial.
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
        known = [*_CONSTANT, "polar_express", "svd"]
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
    """The polar factor of each matrix of a stack, zero where a matrix is zero.

    Args:
        matrices: (..., m, n).
        polynomial: see :func:`triples`; "svd" is exact.
        steps: how many.
        epsilon: a matrix with a Frobenius norm below it is taken as small, not scaled up to 1.
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
    # A null direction has no sign to keep: its part of U V^T would be an accident of rounding.
    rounding = max(matrices.shape[-2:]) * torch.finfo(s.dtype).eps
    kept = (s > rounding * s[..., :1]).to(s.dtype)
    return (u * kept.unsqueeze(-2)) @ vt


def _fused(x: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta x + alpha a b`` in one pass over memory where torch has one."""
    if x.ndim == 2:
        return torch.addmm(x, a, b, beta=beta, alpha=alpha)
    if x.ndim == 3:
        return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)
    return beta * x + alpha * (a @ b)
