r"""The Gram form of a curvature matrix: ``C = U^T U``, stored as U with one row per example.

A solver by Woodbury's formula needs only :math:`U U^T`, :math:`U v` and :math:`U^T w`. All three
follow from the layers' inputs and output gradients, without any per-sample gradient:

.. math:: (U U^T)_{nm} = c \sum_l \sum_{ts} (a_{nt} \cdot a_{ms}) (g_{nt} \cdot g_{ms})

with sums over layers l and over pairs of positions t, s. For a layer with a bias,
:math:`a_{nt} \cdot a_{ms} + 1` replaces the first inner product. With V cotangents there are V N
rows, in the order of the cotangents.
"""

import dataclasses
import math

import torch
from torch import Tensor

from funcprecond.layers.blocks import Layers
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.tree import Params, state, static

__all__ = ["Gram"]


@state
class Gram:
    """``C = U^T U`` over all parameters jointly, of rank at most R = V N.

    Attributes:
        layers: the rows of the affine layers, kept as inputs and output gradients.
        others: the rows of the other parameters, (R, *shape) each.
        scale: 0-d; U is the rows times the root of the scale.
        names: the order of the parameters.
    """

    layers: tuple[ExampleGradients, ...]
    others: Params
    scale: Tensor
    names: tuple[str, ...] = static()

    @classmethod
    def from_layers(cls, layers: Layers, params: Params, examples: int | None = None) -> "Gram":
        """The Gram form of layer statistics.

        Args:
            layers: a measurement of ``LayerStatistics(others="rows", per_sample=True)``.
            params: the parameters whose block is wanted, in this order. Other parameters are left
                out.
            examples: the number of examples that are kept, the first ones; by default all. The
                scale is then such that the matrix estimates that of the whole batch.

        Returns:
            The representation.
        """
        kept, formed = layers.example_gradients(params)
        if examples is None:
            return cls(kept, formed, layers.scale, tuple(params))
        of_uses = (use.grads.shape[0] for uses in layers.uses.values() for use in uses)
        cotangents = next(of_uses, 0) or next(iter(layers.others.values())).shape[0]
        whole = cls(kept, formed, layers.scale, tuple(params)).count // cotangents
        kept = tuple(
            dataclasses.replace(p, inputs=p.inputs[:, :examples], grads=p.grads[:, :, :examples])
            for p in kept
        )
        formed = {
            k: x.unflatten(0, (cotangents, whole))[:, :examples].flatten(0, 1)
            for k, x in formed.items()
        }
        return cls(kept, formed, layers.scale * whole / min(examples, whole), tuple(params))

    @property
    def count(self) -> int:
        """R, the number of rows of U."""
        for rows in self.layers:
            return math.prod(rows.grads.shape[1:3])
        return next(iter(self.others.values())).shape[0]

    def gram(self) -> Tensor:
        """``U U^T``, (R, R)."""
        terms = [p.gram() for p in self.layers]
        terms += [x @ x.mT for x in self._flat_others().values()]
        return self.scale * sum(terms)

    def squared_norms(self) -> Tensor:
        """The diagonal of ``U U^T``, (R,), for a single cotangent."""
        terms = [rows.squared_norms() for rows in self.layers]
        terms += [x.square().sum(1) for x in self._flat_others().values()]
        return self.scale * sum(terms)

    def matvec(self, vector: Params) -> Tensor:
        """``U v``.

        Args:
            vector: v, shaped like the parameters.

        Returns:
            (R,).
        """
        terms = [p.matvec(vector).reshape(-1) for p in self.layers]
        terms += [x @ vector[k].reshape(-1).to(x.dtype) for k, x in self._flat_others().items()]
        return self.scale.sqrt() * sum(terms)

    def rmatvec(self, weights: Tensor) -> Params:
        """``U^T w``.

        Args:
            weights: w, (R,).

        Returns:
            Shaped like the parameters.
        """
        weights = self.scale.sqrt() * weights
        found: Params = {}
        for p in self.layers:
            found |= p.rmatvec(weights.to(p.grads.dtype).reshape(p.grads.shape[1:3]))
        for name, x in self.others.items():
            found[name] = torch.tensordot(weights.to(x.dtype), x, 1)
        return {k: found[k] for k in self.names}

    def diagonal(self) -> Params:
        """The diagonal of ``U^T U``, shaped like the parameters."""
        found: Params = {}
        for p in self.layers:
            found |= p.diagonal()
        found |= {k: x.square().sum(0) for k, x in self.others.items()}
        return {k: self.scale * found[k] for k in self.names}

    def trace(self) -> Tensor:
        """The trace of ``U^T U``, a 0-d tensor."""
        return torch.stack([d.sum() for d in self.diagonal().values()]).sum()

    def rows(self) -> Tensor:
        """U itself, formed, (R, P)."""
        found = dict(self.others)
        for p in self.layers:
            found |= p.rows()
        return self.scale.sqrt() * torch.cat(
            [found[k].reshape(self.count, -1) for k in self.names], 1
        )

    def to_dense(self) -> Tensor:
        """``U^T U`` over all parameters in order, (P, P)."""
        u = self.rows()
        return u.mT @ u

    def _flat_others(self) -> Params:
        """The other rows as matrices, (R, n) for a parameter of n entries."""
        return {k: x.reshape(len(x), -1) for k, x in self.others.items()}
