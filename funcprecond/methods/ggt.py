"""GGT: full-matrix AdaGrad over a window of gradients, through their Gram matrix."""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.checks import at_least, one_of
from funcprecond.linalg import treemath
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.gram_root import inverse_root_coefficients
from funcprecond.linalg.precision import factor_dtype, wide
from funcprecond.methods.card import card
from funcprecond.representation.average import accumulate
from funcprecond.transform import Transform, counter, fitted, gradient_only
from funcprecond.tree import Params, state

__all__ = ["GGTState", "ggt"]


@state
class GGTState:
    """The state of GGT, in float32 or wider.

    Attributes:
        window: the last r gradients of each parameter of N entries, (r, N). Row t mod r has the
            gradient of update t, counted from 0; unused rows are zero.
        gram: (r, r), the inner products of the rows, without decay.
        mean: m, shaped like the parameters.
        step: the number of updates.
    """

    window: Params
    gram: Params
    mean: Params
    step: Tensor


@card(
    "GGT (Agarwal 2019)",
    curvature="(F̂_emp^batch)^½",
    representation="full, Gram",
    solver="G direct, eigendecomposition",
    learning_rate=0.3,
    carries_momentum=True,
    options={"window": 20},
)
def ggt(
    *,
    window: int = 100,
    damping: float | Tensor = 1e-4,
    momentum: float | Tensor = 0.9,
    decay: float | Tensor = 1.0,
    outside: Literal["zero", "sgd"] = "zero",
    epsilon: float | Tensor = 1e-6,
) -> Transform:
    """GGT (Agarwal et al., ICML 2019, arXiv 1806.02958).

    Each parameter is a vector of N entries. The columns of B, (N, r), are its last r gradients,
    each multiplied by ``b2^(age / 2)``::

        m <- b1 m + (1 - b1) g
        Bᵀ B = V diag(s²) Vᵀ,    U = B V diag(1 / s)                   for s² > ε max s²
        d = U diag(1 / (s + λ)) Uᵀ m                                   outside="zero"
        d = that + (m - U Uᵀ m) / λ = [ (B Bᵀ)^½ + λ I ]^(-1) m        outside="sgd", the paper's

    U is never formed: the eigendecomposition is that of the (r, r) Gram matrix.

    Args:
        window: r, the number of gradients. The paper uses 200.
        damping: λ, added to the root.
        momentum: b1, the weight of the old mean.
        decay: b2, the weight of each squared gradient relative to the next one; 1 means no decay.
        outside: what happens to the part of m outside the span of the window: "zero" drops it, as
            in the authors' code; "sgd" divides it by λ, as in the paper, which needs a large λ.
        epsilon: ε. In float32, eigenvalues below 1e-7 of the largest one are rounding errors.

    Returns:
        A method that needs the gradient only. Its state is r copies of the parameters, which limits
        its use. A step takes three passes over them and an (r, r) eigendecomposition.

    Raises:
        ValueError: an option has a value that is not allowed.

    Example:
        >>> import funcprecond as fp
        >>> opt = fp.chain(fp.ggt(window=20), fp.scale(0.3))
    """
    at_least(1, window=window)
    one_of(("zero", "sgd"), outside=outside)
    if outside == "sgd" and not isinstance(damping, Tensor) and damping <= 0:
        msg = f"outside='sgd' divides by the damping, which must be positive, not {damping}"
        raise ValueError(msg)

    def init(params: Params) -> GGTState:
        def zeros(*shape: int) -> Params:
            shapes = {k: shape or (window, p.numel()) for k, p in params.items()}
            return {k: p.new_zeros(shapes[k], dtype=factor_dtype(p)) for k, p in params.items()}

        return GGTState(
            zeros(), zeros(window, window), treemath.zeros_like(params), counter(params)
        )

    def update(state: GGTState, grads: Params) -> tuple[GGTState, Params]:
        rows = torch.arange(window, device=state.step.device)
        newest = state.step % window
        here, age = rows == newest, (newest - rows) % window
        windows, grams = {}, {}
        mean = {k: accumulate(m, grads[k], momentum) for k, m in state.mean.items()}
        for name, m in mean.items():
            g = grads[name].to(m.dtype).reshape(-1)
            w = torch.where(here.unsqueeze(1), g.unsqueeze(0), state.window[name])
            products = w @ g
            gram = torch.where(here.unsqueeze(1), products, state.gram[name])
            grams[name] = torch.where(here, products.unsqueeze(1), gram)
            windows[name] = w
        # The Gram matrix of the decayed gradients comes from that of the stored ones, which stay as
        # they are. In float32 the powers would be off by 1e-7 for each turn of the window.
        weights = decay ** (wide(age) / 2)
        scaled = {k: weights.to(x.dtype) for k, x in grams.items()}
        found = by_shape(
            lambda gram, y, _: inverse_root_coefficients(
                gram, y, damping=damping, epsilon=epsilon, outside=outside == "sgd"
            ),
            [x * scaled[k] * scaled[k].unsqueeze(1) for k, x in grams.items()],
            [(windows[k] @ m.reshape(-1)) * scaled[k] for k, m in mean.items()],
            static=[None] * len(mean),
        )
        direction = {}
        for (name, m), z in zip(mean.items(), found, strict=True):
            d = ((z * scaled[name]) @ windows[name]).reshape(m.shape)
            direction[name] = d + m / damping if outside == "sgd" else d
        new = GGTState(windows, grams, mean, state.step + 1)
        return new, treemath.cast(direction, grads)

    return fitted(gradient_only(init, update), lambda state: state.mean)
