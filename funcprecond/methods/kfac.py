"""K-FAC: the Fisher matrix as a Kronecker product for each layer."""

from typing import Literal

from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.layer_call import Sharing
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky
from funcprecond.solver.eigen import Eigen
from funcprecond.transform import Transform

__all__ = ["kfac", "kflr"]


@card(
    "K-FAC (Martens & Grosse 2015)",
    curvature="F̂_nmc, F̂_emp",
    representation="layer, KF-io",
    solver="L/G direct, Cholesky inverse or eigendecomposition",
    learning_rate=0.03,
    options={"damping": 0.03, "damping_split": "pi"},
    starred=True,
)
def kfac(
    *,
    damping: float | Tensor = 1e-3,
    damping_split: Literal["joint", "pi", "equal"] = "joint",
    labels: Labels = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    max_dim: int = 0,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """K-FAC (Martens & Grosse, arXiv 1503.05671).

    For a layer with inputs a (a 1 appended for the bias) and output gradients g of labels drawn
    from p(y|x), with c the loss's reduction constant::

        A = mean a aᵀ        B = c Σ g gᵀ        F ≈ B ⊗ A
        d = (B ⊗ A + λ I)^-1 [∇W | ∇b]                          damping_split="joint"
        d = (B + √λ/π I)^-1 [∇W | ∇b] (A + √λ π I)^-1           damping_split="pi"

    where (x ⊗ y) M is x M yᵀ. Layers are whatever applies a weight: linear, bilinear, convolution
    (Grosse & Martens, arXiv 1602.01407) and embedding, which may be tied to a linear layer; shared
    weights are those of Eschenhagen et al., arXiv 2311.00636. Norm layers get exact 2 × 2 blocks
    for each unit, and everything else the diagonal of its curvature.

    Args:
        damping: λ, in the loss's units.
        damping_split: "joint" damps the product, exactly; "pi" and "equal" damp the factors, see
            :class:`funcprecond.solver.cholesky.Cholesky`. The same λ is much stronger there.
        labels: "mc" (the Fisher matrix, sampled), "empirical", or "exact" (KFLR: as many pull-backs
            as an example has outputs).
        samples: sampled labels for each term, with "mc".
        sharing: how the positions of one example are combined, "expand" or "reduce", see
            :class:`funcprecond.curvature.LayerStatistics`.
        max_dim: of a longer axis of a weight, such as a head's vocabulary, only the diagonal of the
            factor is kept, as of an embedding's; 0 is no limit.
        decay: None for the newest batch alone, or the weight of the old factors; the paper's is
            ``fp.RisingDecay(0.95)``.
        every, refresh_every, start: the intervals of the factors and of their decompositions, see
            :func:`funcprecond.compose`.

    Returns:
        A method that needs layer statistics: one more pull-back to the layers for each sampled
        label. It keeps 2 to 4 (i² + o²) numbers for a layer; each refresh decomposes both factors,
        each step takes 2 to 4 products.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> opt, generator = fp.kfac(damping=0.1), torch.Generator().manual_seed(0)
        >>> evidence = fp.observe(
        ...     problem, problem.params, batch, opt.needs(0), generator=generator
        ... )
        >>> state, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
    """
    one_of(("joint", "pi", "equal"), damping_split=damping_split)
    joint = damping_split == "joint"
    return compose(
        LayerStatistics(labels, samples, sharing=sharing, tied=True),
        KroneckerIO,
        # Inverses pay when they are used for several steps.
        Eigen(damping) if joint else Cholesky(damping, damping_split, invert=refresh_every > 4),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        # Of one batch the factors have low rank, which the split damping can make use of.
        initial=lambda params: KroneckerIO.init(params, decay is None and not joint, max_dim),
    )


@card(
    "KFLR (Botev 2017)",
    curvature="F (= G) exact",
    representation="layer, KF-io",
    solver="L/G direct, Cholesky inverse or eigendecomposition",
    learning_rate=0.03,
    options={"damping": 0.03, "damping_split": "pi"},
)
def kflr(
    *,
    damping: float | Tensor = 1e-3,
    damping_split: Literal["joint", "pi", "equal"] = "joint",
    sharing: Sharing = "expand",
    max_dim: int = 0,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """K-FAC with the exact Fisher matrix at the outputs (Botev et al., arXiv 1706.03662).

    It is ``kfac(labels="exact", ...)``: no randomness, and as many pull-backs as an example has
    outputs.

    Args:
        damping, damping_split, sharing, max_dim, decay, every, refresh_every, start: see
            :func:`funcprecond.kfac`.

    Returns:
        A method, see :func:`funcprecond.kfac`.

    Raises:
        ValueError: an option has a value that it cannot have.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.kflr(damping=1e-2), fp.scale(0.1))
    """
    return kfac(
        labels="exact",
        damping=damping,
        damping_split=damping_split,
        sharing=sharing,
        max_dim=max_dim,
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
    )
