"""Looking at curvature: the matrix by blocks, its spectrum, and how good an approximation is.

Matplotlib is imported by the functions that draw; what they draw can be had without it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcprecond.estimators.spectral_densities import SpectralDensity
from funcprecond.linalg import random, treemath
from funcprecond.linalg.precision import wide
from funcprecond.operators.operator import Operator
from funcprecond.operators.vector_stacks import Partition, partition_of
from funcprecond.tree import state

__all__ = ["Quality", "approximation_quality", "matrix", "quality", "spectrum"]


@state
class Quality:
    """How far an approximation of a block is from it.

    Attributes:
        error: ``|A - C|_F / |C|_F``, a 0-d tensor.
        cosine: of the angle between the damped solves with A and with C, of random vectors, in the
            mean.
    """

    error: Tensor
    cosine: Tensor


def approximation_quality(
    exact: Operator,
    approximations: Mapping[str, Operator],
    *,
    damping: float | Tensor,
    by: Partition = "layer",
    probes: int = 16,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, Quality]]:
    """Every approximation against the truth, block by block, in dense algebra.

    Args:
        exact: C, such as a :class:`funcprecond.GGN`.
        approximations: A, by name.
        damping: of the solves.
        by: the blocks, see :meth:`Operator.blocks`.
        probes: random right-hand sides, standard normal.
        generator: draws them.

    Returns:
        ``{block: {name: Quality}}``. Costs as many products as there are parameters.
    """
    found: dict[str, dict[str, Quality]] = {}
    for label, names in partition_of(exact.like, by).items():
        c = wide(exact.block(names).to_dense())
        shape = (probes, c.shape[0])
        b = random.normal(shape, generator, dtype=c.dtype, device=c.device).mT
        eye = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
        truth = torch.linalg.solve(c + damping * eye, b)
        found[label] = {}
        for name, operator in approximations.items():
            a = wide(operator.block(names).to_dense())
            guess = torch.linalg.solve(a + damping * eye, b)
            cosine = torch.nn.functional.cosine_similarity(guess, truth, dim=0).mean()
            norm = torch.linalg.matrix_norm
            found[label][name] = Quality(norm(a - c) / norm(c), cosine)
    return found


def matrix(operator: Operator, *, by: Partition = "layer", axes: Any = None) -> Any:
    """Draw a curvature matrix entry by entry, with lines between its blocks.

    The colour is the logarithm of an entry's size: curvature spans many magnitudes.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    groups = partition_of(operator.like, by)
    order = [k for names in groups.values() for k in names]
    index = treemath.unravel(torch.arange(operator.size), operator.like)
    order = torch.cat([index[k].reshape(-1) for k in order])
    dense = operator.to_dense().detach().cpu().double()[order][:, order].abs()
    top = dense.max().clamp_min(torch.finfo(torch.float64).tiny)
    image = axes.imshow((dense / top).clamp_min(1e-6).log10().numpy(), vmin=-6, vmax=0)
    edge, ticks = 0, []
    for names in groups.values():
        size = sum(operator.like[k].numel() for k in names)
        ticks.append(edge + size / 2 - 0.5)
        edge += size
        if edge < operator.size:
            axes.axhline(edge - 0.5, color="white", linewidth=0.5)
            axes.axvline(edge - 0.5, color="white", linewidth=0.5)
    axes.set_xticks(ticks, list(groups), rotation=45, ha="right")
    axes.set_yticks(ticks, list(groups))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("log10 |entry| / largest")
    return axes


def spectrum(
    density: SpectralDensity,
    *,
    eigenvalues: Tensor | None = None,
    points: int = 1000,
    axes: Any = None,
) -> Any:
    """Draw a spectral density, logarithmically, with single eigenvalues as marks below.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    low, high = float(density.nodes.min()), float(density.nodes.max())
    margin = 0.05 * (high - low)
    grid = torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
    height = density.density(grid.to(density.nodes.device)).cpu()
    axes.semilogy(grid, height)
    axes.set_ylim(bottom=max(float(height.max()) * 1e-8, 1e-300))
    if eigenvalues is not None:
        marks = eigenvalues.detach().cpu()
        axes.plot(marks, torch.full_like(marks, axes.get_ylim()[0]), "|", markersize=16, color="C1")
    axes.set(xlabel="eigenvalue", ylabel="density")
    return axes


def quality(measured: Mapping[str, Mapping[str, Quality]], *, axes: Any = None) -> Any:
    """Draw :func:`approximation_quality` as bars, error and cosine side by side.

    Returns:
        Both axes.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")[1]
    labels, names = list(measured), list(next(iter(measured.values())))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(labels))]
        for ax, what in zip(axes, ("error", "cosine"), strict=True):
            heights = [float(getattr(measured[label][name], what)) for label in labels]
            ax.bar(places, heights, width, label=name)
    for ax, title in zip(
        axes, ("relative Frobenius error", "cosine with the exact solve"), strict=True
    ):
        ax.set_xticks(range(len(labels)), labels)
        ax.set(title=title, xlabel="block")
    axes[0].legend()
    return axes


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 4.5), layout="constrained")[1]
