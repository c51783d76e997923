"""The linearised model, whose graph is opened without its numbers, against one that has them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import funcprecond as fp
from funcprecond.autodiff.graph_run import GraphRun
from tests.equality import assert_close
from tests.problems import normal


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.causal = torch.ones(4, 4, dtype=torch.bool).tril()

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1) / 3**0.5).masked_fill(~self.causal, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return (x + self.out(mixed))[:, -1]


class InPlace(torch.autograd.Function):
    """A square whose backward pass writes into what it was given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.mul_(2) * x


class Recomputed(torch.autograd.Function):
    """``x W`` and the sine of it, which the backward pass computes again."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x @ w).sin()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        inner = g * (x @ w).cos()
        return inner @ w.mT, x.mT @ inner


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(5, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def fixed(x):
    return Recomputed.apply(x, torch.eye(4).double() + 0.5)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3)), (6, 5)),
    "norms": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)),
        (6, 2, 5),
    ),
    "attention": (Attention, (3, 4, 6)),
    "convolutions": (convolutional, (5, 2, 8, 8)),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)), (5, 2, 7)),
    "in place": (lambda: Custom(InPlace.apply), (6, 5)),
    "recomputed": (lambda: Custom(fixed), (6, 5)),
    "transposed weight": (lambda: Custom(lambda x: x @ x.mT @ x), (6, 5)),
}


def opened(name):
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().double()
    problem = fp.problem(model, lambda outputs, targets: outputs.square().sum())
    batch = (normal(shape, 1), torch.zeros(()))
    return problem, batch, {k: normal(p.shape, 2) for k, p in problem.params.items()}


@pytest.mark.parametrize("name", MODELS)
def test_products_with_the_jacobian(name):
    problem, batch, v = opened(name)
    h = 1e-5

    def at(step):
        moved = {k: p + step * v[k] for k, p in problem.params.items()}
        return problem(moved, batch[0])

    assert_close(
        fp.jvp(problem, problem.params, batch, v), (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-6
    )


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "convolution_backward")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mlp", "norms", "attention", "convolutions"])
def test_nothing_is_multiplied_to_open_it(name):
    problem, batch, _ = opened(name)
    run = fp.linearize(problem, problem.params, batch)._run
    assert isinstance(run, GraphRun)
    with Products() as computed:
        run._transposed  # noqa: B018
    assert computed.count == 0
