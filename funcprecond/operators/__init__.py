"""Curvature matrices as linear operators: products, sums, blocks, diagonals, solves, inverses."""

from funcprecond.operators.algebra import (
    BlockDiagonal,
    Function,
    Identity,
    Matrix,
    Multiple,
    Product,
    Sum,
    as_operator,
)
from funcprecond.operators.curvature_matrices import GGN, Fisher, Hessian
from funcprecond.operators.diagonal import DiagonalGGN, DiagonalMatrix
from funcprecond.operators.kronecker_factored import KroneckerFactored
from funcprecond.operators.layer_blocks import LayerBlocks
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.nystrom_sketch import nystrom, nystrom_cg
from funcprecond.operators.operator import Operator

__all__ = [
    "GGN",
    "BlockDiagonal",
    "DiagonalGGN",
    "DiagonalMatrix",
    "Fisher",
    "Function",
    "Hessian",
    "Identity",
    "KroneckerFactored",
    "LayerBlocks",
    "LowRank",
    "Matrix",
    "Multiple",
    "Operator",
    "Product",
    "Sum",
    "as_operator",
    "nystrom",
    "nystrom_cg",
]
