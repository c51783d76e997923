"""Diagonal natural gradient: the Fisher matrix of each parameter entry alone."""

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.layer_diagonal import LayerDiagonal
from funcprecond.solver.divide import Divide
from funcprecond.transform import Transform

__all__ = ["diagonal_ng"]


@card(
    "Diagonal NG (Becker & LeCun 1988)",
    curvature="F, F̂_nmc, F̂_emp",
    representation="element",
    solver="L/G direct, division",
    learning_rate=0.00316,
    options={"damping": 0.03},
)
def diagonal_ng(
    *,
    damping: float | Tensor = 1e-3,
    power: float = 1.0,
    labels: Labels = "mc",
    samples: int = 1,
    decay: Decay = 0.95,
    every: int = 1,
) -> Transform:
    """Natural gradient with the diagonal of the Fisher matrix.

    Becker & LeCun (1988) divide by the diagonal of the Gauss-Newton matrix, which is that of the
    Fisher matrix; Martens (arXiv 1412.1193, section 10) discusses its estimates. Let g_n be the
    gradient of example n, summed over its positions, for labels sampled from p(y|x), and c the
    loss's reduction constant (1/N for a mean). All operations are element-wise::

        s = c Σ_n g_n²
        d = ∇ / (s + λ)                          power=1
        d = ∇ / (s^power + λ)                    power=1/2 for steps like Adam's

    This differs from Adam's second moment, the square of the mean gradient of a batch.

    Args:
        damping: λ, added to the power of s; with ``power=1`` in units of the loss.
        power: the exponent of s.
        labels, samples: as for :func:`funcprecond.kfac`; "exact" is the diagonal of the
            Gauss-Newton matrix.
        decay: the weight of the old s in the moving average, or None to use the newest batch alone.
        every: the interval of the measurement of s, in steps.

    Returns:
        A method that needs layer statistics with the examples kept apart. Its state is two copies
        of the parameters. A measurement is one product of squares per layer where each example has
        one position, and forms the examples' gradients, a few at a time, where it has several.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> opt, generator = fp.diagonal_ng(), torch.Generator().manual_seed(0)
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0), generator=generator)
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> direction["weight"].shape
        torch.Size([3, 4])
    """
    return compose(
        LayerStatistics(labels, samples, per_sample=True),
        LayerDiagonal,
        Divide(damping, power),
        decay=decay,
        every=every,
        refresh_every=every,
    )
