"""K-FAC's factors, their eigenbases, and the exact second moments in these bases."""

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
    """``(U_B ⊗ U_A) diag(s) (U_B ⊗ U_A)^T`` for each layer, with the best diagonal in that basis.

    This is the representation of EKFAC (George et al., arXiv 1806.03884). The dicts have one entry
    per block, and are empty until the first measurement.

    Attributes:
        factors: K-FAC's factors.
        left, right: the eigenvectors U_B and U_A; an embedding has no left ones, because its left
            factor is diagonal.
        moments: (o, i + 1), the totals of s; divided by ``normalizer`` they are the second moments.
        normalizer: 0-d; it starts again at 0 when the bases are refreshed.
    """

    factors: KroneckerIO
    left: dict[str, Tensor]
    right: dict[str, Tensor]
    moments: dict[str, Tensor]
    normalizer: Tensor

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
