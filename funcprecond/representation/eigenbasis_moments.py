"""K-FAC's factors, their eigenbases, and the exact second moments in these bases."""

import dataclasses

import torch
from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.linalg.eigh import eigenbases
from funcprecond.representation.average import (
    Decay,
    Present,
    accumulate,
    divisor,
    normalizer_after,
    present,
    separated,
)
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.tree import Params, state

__all__ = ["EigenbasisMoments"]


@state
class EigenbasisMoments:
    """``(U_B ⊗ U_A) diag(s) (U_B ⊗ U_A)^T`` for each layer, with the best diagonal in that basis.

    This is the representation of EKFAC (George et al., arXiv 1806.03884). The dicts have one entry
    per block, and are empty until the first measurement.

    Attributes:
        factors: K-FAC's factors.
        left, right: the eigenvectors U_B and U_A; an embedding has no left ones, because its left
            factor is diagonal.
        moments: (o, i + 1), the totals of s; divided by ``normalizer`` they are the second moments.
        normalizer: 0-d; it starts again at 0 when the bases are refreshed.
        normalizers: the normalizers of the blocks that some measurements left out. Such a block
            keeps its moments, and a refresh turns them into the new basis.
    """

    factors: KroneckerIO
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    moments: dict[str, Tensor]
    normalizer: Tensor
    normalizers: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def init(cls, params: Params) -> "EigenbasisMoments":
        """Empty dicts, because the layers are found by the first measurement.

        Args:
            params: the parameters.

        Returns:
            The representation.
        """
        factors = KroneckerIO.init(params)
        return cls(factors, {}, {}, {}, factors.normalizer.clone())

    def accumulate(self, value: Layers, decay: Decay, *, refresh: bool) -> "EigenbasisMoments":
        """Include a measurement whose rows belong to single examples.

        Args:
            value: the measurement.
            decay: see :mod:`funcprecond.representation.average`.
            refresh: whether to compute new bases, for which the moments start anew.

        Returns:
            The new representation.
        """
        value = value.restrict(self.factors.names)
        factors = self.factors.accumulate(value, decay)
        found = [k for k in value.uses if k in factors.right]
        # A block of which only the diagonal is kept has no basis any more.
        moments = {k: s for k, s in self.moments.items() if k in factors.right}
        own = {k: w for k, w in self.normalizers.items() if k in factors.right}
        own, shared = separated(self.normalizer, own, moments, found), self.normalizer
        due = [k for k in found if k not in self.right]
        if refresh:
            due = [*dict.fromkeys((*moments, *found))]
        left = {k: x for k, x in self.left.items() if k in factors.right}
        right = {k: x for k, x in self.right.items() if k in factors.right}
        if due:
            left = left | eigenbases({k: factors.left[k] for k in due})[1]
            right = right | eigenbases({k: factors.right[k] for k in due})[1]
        if refresh:
            # A block without a measurement keeps its matrix, of which this is the new diagonal.
            moments = {
                k: _turned(s, (self.left.get(k), left.get(k)), (self.right[k], right[k]))
                for k, s in moments.items()
                if k not in found
            }
            shared = torch.zeros_like(shared)
            own = {k: torch.zeros_like(w) if k in found else w for k, w in own.items()}
        decays: dict[str, Present] = {k: present(own.get(k, shared), decay) for k in found}
        for block in found:
            uses = value.uses[block]
            bias = split_block(block)[1] is not None
            s = uses[0].call.second_moments(uses, bias, left.get(block), right[block])
            moments[block] = accumulate(moments.get(block), s * value.scale, decays[block])
        own = {k: normalizer_after(w, decays[k]) if k in found else w for k, w in own.items()}
        if any(k not in own for k in found):
            shared = normalizer_after(shared, present(shared, decay))
        return EigenbasisMoments(factors, left, right, moments, shared, own)

    def grown(self, new: "EigenbasisMoments") -> "EigenbasisMoments":
        """The same state with the blocks of a later one, of which the new ones are empty."""

        def with_zeros(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: before[k] if k in before else torch.zeros_like(x) for k, x in after.items()}

        starts = {k: self.normalizer if k in self.moments else 0.0 for k in new.normalizers}
        return EigenbasisMoments(
            self.factors.grown(new.factors),
            with_zeros(self.left, new.left),
            with_zeros(self.right, new.right),
            with_zeros(self.moments, new.moments),
            self.normalizer,
            {
                k: self.normalizers[k] if k in self.normalizers else torch.zeros_like(w) + starts[k]
                for k, w in new.normalizers.items()
            },
        )

    def second_moments(self) -> dict[str, Tensor]:
        """The average of s for each block."""
        shared = divisor(self.normalizer)
        own = {k: divisor(w) for k, w in self.normalizers.items()}
        return {k: s / own.get(k, shared) for k, s in self.moments.items()}


def _turned(
    moments: Tensor,
    left: tuple[Tensor | None, Tensor | None],
    right: tuple[Tensor, Tensor],
) -> Tensor:
    """The diagonal, in new bases, of the matrix with these moments on its diagonal in old bases."""
    (old_left, new_left), (old_right, new_right) = left, right
    if old_left is not None and new_left is not None:
        moments = (new_left.mT @ old_left).square() @ moments
    return moments @ (old_right.mT @ new_right).square()
