"""SMW-GN: the exact Gauss-Newton step of a part of a batch, through its Gram matrix."""

from torch import Tensor

from funcprecond.methods.card import card
from funcprecond.methods.smw_ng import smw_ng
from funcprecond.transform import Transform

__all__ = ["smw_gn"]


@card(
    "SMW-GN (Ren & Goldfarb 2019)",
    curvature="G",
    representation="full, Gram",
    solver="L direct, SMW inverse",
    learning_rate=0.3,
    options={"damping": 1.0, "examples": 32},
)
def smw_gn(
    *,
    damping: float | Tensor = 1e-1,
    examples: int | None = None,
    adapt: bool = True,
    factor: float = 1.01,
) -> Transform:
    """SMW-GN (Ren & Goldfarb, arXiv 1906.02353).

    J_n, (C, P), is the Jacobian of the outputs of example n, and S_n S_nᵀ the Hessian of its loss
    in the C outputs. The rows of U, (N C, P), are those of ``√c S_nᵀ J_n`` for N examples of the
    batch, where c is the reduction constant of a mean over them. g is the gradient on the whole
    batch::

        G = Uᵀ U = c Σ_n J_nᵀ (S_n S_nᵀ) J_n
        d = (G + λ I)⁻¹ g = (g - Uᵀ (λ I + U Uᵀ)⁻¹ U g) / λ
        ρ = (h(θ - d) - h(θ)) / (-gᵀd / 2);   λ <- λ / ω if ρ > 3/4,  ω λ if ρ < 1/4

    Args:
        damping: the initial λ, positive, in units of the loss.
        examples: N, the first examples of the batch; by default all of them.
        adapt: whether the Levenberg-Marquardt rule changes λ, which costs one loss per step.
        factor: ω.

    Returns:
        A method that takes as many pull-backs as one example has outputs, and the inputs and output
        gradients of the layers. The Gram matrix takes ``(N C)² (i + o)`` operations for each layer
        of i inputs and o outputs, the solve (N C)³ / 3. The state is λ.

    Raises:
        ValueError: an option is out of range. ``fp.observe`` raises it where a BatchNorm in
            training mode couples the examples.
        TypeError: the loss has no known likelihood; raised by ``fp.observe``.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.smw_gn(damping=1.0, examples=32), fp.scale(0.3))
    """
    return smw_ng(damping=damping, labels="exact", examples=examples, adapt=adapt, factor=factor)
