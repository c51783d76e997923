"""Random probes, their products with an operator, and estimates with their standard errors."""

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
    """An estimate and its standard error.

    Attributes:
        estimate: a 0-d tensor, or a dict of tensors shaped like the parameters.
        standard_error: the standard error of each entry of the estimate; NaN if there is only one
            sample, which does not determine it.
    """

    estimate: Tensor | Params
    standard_error: Tensor | Params


def draw_probes(
    operator: Operator,
    n: int,
    generator: torch.Generator | None,
    distribution: Distribution = "rademacher",
) -> Tensor:
    """Draw random vectors, which an estimator accepts as ``probes``.

    Estimators draw their own probes if they get a generator. Under a ``torch.func`` transform or
    ``torch.compile``, which accept no generator, draw them beforehand with this function.

    Args:
        operator: the operator whose trace or diagonal will be estimated.
        n: the number of vectors.
        generator: draws them.
        distribution: the distribution of the entries, which have mean 0 and variance 1:
            "rademacher" for random signs, or "normal".

    Returns:
        (n, P), where P is the number of rows of the operator.

    Raises:
        ValueError: ``distribution`` is unknown, n is not positive, or ``generator`` is None.

    Example:
        >>> import torch, funcprecond as fp
        >>> a = fp.operators.Identity({"w": torch.zeros(3)})
        >>> generator = torch.Generator().manual_seed(0)
        >>> fp.estimators.draw_probes(a, 2, generator).abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if distribution not in ("rademacher", "normal") or n < 1:
        msg = (
            "distribution must be 'rademacher' or 'normal', and the number of probes must be "
            f"positive, not {distribution!r} and {n}"
        )
        raise ValueError(msg)
    sample = random.rademacher if distribution == "rademacher" else random.normal
    return sample((n, operator.size), generator, **operator.flat_options)


def probes_of(operator, n, generator, distribution, probes) -> Tensor:
    """The given (n, P) probes, or new ones if they are None."""
    if probes is None:
        return draw_probes(operator, n, generator, distribution)
    if probes.shape != (n, operator.size):
        msg = f"probes must have the shape {(n, operator.size)}, not {tuple(probes.shape)}"
        raise ValueError(msg)
    return probes


def forms(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """``v · A v`` for each row v of an (n, P) matrix: (n,), in :func:`wide_dtype`."""
    return operator.quadratic_forms(from_rows(rows, operator.like), chunk_size)


def multiply(operator: Operator, rows: Tensor, chunk_size: int | None) -> Tensor:
    """``A v`` for each row v of an (n, P) matrix, as the rows of (n, P), in :func:`wide_dtype`."""
    product = operator.matmat(from_rows(rows, operator.like), chunk_size)
    return wide(to_rows(product, operator.like))


def leave_one_out(operator, products, generator, distribution, probes, chunk_size):
    """The matrices that XTrace and XDiag need, all in :func:`wide_dtype`.

    With k = products / 2 probes Ω and ``A Ω = Q R``, the basis without the i-th probe satisfies
    ``Q_i Q_i^T = Q (I - s_i s_i^T) Q^T``, where s_i is the i-th column of S, which is ``R^-T`` with
    normalized columns.

    Returns:
        Ω (P, k), ``A Ω`` (P, k), Q (P, k), R (k, k), S (k, k), ``A Q`` (P, k), and a 0-d boolean,
        whether R is invertible; if it is not, S is zero.

    Raises:
        ValueError: ``products`` is odd, less than 4 or more than 2 P.
    """
    if products % 2 or products < 4:
        msg = f"products must be an even number and at least 4, not {products}"
        raise ValueError(msg)
    k = products // 2
    if k > operator.size:
        msg = (
            f"products must not be more than twice the number of parameters, {operator.size}, but "
            f"it is {products}"
        )
        raise ValueError(msg)
    w = wide(probes_of(operator, k, generator, distribution, probes))
    y = multiply(operator, w, chunk_size).mT
    q, r = torch.linalg.qr(y)
    z = multiply(operator, q.mT, chunk_size).mT
    # If two probes are equal up to sign, R is exactly singular. The estimators then use Hutchinson.
    regular = (r.diagonal() != 0).all()
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    s = torch.linalg.solve_triangular(torch.where(regular, r, eye).mT, eye, upper=False)
    scale = s.abs().amax(0, keepdim=True)
    s = s / scale
    s = s / s.norm(dim=0, keepdim=True)
    regular = regular & torch.isfinite(s).all()
    return w.mT, y, q, r, torch.where(regular, s, 0.0), z, regular


def mean_of(samples: Tensor) -> Estimate:
    """The mean of the samples along axis 0, and its standard error."""
    n = samples.shape[0]
    if n == 1:
        return Estimate(samples[0], torch.full_like(samples[0], torch.nan))
    # torch.var along the first axis is twenty times as slow as these two sums.
    mean = samples.sum(0) / n
    squares = (samples - mean).square().sum(0)
    return Estimate(mean, (squares / (n * (n - 1))).sqrt())
