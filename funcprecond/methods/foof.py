"""FOOF: gradient descent on the neurons of each layer, without output gradients of its own."""

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.layer_call import Sharing
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.input_moments import InputMoments
from funcprecond.solver.input_inverse import InputInverse
from funcprecond.transform import Transform

__all__ = ["foof"]


@card(
    "FOOF (Benzing 2022)",
    curvature="input covariance",
    representation="layer, KF-io",
    solver="L/G direct, Cholesky inverse",
    learning_rate=0.00316,
)
def foof(
    *,
    damping: float | Tensor = 1e-2,
    sharing: Sharing = "expand",
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """FOOF, fast first-order optimizer (Benzing, arXiv 2201.12250).

    A layer computes ``z = [W | b] a`` of inputs a with a 1 appended. The direction changes the
    outputs z of the batch as a step along their own gradients ∇z would, as nearly as a change of
    the weights can, up to a ridge on this change::

        A = mean a aᵀ                                             over examples and positions
        d = [∇W | ∇b] (A + λ ā I)^-1                              ā = tr A / dim A
          = argmin_D  mean ‖D a - N ∇z‖² + λ ā ‖D‖²               for N rows a of the batch

    This is K-FAC (:func:`funcprecond.kfac`) with B = I, so that it is no approximation of the
    Fisher matrix. A is a moving average over the steps.

    Args:
        damping: λ, relative to ā, because A has the units of squared activations, which differ
            between layers, and not those of the loss. The paper adds an absolute number to A.
        sharing: how the positions of one example are combined, "expand" or "reduce", see
            :class:`funcprecond.curvature.LayerStatistics`.
        decay: the weight of the old A in the moving average, or None to use the newest batch alone.
        every, refresh_every, start: A is measured at every ``every``-th step and inverted at every
            ``refresh_every``-th, and at each of the first ``start`` steps; see
            :func:`funcprecond.compose`.

    Returns:
        A method that needs the inputs of the layers, and no pull-back beside the gradient's. Its
        state has 2 i² numbers for a layer of i inputs; with ``decay=None`` and M < i rows in a
        batch, 2 M i. A refresh is one Cholesky inverse per layer, and a step is one product. The
        gradients of other parameters, such as those of norm layers, are divided by 1 + λ.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> opt = fp.foof()
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0))
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> state.representation.right["weight+bias"].shape
        torch.Size([5, 5])
    """
    return compose(
        LayerStatistics("empirical", others="none", sharing=sharing),
        InputMoments,
        InputInverse(damping),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
    )
