r"""The Gram form of a curvature matrix: ``C = U^T U`` kept as its rows, U with one row an example.

All that a solver of Woodbury's kind asks for is :math:`U U^T`, :math:`U v` and :math:`U^T w`, and
the layers' inputs and output gradients give the three without any per-example gradient. Its entries
are

.. math:: (U U^T)_{nm} = c \sum_l \sum_{ts} (a_{nt} \cdot a_{ms}) (g_{nt} \cdot g_{ms})

over layers l and pairs of positions t, s, with :math:`a_{nt} \cdot a_{ms} + 1` for a layer with a
bias. With V cotangents there are V N rows, cotangent by cotangent.
"""

import math

import torch
from torch import Tensor

from funcprecond.layers.blocks import Layers
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.tree import Params, state, static

__all__ = ["Gram"]


@state
class Gram:
    """``C = scale * sum over rows``: a matrix of at most R = V N rows, over all parameters at once.

    Attributes:
        layers: the affine layers' rows, kept as inputs and output gradients.
        others: the other parameters' rows, (R, *shape) each.
        scale: 0-d; U is the rows times its root.
        names: the order of the parameters.
    """

    layers: tuple[ExampleGradients, ...]
    others: Params
    scale: Tensor
    names: tuple[str, ...] = static()

    @classmethod
    def from_layers(cls, layers: Layers, params: Params) -> "Gram":
        """The Gram form of what ``LayerStatistics(others="rows", per_sample=True)`` measured.

        Args:
            layers: the measurement.
            params: whose block is wanted: its shapes and order; other parameters are left out.
        """
        kept, formed = layers.example_gradients(params)
        return cls(kept, formed, layers.scale, tuple(params))

    @property
    def count(self) -> int:
        """R, the number of rows."""
        for rows in self.layers:
            return math.prod(rows.grads.shape[1:3])
        return next(iter(self.others.values())).shape[0]

    def gram(self) -> Tensor:
        """(R, R): ``U U^T``."""
        terms = [p.gram() for p in self.layers]
        terms += [x @ x.mT for x in self._flat_others().values()]
        return self.scale * sum(terms)

    def squared_norms(self) -> Tensor:
        """(R,): the diagonal of ``U U^T``, for a single cotangent."""
        terms = [rows.squared_norms() for rows in self.layers]
        terms += [x.square().sum(1) for x in self._flat_others().values()]
        return self.scale * sum(terms)

    def matvec(self, vector: Params) -> Tensor:
        """(R,): ``U v``."""
        terms = [p.matvec(vector).reshape(-1) for p in self.layers]
        terms += [x @ vector[k].reshape(-1).to(x.dtype) for k, x in self._flat_others().items()]
        return self.scale.sqrt() * sum(terms)

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T w`` for (R,) weights, shaped like the parameters."""
        weights = self.scale.sqrt() * weights
        found: Params = {}
        for p in self.layers:
            found |= p.rmatvec(weights.to(p.grads.dtype).reshape(p.grads.shape[1:3]))
        for name, x in self.others.items():
            found[name] = torch.tensordot(weights.to(x.dtype), x, 1)
        return {k: found[k] for k in self.names}

    def diagonal(self) -> Params:
        """The diagonal of ``U^T U``."""
        found: Params = {}
        for p in self.layers:
            found |= p.diagonal()
        found |= {k: x.square().sum(0) for k, x in self.others.items()}
        return {k: self.scale * found[k] for k in self.names}

    def trace(self) -> Tensor:
        """The trace of ``U^T U``, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def rows(self) -> Tensor:
        """(R, P): U itself, formed."""
        found = dict(self.others)
        for p in self.layers:
            found |= p.rows()
        return self.scale.sqrt() * torch.cat(
            [found[k].reshape(self.count, -1) for k in self.names], 1
        )

    def to_dense(self) -> Tensor:
        """(P, P): ``U^T U``, all parameters in order."""
        u = self.rows()
        return u.mT @ u

    def _flat_others(self) -> Params:
        """(R, n) for a parameter of n entries."""
        return {k: x.reshape(len(x), -1) for k, x in self.others.items()}
