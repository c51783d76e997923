"""The natural gradient itself: the dense Fisher matrix of a small network, decomposed."""

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import ExampleRows
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.dense_blocks import DenseBlocks
from funcprecond.solver.dense_cholesky import DenseCholesky
from funcprecond.transform import Transform

__all__ = ["layerwise_ng", "natural_gradient"]


@card(
    "Natural gradient (Amari 1998)",
    curvature="F, F̂_nmc, F̂_emp",
    representation="full, dense",
    solver="L/G direct, Cholesky",
    learning_rate=0.3,
    options={"damping": 1.0},
)
def natural_gradient(
    *,
    damping: float | Tensor = 1e-3,
    labels: Labels = "exact",
    samples: int = 1,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
) -> Transform:
    """The natural gradient (Amari, Neural Computation 1998), for small networks.

    F is the Fisher matrix of all P parameters jointly, which all methods of its family
    approximate::

        F = c Σ_n J_nᵀ E_y[s_n s_nᵀ] J_n                         (P, P)
        d = (F + λ I)⁻¹ g

    J_n is the Jacobian of the outputs of example n, s_n the gradient of its loss in the outputs at
    a label y, and c the loss's reduction constant.

    Args:
        damping: λ, in units of the loss.
        labels: "exact" for the exact Fisher matrix, which is the Gauss-Newton matrix of a
            likelihood; "mc" for sampled labels; "empirical" for the labels of the data.
        samples: the number of labels to sample for each term of the loss, with "mc".
        decay: the weight of the old matrix, or None to use the newest batch alone.
        every, refresh_every, start: the intervals of the measurement and of the decomposition, in
            steps, see :func:`funcprecond.compose`.

    Returns:
        A method that needs the rows of single examples. Its state has 2 P² numbers, and a refresh
        takes P³/3 operations.

    Raises:
        ValueError: an option has a value that is not allowed, or ``init`` gets parameters of more
            than 4096 entries; :func:`funcprecond.smw_ng` has the same step for one batch.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.natural_gradient(damping=1e-2), fp.scale(0.1))
    """
    return _dense(True, damping, labels, samples, decay, every, refresh_every, start)


@card(
    "Layer-wise natural gradient",
    curvature="F, F̂_nmc, F̂_emp",
    representation="layer, dense",
    solver="L/G direct, Cholesky",
    learning_rate=0.3,
    options={"damping": 1.0},
)
def layerwise_ng(
    *,
    damping: float | Tensor = 1e-3,
    labels: Labels = "exact",
    samples: int = 1,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
) -> Transform:
    """The natural gradient of each layer by itself, for small networks.

    The Fisher matrix without the blocks of two different layers, which is what K-FAC and its
    relatives approximate further (Martens & Grosse, arXiv 1503.05671, section 3)::

        F_l = c Σ_n J_nlᵀ E_y[s_n s_nᵀ] J_nl                     (D, D) for the D entries of [W | b]
        d_l = (F_l + λ I)⁻¹ g_l

    Args:
        damping, labels, samples, decay, every, refresh_every, start: see
            :func:`funcprecond.natural_gradient`. A parameter outside of layers is a layer of its
            own.

    Returns:
        A method that needs the rows of single examples. Its state has 2 D² numbers for each layer,
        and a refresh takes D³/3 operations.

    Raises:
        ValueError: an option has a value that is not allowed, or a layer has more than 4096
            entries.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.layerwise_ng(damping=1e-2), fp.scale(0.1))
    """
    return _dense(False, damping, labels, samples, decay, every, refresh_every, start)


def _dense(whole, damping, labels, samples, decay, every, refresh_every, start) -> Transform:
    return compose(
        ExampleRows(labels, samples),
        DenseBlocks,
        DenseCholesky(damping),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        initial=lambda params: DenseBlocks.init(params, whole),
    )
