"""Random probes, what they give of an operator, and estimates with their standard errors."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.linalg.precision import wide
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import from_rows, to_rows
from funcprecond.tree import Params, state

__all__ = ["Distribution", "Estimate", "draw_probes"]

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


def probes_of(operator, n, generator, distribution, probes) -> Tensor:
    if probes is None:
        return draw_probes(operator, n, generator, distribution)
    if probes.shape != (n, operator.size):
        msg = f"probes must have the shape {(n, operator.size)}, not {tuple(probes.shape)}"
        raise ValueError(msg)
    return probes


def forms(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """(n,) ``v · A v`` of (n, P) rows, :func:`wide`."""
    return operator.quadratic_forms(from_rows(rows, operator.like), chunk_size)


def multiply(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """(n, P) rows times A, :func:`wide`."""
    product = operator.matmat(from_rows(rows, operator.like), chunk_size)
    return wide(to_rows(product, operator.like))


def leave_one_out(operator, products, generator, distribution, probes, chunk_size):
    """Probes, products, their QR, S, A Q, (P, k) or (k, k), :func:`wide`; whether R is regular."""
    if products % 2 or products < 4:
        msg = f"an even number of products is needed, at least 4, not {products}"
        raise ValueError(msg)
    k = products // 2
    if k > operator.size:
        msg = f"{products} products are more than twice the {operator.size} parameters"
        raise ValueError(msg)
    w = wide(probes_of(operator, k, generator, distribution, probes))
    y = multiply(operator, w, chunk_size).mT
    q, r = torch.linalg.qr(y)
    z = multiply(operator, q.mT, chunk_size).mT
    # Two probes that agree up to sign leave R exactly singular: then each probe stands alone.
    regular = (r.diagonal() != 0).all()
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    s = torch.linalg.solve_triangular(torch.where(regular, r, eye).mT, eye, upper=False)
    scale = s.abs().amax(0, keepdim=True)
    s = s / scale
    s = s / s.norm(dim=0, keepdim=True)
    regular = regular & torch.isfinite(s).all()
    return w.mT, y, q, r, torch.where(regular, s, 0.0), z, regular


def mean_of(samples: Tensor) -> Estimate:
    """Of samples along axis 0."""
    n = samples.shape[0]
    if n == 1:
        return Estimate(samples[0], torch.full_like(samples[0], torch.nan))
    # Two sums over the first axis: torch's own variance along it is twenty times as slow.
    mean = samples.sum(0) / n
    squares = (samples - mean).square().sum(0)
    return Estimate(mean, (squares / (n * (n - 1))).sqrt())
