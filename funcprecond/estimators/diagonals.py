"""Estimates of a diagonal from products with random vectors, with standard errors.

See :mod:`funcprecond.estimators.traces`.
"""

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.estimators.probes import (
    Distribution,
    Estimate,
    leave_one_out,
    mean_of,
    probes_of,
)
from funcprecond.linalg import treemath
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import from_rows, unstack
from funcprecond.tree import Params

__all__ = ["hutchinson_diagonal", "xdiag"]


def hutchinson_diagonal(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """The diagonal as the mean of ``v * A v`` (Bekas et al. 2007); see :func:`hutchinson_trace`."""
    rows = probes_of(operator, products, generator, distribution, probes)
    columns = from_rows(rows, operator.like)
    pairs = zip(unstack(columns), operator.products(columns, chunk_size), strict=True)
    # Sums of what is beyond the first sample, so that no more than one further is in memory.
    v, product = next(pairs)
    minus = {k: -(v[k] * product[k]) for k in v}
    beyond = {k: torch.zeros_like(x) for k, x in minus.items()}
    squares = {k: torch.zeros_like(x) for k, x in minus.items()}
    for v, product in pairs:
        for k, x in minus.items():
            more = torch.addcmul(x, v[k], product[k])
            beyond[k].add_(more)
            squares[k].add_(more.square_())
    mean = {k: b / products - minus[k] for k, b in beyond.items()}
    if products == 1:
        return Estimate(mean, {k: torch.full_like(x, torch.nan) for k, x in mean.items()})
    spread = {k: (q - beyond[k].square_() / products).clamp_min_(0) for k, q in squares.items()}
    of_mean = {k: s.div_(products * (products - 1)).sqrt_() for k, s in spread.items()}
    return Estimate(mean, of_mean)


def xdiag(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """The diagonal by XDiag (Epperly, Tropp & Webber 2024), XTrace's idea for each entry.

    A must be symmetric; probes are signs. See :func:`xtrace` for the arguments.
    """
    w, y, q, r, s, z, regular = leave_one_out(
        operator, products, generator, "rademacher", probes, chunk_size
    )
    inside = (q * z).sum(1, keepdim=True) - (q @ s) * (z @ s)
    rest = w * (y - q @ (r - s * (s * r).sum(0)))
    found = torch.where(regular, inside + rest, w * y)
    return _shaped(mean_of(found.mT), operator.like)


def _shaped(estimate: Estimate, like: Params) -> Estimate:
    return tree.map(lambda x: treemath.unravel(x, like), estimate)
