"""Linear and bilinear layers in every spelling, against dense float64 references."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

import funcprecond as fp
from funcprecond.layers.kinds.bilinear import Bilinear
from funcprecond.layers.kinds.linear import Linear
from funcprecond.linalg import treemath
from funcprecond.representation.kronecker_io import KroneckerIO
from tests import reference
from tests.equality import assert_close
from tests.problems import initialised, normal

LABELS = torch.tensor([0, 2, 1])
I, O = 3, 4


class Spelled(nn.Module):
    """A layer that is spelled as ``apply`` says, between a nonlinear body and a linear head."""

    def __init__(self, apply, weight, bias):
        super().__init__()
        self.before = nn.Linear(I, I)
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = nn.Parameter(torch.empty(O)) if bias else None
        self.head = nn.Linear(O, 3)
        self.apply_layer = apply

    def forward(self, x):
        z = self.apply_layer(torch.tanh(self.before(x)), self.weight, self.bias)
        z = torch.tanh(z)
        return self.head(z if z.ndim == 2 else z.mean(1))


def conv1d_of_gpt2(x, w, b):
    return torch.addmm(b, x.reshape(-1, I), w).reshape(*x.shape[:-1], O)


# name: (the layer, the weight's shape, whether the bias can be in the layer's block)
SPELLINGS = {
    "linear": (F.linear, (O, I), True),
    "addmm": (conv1d_of_gpt2, (I, O), True),
    "addmm of the transpose": (lambda x, w, b: torch.addmm(b, x, w.T), (O, I), True),
    "addmm by name": (lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w), (I, O), True),
    "addmm as a method": (lambda x, w, b: b.addmm(x, w), (I, O), True),
    "matmul": (lambda x, w, b: x @ w, (I, O), False),
    "matmul of the transpose": (lambda x, w, b: x @ w.mT, (O, I), False),
    "mm": (lambda x, w, b: torch.mm(x, w), (I, O), False),
    "linear of the transpose": (lambda x, w, b: F.linear(x, w.T), (I, O), False),
    "bilinear": (lambda x, w, b: F.bilinear(x, x[..., :2], w, b), (O, I, 2), True),
}
POSITIONS = ("linear", "addmm", "matmul", "bilinear", "matmul of the transpose")


def work(name, positions, bias, count):
    apply, shape, can_have_bias = SPELLINGS[name]
    bias = can_have_bias and (bias or name.startswith("addmm"))
    module = initialised(Spelled(apply, shape, bias))
    x = normal((count, positions, I) if positions else (count, I))
    return fp.problem(module, fp.losses.cross_entropy), (x, LABELS[:count])


@st.composite
def works(draw):
    name = draw(st.sampled_from(sorted(SPELLINGS)))
    positions = draw(st.sampled_from([0, 1, 3])) if name in POSITIONS else 0
    return work(name, positions, draw(st.booleans()), 3)


def rows_of(problem, batch):
    def loss(params, x, y):
        outputs = functional_call(problem.module, params, (x.unsqueeze(0),))
        return F.cross_entropy(outputs, y.unsqueeze(0))

    return vmap(grad(loss), (None, 0, 0))(problem.params, *batch)


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_seen_as_a_layer_of_its_kind(name):
    problem, batch = work(name, 0, True, 3)
    layers = fp.layer_statistics(problem, problem.params, batch, labels="empirical")
    block = "weight+bias" if problem.module.bias is not None else "weight"
    assert block in layers.uses
    kind = Bilinear if name == "bilinear" else Linear
    assert all(type(use.call) is kind for use in layers.uses[block])
    assert not layers.others


@given(works())
def test_rows_norms_and_inner_products_are_those_of_single_examples(drawn):
    problem, batch = drawn
    data, rows = (problem, problem.params, batch), rows_of(*drawn)
    assert_close(fp.per_sample_grads(*data), rows, rtol=1e-9)
    flat = torch.cat([g.flatten(1) for g in rows.values()], 1)
    assert_close(fp.per_sample_norms(*data), flat.norm(dim=1), rtol=1e-9)
    assert_close(fp.per_sample_gram(*data), flat @ flat.mT, rtol=1e-9)


@given(works())
def test_the_diagonal_is_the_dense_matrixs(drawn):
    problem, batch = drawn
    dense = reference.ggn(problem, problem.params, batch)
    found = fp.DiagonalGGN(problem, problem.params, batch).diagonal()
    assert_close(treemath.ravel(found), dense.diagonal(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_factors_of_one_example_at_one_position_are_exact(name, bias):
    problem, batch = work(name, 0, bias, 1)
    names = [k for k in ("weight", "bias") if k in problem.params]
    dense = reference.ggn(problem, problem.params, batch)
    index = treemath.unravel(torch.arange(len(dense)), problem.params)
    order = torch.cat([index[k].reshape(-1) for k in names])
    found = fp.KroneckerFactored(problem, problem.params, batch, kind="kflr").block(names)
    assert_close(found.to_dense(), dense[order][:, order], rtol=1e-7, atol=1e-11)


@given(works())
def test_the_eigenbasis_moments_have_the_exact_trace(drawn):
    problem, batch = drawn
    names = [k for k in ("weight", "bias") if k in problem.params]
    data = (problem, problem.params, batch)
    moments = fp.KroneckerFactored(*data, kind="ekfac", labels="exact").block(names)
    dense = fp.GGN(*data).block(names).to_dense()
    assert_close(moments.to_dense().trace(), dense.trace(), rtol=1e-8)


@pytest.mark.parametrize("name", [k for k in SPELLINGS if k != "bilinear"])
def test_all_spellings_of_one_layer_have_one_preconditioned_direction(name):
    bias = name.startswith("addmm") or name == "linear"
    problem, batch = work(name, 0, bias, 3)
    weight = normal((I, O), 7)
    stored_inputs_first = problem.params["weight"].shape == (I, O)
    like = work("linear", 0, bias, 3)[0]
    shared = {k: normal(tuple(p.shape), 8) for k, p in like.params.items() if k != "weight"}
    params = shared | {"weight": weight if stored_inputs_first else weight.mT.contiguous()}
    expected_params = shared | {"weight": weight.mT.contiguous()}
    directions = []
    for method in (fp.kflr(damping=0.1), fp.kflr(damping=0.1, damping_split="pi")):
        found = []
        for each, at in ((problem, params), (like, expected_params)):
            at = {k: at[k] for k in each.params}
            evidence = fp.observe(each, at, batch, method.needs(0))
            found.append(method.update(method.init(at), evidence.grads, evidence)[1])
        directions.append(found)
    for ours, theirs in directions:
        turned = ours | {"weight": ours["weight"].mT if stored_inputs_first else ours["weight"]}
        assert_close({k: turned[k] for k in theirs}, theirs, rtol=1e-9)


@pytest.mark.parametrize(
    "apply",
    [
        lambda x, w, b: torch.addmm(b, x, w, beta=2),
        lambda x, w, b: torch.addmm(b.expand(len(x), O) * 1, x, w.exp()),
        lambda x, w, b: x @ w.tril() + b,
    ],
)
def test_a_product_that_is_no_affine_layer_is_left_to_the_diagonal(apply):
    module = initialised(Spelled(apply, (I, O), True))
    problem, batch = fp.problem(module, fp.losses.cross_entropy), (normal((3, I)), LABELS)
    data = (problem, problem.params, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = KroneckerIO.init(problem.params).accumulate(
            fp.layer_statistics(*data, labels="exact"), None
        )
    dense = reference.ggn(problem, problem.params, batch).diagonal()
    expected = treemath.unravel(dense, problem.params)
    left = [k for k in ("weight", "bias") if k in state.others]
    assert len(left) == 1
    assert_close({k: state.others[k] for k in left}, {k: expected[k] for k in left}, rtol=1e-8)
