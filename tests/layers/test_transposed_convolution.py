"""Transposed convolutions as layers: linear in a weight whose rows lie on the input's positions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics, layer_statistics
from funcprecond.layers.patches import transposed_patches
from funcprecond.linalg import treemath
from funcprecond.representation.kronecker_io import KroneckerIO
from tests.conformance.methods import METHODS, build
from tests.equality import assert_close
from tests.problems import initialised, normal, seeded

CLASSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LABELS = torch.tensor([0, 2, 1])


class Decoder(nn.Module):
    """Something to differentiate before and behind the layer under test."""

    def __init__(self, dims, shape, **options):
        super().__init__()
        self.before = nn.Linear(shape[-1], shape[-1])
        self.body = CLASSES[dims](4, 2 * options.get("groups", 1), **options).double()
        out = self.body(torch.zeros(1, 4, *shape, dtype=torch.float64))
        self.head = nn.Linear(out.numel(), 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.before(x)))).flatten(1))


@st.composite
def decoders(draw, single=False):
    """(problem, batch) of a drawn geometry; ``single`` is one example at one position."""
    dims = draw(st.integers(1, 3))
    shape = (1,) * dims if single else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "padding": draw(st.integers(0, dilation * (min(kernel) - 1) // 2)),
        "output_padding": draw(st.integers(0, max(stride, dilation) - 1)),
        "groups": draw(st.sampled_from([1, 2, 4])),
        "bias": draw(st.booleans()),
    }
    problem = fp.problem(initialised(Decoder(dims, shape, **options)), fp.losses.cross_entropy)
    count = 1 if single else 3
    return problem, (normal((count, 4, *shape)), LABELS[:count])


def rows_of(problem, batch):
    def loss(params, x, y):
        outputs = functional_call(problem.module, params, (x.unsqueeze(0),))
        return nn.functional.cross_entropy(outputs, y.unsqueeze(0))

    return vmap(grad(loss), (None, 0, 0))(problem.params, *batch)


@given(decoders())
def test_examples_gradients_norms_and_inner_products_are_those_by_vmap(work):
    problem, batch = work
    data, rows = (problem, problem.params, batch), rows_of(*work)
    assert_close(fp.per_sample_grads(*data), rows, rtol=1e-9)
    flat = torch.cat([g.flatten(1) for g in rows.values()], 1)
    assert_close(fp.per_sample_norms(*data), flat.norm(dim=1), rtol=1e-9)
    assert_close(fp.per_sample_gram(*data), flat @ flat.mT, rtol=1e-9)
    fisher = fp.Fisher(*data, labels="empirical").to_dense()
    assert_close(fisher, flat.mT @ flat / len(flat), rtol=1e-9)


@given(decoders())
def test_the_diagonal_is_that_of_the_dense_matrix(work):
    problem, batch = work
    dense = fp.GGN(problem, problem.params, batch).to_dense()
    found = fp.DiagonalGGN(problem, problem.params, batch).diagonal()
    assert_close(treemath.ravel(found), dense.diagonal(), rtol=1e-9)


@given(decoders(single=True))
def test_of_one_example_at_one_position_the_factors_are_exact_within_a_group(work):
    problem, batch = work
    data, names = (problem, problem.params, batch), ["body.weight"]
    dense = fp.GGN(*data).block(names).to_dense()
    groups = problem.module.body.groups
    blocks = dense.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    expected = torch.block_diag(*[blocks[j, :, j] for j in range(groups)])
    found = fp.KroneckerFactored(*data, kind="kflr").factors.block("body.weight")
    scale = dense.abs().max().clamp_min(1e-8)
    assert_close(found / scale, expected / scale, atol=1e-9)


@given(decoders())
def test_the_eigenbasis_leaves_the_trace_and_the_factors_have_the_weights_axes(work):
    problem, batch = work
    data = (problem, problem.params, batch)
    dense = fp.GGN(*data).block(["body.weight"]).to_dense()
    moments = fp.KroneckerFactored(*data, kind="ekfac", labels="exact").block(["body.weight"])
    assert_close(moments.to_dense().trace(), dense.trace(), rtol=1e-9, atol=1e-10)
    weight, groups = problem.params["body.weight"], problem.module.body.groups
    size = weight.shape[0] // groups, weight[0].numel()
    shapes = [(n, n) if groups == 1 else (groups, n, n) for n in size]
    for kind in ("kflr", "foof"):
        factors = fp.KroneckerFactored(*data, kind=kind).factors
        assert factors.block("body.weight").shape == 2 * (weight.numel(),)
    layers = layer_statistics(*data, labels="exact")
    factors = KroneckerIO.init(problem.params).accumulate(layers, None)
    assert [factors.left["body.weight"].shape, factors.right["body.weight"].shape] == shapes


@given(decoders())
def test_patches_are_the_transpose_of_the_convolution(work):
    problem, (x, _) = work
    body = problem.module.body
    weight = problem.params["body.weight"]
    z = body(x) if body.bias is None else body(x) - body.bias.reshape(-1, *[1] * (x.ndim - 2))
    g = normal(tuple(z.shape), 3)
    patches = transposed_patches(
        g, weight.shape[2:], body.stride, body.padding, body.dilation, body.output_padding
    )
    groups = body.groups
    rows = patches.unflatten(1, (groups, -1))
    inputs = x.flatten(2).unflatten(1, (groups, -1))
    found = torch.einsum("njit,njot->jio", inputs, rows).reshape(weight.shape)
    (expected,) = torch.autograd.grad(z, body.weight, g)
    assert_close(found, expected, rtol=1e-9)


def problem_and_batch(**options):
    options = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1} | options
    module = initialised(Decoder(2, (2, 3), **options))
    return fp.problem(module, fp.losses.cross_entropy), (normal((3, 4, 2, 3)), LABELS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_both_routes_see_the_layer_and_say_the_same(groups, sharing):
    problem, batch = problem_and_batch(groups=groups)
    need = LayerStatistics("exact", sharing=sharing)

    def measured(params):
        found = fp.observe(problem, params, batch, (need,))[need]
        factors = KroneckerIO.init(params).accumulate(found, None)
        return factors.left | {f"{k} right": x for k, x in factors.right.items()} | factors.units

    found = measured(problem.params)
    assert {"body.weight", "body.weight right", "body.bias"} <= found.keys()
    stacked = {k: p.unsqueeze(0) for k, p in problem.params.items()}
    mapped = vmap(measured)(stacked)
    assert_close({k: x[0] for k, x in mapped.items()}, found, rtol=1e-9)


def test_of_a_long_axis_only_the_factors_diagonal_is_kept():
    problem, batch = problem_and_batch()
    layers = layer_statistics(problem, problem.params, batch, labels="exact")
    whole = KroneckerIO.init(problem.params).accumulate(layers, None)
    short = KroneckerIO.init(problem.params, max_dim=10).accumulate(layers, None)
    assert_close(short.left["body.weight"], whole.left["body.weight"])
    assert_close(short.right["body.weight"], whole.right["body.weight"].diagonal(), rtol=1e-9)


def test_a_weight_used_twice_has_the_positions_of_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.ConvTranspose1d(3, 3, 2), nn.Linear(15, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))).flatten(1))

    problem = fp.problem(initialised(Twice()), fp.losses.cross_entropy)
    batch = (normal((3, 3, 3)), LABELS)
    assert_close(
        fp.per_sample_grads(problem, problem.params, batch), rows_of(problem, batch), rtol=1e-9
    )


def test_an_input_without_batch_axis_is_left_to_the_fallback():
    module = initialised(nn.ConvTranspose1d(3, 2, 2))
    problem = fp.problem(module, fp.losses.mse)
    e = fp.Evaluation(problem, problem.params, (normal((3, 4)), normal((2, 5))), layers=True)
    assert not e.calls
    assert e.unrecorded == {"weight": "conv_transpose1d", "bias": "conv_transpose1d"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [k for k, line in METHODS.items() if line.learns_layers])
def test_methods_that_learn_the_layers_take_it_without_a_warning(name):
    problem, batch = problem_and_batch()
    method, params = build(name), problem.params
    found = fp.observe(problem, params, batch, method.needs(0), generator=seeded(0))
    _, direction = method.update(method.init(params), found.grads, found)
    assert treemath.norm(direction).isfinite()
    assert treemath.dot(direction, found.grads) > 0
