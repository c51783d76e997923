"""K-FAC's factors with their eigenbases, and the exact second moments along the bases' axes."""

import torch
from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.linalg.eigh import eigenbases
from funcprecond.representation.average import Decay, accumulate, normalizer_after, present
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.tree import Params, state

__all__ = ["EigenbasisMoments"]


@state
class EigenbasisMoments:
    """``(U_B ⊗ U_A) diag(s) (U_B ⊗ U_A)^T`` for each layer, the best diagonal in that basis.

    All but ``factors`` is by block, and empty until the first measurement.

    Attributes:
        factors: K-FAC's.
        left, right: the eigenvectors; an embedding has no left ones.
        moments: (o, i + 1), totals of s; divided by ``normalizer`` the second moments.
        normalizer: 0-d, restarts when the bases are refreshed.
    """

    factors: KroneckerIO
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    moments: dict[str, Tensor]
    normalizer: Tensor

    @classmethod
    def init(cls, params: Params) -> "EigenbasisMoments":
        """Empty."""
        factors = KroneckerIO.init(params)
        return cls(factors, {}, {}, {}, factors.normalizer.clone())

    def accumulate(self, value: Layers, decay: Decay, *, refresh: bool) -> "EigenbasisMoments":
        """Take in a measurement that tells the examples apart.

        Args:
            value: the measurement.
            decay: how it is carried, see :mod:`funcprecond.representation.average`.
            refresh: find new bases, in which the moments start anew.
        """
        value = value.restrict(self.factors.names)
        factors = self.factors.accumulate(value, decay)
        left, right, moments, old = self.left, self.right, self.moments, self.normalizer
        if refresh:
            _, left = eigenbases(factors.left)
            _, right = eigenbases(factors.right)
            moments, old = {}, torch.zeros_like(old)
        now = present(old, decay)
        new = {}
        for block, uses in value.uses.items():
            if block in right:
                bias = split_block(block)[1] is not None
                call, basis = uses[0].call, (left.get(block), right[block])
                s = call.second_moments(uses, bias, *basis) * value.scale
                new[block] = accumulate(moments.get(block), s, now)
        return EigenbasisMoments(factors, left, right, new, normalizer_after(old, now))
