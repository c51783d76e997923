"""Stage 2: how the curvature matrix is stored.

Each file has one representation, which is an immutable tree of tensors. :class:`Representation` is
their protocol, with ``init(params)`` and ``accumulate(value, decay)``.
"""

from funcprecond.representation.average import Average, Decay, RisingDecay
from funcprecond.representation.dense import Dense
from funcprecond.representation.dense_blocks import DenseBlocks
from funcprecond.representation.diagonal import Diagonal
from funcprecond.representation.eigenbasis_moments import EigenbasisMoments
from funcprecond.representation.gradient_window import GradientWindow
from funcprecond.representation.gram import Gram
from funcprecond.representation.input_moments import InputMoments
from funcprecond.representation.inverse_roots import InverseRoots
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.representation.layer_averages import LayerAverages
from funcprecond.representation.layer_diagonal import LayerDiagonal
from funcprecond.representation.layer_gram import LayerGram
from funcprecond.representation.mean_rows import MeanRows
from funcprecond.representation.representation import Representation, WithDiagonal, WithMatrices
from funcprecond.representation.tensor_normal import TensorNormal
from funcprecond.representation.unit_blocks import UnitBlocks
from funcprecond.representation.unit_window import UnitWindow

__all__ = [
    "Average",
    "Decay",
    "Dense",
    "DenseBlocks",
    "Diagonal",
    "EigenbasisMoments",
    "GradientWindow",
    "Gram",
    "InputMoments",
    "InverseRoots",
    "KroneckerDim",
    "KroneckerIO",
    "LayerAverages",
    "LayerDiagonal",
    "LayerGram",
    "MeanRows",
    "Representation",
    "RisingDecay",
    "TensorNormal",
    "UnitBlocks",
    "UnitWindow",
    "WithDiagonal",
    "WithMatrices",
]
