"""Muon: the momentum, made orthogonal."""

import math
from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.linalg import treemath
from funcprecond.linalg.axes import axes_of
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.polar import Polynomial, polar, triples
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.transform import Transform, gradient_only
from funcprecond.tree import Params, state

__all__ = ["MuonState", "muon"]


@state
class MuonState:
    """The running mean of the gradient, shaped like the parameters, in float32 or wider."""

    momentum: Params


@card(
    "Muon (Jordan 2024)",
    curvature="none",
    representation="layer",
    solver="L iter, Newton-Schulz",
    learning_rate=0.02,
    carries_momentum=True,
)
def muon(
    *,
    momentum: float | Tensor = 0.95,
    nesterov: bool = True,
    polynomial: Polynomial = "jordan",
    steps: int = 5,
    adjust: Literal["original", "match_rms_adamw", "none"] = "original",
    epsilon: float | Tensor = 1e-7,
    dtype: torch.dtype | None = None,
) -> Transform:
    """Muon (Jordan et al. 2024, KellerJordan/Muon and ``torch.optim.Muon``).

    For a matrix, with U Σ Vᵀ the singular value decomposition of M::

        B <- μ B + (1 - μ) G
        M  = (1 - μ) G + μ B            Nesterov, or M = B
        d  = scale · U Vᵀ               by a polynomial iteration

    It is what Shampoo and CASPR do to the momentum when they do not accumulate. A tensor is a
    matrix of its first axis by all the others; axes of length 1 do not count. A vector or a scalar
    gets its momentum as it is, which is on another scale. Muon is for hidden matrices, so leave
    embeddings, heads and vectors to Adam, as :func:`funcprecond.muon_rules` says.

    Args:
        momentum: μ, the weight of the old mean.
        nesterov: look one step ahead.
        polynomial, steps, epsilon: how the polar factor is computed, see
            :func:`funcprecond.linalg.polar.polar`. "polar_express" (Amsel et al., arXiv 2505.16932)
            with eight steps is exact to rounding unless the momentum is close to singular; "svd"
            always is.
        adjust: "original" multiplies by ``sqrt(max(1, rows / columns))``; "match_rms_adamw" by
            ``0.2 sqrt(max(rows, columns))``, which lets one learning rate serve Muon and AdamW.
        dtype: what the iteration runs in, by default that of the mean; bfloat16 in the original.

    Returns:
        A method that needs the gradient only. It keeps one copy of the parameters; each of the
        steps takes three products with the short side.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.partition(
        ...     fp.muon_rules(),
        ...     muon=fp.chain(fp.muon(), fp.weight_decay(0.01), fp.scale(0.02)),
        ...     adam=fp.chain(fp.adam(), fp.scale(3e-4)),
        ... )
    """
    if polynomial != "svd":
        triples(polynomial, steps)
    one_of(("original", "match_rms_adamw", "none"), adjust=adjust)

    def init(params: Params) -> MuonState:
        return MuonState(treemath.zeros_like(params))

    def update(state: MuonState, grads: Params) -> tuple[MuonState, Params]:
        mean = {k: accumulate(old, grads[k], momentum) for k, old in state.momentum.items()}
        ahead = mean
        if nesterov:
            ahead = {k: accumulate(m, grads[k], momentum) for k, m in mean.items()}
        matrices = {k: _as_matrix(m) for k, m in ahead.items() if axes_of(m.shape)}
        # Wide, so that a matrix and its transpose are of one stack.
        wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices.values()]
        factors = by_shape(
            lambda x, _: polar(x, polynomial, steps, epsilon=epsilon),
            wide if dtype is None else [x.to(dtype) for x in wide],
            static=[None] * len(wide),
        )
        direction = dict(ahead)
        for (name, x), factor in zip(matrices.items(), factors, strict=True):
            rows, columns = x.shape
            factor = factor.mT if rows > columns else factor
            scaled = factor.to(x.dtype) * _scale(adjust, rows, columns)
            direction[name] = scaled.reshape(ahead[name].shape)
        return MuonState(mean), treemath.cast(direction, grads)

    return gradient_only(init, update)


def _as_matrix(x: Tensor) -> Tensor:
    """(first axis, all others), of the axes longer than 1."""
    return x.reshape(x.shape[axes_of(x.shape)[0]], -1)


def _scale(adjust: str, rows: int, columns: int) -> float:
    if adjust == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else 1.0
