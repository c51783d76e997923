"""The battery of facts/torch-func.md on one model a kind of layer, by both routes.

Products are linear, symmetric, equal to central differences of the gradient (which no fault of an
autodiff engine can share), positive semi-definite where they must be, repeatable bit for bit, and
leave modules, parameters and generators alone.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import funcprecond as fp
from funcprecond.autodiff import evaluation as module_under_test
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.layers.kinds.linear import Linear
from funcprecond.linalg import treemath
from tests import reference
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, normal, seeded

N = 3


class Body(nn.Module):
    """A linear or embedding layer before, the layer under test, and a linear head behind."""

    def __init__(self, before, body, features, after=None):
        super().__init__()
        self.before, self.body = before, body
        self.after = after or nn.Identity()
        self.head = nn.Linear(features, 3)

    def forward(self, x):
        h = self.body(torch.tanh(self.before(x)))
        h = h[0] if isinstance(h, tuple) else h
        return self.head(self.after(h).flatten(1))


class Attention(nn.Module):
    def __init__(self, causal=False, dropout=0.0):
        super().__init__()
        self.qkv, self.options = nn.Linear(4, 12), (dropout, causal)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        p, causal = self.options
        out = F.scaled_dot_product_attention(q, k, v, None, p if self.training else 0.0, causal)
        return out.transpose(1, 2).flatten(2)


class WrittenOut(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 2**0.5).softmax(-1)
        return (scores @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)

    def forward(self, tokens):
        h = torch.tanh(self.embedding(tokens)).mean(1)
        return F.linear(h, self.embedding.weight)


class TiedLinear(nn.Module):
    """One weight under two names, and once more transposed."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.head = (nn.Linear(4, n) for n in (4, 4, 3))
        self.decode.weight = self.encode.weight

    def forward(self, x):
        h = torch.tanh(self.decode(torch.tanh(self.encode(x))))
        return self.head(torch.tanh(F.linear(h, self.decode.weight.T)))


def flat(layer, features=6):
    return Body(nn.Linear(4, features), layer, features)


def image(layer, outputs, channels=4):
    return Body(nn.Conv2d(2, channels, 1), layer, outputs)


def sequence(layer, features=4):
    return Body(nn.Linear(4, 4), layer, 3 * features)


def signal(layer, outputs):
    return Body(nn.Conv1d(2, 4, 1), layer, outputs)


def volume(layer, outputs):
    return Body(nn.Conv3d(1, 2, 1), layer, outputs)


FLAT, IMAGE, SEQUENCE = (N, 4), (N, 2, 4, 4), (N, 3, 4)
SIGNAL, VOLUME = (N, 2, 6), (N, 1, 3, 3, 3)
TOKENS = torch.tensor([[0, 1, 1], [2, 2, 0], [1, 0, 2]])
MODELS = {
    "linear, tied": (TiedLinear, FLAT),
    "layer norm": (lambda: flat(nn.LayerNorm(6)), FLAT),
    "layer norm without bias": (lambda: flat(nn.LayerNorm(6, bias=False)), FLAT),
    "rms norm": (lambda: flat(nn.RMSNorm(6)), FLAT),
    "weight norm": (lambda: flat(weight_norm(nn.Linear(6, 6))), FLAT),
    "weight norm of the whole": (lambda: flat(weight_norm(nn.Linear(6, 6), dim=None)), FLAT),
    "weight norm of inputs": (lambda: image(weight_norm(nn.Conv2d(4, 3, 3), dim=1), 12), IMAGE),
    "group norm": (lambda: image(nn.GroupNorm(2, 4), 64), IMAGE),
    "instance norm": (lambda: image(nn.InstanceNorm2d(4, affine=True), 64), IMAGE),
    "instance norm, tracking": (
        lambda: image(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 64),
        IMAGE,
    ),
    "batch norm, train": (lambda: flat(nn.BatchNorm1d(6)), FLAT),
    "batch norm, eval": (lambda: flat(nn.BatchNorm1d(6)).eval(), FLAT),
    "batch norm of images, eval": (lambda: image(nn.BatchNorm2d(4).eval(), 64).eval(), IMAGE),
    "batch norm of volumes, train": (lambda: volume(nn.BatchNorm3d(2), 54), VOLUME),
    "instance norm of sequences": (lambda: signal(nn.InstanceNorm1d(4, affine=True), 24), SIGNAL),
    "batch norm of images, train": (lambda: image(nn.BatchNorm2d(4), 64), IMAGE),
    "conv": (lambda: image(nn.Conv2d(4, 3, 3), 12), IMAGE),
    "conv, grouped": (lambda: image(nn.Conv2d(4, 6, 2, groups=2), 54), IMAGE),
    "conv, dilated": (lambda: image(nn.Conv2d(4, 3, 2, dilation=2), 12), IMAGE),
    "conv, strided": (lambda: image(nn.Conv2d(4, 3, 2, stride=2), 12), IMAGE),
    "conv, same": (lambda: image(nn.Conv2d(4, 2, (3, 1), padding="same"), 32), IMAGE),
    "conv, circular": (
        lambda: image(nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), 32),
        IMAGE,
    ),
    "conv of sequences": (lambda: Body(nn.Linear(4, 4), nn.Conv1d(3, 2, 2), 6), SEQUENCE),
    "conv of sequences, grouped and dilated": (
        lambda: signal(nn.Conv1d(4, 6, 2, dilation=2, groups=2), 24),
        SIGNAL,
    ),
    "conv of volumes": (lambda: volume(nn.Conv3d(2, 3, 2, padding=1, stride=2), 24), VOLUME),
    "conv of volumes, grouped and dilated": (
        lambda: volume(nn.Conv3d(2, 4, 2, dilation=2, groups=2), 4),
        VOLUME,
    ),
    "transposed conv of sequences": (
        lambda: signal(nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), 28),
        SIGNAL,
    ),
    "transposed conv": (
        lambda: image(nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=2), 72),
        IMAGE,
    ),
    "transposed conv of volumes": (
        lambda: volume(nn.ConvTranspose3d(2, 1, 2, padding=1), 8),
        VOLUME,
    ),
    "max pool": (lambda: Body(nn.Conv2d(2, 4, 1), nn.MaxPool2d(2), 16), IMAGE),
    "max pool of sequences": (lambda: signal(nn.MaxPool1d(2, 1), 20), SIGNAL),
    "max pool of volumes": (lambda: volume(nn.MaxPool3d(2, 1), 16), VOLUME),
    "average pool": (lambda: image(nn.AvgPool2d(2, 1, 1), 100), IMAGE),
    "average pool of sequences": (lambda: signal(nn.AvgPool1d(3), 8), SIGNAL),
    "average pool of volumes": (lambda: volume(nn.AvgPool3d(2, 1), 16), VOLUME),
    "adaptive average pool": (lambda: image(nn.AdaptiveAvgPool2d((1, 3)), 12), IMAGE),
    "adaptive max pool": (lambda: image(nn.AdaptiveMaxPool2d(2), 16), IMAGE),
    "power-average pool": (lambda: image(nn.LPPool2d(2, 2), 16), IMAGE),
    "embedding": (lambda: Body(nn.Embedding(3, 4), nn.Linear(4, 2), 6), TOKENS),
    "tied embedding": (TiedEmbedding, TOKENS),
    "attention, written out": (lambda: sequence(WrittenOut()), SEQUENCE),
    "attention": (lambda: sequence(Attention()), SEQUENCE),
    "attention, causal": (lambda: sequence(Attention(causal=True)), SEQUENCE),
    "attention, dropout": (lambda: sequence(Attention(dropout=0.4)), SEQUENCE),
    "multi-head attention": (lambda: sequence(SelfAttention()), SEQUENCE),
    "multi-head attention, eval": (lambda: sequence(SelfAttention()).eval(), SEQUENCE),
    "multi-head attention, dropout": (lambda: sequence(SelfAttention(dropout=0.4)), SEQUENCE),
    "encoder layer": (
        lambda: sequence(nn.TransformerEncoderLayer(4, 2, 5, 0.0, "gelu", batch_first=True)),
        SEQUENCE,
    ),
    "encoder layer, dropout": (
        lambda: sequence(nn.TransformerEncoderLayer(4, 2, 5, 0.3, batch_first=True)),
        SEQUENCE,
    ),
    "encoder layer, eval": (
        lambda: sequence(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)).eval(),
        SEQUENCE,
    ),
    "dropout": (lambda: flat(nn.Dropout(0.4)), FLAT),
    "dropout of channels": (lambda: image(nn.Dropout2d(0.4), 64), IMAGE),
    "dropout that keeps the variance": (lambda: flat(nn.AlphaDropout(0.4)), FLAT),
    "rnn": (lambda: sequence(nn.RNN(4, 2, batch_first=True), 2), SEQUENCE),
    "lstm, stacked in both directions": (
        lambda: sequence(nn.LSTM(4, 2, 2, batch_first=True, bidirectional=True), 4),
        SEQUENCE,
    ),
    "lstm": (lambda: sequence(nn.LSTM(4, 2, batch_first=True), 2), SEQUENCE),
    "gru": (lambda: sequence(nn.GRU(4, 2, batch_first=True), 2), SEQUENCE),
}
every_model = pytest.mark.parametrize("model", MODELS)


def build(model: str):
    make, inputs = MODELS[model]
    module = make()
    training = module.training
    module = initialised(module).train(training)
    for i, buffer in enumerate(module.buffers()):
        if buffer.is_floating_point():
            buffer.copy_(normal(buffer.shape, 40 + i).abs() + 0.1)
    x = inputs if isinstance(inputs, torch.Tensor) else normal(inputs)
    return fp.problem(module, fp.losses.cross_entropy), (x, torch.tensor([0, 2, 1]))


def evaluate(problem, batch, **options):
    return Evaluation(problem, problem.params, batch, generator=seeded(3), twice=True, **options)


def vectors(problem, count=2):
    return [
        {k: normal(p.shape, 100 * j + i) for i, (k, p) in enumerate(problem.params.items())}
        for j in range(count)
    ]


@every_model
@pytest.mark.parametrize("product", ["hvp", "ggn_mv"])
def test_products_are_linear_symmetric_and_repeatable(model, product):
    problem, batch = build(model)
    apply = getattr(evaluate(problem, batch), product)
    u, v = vectors(problem)
    cu, cv = apply(u), apply(v)
    combined = apply(treemath.add(treemath.mul(u, 2.0), v, -3.0))
    assert_close(
        reference.ravel(combined), 2 * reference.ravel(cu) - 3 * reference.ravel(cv), rtol=1e-9
    )
    scale = treemath.norm(u) * treemath.norm(cv)
    assert abs(treemath.dot(u, cv) - treemath.dot(v, cu)) < 1e-11 * scale
    assert_same(apply(v), cv)


@every_model
def test_hessian_products_equal_central_differences_of_the_gradient(model):
    problem, batch = build(model)
    e = evaluate(problem, batch)
    (v,) = vectors(problem, 1)
    expected = reference.difference(lambda p: e.objective(p)[1], problem.params, v, 1e-5)
    assert_close(reference.ravel(e.hvp(v)), reference.ravel(expected), rtol=1e-6)


@every_model
def test_the_gradient_equals_central_differences_of_the_loss(model):
    problem, batch = build(model)
    e = evaluate(problem, batch)
    for v in vectors(problem, 3):
        expected = reference.difference(e.value, problem.params, v)
        assert treemath.dot(e.grads, v).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)


@every_model
def test_jacobian_products_equal_central_differences_of_the_outputs(model):
    problem, batch = build(model)
    e = evaluate(problem, batch)
    (v,) = vectors(problem, 1)

    def outputs(p):
        return Evaluation(problem, p, batch, masks=e.masks).outputs

    assert_close(e.jvp(v), reference.difference(outputs, problem.params, v), rtol=1e-6)


@every_model
def test_the_gauss_newton_matrix_is_positive_and_its_jacobians_are_adjoint(model):
    problem, batch = build(model)
    e = evaluate(problem, batch)
    u = normal((N, 3), 5)
    for v in vectors(problem, 3):
        gv, jv = e.ggn_mv(v), e.jvp(v)
        assert treemath.dot(v, gv) >= -1e-12 * treemath.dot(v, v)
        h = problem.loss.hessian_product(e.outputs, e.targets, jv)
        assert_close(treemath.dot(v, gv), (jv * h).sum(), rtol=1e-9)
        assert_close(treemath.dot(e.pull(u), v), (u * jv).sum(), rtol=1e-9)


@every_model
def test_nothing_outside_is_changed(model):
    problem, batch = build(model)
    module = problem.module
    before = copy((dict(module.state_dict()), problem.params, problem.buffers, batch))
    state = torch.get_rng_state()
    e = evaluate(problem, batch, layers=True)
    (v,) = vectors(problem, 1)
    results = e.grads, e.hvp(v), e.ggn_mv(v), list(e.layer_grads), e.objective(problem.params)
    assert_same((dict(module.state_dict()), problem.params, problem.buffers, batch), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(results))


@every_model
def test_both_routes_lead_to_the_same_numbers(model, monkeypatch):
    problem, batch = build(model)
    (v,) = vectors(problem, 1)

    def measure():
        e = evaluate(problem, batch, layers=True)
        calls = [(type(c), c.weight, c.bias, c.shape) for c in e.calls]
        layers = [list(e.layer_inputs), list(e.layer_grads), list(e.pull_layers(e.outputs))]
        first = e.loss, e.outputs, e.grads, e.buffers, e.pull(e.outputs)
        return calls, (first, layers, e.hvp(v), e.jvp(v), e.ggn_mv(v))

    calls, graph = measure()
    monkeypatch.setattr(module_under_test, "is_eager", lambda tree: False)
    other_calls, function = measure()
    assert calls == other_calls
    assert_close(function, graph, rtol=1e-8)


@every_model
def test_layer_pairs_rebuild_the_gradient_of_linear_layers(model):
    """No call is lost, and inputs and output gradients give the gradient."""
    problem, batch = build(model)
    e = evaluate(problem, batch, layers=True)
    assert len(e.calls) == len(e.layer_inputs) == len(e.layer_grads)
    recorded = {c.weight for c in e.calls} | {c.bias for c in e.calls}
    assert problem.params.keys() <= recorded | e.unrecorded.keys()
    rebuilt: dict[str, torch.Tensor] = {}
    for call, a, g in zip(e.calls, e.layer_inputs, e.layer_grads, strict=True):
        if isinstance(call, Linear) and call.weight not in e.unrecorded:
            pair = g.flatten(0, -2).T @ a.flatten(0, -2)
            pair = pair.T if call.inputs_first else pair
            rebuilt[call.weight] = rebuilt.get(call.weight, 0.0) + pair
    for name, gradient in rebuilt.items():
        if all(isinstance(c, Linear) for c in e.calls if c.weight == name):
            assert_close(gradient, e.grads[name], rtol=1e-9)


COUPLED = [m for m in MODELS if "batch norm" in m and "eval" not in m]


@pytest.mark.parametrize("model", [m for m in MODELS if m not in COUPLED])
def test_per_example_gradients_are_those_of_the_examples_alone(model):
    problem, batch = build(model)
    e = evaluate(problem, batch)
    u = problem.loss.empirical(e.outputs, e.targets)
    pulled = e.pull_each(u, list(problem.params))
    for n in range(N):
        alone = torch.zeros_like(u)
        alone[n] = u[n]
        assert_close({k: g[n] for k, g in pulled.items()}, e.pull(alone), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("model", COUPLED)
def test_models_that_couple_their_examples_are_refused_by_layer(model):
    problem, batch = build(model)
    with pytest.raises(ValueError, match="BatchNorm.*couples the examples"):
        evaluate(problem, batch).pull_each(normal((N, 3)), ["head.weight"])
