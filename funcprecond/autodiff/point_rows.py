"""The rows of the Jacobian of a scientific problem, one for each residual or sample.

The points of a residual problem are of several kinds, without a common axis of examples, and its
residuals may differentiate the network. So the rows are not taken from the layers of the run, but
are the derivatives of the residual of one point, under ``vmap`` over the points of a block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from funcprecond.linalg.precision import factor_dtype
from funcprecond.residual_problems import ResidualProblem, VariationalProblem, as_points
from funcprecond.tree import Params

__all__ = ["point_rows"]


def point_rows(evaluation: Any, names: Sequence[str]) -> tuple[Params, Tensor, float] | None:
    """Implement :meth:`funcprecond.Evaluation.point_rows`.

    Args:
        evaluation: the run.
        names: the parameters.
    """
    problem = evaluation.problem
    if isinstance(problem, ResidualProblem):
        return *_residual_rows(evaluation, problem, names), 1.0
    if isinstance(problem, VariationalProblem):
        return *_score_rows(evaluation, problem, names), 2.0
    return None


def _residual_rows(
    evaluation: Any, problem: ResidualProblem, names: Sequence[str]
) -> tuple[Params, Tensor]:
    """``r_kn = √(w_k / N_k) ρ_kn`` and its derivatives."""
    parts, residuals = [], []
    for name, block in problem.blocks.items():
        points, value = as_points(name, evaluation.inputs[name]), evaluation.outputs[name]
        rows = _rows(block.residual, points, evaluation.params, names)
        scale = (value.new_ones(()) * block.weight / len(value)) ** 0.5
        residuals.append((scale * value).reshape(-1))
        parts.append({k: (scale * x).flatten(0, 1) for k, x in rows.items()})
    return {k: torch.cat([p[k] for p in parts]) for k in names}, torch.cat(residuals)


def _score_rows(
    evaluation: Any, problem: VariationalProblem, names: Sequence[str]
) -> tuple[Params, Tensor]:
    """``√ω (∇ log ψ - mean)`` and ``√ω (E_L - E)``."""
    loss: Any = problem.loss
    energies = evaluation.outputs["local_energy"]
    weights = loss.shares(energies, evaluation.targets)
    points = as_points("samples", evaluation.inputs)
    rows = {}
    for k, x in _rows(problem.log_psi, points, evaluation.params, names).items():
        scores, share = x.flatten(0, 1), weights.to(x.dtype)
        centred = scores - torch.tensordot(share, scores, 1)
        rows[k] = share.sqrt().reshape(-1, *[1] * (scores.ndim - 1)) * centred
    return rows, weights.sqrt() * loss.centred(energies, weights)


def _rows(
    function: Callable, points: Sequence[Tensor], params: Params, names: Sequence[str]
) -> Params:
    """(N, C, *shape) for each parameter: the derivatives of a function of one point."""

    def one(*point: Tensor) -> Params:
        def f(own: Params) -> Tensor:
            return function({**params, **own}, *point).reshape(-1)

        value, pull = vjp(f, {k: params[k] for k in names})  # pyright: ignore
        if len(value) == 1:
            return {k: x.unsqueeze(0) for k, x in pull(torch.ones_like(value))[0].items()}
        eye = torch.eye(len(value), dtype=value.dtype, device=value.device)
        return vmap(lambda u: pull(u)[0])(eye)

    rows = vmap(one)(*points)
    return {k: x.to(factor_dtype(x)) for k, x in rows.items()}
