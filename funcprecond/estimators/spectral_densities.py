"""The density of a matrix's eigenvalues, by stochastic Lanczos quadrature."""

import math

import torch
from torch import Tensor

from funcprecond.estimators.lanczos import lanczos
from funcprecond.linalg import random
from funcprecond.operators.operator import Operator
from funcprecond.tree import state

__all__ = ["SpectralDensity", "spectral_density"]


@state
class SpectralDensity:
    """Quadrature nodes of the spectrum, one set a probe: what stochastic Lanczos quadrature gives.

    Attributes:
        nodes: (probes, m), Ritz values.
        weights: (probes, m), the share of the spectrum at each; they sum to 1 for a probe.
        size: P, a 0-d tensor.
    """

    nodes: Tensor
    weights: Tensor
    size: Tensor

    def density(self, grid: Tensor, width: float | Tensor | None = None) -> Tensor:
        """The density of eigenvalues on a grid, integrating to 1.

        Args:
            grid: any shape.
            width: the standard deviation of the Gaussian that stands for each node; 1 % of the
                nodes' range by default.
        """
        if width is None:
            width = 0.01 * (self.nodes.max() - self.nodes.min())
        width = torch.as_tensor(width, dtype=self.nodes.dtype, device=self.nodes.device)
        width = width.clamp_min(torch.finfo(self.nodes.dtype).tiny)
        distance = (grid.to(self.nodes).unsqueeze(-1) - self.nodes.reshape(-1)) / width
        bells = torch.exp(-0.5 * distance**2) / (width * math.sqrt(2 * math.pi))
        return (bells * self.weights.reshape(-1)).sum(-1) / self.nodes.shape[0]

    def trace(self, function) -> tuple[Tensor, Tensor]:
        """The trace of a function of the matrix, as (estimate, standard error).

        ``function`` acts on eigenvalues: ``torch.log1p`` gives ``log det (I + A)``.
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
    """The density of a symmetric operator's eigenvalues (stochastic Lanczos quadrature).

    Args:
        operator: A.
        probes: random sign vectors to average over.
        steps: m, products for each. Memory: m vectors.
        reorthogonalize: if not, three vectors are in memory; eigenvalues that are found already
            then come up again as nodes that share the weight, so that fewer new ones are found.
        generator: draws the probes.
        vectors: (probes, P) instead.

    Moments up to ``2 steps - 1`` of each probe's spectral measure are exact.
    """
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
        # A space that ended early is filled up with nodes that have no weight.
        missing = steps - len(values)
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([columns[0] ** 2, values.new_zeros(missing)]))
    size = torch.full_like(nodes[0][0], operator.size)
    return SpectralDensity(torch.stack(nodes), torch.stack(weights), size)
