"""Eigenbases of Shampoo's factors, followed over the steps, for methods that work in them."""

import dataclasses
import sys
from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of
from funcprecond.evidence import Evidence, is_due
from funcprecond.linalg.axes import axes_below, grams
from funcprecond.linalg.eigenbases import Bases, decomposed, followed, identities
from funcprecond.linalg.precision import factor_dtype
from funcprecond.need import Every, Need
from funcprecond.representation.average import accumulate
from funcprecond.tree import Params

__all__ = ["FollowedEigenbases"]


@dataclasses.dataclass(frozen=True)
class FollowedEigenbases:
    """One orthogonal basis for each axis of a parameter, kept near the eigenvectors of a statistic.

    A statistic changes slowly, so that one step of orthogonal iteration, ``qr(S Q)``, follows it
    for a fraction of the cost of a decomposition.

    Attributes:
        every, refresh_every, start: the intervals of the statistics and of the bases, see
            :func:`funcprecond.compose`.
        refresh: "qr" follows the bases, "eigh" decomposes at each refresh. In both cases a
            decomposition computes the first bases, all bases before ``start``, and the bases in an
            ``update`` without evidence.
        epsilon, sort: see :func:`funcprecond.linalg.eigenbases.orthogonal_step`.
        max_dim: an axis longer than this has no basis; 0 means no limit.

    Raises:
        ValueError: an option has a value that is not allowed.
    """

    every: int = 1
    refresh_every: int = 10
    start: int = 0
    refresh: Literal["qr", "eigh"] = "qr"
    epsilon: float | Tensor = 1e-6
    sort: bool = True
    max_dim: int = 0

    def __post_init__(self):
        one_of(("qr", "eigh"), refresh=self.refresh)
        at_least(0, max_dim=self.max_dim)
        self._marks  # noqa: B018 - they check the intervals

    @property
    def _marks(self) -> tuple[Every, Every, Every]:
        """The marks of a measurement, of a refresh, and of a decomposition."""
        decompose_every = self.refresh_every if self.refresh == "eigh" else sys.maxsize
        return (
            Every("measure", self.every, self.start),
            Every("refresh", self.refresh_every, self.start),
            Every("decompose", decompose_every, self.start),
        )

    def needs(self, t: int) -> tuple[Need, ...]:
        """The marks of step ``t``, a Python integer that counts from 0."""
        return tuple(need for mark in self._marks for need in mark.marks(t))

    def axes(self, shape: torch.Size) -> tuple[int, ...]:
        """The axes of a parameter of this shape that have a basis."""
        return axes_below(shape, self.max_dim)

    def identities(self, params: Params) -> Bases:
        """An identity matrix for each axis with a basis, for each parameter."""
        return {k: identities(p, self.axes(p.shape), factor_dtype(p)) for k, p in params.items()}

    def are_measured(self, evidence: Evidence | None) -> bool:
        """Whether the statistics are due."""
        return is_due(self._marks[0], evidence)

    def statistics(
        self, old: tuple[Tensor, ...], g: Tensor, decay: float | Tensor, evidence: Evidence | None
    ) -> tuple[Tensor, ...]:
        """``S_i <- decay S_i + (1 - decay) C_i(g)`` for one parameter, if the statistics are due.

        Args:
            old: the statistics S_i, one per axis with a basis.
            g: the gradient of the parameter.
            decay: the weight of the old statistics.
            evidence: the evidence of this step, if there is any.

        Returns:
            The new statistics, or ``old``.
        """
        if not self.are_measured(evidence):
            return old
        found = zip(old, grams(g, self.axes(g.shape)), strict=True)
        return tuple(accumulate(s, c, decay) for s, c in found)

    def refreshed(
        self, statistics: Bases, bases: Bases, evidence: Evidence | None
    ) -> tuple[Bases, Literal["kept", "followed", "decomposed"]]:
        """The bases after this step, and how they were computed.

        Each column of a followed basis has the place of the old column that it comes from. The
        columns of a decomposition do not correspond to old ones.

        Args:
            statistics: for each parameter the statistics, one per axis with a basis.
            bases: the old bases.
            evidence: the evidence of this step, if there is any.

        Returns:
            The bases, and "kept", "followed" or "decomposed".
        """
        _, refresh, decompose = self._marks
        if is_due(decompose, evidence):
            return decomposed(statistics, bases), "decomposed"
        if is_due(refresh, evidence):
            return followed(statistics, bases, self.epsilon, sort=self.sort), "followed"
        return bases, "kept"
