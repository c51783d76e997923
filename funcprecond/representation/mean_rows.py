"""The means of each layer's inputs and output gradients: curvature of rank one."""

import dataclasses
from typing import ClassVar, Self

from torch import Tensor

from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.representation.average import Decay
from funcprecond.representation.layer_averages import TwoSided
from funcprecond.tree import Params, state, static

__all__ = ["MeanRows"]


@state
class MeanRows(TwoSided):
    """The vectors ``ā = mean [a, 1]`` and ``ḡ = √(c N) mean_n Σ_t g_nt`` of each layer.

    The means are over N examples with positions t; c is the reduction constant of the loss, and g
    are the output gradients of its terms. The curvature of a layer is ``ḡ ḡ^T ⊗ ā ā^T``, or
    ``I ⊗ ā ā^T`` without output gradients. The vector of the rows of ``[W | b]`` is in ``left``,
    (o,), and that of its columns in ``right``, (i + 1,); with J groups (J, o / J) and
    (J, i / J + 1). Where axis 0 of the weight is the axis of the inputs, ā is in ``left``. Other
    parameters, such as those of norm layers, have no vectors.

    Attributes:
        normalizers, names, shapes, left, right: see
            :class:`funcprecond.representation.layer_averages.TwoSided`.
        outputs: whether there are vectors of output gradients.
    """

    outputs: bool = static(default=True)

    accepts: ClassVar[type] = Layers

    @classmethod
    def init(cls, params: Params, outputs: bool = True) -> Self:
        """Empty dicts.

        Args:
            params: the parameters.
            outputs: see the attribute.

        Returns:
            The representation.
        """
        return dataclasses.replace(super().init(params), outputs=outputs)

    def accumulate(self, value: Layers, decay: Decay) -> "MeanRows":
        """Include a measurement of the layers.

        Args:
            value: the layer statistics, with "reduce", for which the examples of all layers are
                known, and with the labels of the data: those of sampled labels have the mean zero.
            decay: see :mod:`funcprecond.representation.average`.

        Returns:
            The new representation. Costs one pass over the inputs and output gradients.
        """
        value = value.restrict(self.names)
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        for block, uses in value.uses.items():
            call = uses[0].call
            if not isinstance(call, AffineCall):
                continue
            inputs, others = (left, right) if call.inputs_first else (right, left)
            inputs[block] = call.input_mean(uses, split_block(block)[1] is not None)
            if self.outputs:
                count = call.positions(uses[0].inputs, "reduce")
                total = call.output_sum(uses)
                others[block] = total * (value.scale / count).sqrt().to(total.dtype)
        return self.include(decay, left=left, right=right)
