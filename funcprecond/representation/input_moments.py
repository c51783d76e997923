"""The second moments of the inputs of each layer."""

from typing import ClassVar

from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.representation.average import Decay
from funcprecond.representation.layer_averages import TwoSided
from funcprecond.tree import state

__all__ = ["InputMoments"]


@state
class InputMoments(TwoSided):
    """``A = mean a a^T`` over the rows of each layer's inputs, with 1 appended if there is a bias.

    The curvature of a layer is ``I ⊗ A``: A acts on the columns of ``[W | b]`` and is in ``right``,
    or in ``left`` where axis 0 of the weight is the axis of the inputs. It is (i + 1, i + 1);
    (J, i / J + 1, i / J + 1) for J groups; (V,), the frequencies, for an embedding of V tokens.
    With ``decay=None`` it is stored as X, (M, i + 1), with ``X^T X = A``, if a batch has M rows and
    M < i + 1. Other parameters, such as those of norm layers, have no statistic.

    Attributes:
        normalizers, names, shapes, left, right: see
            :class:`funcprecond.representation.layer_averages.TwoSided`.
    """

    accepts: ClassVar[type] = Layers

    def accumulate(self, value: Layers, decay: Decay) -> "InputMoments":
        """Include a measurement of the layers.

        Args:
            value: the layer statistics, of which the inputs are used.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one Gram matrix per layer.
        """
        value = value.restrict(self.names)
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for block, uses in value.uses.items():
            call = uses[0].call
            if isinstance(call, AffineCall):
                bias = split_block(block)[1] is not None
                moment = call.input_factor(uses, bias, value.sharing, thin=decay is None)
                (left if call.inputs_first else right)[block] = moment
        return self.include(decay, left=left, right=right)
