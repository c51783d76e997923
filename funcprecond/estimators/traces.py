r"""Estimates of a trace or a diagonal from products with random vectors, with standard errors.

All take the number of products, so that they can be compared at equal cost; where only ``v · A v``
is asked for, which a Gauss-Newton matrix gives for half a product, that counts as one. Hutchinson's
variance is :math:`2 (|A|_F^2 - \sum_i a_{ii}^2)` a probe with signs; Hutch++ and XTrace first take
out the dominant eigenspace, so that theirs falls with the square of the number of products wherever
the eigenvalues decay. Probes are drawn from the generator before anything is multiplied; the
numbers do not depend on the chunk size.
"""

import torch
from torch import Tensor

from funcprecond.estimators.probes import (
    Distribution,
    Estimate,
    forms,
    leave_one_out,
    mean_of,
    probes_of,
)
from funcprecond.linalg import treemath
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
    """The trace as the mean of ``v · A v`` (Hutchinson 1990).

    Of a Gauss-Newton or Fisher matrix these are quadratic forms that need no pull-back, half a
    product each: see :meth:`Operator.quadratic_forms`.

    Args:
        operator: A.
        products: the number of probes.
        generator: draws them.
        distribution: of the probes' entries, "rademacher" signs or "normal".
        probes: (products, P) instead, from :func:`draw_probes`.
        chunk_size: see :meth:`Operator.matmat`.
    """
    v = probes_of(operator, products, generator, distribution, probes)
    return mean_of(forms(operator, v, chunk_size))


def hutchpp(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """The trace by Hutch++ (Meyer et al. 2021): exact on a subspace, Hutchinson on the rest.

    A third of the products finds the subspace, a third is exact on it, a third is for the rest; the
    standard error is that of the rest. See :func:`hutchinson_trace` for the arguments, with
    ``probes`` of shape (2 products / 3, P).

    Raises:
        ValueError: ``products`` is not a multiple of three.
    """
    if products % 3:
        msg = f"Hutch++ takes a multiple of three products, not {products}"
        raise ValueError(msg)
    v = probes_of(operator, 2 * products // 3, generator, distribution, probes)
    s, g = v.chunk(2)
    range_of_a = operator.products(from_rows(s, operator.like), chunk_size)
    q = torch.linalg.qr(torch.stack([treemath.ravel(y).to(v.dtype) for y in range_of_a]).mT)[0].mT
    inside = forms(operator, q, chunk_size).sum()
    # What float32 leaves of the subspace here is rounding beside the probe, and squared.
    g = torch.addmm(g, g @ q.mT, q, alpha=-1)
    return mean_of(inside + forms(operator, g, chunk_size))


def xtrace(
    operator: Operator,
    products: int = 30,
    *,
    generator: torch.Generator | None = None,
    distribution: Distribution = "rademacher",
    probes: Tensor | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    r"""The trace by XTrace (Epperly, Tropp & Webber 2024): Hutch++ with every probe in both roles.

    With :math:`A \Omega = Q R`, for each probe in turn the subspace of the others, by downdating:
    :math:`Q_i Q_i^T = Q (I - s_i s_i^T) Q^T` with the normalised columns :math:`s_i` of
    :math:`R^{-T}`. See :func:`hutchinson_trace` for the arguments, with ``probes`` of shape
    (products / 2, P).

    Raises:
        ValueError: ``products`` is odd.
    """
    w, y, q, r, s, z, regular = leave_one_out(
        operator, products, generator, distribution, probes, chunk_size
    )
    h = q.mT @ z
    x = q.mT @ w
    u = x - s * (s * x).sum(0)
    inside = h.diagonal().sum() - (s * (h @ s)).sum(0)
    rest = (w * y).sum(0) - (u * r).sum(0) - ((z.mT @ w) * u).sum(0) + (u * (h @ u)).sum(0)
    plain = (w * y).sum(0)
    return mean_of(torch.where(regular, inside + rest, plain))
