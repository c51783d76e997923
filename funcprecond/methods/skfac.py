"""SKFAC: K-FAC's factors of one batch, solved at the size of the batch instead of the layer."""

from typing import Literal

from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.layers.layer_call import Sharing
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.methods.kfac import kfac
from funcprecond.transform import Transform

__all__ = ["skfac"]


@card(
    "SKFAC (Tang 2021)",
    curvature="F̂_nmc, F̂_emp",
    representation="layer, KF-io, rank reduced",
    solver="L direct, SMW inverse",
    learning_rate=0.01,
)
def skfac(
    *,
    damping: float | Tensor = 0.03,
    damping_split: Literal["pi", "equal"] = "pi",
    labels: Labels = "mc",
    samples: int = 1,
    sharing: Sharing = "reduce",
    every: int = 10,
    start: int = 10,
) -> Transform:
    """SKFAC, sparse K-FAC (Tang et al., CVPR 2021).

    K-FAC's factors of a single batch have at most as many dimensions as the batch has rows. For M
    rows x in n columns, with M < n, let U, (M, n), be these rows over √M for the inputs, and times
    √c for the output gradients (see :func:`funcprecond.kfac`). The Sherman-Morrison-Woodbury
    identity then needs only an (M, M) matrix, and the (n, n) factor Uᵀ U is never formed::

        (Uᵀ U + r I)^-1 = (I - Uᵀ (U Uᵀ + r I)^-1 U) / r
        d = (B + √λ/π I)^-1 [∇W | ∇b] (A + √λ π I)^-1

    A factor with M ≥ n is formed and inverted. Both ways compute the same direction, that of
    ``fp.kfac(decay=None)`` with the same ``damping_split`` and ``sharing``.

    Args:
        damping: λ, in units of the loss.
        damping_split: how λ is divided between the factors, see
            :class:`funcprecond.solver.Cholesky`; the authors' program takes "equal", π = 1.
        labels, samples: as for :func:`funcprecond.kfac`.
        sharing: "reduce", as published, makes one row of all positions of an example, the mean of
            its inputs and the sum of its output gradients, so that M is the number of examples.
            "expand" has one row for each position.
        every, start: the factors are those of the batch of every ``every``-th step, and of each of
            the first ``start`` steps.

    Returns:
        A method that needs layer statistics, as K-FAC does. For a layer of i inputs and o outputs
        its state has M (i + o) numbers, which is linear in the width; a refresh takes about
        M² (i + o) operations, and a step 4 M i o or fewer.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(40, 30), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 40), torch.zeros(8, dtype=torch.int64))
        >>> opt, generator = fp.skfac(), torch.Generator().manual_seed(0)
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0), generator=generator)
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> state.representation.right["weight+bias"].shape
        torch.Size([8, 41])
    """
    one_of(("pi", "equal"), damping_split=damping_split)
    return kfac(
        damping=damping,
        damping_split=damping_split,
        labels=labels,
        samples=samples,
        sharing=sharing,
        max_dim=0,  # a factor of few rows is small, however long they are
        decay=None,
        every=every,
        refresh_every=every,
        start=start,
    )
