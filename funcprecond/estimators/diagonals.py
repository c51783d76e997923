"""Estimates of a diagonal from products with random vectors, with standard errors.

See :mod:`funcprecond.estimators.traces`.
"""

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.estimators.probes import (
    Distribution,
    Estimate,
    check_products,
    correlated,
    exact,
    leave_one_out,
    mean_of,
    probes_of,
)
from funcprecond.linalg import treemath
from funcprecond.operators.operator import Operator
from funcprecond.operators.solve import require_symmetric
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
    """Estimate the diagonal of A by the mean of ``v * A v`` over random vectors v.

    The product ``*`` is entry by entry (Bekas, Kokiopoulou & Saad 2007).

    Args:
        operator: A.
        products: the number of random vectors.
        generator: draws the random vectors, if ``probes`` is None.
        distribution: the distribution of their entries, "rademacher" (random signs) or "normal".
        probes: the random vectors, (products, P), from :func:`funcprecond.estimators.draw_probes`.
        chunk_size: see :meth:`funcprecond.Operator.matmat`.

    Returns:
        An :class:`funcprecond.Estimate` of two dicts of tensors shaped like the parameters. Costs
        ``products`` products.

    Raises:
        ValueError: ``products`` is not positive, ``distribution`` is unknown, ``probes`` has
            another shape, or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> generator = torch.Generator().manual_seed(0)
        >>> fp.hutchinson_diagonal(a, 4, generator=generator).estimate
        {'w': tensor([3., 2.])}
    """
    rows = probes_of(operator, products, generator, distribution, probes)
    columns = from_rows(rows, operator.like)
    pairs = zip(unstack(columns), operator.products(columns, chunk_size), strict=True)
    # Running sums of the differences from the first sample, which keep one more sample in memory.
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
    """Estimate the diagonal of a symmetric A by XDiag (Epperly, Tropp & Webber, arXiv 2301.07825).

    XDiag applies the idea of :func:`funcprecond.xtrace` to every entry of the diagonal.

    Args:
        operator: A.
        products: the number of products: an even number, at least 4 and at most 2 P.
        generator: draws the random vectors, whose entries are random signs, if ``probes`` is None.
        probes: the random vectors, (products / 2, P), from
            :func:`funcprecond.estimators.draw_probes`.
        chunk_size: see :meth:`funcprecond.Operator.matmat`.

    Returns:
        An :class:`funcprecond.Estimate` of two dicts of tensors shaped like the parameters. The
        standard errors have the factor of :func:`funcprecond.xtrace`. Costs ``products`` products.
        With ``products >= P`` the diagonal is exact, and the standard errors are those of rounding.

    Raises:
        TypeError: A is not symmetric.
        ValueError: ``products`` is odd, less than 4 or more than 2 P, ``probes`` has another shape,
            or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0, 0.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> found = fp.xdiag(a, 6, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(found.estimate["w"].float(), values["w"], atol=1e-4)
        True
    """
    require_symmetric(operator, "xdiag()", "hutchinson_diagonal() accepts any operator")
    check_products(products, operator)
    v = probes_of(operator, products // 2, generator, "rademacher", probes)
    if products >= operator.size:
        diagonal = operator.diagonal()
        return exact(diagonal, diagonal, operator.flat_options["dtype"])
    w, y, q, r, s, z, regular = leave_one_out(operator, v, chunk_size)
    inside = (q * z).sum(1, keepdim=True) - (q @ s) * (z @ s)
    rest = w * (y - q @ (r - s * (s * r).sum(0)))
    found = torch.where(regular, inside + rest, w * y)
    factor = correlated(products // 2, operator.size)
    return _shaped(mean_of(found.mT, factor), operator.like)


def _shaped(estimate: Estimate, like: Params) -> Estimate:
    return tree.map(lambda x: treemath.unravel(x, like), estimate)
