"""Scientific problems: residuals at points of several kinds, and wave functions.

Their loss is no mean over the examples of one batch of inputs and targets. A residual problem has
blocks of points (interior, boundary, data) with a function of their own each, which may
differentiate the network. The loss of a variational Monte Carlo problem is an energy, whose samples
depend on the parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.losses.residual import Energy, HalfSquares
from funcprecond.problems import Problem, problem
from funcprecond.tree import Params

__all__ = ["Block", "ResidualProblem", "VariationalProblem", "as_points", "residuals", "vmc"]


class Block(NamedTuple):
    """One kind of points of a residual problem.

    Attributes:
        residual: a function ``(params, *point) -> ()`` or ``(C,)``, of one point.
        weight: w, the weight of the block in the loss.
    """

    residual: Callable[..., Tensor]
    weight: float | Tensor = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class ResidualProblem(Problem):
    """A problem of least squares over blocks of points; make one with :func:`residuals`.

    Attributes:
        blocks: the blocks by name.
    """

    blocks: Mapping[str, Block] = dataclasses.field(default_factory=dict)
    by_points: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False)
class VariationalProblem(Problem):
    """The energy of a wave function; make one with :func:`vmc`.

    Attributes:
        log_psi: a function ``(params, x) -> ()``, log ψ at one sample.
    """

    log_psi: Callable[[Params, Tensor], Tensor] = lambda params, x: x.sum()
    by_points: ClassVar[bool] = True


def residuals(
    blocks: Mapping[str, Callable[..., Tensor] | tuple[Callable[..., Tensor], float | Tensor]],
    *,
    params: Mapping[str, Tensor],
) -> ResidualProblem:
    """Define a problem of least squares, such as a physics-informed network.

    Each block of points, such as the interior and the boundary of a domain, has a residual ρ_k, a
    weight w_k and N_k points x_kn. The loss is a sum of squares::

        L(θ) = ½ Σ_k w_k / N_k Σ_n ‖ρ_k(θ; x_kn)‖²  =  ½ ‖r(θ)‖²

    A batch is a dict ``{name: points}``. The points of a block are a tensor (N_k, ...), or a tuple
    of tensors, such as the coordinates and the data, whose first axes count the points. A
    residual may take derivatives of the network with ``torch.func``. (torch's compiler cannot trace
    ``torch.func.hessian`` here, but ``jvp`` of ``grad``, and derivatives that are written out.)

    Every method of the gradient trains such a problem, as do those of Hessian and Gauss-Newton
    products; :func:`engd` and :func:`spring` are made for it. Methods of layers and of labels
    (K-FAC and its relatives) do not apply.

    Args:
        blocks: for each block, ``(ρ, w)``, or ρ alone for the weight 1. ρ is a function
            ``(params, *point) -> ()`` or ``(C,)`` of *one* point. For an integral instead of a
            mean, let w be the measure of the domain.
        params: the initial parameters, by name; those of a module are
            ``dict(module.named_parameters())``, and ρ calls it with
            ``torch.func.functional_call``.

    Returns:
        A :class:`funcprecond.Problem`, whose ``evidence.outputs`` are the residuals of each block,
        (N_k,) or (N_k, C_k), without the weights.

    Raises:
        TypeError: a residual is not callable.
        ValueError: there are no blocks; or, in a run, a batch has other blocks than the problem,
            tensors of different lengths or none in a block, or a residual has more than one axis.

    Example:
        The equation ``u'' = -1`` with ``u(0) = u(1) = 0``.

        >>> import torch, funcprecond as fp
        >>> def u(params, x):
        ...     return (params["out"] * torch.tanh(params["scale"] * x + params["shift"])).sum()
        >>> def interior(params, x):
        ...     slope = torch.func.grad(u, argnums=1)
        ...     return torch.func.grad(slope, argnums=1)(params, x) + 1.0
        >>> g = torch.Generator().manual_seed(0)
        >>> params = {k: torch.randn(8, generator=g) for k in ("out", "scale", "shift")}
        >>> problem = fp.residuals({"interior": interior, "boundary": (u, 10.0)}, params=params)
        >>> points, ends = torch.linspace(0.05, 0.95, 10), torch.tensor([0.0, 1.0])
        >>> batch = {"interior": points, "boundary": ends}
        >>> opt = fp.engd()
        >>> step, state = fp.make_step(problem, opt), opt.init(params)
        >>> for t in range(20):
        ...     params, state, evidence = step(params, state, batch, t)
        >>> bool(evidence.loss < 1e-4)
        True
    """
    if not blocks:
        msg = "a residual problem needs at least one block: pass {'interior': (residual, weight)}"
        raise ValueError(msg)
    own = {k: _block(k, given) for k, given in blocks.items()}

    def model(params: Params, batch: Any) -> dict[str, Tensor]:
        if not isinstance(batch, Mapping) or batch.keys() != own.keys():
            found = listed(batch) if isinstance(batch, Mapping) else type(batch).__name__
            msg = (
                f"a batch of this problem must be a dict with the blocks {listed(own)}, not {found}"
            )
            raise ValueError(msg)
        return {k: _at_points(k, block.residual, params, batch[k]) for k, block in own.items()}

    loss = HalfSquares({k: block.weight for k, block in own.items()})
    made = problem(model, loss, params=params, split=_without_targets)
    return ResidualProblem(**_fields(made), blocks=own)


def vmc(
    log_psi: Callable[[Params, Tensor], Tensor],
    local_energy: Callable[[Params, Tensor], Tensor],
    *,
    params: Mapping[str, Tensor],
    clip: float | None = None,
) -> VariationalProblem:
    """Define a problem of variational Monte Carlo: the least energy of a real wave function ψ > 0.

    At samples x_n of ``|ψ|²`` with weights ω_n, which are 1/N by default::

        E = Σ ω_n E_L(x_n),    E_L = H ψ / ψ,    ∇E = 2 Σ ω_n (E_L(x_n) - E) ∇ log ψ(x_n)

    ``H = -½ Δ + V`` has ``E_L = -½ (Δ log ψ + |∇ log ψ|²) + V``. A batch is the samples, (N, ...),
    or the pair (samples, weights). Drawing the samples is the caller's part. The samples belong to
    the parameters that they were drawn with, so that the loss at other parameters and the Hessian
    are refused: :func:`sr`, :func:`spring` and methods of the gradient train such a problem.

    Args:
        log_psi: a function ``(params, x) -> ()``, the logarithm of ψ at *one* sample.
        local_energy: a function ``(params, x) -> ()``, E_L at one sample.
        params: the initial parameters, by name.
        clip: with a number, such as 5.0, the local energies in the gradient are clipped to
            ``E ± clip Σ ω |E_L - E|``; the loss is E without clipping.

    Returns:
        A :class:`funcprecond.Problem`, whose ``evidence.outputs`` are a dict of ``log_psi`` and
        ``local_energy``, (N,) each.

    Raises:
        TypeError: ``log_psi`` or ``local_energy`` is not callable.
        ValueError: in a run, a batch has no samples, or one of the functions does not return a real
            0-d tensor.

    Example:
        The harmonic oscillator, ψ = exp(-a x²): the energy a/2 + 1/(8a) is least at a = ½.

        >>> import torch, funcprecond as fp
        >>> def log_psi(params, x):
        ...     return -params["a"] * x**2
        >>> def local_energy(params, x):
        ...     slope = torch.func.grad(log_psi, argnums=1)
        ...     curvature = torch.func.grad(slope, argnums=1)(params, x)
        ...     return -0.5 * (curvature + slope(params, x) ** 2) + 0.5 * x**2
        >>> problem = fp.vmc(log_psi, local_energy, params={"a": torch.tensor(0.3)})
        >>> g, params = torch.Generator().manual_seed(0), problem.params
        >>> opt = fp.chain(fp.sr(), fp.scale(0.2))
        >>> step, state = fp.make_step(problem, opt), opt.init(params)
        >>> for t in range(30):
        ...     samples = torch.randn(100, generator=g) / (4 * params["a"]).sqrt()
        ...     params, state, evidence = step(params, state, samples, t)
        >>> bool((params["a"] - 0.5).abs() < 0.01)
        True
    """
    for name, f in (("log_psi", log_psi), ("local_energy", local_energy)):
        if not callable(f):
            msg = f"{name} must be a function (params, x), not a {type(f).__name__}"
            raise TypeError(msg)

    def model(params: Params, samples: Any) -> dict[str, Tensor]:
        both = {"log_psi": log_psi, "local_energy": local_energy}
        found = {k: _at_points(k, f, params, samples) for k, f in both.items()}
        for name, value in found.items():
            if value.ndim != 1 or value.is_complex():
                msg = (
                    f"{name} must return a real 0-d tensor for one sample, and returned the shape "
                    f"{tuple(value.shape[1:])} of {value.dtype}: complex wave functions are not "
                    "supported"
                )
                raise ValueError(msg)
        return found

    made = problem(model, Energy(clip), params=params, split=_samples)
    return VariationalProblem(**_fields(made), log_psi=log_psi)


def as_points(name: str, points: Any) -> tuple[Tensor, ...]:
    """The tensors of a block of points, whose first axes count them.

    Args:
        name: the name of the block, for messages.
        points: a tensor, or a tuple or list of tensors.

    Returns:
        The tensors.

    Raises:
        ValueError: they have different lengths, or there is no point.
    """
    tensors = tuple(points) if isinstance(points, (tuple, list)) else (points,)
    counts = [x.shape[0] if isinstance(x, Tensor) and x.ndim else None for x in tensors]
    if len(set(counts)) != 1 or None in counts or counts == [0] * len(counts):
        found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in tensors]
        msg = (
            f"the points of {name!r} must be tensors whose first axes have one length, and there "
            f"must be at least one, not {found}"
        )
        raise ValueError(msg)
    return tensors


def _block(name: str, given: Any) -> Block:
    """A block of :func:`residuals`, from ``(ρ, w)`` or ρ alone."""
    block = Block(*given) if isinstance(given, tuple) else Block(given)
    if not callable(block.residual):
        msg = (
            f"the residual of block {name!r} must be a function (params, *point), not a "
            f"{type(block.residual).__name__}"
        )
        raise TypeError(msg)
    return block


def _at_points(name: str, function: Callable, params: Params, points: Any) -> Tensor:
    """A function of one point at all points of a block."""
    tensors = as_points(name, points)
    value = torch.vmap(lambda *point: function(params, *point))(*tensors)
    if not isinstance(value, Tensor) or value.ndim > 2:
        found = tuple(value.shape[1:]) if isinstance(value, Tensor) else type(value).__name__
        msg = f"the function of {name!r} must return () or (C,) for one point, not {found}"
        raise ValueError(msg)
    return value


def _without_targets(batch: Any) -> tuple[Any, None]:
    return batch, None


def _samples(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)):
        return batch, None
    samples, weights = batch
    return samples, weights


def _fields(made: Problem) -> dict[str, Any]:
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(Problem)}
