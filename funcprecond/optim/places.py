"""Where the examples are in a run that belongs to somebody else, and cannot be repeated on two.

:mod:`funcprecond.autodiff.examples` runs the model on a part of the batch. Here the cotangent of
one example is pulled back instead: it must reach each layer only where this example is.
"""

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.examples import Examples
from funcprecond.autodiff.graph_run import GraphRun
from funcprecond.layers.place import Place

__all__ = ["find_by_gradients"]


def find_by_gradients(run: GraphRun) -> Examples:
    """Find where the examples are, of which axis 0 of the outputs has the rows.

    Args:
        run: a run that keeps its graph.

    Returns:
        The places. The examples count as coupled if the gradient of one of them reaches a layer in
        several places. Costs a backward pass through the layers for each number of examples that is
        tried; the first one usually is right.
    """
    outputs = tree.floating(run.outputs)
    rows = next(x.shape[0] for x in outputs if x.ndim)
    # The positions of a sequence are often merged into the rows of the outputs, behind the example.
    lengths = [n for call in run.calls for n in call.shape[:2] if n and rows % n == 0]
    calls, found = [], rows
    for count in dict.fromkeys([*lengths, rows]):
        inner, chosen, seeds = rows // count, count // 2, []
        for x in outputs:
            u = torch.zeros_like(x)
            if x.ndim and x.shape[0] == rows:
                part = u[chosen * inner : (chosen + 1) * inner]
                # Different numbers, so that no sum over the entries vanishes.
                part.copy_(torch.linspace(0.5, 1.5, part.numel(), device=x.device).view_as(part))
            seeds.append(u)
        pulled = run.pull_layers(tree.with_floating(run.outputs, seeds), True)
        places = [_place(g, count, chosen) for g in pulled]
        if not calls or places.count(None) < calls.count(None):
            calls, found = places, count
        if None not in calls:
            break
    coupled = [call.weight for call, place in zip(run.calls, calls, strict=True) if place is None]
    outer = Place(0, rows // found)
    places = tuple(outer if x.ndim and x.shape[0] == rows else None for x in outputs)
    why = None
    if coupled:
        why = f"the gradient of one example is not in one place in the layer with {coupled[0]!r}"
    return Examples(found, (), (), places, tuple(calls), why)


def _place(g: Tensor, count: int, chosen: int) -> Place | None:
    """Where the examples are in the output of a layer that has this gradient for one example."""
    own = [Place(axis) for axis in (0, 1) if g.shape[axis : axis + 1] == (count,)]
    merged = []
    if g.ndim and g.shape[0] % count == 0:
        inner = g.shape[0] // count
        merged = [Place(0, inner), Place(0, inner, examples_first=False)]
    for place in (*own, *merged):
        parts = place.split(g)
        if not (bool(parts[:chosen].any()) or bool(parts[chosen + 1 :].any())):
            return place
    return None
