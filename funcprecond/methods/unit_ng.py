"""Unit-wise natural gradient: the Fisher matrix of the parameters of each unit."""

from torch import Tensor

from funcprecond.composition import compose
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.losses.base import Labels
from funcprecond.methods.card import card
from funcprecond.representation.average import Decay
from funcprecond.representation.unit_blocks import UnitBlocks
from funcprecond.solver.unit_inverse import UnitInverse
from funcprecond.transform import Transform

__all__ = ["unit_ng"]


@card(
    "Unit-wise NG (Ollivier 2015)",
    curvature="F̂_nmc, F̂_emp",
    representation="unit, dense",
    solver="L/G direct, Cholesky inverse",
    learning_rate=0.01,
    options={"damping": 0.03},
)
def unit_ng(
    *,
    damping: float | Tensor = 1e-3,
    quasi_diagonal: bool = False,
    labels: Labels = "mc",
    samples: int = 1,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """Unit-wise natural gradient (Ollivier, arXiv 1303.0818).

    A unit o is one output of a linear layer, or one channel of a convolution. Its parameters are
    its incoming weights and its bias b. Let ``p_no = Σ_t g_nto [a_nt, 1]`` be the gradient of
    example n in them, a sum over positions t of output gradients g and inputs a, for labels sampled
    from p(y|x), and c the loss's reduction constant (1/N for a mean)::

        M_o = c Σ_n p_no p_noᵀ                       (i + 1, i + 1), exact
        d_o = (M_o + λ I)^-1 [∇w_o, ∇b_o]

    With ``quasi_diagonal=True`` only the diagonal of M = M_o + λ I and the row of the bias are
    kept (section 2.3 of the paper). The direction is then that of the sparse inverse that
    reproduces them, and still does not depend on the means of the inputs::

        d_i = (∇_i - ∇_b M_bi / M_bb) / (M_ii - M_bi² / M_bb)
        d_b = (∇_b - Σ_i M_bi d_i) / M_bb

    A unit of a norm layer has its scale and shift, and gets its whole 2 × 2 block. Embeddings and
    all other parameters get the diagonal of their curvature.

    Args:
        damping: λ, in units of the loss.
        quasi_diagonal: whether to keep the diagonal and the row of the bias alone.
        labels, samples: as for :func:`funcprecond.kfac`.
        decay: the weight of the old blocks in the moving average, or None to use the newest batch
            alone.
        every, refresh_every, start: the blocks are measured at every ``every``-th step and inverted
            at every ``refresh_every``-th, and at each of the first ``start`` steps; see
            :func:`funcprecond.compose`.

    Returns:
        A method that needs layer statistics with the examples kept apart. A layer of i inputs and o
        outputs has ``2 o i²`` numbers in the state; a measurement takes ``N o i²`` operations, a
        refresh ``o i³``, and a step ``o i²``. With ``quasi_diagonal`` the state has 4 copies of the
        parameters, and everything else is linear in i as well.

    Raises:
        ValueError: an option has a value that is not allowed; or, at an update, the blocks of a
            layer would have more than 2^28 entries.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> params, batch = problem.params, (torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> opt, generator = fp.unit_ng(), torch.Generator().manual_seed(0)
        >>> evidence = fp.observe(problem, params, batch, opt.needs(0), generator=generator)
        >>> state, direction = opt.update(opt.init(params), evidence.grads, evidence)
        >>> state.representation.rows["weight+bias"].shape
        torch.Size([3, 5, 5])
    """
    return compose(
        LayerStatistics(labels, samples, per_sample=True),
        UnitBlocks,
        UnitInverse(damping),
        decay=decay,
        every=every,
        refresh_every=refresh_every,
        start=start,
        initial=lambda params: UnitBlocks.init(params, border=quasi_diagonal),
    )
