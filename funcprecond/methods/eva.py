"""Eva: K-FAC with one vector in the place of each factor."""

from typing import Literal

from torch import Tensor

from funcprecond.checks import one_of
from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.mean_rows import MeanRows
from funcprecond.solver.rank_one import RankOne
from funcprecond.transform import Transform

__all__ = ["eva"]


@card(
    "Eva (Zhang 2023)",
    curvature="F̂_emp",
    representation="layer, rank-one KF-io",
    solver="G direct, Sherman-Morrison",
    learning_rate=0.00316,
)
def eva(
    *,
    damping: float | Tensor = 0.03,
    form: Literal["eva", "eva-f"] = "eva",
    decay: Decay = 0.05,
    every: int = 1,
) -> Transform:
    """Eva, efficient vectorized approximation (Zhang, Shi & Li, arXiv 2308.02123).

    A layer computes ``z = [W | b] a`` of inputs a with a 1 appended; g are the gradients in z of
    the loss of each of N examples, and c is the loss's reduction constant (1/N for a mean). Each
    factor of K-FAC (:func:`funcprecond.kfac`) is replaced by the outer product of a mean with
    itself, and the Sherman-Morrison formula inverts the result. With G = [∇W | ∇b]::

        ā = mean a                    over examples and positions
        ḡ = √(c N) mean g             over examples, each g summed over its positions
        d = (λ I + ḡ ḡᵀ ⊗ ā āᵀ)^-1 G = (G - (ḡᵀ G ā) / (λ + ‖ḡ‖² ‖ā‖²) ḡ āᵀ) / λ     form="eva"
        d = (λ I + I ⊗ ā āᵀ)^-1 G    = (G - G ā āᵀ / (λ + ‖ā‖²)) / λ                 form="eva-f"

    ā and ḡ are moving averages over the steps. The labels are those of the data, because the mean
    of g is zero for labels sampled from the model. At a minimum ḡ vanishes as well, and d is then
    ``G / λ``: a suitable learning rate is of the order of λ times that of gradient descent. The
    authors bound the length of a step by :func:`funcprecond.kl_clip`.

    Args:
        damping: λ, in units of the loss; for "eva-f" in units of squared inputs.
        form: "eva" has the vectors of both factors; "eva-f" has those of the inputs alone, as FOOF
            does (:func:`funcprecond.foof`). The paper's third form, Eva-s, is
            :func:`funcprecond.eva_s`.
        decay: the weight of the old vectors in the moving average, 0.05 as in the authors'
            program, or None to use the newest batch alone.
        every: the interval of the measurement of the vectors, in steps.

    Returns:
        A method that needs the inputs of the layers and their output gradients, of which the
        gradient consists anyway. Its state has 2 (i + o) numbers for a layer of i inputs and o
        outputs, and a step takes about 4 i o operations. The gradients of all other parameters,
        such as those of norm layers, are divided by λ.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> opt = fp.kl_clip(fp.eva(), rate=0.1, bound=1e-3)
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0))
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> direction["weight"].shape
        torch.Size([3, 4])
    """
    one_of(("eva", "eva-f"), form=form)
    return compose(
        LayerStatistics("empirical", others="none", sharing="reduce"),
        MeanRows,
        RankOne(damping),
        decay=decay,
        every=every,
        refresh_every=every,
        initial=lambda params: MeanRows.init(params, outputs=form == "eva"),
    )
