"""The kinds of layers. A new kind is a new file in this folder, and a line in the table below."""

from collections.abc import Callable
from typing import Any

from funcprecond.layers.kinds.added import Added
from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.kinds.bilinear import Bilinear
from funcprecond.layers.kinds.contraction import Contraction
from funcprecond.layers.kinds.convolution import Convolution
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.expert import Expert
from funcprecond.layers.kinds.linear import Linear
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.kinds.transposed_convolution import TransposedConvolution
from funcprecond.layers.layer_call import LayerCall

__all__ = ["KINDS", "KINDS_OF_FUNCTION"]

KINDS: tuple[type[LayerCall], ...] = (
    Linear,
    Contraction,
    Expert,
    Bilinear,
    Convolution,
    TransposedConvolution,
    Embedding,
    Scale,
    Added,
    Bias,
)
KINDS_OF_FUNCTION: dict[Callable[..., Any], type[LayerCall]] = {
    function: kind for kind in KINDS for function in kind.functions
}
