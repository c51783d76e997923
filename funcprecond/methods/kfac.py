"""K-FAC: the Fisher matrix as a Kronecker product for each layer.

Row: F̂_nmc, F̂_emp or exact F; layer, KF-io; Cholesky inverse or eigendecomposition. Martens &
Grosse, arXiv 1503.05671; convolutions: Grosse & Martens, arXiv 1602.01407; shared weights:
Eschenhagen et al., arXiv 2311.00636. With inputs a (a 1 appended for the bias) and output gradients
g of labels y ~ p(y|x)::

    A = mean a aᵀ        B = c Σ g gᵀ        F ≈ B ⊗ A
    d = (B ⊗ A + λ I)^-1 [∇W | ∇b]                          damping_split="joint"
    d = (B + √λ/π I)^-1 [∇W | ∇b] (A + √λ π I)^-1           damping_split="pi"

Layers are whatever applies a weight: linear, convolution (any stride, padding, dilation, groups)
and embedding, which may be tied to a linear layer; norm layers get exact 2 × 2 blocks a unit; the
rest its diagonal. Needs layer statistics: one more pull-back to the layers for each sampled label.
2 to 4 (i² + o²) numbers a layer; each refresh a decomposition of both factors, each step 2 to 4
products.
"""

from typing import Any, Literal

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.kinds.base import Sharing
from funcprecond.losses.base import Labels
from funcprecond.methods.table import Card
from funcprecond.representation.average import Decay
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky
from funcprecond.solver.eigen import Eigen
from funcprecond.transform import Transform

__all__ = ["kfac", "kflr"]


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
    """K-FAC's direction.

    Args:
        damping: λ, in the loss's units.
        damping_split: "joint" damps the product, exactly; "pi" and "equal" damp the factors, see
            :class:`funcprecond.solver.cholesky.Cholesky`. The same λ is much stronger there.
        labels: "mc" (the Fisher matrix, sampled), "empirical", or "exact" (KFLR: as many pull-backs
            as an example has outputs).
        samples: sampled labels, with "mc".
        sharing: how positions of one example are combined, "expand" or "reduce", see
            :func:`funcprecond.representation.kronecker_io.layer_rows`.
        max_dim: of a longer axis of a weight, such as a head's vocabulary, only the diagonal of the
            factor is kept, as of an embedding's; 0 is no limit.
        decay: None for the newest batch alone, or the weight of the old factors; the paper's is
            ``fp.RisingDecay(0.95)``.
        every, refresh_every, start: the intervals, see :func:`funcprecond.composition`.
    """
    if damping_split not in ("joint", "pi", "equal"):
        msg = f"damping_split must be 'joint', 'pi' or 'equal', not {damping_split!r}"
        raise ValueError(msg)
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


def kflr(**options: Any) -> Transform:
    """K-FAC with the exact Fisher matrix at the outputs (Botev et al., arXiv 1706.03662).

    ``kfac(labels="exact", ...)``: as many pull-backs as an example has outputs, no randomness.
    """
    return kfac(labels="exact", **options)


_STORED = ("layer, KF-io", "L/G direct, Cholesky inverse or eigendecomposition")
CARDS = (
    Card(
        "kfac",
        "K-FAC (Martens & Grosse 2015)",
        "F̂_nmc, F̂_emp",
        *_STORED,
        kfac,
        learning_rate=0.03,
        intervals=True,
        starred=True,
        options={"damping": 0.03, "damping_split": "pi"},
    ),
    Card(
        "kflr",
        "KFLR (Botev 2017)",
        "F (= G) exact",
        *_STORED,
        kflr,
        learning_rate=0.03,
        intervals=True,
        options={"damping": 0.03, "damping_split": "pi"},
    ),
)
