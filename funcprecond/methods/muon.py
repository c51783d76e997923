"""Muon: the momentum, made orthogonal.

Row: no curvature; layer; Newton-Schulz. Jordan et al. 2024 (KellerJordan/Muon and
``torch.optim.Muon``); Polar Express: Amsel, Persson, Musco & Gower, arXiv 2505.16932. For a
matrix::

    B <- μ B + (1 - μ) G
    M  = (1 - μ) G + μ B            Nesterov, or M = B
    d  = scale · U Vᵀ               of M = U Σ Vᵀ, by a polynomial iteration

It is what Shampoo and CASPR do to the momentum when they do not accumulate. One copy of the
parameters; each step five times three products with the short side.

Muon is for hidden matrices; embeddings, heads and vectors go to Adam, as :func:`muon_rules` says::

    opt = fp.partition(
        fp.muon_rules(),
        muon=fp.chain(fp.muon(), fp.weight_decay(0.01), fp.scale(0.02)),
        adam=fp.chain(fp.adam(), fp.scale(3e-4)),
    )
"""

import math
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg import treemath
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.polar import Polynomial, polar, triples
from funcprecond.linalg.precision import factor_dtype
from funcprecond.methods.table import Card
from funcprecond.representation.kronecker_dim import axes_of
from funcprecond.transform import Transform, gradient_only
from funcprecond.transforms.partition import Rule
from funcprecond.tree import Params, state

__all__ = ["MuonState", "muon", "muon_rules"]

# Names of what a model starts and ends with; each is held against every part of a dotted name.
ENDS = (
    *("embed*", "*_embed", "*embedding", "*embeddings", "tok_emb", "pos_emb", "wte", "wpe"),
    *("head", "heads", "*_head", "classifier", "logits", "fc"),
)


@state
class MuonState:
    """The running mean of the gradient, shaped like the parameters, in float32 or wider."""

    momentum: Params


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
    """Muon's direction.

    A tensor is a matrix of its first axis by all the others; axes of length 1 do not count. A
    vector or a scalar gets its momentum as it is, which is on another scale: leave it to Adam.

    Args:
        momentum: μ, the weight of the old mean.
        nesterov: look one step ahead.
        polynomial, steps, epsilon: how the polar factor is computed, see
            :func:`funcprecond.linalg.polar.polar`. "polar_express" with eight steps is
            exact to rounding unless the momentum is close to singular; "svd" always is.
        adjust: "original" multiplies by ``sqrt(max(1, rows / columns))``; "match_rms_adamw" by
            ``0.2 sqrt(max(rows, columns))``, which lets one learning rate serve Muon and AdamW.
        dtype: what the iteration runs in, by default that of the mean; bfloat16 in the original.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    if polynomial != "svd":
        triples(polynomial, steps)
    if adjust not in ("original", "match_rms_adamw", "none"):
        msg = f"adjust must be 'original', 'match_rms_adamw' or 'none', not {adjust!r}"
        raise ValueError(msg)

    def init(params: Params) -> MuonState:
        return MuonState({k: torch.zeros_like(p, dtype=factor_dtype(p)) for k, p in params.items()})

    def update(state: MuonState, grads: Params) -> tuple[MuonState, Params]:
        mean, ahead = {}, {}
        for name, old in state.momentum.items():
            g = grads[name].to(old.dtype)
            mean[name] = momentum * old + (1 - momentum) * g
            ahead[name] = momentum * mean[name] + (1 - momentum) * g if nesterov else mean[name]
        names = [k for k, m in ahead.items() if axes_of(m.shape)]
        # Wide, so that a matrix and its transpose are of one stack.
        wide = [_wide(as_matrix(ahead[k])) for k in names]
        if dtype is not None:
            wide = [x.to(dtype) for x in wide]
        factors = by_shape(
            lambda x, _: polar(x, polynomial, steps, epsilon=epsilon),
            wide,
            static=[None] * len(names),
        )
        direction = dict(ahead)
        for name, factor in zip(names, factors, strict=True):
            rows, columns = as_matrix(ahead[name]).shape
            factor = factor.mT if rows > columns else factor
            factor = factor.to(ahead[name].dtype) * _scale(adjust, rows, columns)
            direction[name] = factor.reshape(ahead[name].shape)
        return MuonState(mean), treemath.cast(direction, grads)

    return gradient_only(init, update)


def muon_rules(*others: str) -> list[Rule]:
    """The usual routing, for :func:`funcprecond.partition` with methods ``muon=`` and ``adam=``.

    Hidden matrices and convolutions go to Muon. To Adam go vectors, what is called an embedding or
    a head (``wte``, ``lm_head``, ``classifier``, ...), and what the caller names.

    Args:
        *others: patterns of further names for Adam, such as ``"4.*"`` for a last layer without a
            telling name. Print ``fp.assign(rules, params)`` to see that none is missing.
    """

    def is_end(name: str, p: Tensor) -> bool:
        return any(fnmatchcase(part, x) for part in name.split(".") for x in ENDS)

    def is_matrix(name: str, p: Tensor) -> bool:
        return bool(axes_of(p.shape))

    named: list[Rule] = [(pattern, "adam") for pattern in others]
    return [*named, (is_end, "adam"), (is_matrix, "muon"), ("*", "adam")]


def as_matrix(x: Tensor) -> Tensor:
    """(first axis, all others), of the axes longer than 1."""
    return x.reshape(x.shape[axes_of(x.shape)[0]], -1)


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[0] > x.shape[1] else x


def _scale(adjust: str, rows: int, columns: int) -> float:
    if adjust == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjust == "match_rms_adamw" else 1.0


CARDS = (
    Card(
        "muon",
        "Muon (Jordan 2024)",
        "none",
        "layer",
        "L iter, Newton-Schulz",
        muon,
        learning_rate=0.02,
        momentum=True,
    ),
)
