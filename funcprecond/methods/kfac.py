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

__all__ = ["kfac"]


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
    max_dim: int = 10000,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """K-FAC, Kronecker-factored approximate curvature (Martens & Grosse, arXiv 1503.05671).

    A layer computes ``z = [W | b] [a; 1]``. Let a be its inputs with the 1 appended, g the
    gradients of the loss in z for labels sampled from p(y|x), and c the loss's reduction constant
    (1/N for a mean). The layer's block F of the Fisher matrix is approximated by one Kronecker
    product, and the direction solves with it::

        A = mean a aᵀ        B = c Σ g gᵀ        F ≈ B ⊗ A
        d = (B ⊗ A + λ I)^-1 [∇W | ∇b]                          damping_split="joint"
        d = (B + √λ/π I)^-1 [∇W | ∇b] (A + √λ π I)^-1           damping_split="pi"

    where ``(X ⊗ Y) M`` is ``X M Yᵀ``. A and B are moving averages over the steps. A layer is any
    function call that applies a weight: linear and bilinear maps, convolutions (Grosse & Martens,
    arXiv 1602.01407) and embeddings, also where a linear layer shares the embedding's weight.
    Weights that are shared over positions follow Eschenhagen et al., arXiv 2311.00636. A norm layer
    gets an exact 2 × 2 block for each unit's scale and shift. All other parameters get the diagonal
    of their curvature.

    Args:
        damping: λ, in units of the loss.
        damping_split: "joint" adds λ to the product, exactly; "pi" and "equal" add parts of it to
            the factors, see :class:`funcprecond.solver.Cholesky`. Those regularize much more
            strongly at the same λ.
        labels: "mc" for the Fisher matrix with sampled labels, "empirical" for the labels of the
            data, "exact" for the exact expectation (:func:`funcprecond.kflr`).
        samples: the number of labels to sample for each term of the loss, with "mc".
        sharing: how the positions of one example are combined, "expand" or "reduce", see
            :class:`funcprecond.curvature.LayerStatistics`.
        max_dim: a factor of a longer axis (such as the vocabulary of an output layer) keeps only
            its diagonal; 0 means no limit. An embedding's factor of its indices is always diagonal.
        decay: the weight of the old factors in the moving average, or None to use the newest batch
            alone. The paper uses ``fp.RisingDecay(0.95)``.
        every, refresh_every, start: the factors are measured at every ``every``-th step and
            decomposed at every ``refresh_every``-th, and at each of the first ``start`` steps; see
            :func:`funcprecond.compose`.

    Returns:
        A method that needs layer statistics: one more backward pass through the layers' outputs for
        each sampled label. Its state has 2 to 4 times i² + o² numbers for a layer of i inputs and o
        outputs. A refresh decomposes both factors; a step takes 2 to 4 matrix products per layer.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> opt, generator = fp.kfac(damping=0.1), torch.Generator().manual_seed(0)
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0), generator=generator)
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> direction["weight"].shape
        torch.Size([3, 4])
    """
    one_of(("joint", "pi", "equal"), damping_split=damping_split)
    joint = damping_split == "joint"
    return compose(
        LayerStatistics(labels, samples, sharing=sharing, tied=True),
        KroneckerIO,
        # An explicit inverse costs more than a factorization, and pays over several steps.
        Eigen(damping) if joint else Cholesky(damping, damping_split, invert=refresh_every > 4),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        # The factors of one batch have low rank, which the split damping can exploit.
        initial=lambda params: KroneckerIO.init(params, decay is None and not joint, max_dim),
    )
