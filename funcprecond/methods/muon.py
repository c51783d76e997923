"""Muon: the orthogonal polar factor of the momentum."""

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
from funcprecond.transform import Transform, fitted, gradient_only
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

    For a matrix with the gradient G, where U Σ Vᵀ is the singular value decomposition of M::

        B <- μ B + (1 - μ) G
        M  = (1 - μ) G + μ B            with nesterov; otherwise M = B
        d  = scale · U Vᵀ               by a polynomial iteration

    This is the direction of Shampoo and CASPR if M is the only gradient they have seen. A tensor of
    higher order is treated as a matrix of its first axis by all others, and axes of length 1 are
    ignored. The direction of a vector or a scalar is M itself, which has another scale. Muon is
    made for hidden matrices: leave embeddings, output layers and vectors to Adam with
    :func:`funcprecond.muon_rules`.

    Args:
        momentum: μ, the weight of the old mean.
        nesterov: whether M looks one step ahead.
        polynomial, steps, epsilon: how the polar factor is computed, see
            :func:`funcprecond.linalg.polar.polar`. Eight steps of "polar_express" (Amsel et al.,
            arXiv 2505.16932) are exact to rounding unless M is nearly singular; "svd" always is.
        adjust: the scale: ``sqrt(max(1, rows / columns))`` for "original";
            ``0.2 sqrt(max(rows, columns))`` for "match_rms_adamw", with which Muon and AdamW can
            share one learning rate; 1 for "none".
        dtype: the dtype of the iteration, by default that of the mean. The original uses bfloat16.

    Returns:
        A method that needs the gradient only. Its state is one copy of the parameters. Each of the
        ``steps`` takes three products of matrices with the short side.

    Raises:
        ValueError: an option has a value that is not allowed.

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
        # Transposed to wide matrices, so that a matrix and its transpose can share one stack.
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

    return fitted(gradient_only(init, update), lambda state: state.momentum)


def _as_matrix(x: Tensor) -> Tensor:
    """The tensor as a matrix, the first axis longer than 1 by all others."""
    return x.reshape(x.shape[axes_of(x.shape)[0]], -1)


def _scale(adjust: str, rows: int, columns: int) -> float:
    if adjust == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else 1.0
