"""Toy problems, small enough for dense answers; float64 unless said."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcprecond as fp
from funcprecond.representation.average import Average
from funcprecond.representation.kronecker_dim import KroneckerDim


@dataclasses.dataclass(frozen=True)
class Toy:
    """A problem and its batches."""

    problem: fp.Problem
    batches: tuple[Any, ...]

    @property
    def params(self) -> dict[str, Tensor]:
        return self.problem.params

    @property
    def batch(self) -> Any:
        return self.batches[0]

    def at(self, t: int) -> Any:
        return self.batches[t % len(self.batches)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def initialised(module: nn.Module, seed: int = 0, dtype=torch.float64, scale=0.5) -> nn.Module:
    """The module with every parameter drawn anew; no bias is zero, no scale is one."""
    g = seeded(seed)
    module = module.to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            centre = 1.0 if bool((p == 1).all()) else 0.0
            p.copy_(centre + scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module


def labelled(n: int, inputs: int, classes: int, seed: int, dtype=torch.float64):
    labels = torch.randint(0, classes, (n,), generator=seeded(seed + 1))
    return normal((n, inputs), seed, dtype), labels


def mlp_module(dtype=torch.float64) -> nn.Module:
    return initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), dtype=dtype)


def mlp(dtype=torch.float64, examples: int = 5) -> Toy:
    """A two-layer classifier, 31 parameters, four batches of five examples."""
    batches = tuple(labelled(examples, 3, 3, 10 * i, dtype) for i in range(4))
    return Toy(fp.problem(mlp_module(dtype), fp.losses.cross_entropy), batches)


def mlp_function(dtype=torch.float64) -> Toy:
    """The same model as :func:`mlp`, as a plain function of a dict."""

    def model(params, x):
        h = torch.tanh(F.linear(x, params["0.weight"], params["0.bias"]))
        return F.linear(h, params["2.weight"], params["2.bias"])

    params = {k: p.detach() for k, p in mlp_module(dtype).named_parameters()}
    toy = mlp(dtype)
    return Toy(fp.problem(model, fp.losses.cross_entropy, params=params), toy.batches)


def regression(dtype=torch.float64) -> Toy:
    """A two-layer network with two real outputs and the squared error."""
    model = initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), dtype=dtype)
    batches = tuple((normal((6, 3), i, dtype), normal((6, 2), 100 + i, dtype)) for i in range(4))
    return Toy(fp.problem(model, fp.losses.mse), batches)


def convnet(dtype=torch.float64) -> Toy:
    """A convolution, a norm layer and a linear layer, with parameters of four, two and one axes."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )
    batches = tuple((normal((4, 2, 4, 4), i, dtype), torch.arange(4) % 3) for i in range(4))
    return Toy(fp.problem(initialised(model, dtype=dtype), fp.losses.cross_entropy), batches)


SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (3,),
    "matrix": (2, 3),
    "column": (3, 1),
    "row": (1, 3),
    "cube": (2, 3, 2),
    "flat cube": (2, 1, 3),
    "kernel": (2, 2, 1, 3),
    "ones": (1, 1, 1, 1),
}


def tree(shapes=SHAPES, seed: int = 0, dtype=torch.float64, examples: int = 4) -> Toy:
    """Parameters of any shapes, each entering the two outputs of an example by every entry."""
    params, mixing = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        params[name] = 0.5 * normal(shape, seed + i, dtype)
        mixing[name] = normal((*shape, 2), seed + 1000 + i, dtype)

    def model(p, x):
        terms = [(torch.sin(p[k] + 0.3).unsqueeze(-1) * mixing[k]).reshape(-1, 2).sum(0) for k in p]
        total = sum(terms)
        return x * total + 0.1 * x**2 * total**2

    batches = tuple(
        (normal((examples, 2), seed + i, dtype), normal((examples, 2), seed + 50 + i, dtype))
        for i in range(4)
    )
    return Toy(fp.problem(model, fp.losses.mse, params=params), batches)


def train(toy: Toy, opt: fp.Transform, steps: int, *, step=None, params=None, state=None, start=0):
    """``steps`` training steps from ``start``; the noise of step t is drawn from the seed t."""
    step = fp.make_step(toy.problem, opt) if step is None else step
    params = toy.params if params is None else params
    state = opt.init(params) if state is None else state
    evidence = None
    for t in range(start, steps):
        noise = fp.draw(toy.problem, params, toy.at(t), opt.needs(t), generator=seeded(t))
        params, state, evidence = step(params, state, toy.at(t), t, noise)
    return params, state, evidence


def update(toy: Toy, opt: fp.Transform, steps: int = 1, params=None):
    """The state, the last direction and the last evidence of ``steps`` updates at one point."""
    params = toy.params if params is None else params
    state, direction, evidence = opt.init(params), None, None
    for t in range(steps):
        evidence = fp.observe(toy.problem, params, toy.at(t), opt.needs(t), generator=seeded(t))
        state, direction = opt.update(state, evidence.grads, evidence)
    return state, direction, evidence


def kronecker_dim(*factors: Tensor) -> KroneckerDim:
    """The statistics of one parameter ``"w"``, measured once."""
    total = {"factors": {"w": factors}, "diagonals": {}}
    return KroneckerDim(Average(total, torch.ones((), dtype=torch.float64)))
