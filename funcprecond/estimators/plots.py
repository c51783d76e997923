"""Plots of curvature: a matrix with its blocks, a spectrum, and the quality of approximations.

Only the functions that draw import Matplotlib. :func:`approximation_quality` computes its numbers
without it.
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
    """The quality of an approximation A of a matrix C.

    Attributes:
        error: ``|A - C|_F / |C|_F``, a 0-d tensor.
        cosine: the cosine of the angle between ``(A + λ I)^-1 b`` and ``(C + λ I)^-1 b``, averaged
            over random vectors b, a 0-d tensor.
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
    """Compare approximations with the exact matrix, block by block, as dense matrices.

    Args:
        exact: C, such as a :class:`funcprecond.GGN`.
        approximations: the approximations A, by name.
        damping: λ, the damping of the solves that are compared.
        by: the blocks, see :meth:`funcprecond.Operator.blocks`.
        probes: the number of random right-hand sides b, which are standard normal.
        generator: draws them.

    Returns:
        ``{block: {name: Quality}}``. Costs P products with each of the operators, where P is the
        number of parameters.

    Raises:
        ValueError: ``by`` is not a partition of the parameters, or ``generator`` is None.

    Example:
        >>> import torch, funcprecond as fp
        >>> c = fp.operators.Identity({"a.weight": torch.zeros(2)})
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = fp.plots.approximation_quality(
        ...     c, {"twice": 2 * c}, damping=0.1, generator=generator
        ... )
        >>> float(found["a"]["twice"].error)
        1.0
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
    """Draw the entries of a curvature matrix, with lines between its blocks.

    The color of an entry shows the logarithm of its absolute value, because the entries of
    curvature matrices span many orders of magnitude.

    Args:
        operator: the matrix.
        by: the blocks, see :meth:`funcprecond.Operator.blocks`.
        axes: the Matplotlib axes to draw into; new ones by default.

    Returns:
        The axes. Costs P products with the operator, where P is the number of parameters.

    Raises:
        ValueError: ``by`` is not a partition of the parameters.
        ModuleNotFoundError: Matplotlib is not installed.

    Example:
        >>> import torch, funcprecond as fp
        >>> from matplotlib.figure import Figure
        >>> c = fp.operators.Identity({"a.weight": torch.zeros(2), "b.weight": torch.zeros(1)})
        >>> axes = fp.plots.matrix(c, axes=Figure().subplots())
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['a', 'b']
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
    """Draw a spectral density on a logarithmic axis.

    Args:
        density: the density, from :func:`funcprecond.spectral_density`.
        eigenvalues: (k,) eigenvalues to mark at the bottom, such as those of
            :func:`funcprecond.eigsh`.
        points: the number of points of the curve.
        axes: the Matplotlib axes to draw into; new ones by default.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.

    Example:
        >>> import torch, funcprecond as fp
        >>> from matplotlib.figure import Figure
        >>> values = {"w": torch.tensor([3.0, 2.0, 0.0])}
        >>> c = fp.operators.DiagonalMatrix(values, values)
        >>> density = fp.spectral_density(c, generator=torch.Generator().manual_seed(0))
        >>> fp.plots.spectrum(density, axes=Figure().subplots()).get_xlabel()
        'eigenvalue'
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
    """Draw the result of :func:`approximation_quality` as two bar charts, for error and cosine.

    Args:
        measured: ``{block: {name: Quality}}``.
        axes: two Matplotlib axes to draw into; new ones by default.

    Returns:
        The two axes.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.

    Example:
        >>> import torch, funcprecond as fp
        >>> from matplotlib.figure import Figure
        >>> one = fp.plots.Quality(torch.tensor(0.5), torch.tensor(0.9))
        >>> axes = fp.plots.quality({"a": {"kfac": one}}, axes=Figure().subplots(1, 2))
        >>> axes[0].get_title()
        'relative Frobenius error'
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
    """The given axes, or new ones."""
    if axes is not None:
        return axes
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 4.5), layout="constrained")[1]
