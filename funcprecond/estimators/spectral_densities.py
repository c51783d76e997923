"""The density of a matrix's eigenvalues, by stochastic Lanczos quadrature."""

import math

import torch
from torch import Tensor

from funcprecond.estimators.eigenpairs import ADVICE
from funcprecond.estimators.lanczos import lanczos
from funcprecond.linalg import random
from funcprecond.operators.operator import Operator
from funcprecond.operators.solve import require_symmetric
from funcprecond.tree import state

__all__ = ["SpectralDensity", "spectral_density"]


@state
class SpectralDensity:
    """The result of stochastic Lanczos quadrature: one set of weighted nodes per probe.

    Attributes:
        nodes: (probes, m), the Ritz values.
        weights: (probes, m), the share of the spectrum at each node; they sum to 1 for each probe.
        size: P, the number of eigenvalues, a 0-d tensor.
    """

    nodes: Tensor
    weights: Tensor
    size: Tensor

    def density(self, grid: Tensor, width: float | Tensor | None = None) -> Tensor:
        """The density of the eigenvalues at the points of a grid; its integral is 1.

        Args:
            grid: the points, of any shape.
            width: the standard deviation of the Gaussian that replaces each node, positive; by
                default 1 % of the range of the nodes, or of the largest magnitude of a node if all
                are equal up to rounding, or 0.01 if all are zero.

        Returns:
            A tensor shaped like ``grid``.

        Raises:
            ValueError: ``width`` is a number that is not positive.
        """
        if width is None:
            largest = self.nodes.abs().max()
            extent = self.nodes.max() - self.nodes.min()
            # The nodes are computed in float64 from products that may have been float32.
            equal = extent <= 1e-5 * largest
            extent = torch.where(equal, torch.where(largest > 0, largest, 1.0), extent)
            width = 0.01 * extent
        if not isinstance(width, Tensor) and not width > 0:
            msg = f"width must be positive, not {width!r}"
            raise ValueError(msg)
        width = torch.as_tensor(width, dtype=self.nodes.dtype, device=self.nodes.device)
        distance = (grid.to(self.nodes).unsqueeze(-1) - self.nodes.reshape(-1)) / width
        bells = torch.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return (bells * self.weights.reshape(-1)).sum(-1) / self.nodes.shape[0]

    def trace(self, function) -> tuple[Tensor, Tensor]:
        """The trace of a function of the matrix.

        Args:
            function: a function of a tensor of eigenvalues, entry by entry. For example,
                ``torch.log1p`` gives ``log det (I + A)``.

        Returns:
            The estimate and its standard error (NaN for a single probe), two 0-d tensors.
        """
        each = self.size * (self.weights * function(self.nodes)).sum(1)
        n = each.shape[0]
        error = each.std() / n**0.5 if n > 1 else torch.full_like(each[0], torch.nan)
        return each.mean(), error


def spectral_density(
    operator: Operator,
    *,
    probes: int = 1,
    steps: int = 100,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    vectors: Tensor | None = None,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric A, by stochastic Lanczos quadrature.

    The moments of each probe's spectral measure are exact up to the order ``2 steps - 1`` (Ubaru,
    Chen & Saad 2017).

    Args:
        operator: A.
        probes: the number of random sign vectors, over which the density is averaged.
        steps: m, the number of Lanczos steps per probe; at most P are taken.
        reorthogonalize: whether each Lanczos vector is made orthogonal to all previous ones, for
            which m vectors are stored. If not, three vectors are stored, but rounding then makes
            some eigenvalues appear as several nodes, which share their weight, so that fewer
            distinct eigenvalues are found.
        generator: draws the probes, if ``vectors`` is None.
        vectors: the probes, (probes, P).

    Returns:
        A :class:`funcprecond.SpectralDensity`, which in eager mode has no derivatives, even if the
        operator's data require them. Costs ``steps`` products per probe.

    Raises:
        TypeError: A is not symmetric.
        ValueError: ``generator`` and ``vectors`` are both None, or a product is not finite.

    Example:
        >>> import torch, funcprecond as fp
        >>> values = {"w": torch.tensor([3.0, 2.0, 0.0])}
        >>> a = fp.operators.DiagonalMatrix(values, values)
        >>> generator = torch.Generator().manual_seed(0)
        >>> density = fp.spectral_density(a, probes=2, generator=generator)
        >>> density.nodes.shape
        torch.Size([2, 3])
    """
    require_symmetric(operator, "spectral_density()", ADVICE)
    dtype = operator.flat_options["dtype"] if vectors is None else vectors.dtype
    if vectors is None:
        signs = {**operator.flat_options, "dtype": torch.int8}
        vectors = random.rademacher((probes, operator.size), generator, **signs)
    steps = min(steps, operator.size)
    nodes, weights = [], []
    for v in vectors:
        space = lanczos(operator, v.to(dtype), steps, reorthogonalize=reorthogonalize)
        values, columns, _ = space.ritz()
        del space
        # If the iteration ended early, nodes of weight zero are appended.
        missing = steps - len(values)
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([columns[0] ** 2, values.new_zeros(missing)]))
    size = torch.full_like(nodes[0][0], operator.size)
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), size)
