"""Autocast and parameters of mixed dtypes: torch's loss whatever is measured, and right matrices.

The reference is the same model in float32, within the rounding of half precision.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.curvature import (
    ExampleRows,
    GGNForm,
    GGNOperator,
    HessianOperator,
    LayerStatistics,
    PerSampleGrads,
    SampledGradient,
)
from tests.problems import initialised, normal


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=True)[0].mean(1))


class Autocast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)


SEQUENCE, IMAGE = normal((4, 3, 8), 1).float(), normal((4, 2, 6, 6), 1).float()
IDS = torch.arange(12).reshape(4, 3) % 7
MODELS = {
    "a convolution, then linear": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        IMAGE,
    ),
    "transposed, group norm": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(147, 3)
        ),
        IMAGE,
    ),
    "encoder": (lambda: nn.Sequential(encoder(), Mean(), nn.Linear(8, 3)), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "embedding, layer norm": (
        lambda: nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), Mean(), nn.Linear(8, 3)),
        IDS,
    ),
}
TARGETS = torch.arange(4) % 3
NEEDS = [
    LayerStatistics("empirical"),
    LayerStatistics("exact"),
    PerSampleGrads(),
    ExampleRows("empirical"),
    GGNOperator(),
    HessianOperator(),
    GGNForm(),
]


def direction(params):
    return {k: normal(p.shape, 3).to(p.dtype) for k, p in params.items()}


MATRICES = {
    "gradient": lambda *args: fp.observe(*args).grads,
    "GGN": lambda *args: fp.GGN(*args) @ direction(args[1]),
    "Hessian": lambda *args: fp.Hessian(*args) @ direction(args[1]),
    "empirical Fisher": lambda *args: fp.Fisher(*args, labels="empirical") @ direction(args[1]),
    "its form": lambda *args: fp.Fisher(*args, labels="empirical").trace(),
    "K-FAC": lambda *args: fp.KroneckerFactored(*args, labels="exact") @ direction(args[1]),
    "diagonal": lambda *args: fp.DiagonalGGN(*args).trace(),
    "per sample": lambda *args: fp.per_sample_grads(*args),
    "norms": lambda *args: fp.per_sample_norms(*args),
}


def flat(value):
    tensors = value.values() if isinstance(value, dict) else [value]
    return torch.cat([x.float().reshape(-1) for x in tensors])


def compared(half, full, inputs, context):
    """Hold a model in half precision to torch's loss and to the same model in float32."""
    half, full = (fp.problem(m, fp.losses.cross_entropy) for m in (half, full))
    batch = inputs, TARGETS
    with context():
        expected = F.cross_entropy(half.module(inputs), TARGETS)
        for need in NEEDS:
            evidence = fp.observe(half, half.params, batch, (need,))
            assert torch.equal(evidence.loss, expected), need
    for name, matrix in MATRICES.items():
        right = flat(matrix(full, full.params, batch))
        with context():
            found = flat(matrix(half, half.params, batch))
        assert float((found - right).norm() / right.norm()) < 0.06, name


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, where):
    make, inputs = MODELS[name]
    module = initialised(make(), dtype=torch.float32)
    if where == "inside":
        compared(Autocast(module), module, inputs, contextlib.nullcontext)
    else:
        compared(module, module, inputs, lambda: torch.autocast("cpu", torch.bfloat16))


def test_parameters_of_mixed_dtypes():
    layers = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), Mean()
    casts = nn.ModuleList([Cast(torch.bfloat16), Cast(torch.float32)])
    full = initialised(nn.Sequential(*layers, nn.Linear(5, 3)), dtype=torch.float32)
    half = copy.deepcopy(full)
    half[1:4].bfloat16()
    half[0].register_forward_hook(lambda module, args, out: casts[0](out))
    half[4].register_forward_hook(lambda module, args, out: casts[1](out))
    compared(half, full, IDS, contextlib.nullcontext)


def test_the_constant_of_many_terms_neither_overflows_nor_underflows_in_float16():
    """1 / c is above the largest number of float16, and c is below its normal numbers."""
    terms, labels = 70_000, torch.Generator().manual_seed(0)
    module = nn.Linear(2, 2, bias=False)
    x = normal((terms, 2), 1).half()
    problem = fp.problem(module.half(), fp.losses.mse)
    batch = x, normal((terms, 2), 2).half()
    args = (problem, problem.params, batch)
    error = (module(x).double() - batch[1].double()).detach()
    rows = torch.einsum("no,ni->noi", error, x.double())
    found = fp.per_sample_grads(*args)["weight"].double()
    assert float((found - rows).abs().max()) < 0.05
    evidence = fp.observe(*args, (PerSampleGrads(), SampledGradient()), generator=labels)
    found = evidence[PerSampleGrads()].grads["weight"].double()
    assert float((found - rows).norm() / rows.norm()) < 0.1
    assert evidence[SampledGradient()].grads["weight"].isfinite().all()
    fisher = fp.Fisher(*args, labels="empirical").trace()
    assert float(fisher) == pytest.approx(float(rows.square().sum() / terms), rel=0.05)
