"""KFLR: K-FAC with the exact Fisher matrix at the outputs instead of sampled labels."""

from typing import Literal

from torch import Tensor

from funcprecond.layers.layer_call import Sharing
from funcprecond.methods.card import card
from funcprecond.methods.kfac import kfac
from funcprecond.representation.average import Decay
from funcprecond.transform import Transform

__all__ = ["kflr"]


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
    max_dim: int = 10000,
    decay: Decay = 0.95,
    every: int = 1,
    refresh_every: int = 10,
    start: int = 10,
) -> Transform:
    """KFLR, Kronecker-factored low-rank (Botev, Ritter & Barber, arXiv 1706.03662).

    This is ``fp.kfac(labels="exact")``. Instead of sampling labels, it pulls back the columns of a
    square root S of the loss's Hessian in the outputs, which is exact and draws no random numbers::

        S Sᵀ = ∇²ℓ        B = c Σ g gᵀ  over the columns g = (∂f/∂z)ᵀ s of every example
        d = (B ⊗ A + λ I)^-1 [∇W | ∇b]

    Args:
        damping, damping_split, sharing, max_dim, decay, every, refresh_every, start: see
            :func:`funcprecond.kfac`.

    Returns:
        A method like :func:`funcprecond.kfac`, which takes as many pull-backs for each measurement
        as one example has outputs.

    Raises:
        ValueError: an option has a value that is not allowed.

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
