"""Losses of scientific problems: the squares of residuals, and the energy of a wave function."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Loss

__all__ = ["Energy", "HalfSquares"]


@dataclasses.dataclass(frozen=True, eq=False)
class HalfSquares(Loss):
    """``½ Σ_k w_k / N_k Σ_n ‖ρ_kn‖²``: the mean square of the residuals of each block of points.

    The outputs are a dict with the residuals of each block, (N_k,) or (N_k, C_k); there are no
    targets. The constant ``c`` is one over the number of points of all blocks.

    Attributes:
        weights: w_k, a number or a 0-d tensor for each block.

    Example:
        >>> import torch, funcprecond as fp
        >>> loss = fp.losses.HalfSquares({"interior": 1.0, "boundary": 10.0})
        >>> loss({"interior": torch.ones(8), "boundary": torch.ones(2)}, None)
        tensor(5.5000)
    """

    weights: Mapping[str, float | Tensor]

    def __call__(self, outputs: Any, targets: Any = None) -> Tensor:
        terms = [w / len(outputs[k]) * outputs[k].square().sum() for k, w in self.weights.items()]
        return torch.stack(terms).sum() / 2

    def constant(self, outputs: Any, targets: Any = None) -> Tensor:
        first = next(iter(outputs.values()))
        count = sum(len(x) for x in outputs.values())
        return first.new_full((), 1 / count, dtype=factor_dtype(first))

    def hessian_product(self, outputs: Any, targets: Any, vector: Any) -> Any:
        return {k: w / len(vector[k]) * vector[k] for k, w in self.weights.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Energy(Loss):
    """The energy of a wave function ψ, estimated at samples of ``|ψ|²``.

    The outputs are a dict with ``log_psi`` and ``local_energy``, (N,) each, and the targets are the
    samples' weights ω, (N,), or None for equal ones; their sum is made 1. The value is
    ``E = Σ ω E_L``, with the local energies E_L. The samples move with the parameters, so that the
    gradient of the energy is not that of this value, but ``2 Σ ω (E_L - E) ∇ log ψ``, which is
    returned in its place. Nothing else is known of the loss: its value at other parameters, and so
    its Hessian, would need samples of their own.

    Attributes:
        clip: with a number, the local energies in the gradient are clipped to ``E ± clip Σ ω |E_L -
            E|``, against the rare samples next to a zero of ψ; None for no limit.

    Example:
        >>> import torch, funcprecond as fp
        >>> outputs = {"log_psi": torch.zeros(2), "local_energy": torch.tensor([1.0, 2.0])}
        >>> fp.losses.Energy()(outputs, None)
        tensor(1.5000)
    """

    clip: float | None = None
    at_samples: ClassVar[bool] = True

    def __call__(self, outputs: Any, targets: Any = None) -> Tensor:
        energies = outputs["local_energy"]
        weights = self.shares(energies, targets)
        centred = self.centred(energies, weights)
        return _Energy.apply(outputs["log_psi"], energies, weights, centred)  # pyright: ignore

    def constant(self, outputs: Any, targets: Any = None) -> Tensor:
        energies = outputs["local_energy"]
        return energies.new_full((), 1 / len(energies), dtype=factor_dtype(energies))

    def shares(self, energies: Tensor, weights: Tensor | None) -> Tensor:
        """ω, the weights of the samples, (N,)."""
        if weights is None:
            return torch.full_like(energies, 1 / len(energies))
        return weights / weights.sum()

    def centred(self, energies: Tensor, weights: Tensor) -> Tensor:
        """``E_L - E``, clipped and centred once more, (N,)."""
        centred = energies - (weights * energies).sum()
        if self.clip is None:
            return centred
        bound = self.clip * (weights * centred.abs()).sum()
        clipped = centred.clamp(-bound, bound)
        return clipped - (weights * clipped).sum()


class _Energy(torch.autograd.Function):
    """The value ``Σ ω E_L`` with the gradient ``2 ω (E_L - E)`` in ``log ψ``, and no other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_psi, energies, weights, centred):
        return (weights * energies).sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, weights, centred = inputs
        ctx.save_for_backward(weights, centred)

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, centred = ctx.saved_tensors
        return gradient * 2 * weights * centred, None, None, None
