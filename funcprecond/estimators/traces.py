r"""Estimates of a trace or a diagonal from products with random vectors, with standard errors.

All take the number of products, so that they can be compared at equal cost; where only ``v · A v``
is asked for, which a Gauss-Newton matrix gives for half a product, that counts as one. Hutchinson's
variance is :math:`2 (|A|_F^2 - \sum_i a_{ii}^2)` a probe with signs; Hutch++ and XTrace first take
out the dominant eigenspace, so that theirs falls with the square of the number of products wherever
the eigenvalues decay. Probes are drawn from the generator before anything is multiplied; the
numbers do not depend on the chunk size.
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import unstack
from funcprecond.tree import Params, state

__all__ = [
    "Estimate",
    "draw_probes",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp",
    "xdiag",
    "xtrace",
]

Distribution = Literal["rademacher", "normal"]


@state
class Estimate:
    """An estimate and how far off it may be.

    Attributes:
        estimate: a 0-d tensor, or shaped like the parameters.
        standard_error: of the estimate, likewise; NaN where one sample does not tell.
    """

    estimate: Tensor | Params
    standard_error: Tensor | Params


def draw_probes(
    operator: Operator,
    n: int,
    generator: torch.Generator | None,
    distribution: Distribution = "rademacher",
) -> Tensor:
    """(n, P) random vectors of unit variance, to be given to an estimator as ``probes``."""
    if distribution not in ("rademacher", "normal") or n < 1:
        msg = f"distribution must be 'rademacher' or 'normal' and n positive: {distribution!r}, {n}"
        raise ValueError(msg)
    sample = random.rademacher if distribution == "rademacher" else random.normal
    return sample((n, operator.size), generator, **operator.flat_options)


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
    v = _probes(operator, products, generator, distribution, probes)
    return _mean(_forms(operator, v, chunk_size))


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
    columns = _columns(operator, _probes(operator, products, generator, distribution, probes))
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
    v = _probes(operator, 2 * products // 3, generator, distribution, probes)
    s, g = v.chunk(2)
    range_of_a = operator.products(_columns(operator, s), chunk_size)
    q = torch.linalg.qr(torch.stack([treemath.ravel(y).to(v.dtype) for y in range_of_a]).mT)[0].mT
    inside = _forms(operator, q, chunk_size).sum()
    # What float32 leaves of the subspace here is rounding beside the probe, and squared.
    g = torch.addmm(g, g @ q.mT, q, alpha=-1)
    return _mean(inside + _forms(operator, g, chunk_size))


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
    w, y, q, r, s, z, regular = _leave_one_out(
        operator, products, generator, distribution, probes, chunk_size
    )
    h = q.mT @ z
    x = q.mT @ w
    u = x - s * (s * x).sum(0)
    inside = h.diagonal().sum() - (s * (h @ s)).sum(0)
    rest = (w * y).sum(0) - (u * r).sum(0) - ((z.mT @ w) * u).sum(0) + (u * (h @ u)).sum(0)
    plain = (w * y).sum(0)
    return _mean(torch.where(regular, inside + rest, plain))


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
    w, y, q, r, s, z, regular = _leave_one_out(
        operator, products, generator, "rademacher", probes, chunk_size
    )
    inside = (q * z).sum(1, keepdim=True) - (q @ s) * (z @ s)
    rest = w * (y - q @ (r - s * (s * r).sum(0)))
    found = torch.where(regular, inside + rest, w * y)
    return _shaped(_mean(found.mT), operator.like)


def _leave_one_out(operator, products, generator, distribution, probes, chunk_size):
    """Probes, products, their QR, S, A Q, (P, k) or (k, k), :func:`wide`; whether R is regular."""
    if products % 2 or products < 4:
        msg = f"an even number of products is needed, at least 4, not {products}"
        raise ValueError(msg)
    k = products // 2
    if k > operator.size:
        msg = f"{products} products are more than twice the {operator.size} parameters"
        raise ValueError(msg)
    w = wide(_probes(operator, k, generator, distribution, probes))
    y = _multiply(operator, w, chunk_size).mT
    q, r = torch.linalg.qr(y)
    z = _multiply(operator, q.mT, chunk_size).mT
    # Two probes that agree up to sign leave R exactly singular: then each probe stands alone.
    regular = (r.diagonal() != 0).all()
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    s = torch.linalg.solve_triangular(torch.where(regular, r, eye).mT, eye, upper=False)
    scale = s.abs().amax(0, keepdim=True)
    s = s / scale
    s = s / s.norm(dim=0, keepdim=True)
    regular = regular & torch.isfinite(s).all()
    return w.mT, y, q, r, torch.where(regular, s, 0.0), z, regular


def _probes(operator, n, generator, distribution, probes) -> Tensor:
    if probes is None:
        return draw_probes(operator, n, generator, distribution)
    if probes.shape != (n, operator.size):
        msg = f"probes must have the shape {(n, operator.size)}, not {tuple(probes.shape)}"
        raise ValueError(msg)
    return probes


def _forms(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """(n,) ``v · A v`` of (n, P) rows, :func:`wide`."""
    return operator.quadratic_forms(_columns(operator, rows), chunk_size)


def _multiply(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """(n, P) rows times A, :func:`wide`."""
    product = operator.matmat(_columns(operator, rows), chunk_size)
    return wide(torch.cat([product[k].reshape(len(rows), -1) for k in operator.like], 1))


def _columns(operator: Operator, rows: Tensor) -> Params:
    parts = rows.split([p.numel() for p in operator.like.values()], 1)
    return {
        k: x.reshape(len(rows), *p.shape).to(p.dtype)
        for (k, p), x in zip(operator.like.items(), parts, strict=True)
    }


def _mean(samples: Tensor) -> Estimate:
    """Of samples along axis 0."""
    n = samples.shape[0]
    if n == 1:
        return Estimate(samples[0], torch.full_like(samples[0], torch.nan))
    # Two sums over the first axis: torch's own variance along it is twenty times as slow.
    mean = samples.sum(0) / n
    squares = (samples - mean).square().sum(0)
    return Estimate(mean, (squares / (n * (n - 1))).sqrt())


def _shaped(estimate: Estimate, like: Params) -> Estimate:
    return tree.map(lambda x: treemath.unravel(x, like), estimate)
