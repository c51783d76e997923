r"""Estimates of a trace from products with random vectors, with standard errors.

The argument of all estimators is the number of products, so that they can be compared at equal
cost. A quadratic form ``v · A v`` counts as one product, although a Gauss-Newton matrix computes it
for the cost of half a product. With random signs, Hutchinson's estimator has the variance
:math:`2 (|A|_F^2 - \sum_i a_{ii}^2)` per probe. Hutch++ and XTrace treat the dominant eigenspace
exactly, so that their variance falls with the square of the number of products if the eigenvalues
decay. All probes are drawn before the first product, so the estimates do not depend on the chunk
size.
"""

import torch
from torch import Tensor

from funcprecond.estimators.probes import (
    Distribution,
    Estimate,
    check_products,
    correlated,
    exact,
    forms,
    leave_one_out,
    mean_of,
    probes_of,
    skewed,
)
from funcprecond.linalg import treemath
from funcprecond.linalg.precision import wide
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import from_rows

__all__ = ["hutchinson_trace", "hutchpp", "xtrace"]


def hutchinson_trace(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """Estimate the trace of A by the mean of ``v · A v`` over random vectors v (Hutchinson 1990).

    Args:
        operator: A.
        products: the number of random vectors.
        generator: draws the random vectors, if ``probes`` is None.
        distribution: the distribution of their entries, "rademacher" (random signs) or "normal".
        probes: the random vectors, (products, P), from :func:`funcprecond.estimators.draw_probes`.
        chunk_size: see :meth:`funcprecond.Operator.matmat`.

    Returns:
        An :class:`funcprecond.Estimate` of two 0-d tensors; the usual standard error is multiplied
        by ``1 + 10 / products``. Costs one quadratic form per vector, which for a Gauss-Newton or
        Fisher matrix is about half a product.

    Raises:
        ValueError: ``products`` is not positive, ``distribution`` is unknown, ``probes`` has
            another shape, or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> generator = torch.Generator().manual_seed(0)
        >>> float(fp.hutchinson_trace(a, 4, generator=generator).estimate)
        5.0
    """
    v = probes_of(operator, products, generator, distribution, probes)
    return mean_of(forms(operator, v, chunk_size), skewed(products))


def hutchpp(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """Estimate the trace of A by Hutch++ (Meyer, Musco, Musco & Woodruff, arXiv 2010.09649).

    The trace on a subspace is exact, and Hutchinson's estimator serves for its orthogonal
    complement. One third of the products determines the subspace, one third the trace on it, and
    one third the estimate on the complement, to which the standard error belongs.

    Args:
        operator: A.
        products: the number of products, a multiple of three.
        generator: draws the random vectors, if ``probes`` is None.
        distribution: the distribution of their entries, "rademacher" (random signs) or "normal".
        probes: the random vectors, (2 products / 3, P), from
            :func:`funcprecond.estimators.draw_probes`.
        chunk_size: see :meth:`funcprecond.Operator.matmat`.

    Returns:
        An :class:`funcprecond.Estimate` of two 0-d tensors; the usual standard error of the last
        third is multiplied by ``1 + 30 / products``. Costs one third of ``products`` in products
        and two thirds in quadratic forms. With ``products >= P`` the trace is exact, by P quadratic
        forms, and the standard error is that of rounding.

    Raises:
        ValueError: ``products`` is not a positive multiple of three, ``distribution`` is unknown,
            ``probes`` has another shape, or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0, 0.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> found = fp.hutchpp(a, 6, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(found.estimate.float(), torch.tensor(5.0), atol=1e-4)
        True
    """
    if products % 3:
        msg = f"products must be a multiple of three for Hutch++, not {products}"
        raise ValueError(msg)
    v = probes_of(operator, 2 * products // 3, generator, distribution, probes)
    if products >= operator.size:
        return _exact(operator)
    s, g = v.chunk(2)
    range_of_a = operator.products(from_rows(s, operator.like), chunk_size)
    q = torch.linalg.qr(torch.stack([treemath.ravel(y).to(v.dtype) for y in range_of_a]).mT)[0].mT
    inside = forms(operator, q, chunk_size).sum()
    # One projection suffices in float32: the error that remains is as small as the rounding of the
    # probe, and it enters the quadratic form squared.
    g = torch.addmm(g, g @ q.mT, q, alpha=-1)
    return mean_of(inside + forms(operator, g, chunk_size), skewed(products // 3))


def xtrace(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    r"""Estimate the trace of A by XTrace (Epperly, Tropp & Webber, arXiv 2301.07825).

    Every probe serves both purposes of Hutch++: it spans the subspace together with the others, and
    it estimates the trace on the complement of the subspace :math:`Q_i` that the others span. With
    :math:`A \Omega = Q R`, these subspaces come from one QR decomposition: :math:`Q_i Q_i^T = Q (I
    - s_i s_i^T) Q^T`, where :math:`s_i` are the normalized columns of :math:`R^{-T}`.

    Args:
        operator: A.
        products: the number of products: an even number, at least 4 and at most 2 P.
        generator: draws the random vectors Ω, if ``probes`` is None.
        distribution: the distribution of their entries, "rademacher" (random signs) or "normal".
        probes: the random vectors, (products / 2, P), from
            :func:`funcprecond.estimators.draw_probes`.
        chunk_size: see :meth:`funcprecond.Operator.matmat`.

    Returns:
        An :class:`funcprecond.Estimate` of two 0-d tensors. The leave-one-out samples are
        correlated: with k = products / 2 of them, their usual standard error is multiplied by ``(2
        / (1 - k / P))^(1/2)``, which is exact for a flat spectrum and too large where eigenvalues
        decay, and by the quantile of Student's distribution with k - 1 degrees of freedom, divided
        by 2. Costs ``products`` products. With ``products >= P`` the trace is exact, by P quadratic
        forms, and the standard error is that of rounding.

    Raises:
        ValueError: ``products`` is odd, less than 4 or more than 2 P, ``distribution`` is unknown,
            ``probes`` has another shape, or ``generator`` and ``probes`` are both None.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0, 0.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> found = fp.xtrace(a, 6, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(found.estimate.float(), torch.tensor(5.0), atol=1e-4)
        True
    """
    check_products(products, operator)
    v = probes_of(operator, products // 2, generator, distribution, probes)
    if products >= operator.size:
        return _exact(operator)
    w, y, q, r, s, z, regular = leave_one_out(operator, v, chunk_size)
    h = q.mT @ z
    x = q.mT @ w
    u = x - s * (s * x).sum(0)
    inside = h.diagonal().sum() - (s * (h @ s)).sum(0)
    rest = (w * y).sum(0) - (u * r).sum(0) - ((z.mT @ w) * u).sum(0) + (u * (h @ u)).sum(0)
    plain = (w * y).sum(0)
    factor = correlated(products // 2, operator.size)
    return mean_of(torch.where(regular, inside + rest, plain), factor)


def _exact(operator: Operator) -> Estimate:
    """The trace, which costs no more than an estimate if there are as many products as rows."""
    diagonal = operator.diagonal()
    total = torch.stack([wide(d).sum() for d in diagonal.values()]).sum()
    return exact(diagonal, total, operator.flat_options["dtype"])
