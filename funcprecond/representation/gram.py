r"""The Gram form of a curvature matrix: ``C = U^T U`` kept as its rows, U with one row an example.

All that a solver of Woodbury's kind asks for is :math:`U U^T`, :math:`U v` and :math:`U^T w`, and
the layers' inputs and output gradients give the three without any per-example gradient. Its entries
are

.. math:: (U U^T)_{nm} = c \sum_l \sum_{ts} (a_{nt} \cdot a_{ms}) (g_{nt} \cdot g_{ms})

over layers l and pairs of positions t, s, with :math:`a_{nt} \cdot a_{ms} + 1` for a layer with a
bias. With V cotangents there are V N rows, cotangent by cotangent.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import Layers, LayerUse, split_block
from funcprecond.layers.example_gradients import Pairs, pairs_of
from funcprecond.linalg.precision import factor_dtype
from funcprecond.problems import Params
from funcprecond.tree import state, static

__all__ = ["Gram"]


@state
class Gram:
    """``C = scale * sum over rows``: a matrix of at most R = V N rows, over all parameters at once.

    Attributes:
        pairs: the affine layers' rows, as pairs.
        explicit: the other parameters' rows, (R, *shape) each.
        scale: 0-d; U is the rows times its root.
        names: the order of the parameters.
    """

    pairs: tuple[Pairs, ...]
    explicit: Params
    scale: Tensor
    names: tuple[str, ...] = static()

    @classmethod
    def from_layers(cls, layers: Layers, params: Params) -> "Gram":
        """The Gram form of what ``LayerStatistics(others="rows", by_example=True)`` measured.

        Args:
            layers: the measurement.
            params: whose block is wanted: its shapes and order; other parameters are left out.
        """
        pairs: list[Pairs] = []
        explicit: Params = {}
        for block, uses in layers.uses.items():
            weight, bias = split_block(block)
            if weight in params and uses[0].call.kind != "norm":
                pairs.append(
                    pairs_of(uses, params[weight], weight, bias if bias in params else None)
                )
            else:
                found = (
                    _norm_rows(uses, weight, bias) if weight in params else _bias_rows(uses, bias)
                )
                explicit |= {
                    k: x.reshape(-1, *params[k].shape) for k, x in found.items() if k in params
                }
        for name, rows in layers.others.items():
            if name in params:
                explicit[name] = rows.flatten(0, 1).to(factor_dtype(rows))
        return cls(tuple(pairs), explicit, layers.scale, tuple(params))

    @property
    def count(self) -> int:
        """R, the number of rows."""
        for pairs in self.pairs:
            return math.prod(pairs.grads.shape[1:3])
        return next(iter(self.explicit.values())).shape[0]

    def gram(self) -> Tensor:
        """(R, R): ``U U^T``."""
        terms = [p.gram() for p in self.pairs]
        terms += [x @ x.mT for x in self._explicit().values()]
        return self.scale * sum(terms)

    def matvec(self, vector: Params) -> Tensor:
        """(R,): ``U v``."""
        terms = [p.matvec(vector).reshape(-1) for p in self.pairs]
        terms += [x @ vector[k].reshape(-1).to(x.dtype) for k, x in self._explicit().items()]
        return self.scale.sqrt() * sum(terms)

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T w`` for (R,) weights, shaped like the parameters."""
        weights = self.scale.sqrt() * weights
        found: Params = {}
        for p in self.pairs:
            found |= p.rmatvec(weights.to(p.grads.dtype).reshape(p.grads.shape[1:3]))
        for name, x in self.explicit.items():
            found[name] = torch.tensordot(weights.to(x.dtype), x, 1)
        return {k: found[k] for k in self.names}

    def diagonal(self) -> Params:
        """The diagonal of ``U^T U``."""
        found: Params = {}
        for p in self.pairs:
            found |= p.diagonal()
        found |= {k: x.square().sum(0) for k, x in self.explicit.items()}
        return {k: self.scale * found[k] for k in self.names}

    def trace(self) -> Tensor:
        """The trace of ``U^T U``, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def rows(self) -> Tensor:
        """(R, P): U itself, formed."""
        found = dict(self.explicit)
        for p in self.pairs:
            found |= p.rows()
        return self.scale.sqrt() * torch.cat(
            [found[k].reshape(self.count, -1) for k in self.names], 1
        )

    def to_dense(self) -> Tensor:
        """(P, P): ``U^T U``, all parameters in order."""
        u = self.rows()
        return u.mT @ u

    def _explicit(self) -> Params:
        """(R, n) for a parameter of n entries."""
        return {k: x.reshape(len(x), -1) for k, x in self.explicit.items()}


def _norm_rows(uses: Sequence[LayerUse], scale: str, bias: str | None) -> Params:
    """(V N, units): two numbers a unit and example."""
    found = {}
    g = [u.grad_rows().to(factor_dtype(u.grads)) for u in uses]
    products = [x * u.input_rows() for x, u in zip(g, uses, strict=True)]
    found[scale] = sum(x.sum(2) for x in products).flatten(0, 1)  # pyright: ignore
    return found | _bias_rows(uses, bias)


def _bias_rows(uses: Sequence[LayerUse], bias: str | None) -> Params:
    """(V N, o): the output gradients summed over an example's positions."""
    if bias is None:
        return {}
    terms = []
    for u in uses:
        g = u.grad_rows().to(factor_dtype(u.grads)).sum(-2)
        terms.append(g.movedim(0, 2).flatten(2) if u.call.kind == "conv" else g)
    return {bias: sum(terms).flatten(0, 1)}  # pyright: ignore
