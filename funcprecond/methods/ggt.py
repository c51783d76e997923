"""GGT: full-matrix AdaGrad over a window of gradients, by their Gram matrix.

Row: (F̂_emp^batch)^½; full, Gram; eigendecomposition. Agarwal et al., ICML 2019, arXiv 1806.02958.
For each parameter tensor as a vector, B (N, r) the last r gradients, ``b2^(age / 2)`` times each::

    m <- b1 m + (1 - b1) g
    Bᵀ B = V diag(s²) Vᵀ,    U = B V diag(1 / s)                       of s² > ε max s²
    d = U diag(1 / (s + λ)) Uᵀ m                                       outside="zero"
    d = that + (m - U Uᵀ m) / λ = [ (B Bᵀ)^½ + λ I ]^(-1) m            outside="sgd", the paper's

U is never formed: ``B V f(s) Vᵀ Bᵀ m``. Needs the gradient only. The window is r copies of the
parameters, the real limit; each step three passes over it and an eigendecomposition of r x r.
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.precision import decomposition_dtype, factor_dtype, wide
from funcprecond.methods.table import Card
from funcprecond.transform import Transform, counter, gradient_only
from funcprecond.tree import Params, state

__all__ = ["GGTState", "ggt"]


@state
class GGTState:
    """What GGT keeps, in float32 or wider.

    Attributes:
        window: (r, N) for each parameter of N entries; the gradient of update t, counted from 0, is
            row t mod r, and unused rows are zero.
        gram: (r, r), the products of the rows, without decay.
        mean: m, shaped like the parameters.
        step: the number of updates.
    """

    window: Params
    gram: Params
    mean: Params
    step: Tensor


def ggt(
    *,
    window: int = 100,
    damping: float | Tensor = 1e-4,
    momentum: float | Tensor = 0.9,
    decay: float | Tensor = 1.0,
    outside: Literal["zero", "sgd"] = "zero",
    epsilon: float | Tensor = 1e-6,
) -> Transform:
    """GGT's direction.

    Args:
        window: r, how many gradients. The paper's 200 is for a GPU's memory full of them.
        damping: λ, added to the root.
        momentum: b1, the weight of the old mean.
        decay: b2, the weight of a squared gradient against that of the next one; 1 for none.
        outside: what becomes of the mean outside the window's span: nothing (the authors' code), or
            a step of ``1 / λ`` (the paper), which is long: set the damping with it in mind.
        epsilon: what is taken for the span, relative to the largest eigenvalue of the Gram matrix,
            which in float32 is not known below 1e-7.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    if window < 1 or outside not in ("zero", "sgd"):
        msg = f"window={window} must be at least 1, and outside={outside!r} 'zero' or 'sgd'"
        raise ValueError(msg)
    if outside == "sgd" and not isinstance(damping, Tensor) and damping <= 0:
        msg = f"outside='sgd' takes steps of 1 / damping: it must be positive, not {damping}"
        raise ValueError(msg)

    def init(params: Params) -> GGTState:
        dtypes = {k: factor_dtype(p) for k, p in params.items()}
        return GGTState(
            {k: p.new_zeros((window, p.numel()), dtype=dtypes[k]) for k, p in params.items()},
            {k: p.new_zeros((window, window), dtype=dtypes[k]) for k, p in params.items()},
            {k: torch.zeros_like(p, dtype=dtypes[k]) for k, p in params.items()},
            counter(params),
        )

    def update(state: GGTState, grads: Params) -> tuple[GGTState, Params]:
        rows = torch.arange(window, device=state.step.device)
        newest = state.step % window
        here, age = rows == newest, (newest - rows) % window
        windows, grams, mean = {}, {}, {}
        for name, old in state.mean.items():
            g = grads[name].to(old.dtype)
            mean[name] = momentum * old + (1 - momentum) * g
            w = torch.where(here.unsqueeze(1), g.reshape(1, -1), state.window[name])
            products = w @ g.reshape(-1)
            gram = torch.where(here.unsqueeze(1), products, state.gram[name])
            grams[name] = torch.where(here, products.unsqueeze(1), gram)
            windows[name] = w
        names = list(mean)
        # D gram D, the Gram matrix of the decayed vectors; decaying the stored one in place is not.
        # Wide: in float32 the exponent alone is off by 1e-7 an epoch of the window.
        weights = decay ** (wide(age) / 2)
        scaled = {k: weights.to(x.dtype) for k, x in grams.items()}
        decayed = [grams[k] * scaled[k] * scaled[k].unsqueeze(1) for k in names]
        seen = [(windows[k] @ mean[k].reshape(-1)) * scaled[k] for k in names]

        def coefficients(gram: Tensor, y: Tensor, _) -> Tensor:
            return _solve(gram, y, damping, outside == "sgd", epsilon)

        found = by_shape(coefficients, decayed, seen, static=[None] * len(names))
        direction = {}
        for name, z in zip(names, found, strict=True):
            d = ((z * scaled[name]) @ windows[name]).reshape(mean[name].shape)
            if outside == "sgd":
                d = d + mean[name] / damping
            direction[name] = d.to(grads[name].dtype)
        new = GGTState(windows, grams, mean, state.step + 1)
        return new, {k: direction[k] for k in grads}

    return gradient_only(init, update)


def _solve(gram: Tensor, y: Tensor, damping, sgd: bool, epsilon) -> Tensor:
    """``V f(s) V^T y``: what the window is to be multiplied by.

    Args:
        gram: (..., r, r).
        y: (..., r), the window's products with the mean.
        damping, epsilon: λ and ε.
        sgd: subtract what ``m / λ`` puts into the span.
    """
    dtype = decomposition_dtype(gram)
    a = (gram + gram.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    ok = torch.isfinite(a).all(-1).all(-1) & (scale > 0)
    eye = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    scale = torch.where(ok, scale, 1.0).unsqueeze(-1)
    a = torch.where(ok[..., None, None], a / scale.unsqueeze(-1), eye)
    squares, vectors = torch.linalg.eigh(a)
    kept = squares > epsilon * squares[..., -1:]
    squares = torch.where(kept, squares, 1.0) * scale
    f = 1 / (squares.sqrt() + damping)
    f = torch.where(kept, (f - 1 / damping if sgd else f) / squares, 0.0)
    z = vectors @ (f.unsqueeze(-1) * (vectors.mT @ y.to(dtype).unsqueeze(-1)))
    # Of a window that is no number the direction is none either; of one of zeros y is zero.
    finite = torch.isfinite(gram).all(-1).all(-1).unsqueeze(-1)
    return torch.where(finite, z.squeeze(-1), torch.nan).to(y.dtype)


CARDS = (
    Card(
        "ggt",
        "GGT (Agarwal 2019)",
        "(F̂_emp^batch)^½",
        "full, Gram",
        "G direct, eigendecomposition",
        ggt,
        learning_rate=0.3,
        momentum=True,
        options={"window": 20},
    ),
)
