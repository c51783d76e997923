"""Running torch.optim and funcprecond on the same gradients."""

import torch
from torch import Tensor

import funcprecond as fp
from tests import problems


def targets(dtype=torch.float64) -> dict[str, Tensor]:
    return {k: problems.normal(s, i, dtype) for i, (k, s) in enumerate(problems.SHAPES.items())}


def gradient(params: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """A gradient that depends on the point and the step; every seventh step it is zero."""
    if t % 7 == 6:
        return {k: torch.zeros_like(p) for k, p in params.items()}
    return {
        k: torch.sin(3 * p) + problems.normal(p.shape, 31 * t + i, p.dtype)
        for i, (k, p) in enumerate(params.items())
    }


def run_torch(make, steps: int, dtype=torch.float64) -> list[dict[str, Tensor]]:
    """The parameters after each step of ``make(list of parameters)``, a torch optimizer."""
    params = {k: p.clone().requires_grad_() for k, p in targets(dtype).items()}
    optimizer, path = make(list(params.values())), []
    for t in range(steps):
        detached = {k: p.detach() for k, p in params.items()}
        for k, g in gradient(detached, t).items():
            params[k].grad = g
        optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return path


def run(opt: fp.Transform, steps: int, dtype=torch.float64) -> list[dict[str, Tensor]]:
    """The parameters after each step of a transform that needs the gradient and the point only."""
    params, path = targets(dtype), []
    state = opt.init(params)
    for t in range(steps):
        grads = gradient(params, t)
        due = {need: () for need in opt.needs(t)}
        evidence = fp.Evidence(params, torch.zeros(()), None, grads, {}, due)
        state, direction = opt.update(state, grads, evidence)
        params = fp.apply(params, direction)
        path.append(params)
    return path
