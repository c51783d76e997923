r"""BFGS: an inverse Hessian H from steps ``s`` and the changes ``y`` of the gradient along them.

.. math:: H \leftarrow (I - \rho s y^T) H (I - \rho y s^T) + \rho s s^T, \quad \rho = 1 / s^T y

H is a dense matrix (:func:`bfgs_update`), or it is given by the last m pairs and never formed
(:class:`History`, Nocedal's two-loop recursion). :math:`H y = s` holds for the newest pair, and H
stays positive definite as long as every pair has :math:`s^T y > 0`.
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg.precision import wide, wide_dtype
from funcprecond.tree import state

__all__ = ["History", "bfgs_update", "powell", "two_loop"]


@state
class History:
    """The last m pairs, oldest first. Empty rows are zero and contribute nothing to any sum.

    Attributes:
        steps: (m, P), one ``s`` per row.
        changes: (m, P), one ``y`` per row.
        rho: (m,), ``1 / s.y`` of each pair, :func:`wide`; 0 for an empty row.
        gamma: 0-d, :func:`wide`, ``s.y / y.y`` of the newest pair, 1 without one. H is ``gamma I``
            before the pairs are applied.
    """

    steps: Tensor
    changes: Tensor
    rho: Tensor
    gamma: Tensor

    @classmethod
    def init(cls, size: int, like: Tensor) -> "History":
        """The history with ``size`` empty rows for vectors shaped like ``like``, (P,)."""
        return cls(
            like.new_zeros((size, like.numel())),
            like.new_zeros((size, like.numel())),
            like.new_zeros((size,), dtype=wide_dtype(like)),
            like.new_ones((), dtype=wide_dtype(like)),
        )

    def push(
        self,
        s: Tensor,
        y: Tensor,
        *,
        min_curvature: float | Tensor = 1e-4,
        curvature_fix: Literal["none", "powell"] = "none",
    ) -> "History":
        """The history with one more pair, or the same history if the pair is not suitable.

        A pair is suitable if it is finite and has ``s.y >= min_curvature |s|^2`` and ``s.y > 0``,
        which bounds ``gamma`` by ``1 / min_curvature``. The new pair replaces the oldest one.

        Args:
            s, y: (P,), the pair.
            min_curvature: the least curvature along ``s``.
            curvature_fix: "powell" replaces ``y`` by :func:`powell` first, with the estimate
                ``I / gamma`` of the Hessian; "none" does not.
        """
        if curvature_fix == "powell":
            y = powell(s, y, s / self.gamma.to(s.dtype))
        wide_s, wide_y = wide(s), wide(y)
        sy, yy = wide_s.dot(wide_y), wide_y.dot(wide_y)
        fit = (sy > 0) & (sy >= min_curvature * wide_s.dot(wide_s)) & torch.isfinite(yy)
        safe = torch.where(fit, sy, 1.0)
        return History(
            _push(fit, self.steps, s),
            _push(fit, self.changes, y),
            _push(fit, self.rho, 1 / safe),
            torch.where(fit, sy / torch.where(fit, yy, 1.0), self.gamma),
        )

    def filled(self) -> Tensor:
        """The number of pairs, a 0-d integer tensor."""
        return (self.rho != 0).sum()

    def apply(self, vector: Tensor) -> Tensor:
        """``H v`` for a vector (P,), in 4 m P multiplications."""
        return two_loop(self.steps, self.changes, self.rho, self.gamma, vector)


def two_loop(steps: Tensor, changes: Tensor, rho: Tensor, gamma: Tensor, vector: Tensor) -> Tensor:
    """The product of a vector with the inverse Hessian that m pairs make of ``gamma I``.

    Args:
        steps, changes: (m, P), oldest first.
        rho: (m,), ``1 / s.y`` of each pair, or 0 for a row that is not used.
        gamma: 0-d.
        vector: (P,).

    Returns:
        (P,).
    """
    rho, gamma = rho.to(vector.dtype), gamma.to(vector.dtype)
    q, alphas = vector, []
    for i in reversed(range(len(steps))):
        alpha = rho[i] * steps[i].dot(q)
        q = q - alpha * changes[i]
        alphas.append(alpha)
    r = gamma * q
    for i, alpha in enumerate(reversed(alphas)):
        beta = rho[i] * changes[i].dot(r)
        r = r + (alpha - beta) * steps[i]
    return r


def bfgs_update(inverse: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The inverse Hessian, (P, P), updated by a pair ``s``, ``y``, (P,), with nonzero ``s.y``."""
    rho = 1 / s.dot(y)
    left = torch.eye(len(s), dtype=s.dtype, device=s.device) - rho * torch.outer(s, y)
    return left @ inverse @ left.mT + rho * torch.outer(s, s)


def powell(s: Tensor, y: Tensor, bs: Tensor, *, threshold: float = 0.2) -> Tensor:
    """Powell's damped ``y``, which satisfies ``s.y >= threshold s.Bs``.

    Where ``s.y`` is smaller, the result is ``θ y + (1 - θ) B s`` with the θ for which equality
    holds (Nocedal & Wright, procedure 18.2).

    Args:
        s, y: (P,), the pair.
        bs: (P,), the product of the current estimate B of the Hessian with ``s``.
        threshold: a number in (0, 1).

    Returns:
        (P,).
    """
    sy, sbs = s.dot(y), s.dot(bs)
    low = sy < threshold * sbs
    theta = torch.where(low, (1 - threshold) * sbs / torch.where(low, sbs - sy, 1), 1)
    return theta * y + (1 - theta) * bs


def _push(fit: Tensor, window: Tensor, new: Tensor) -> Tensor:
    return torch.where(fit, torch.cat([window[1:], new.unsqueeze(0)]), window)
