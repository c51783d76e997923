"""Draws of a model: from the caller's generator, or refused; never from the global generator."""

import inspect
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions

import funcprecond as fp
from funcprecond.autodiff.attention import COMPOSITES
from funcprecond.autodiff.random_functions import DRAWS, DROPOUTS, REPLACED
from funcprecond.autodiff.recorder import Recorder
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import initialised, normal, seeded

HANDLED = {*DRAWS, *DROPOUTS, *REPLACED, *COMPOSITES, F.scaled_dot_product_attention}
# Operators that are reached only through others, which are handled.
INNER = ["attention", "cudnn", "miopen", "_mps", "nested", "mem_eff", "_fused_sdp"]
INNER += ["_functional", "no_dropout"]


def drawing_operators():
    """The names of the operators that torch itself marks as random."""
    names = {n.removeprefix("aten::").split(".")[0] for n in torch._C._dispatch_get_all_op_names()}
    for name in sorted(names):
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None and any(
            torch.Tag.nondeterministic_seeded in getattr(packet, k).tags for k in packet.overloads()
        ):
            yield name


def test_every_operator_that_torch_marks_as_random_is_handled_in_every_spelling():
    found = set()
    for name in drawing_operators():
        for place in (torch, torch.Tensor, F, torch._C._nn, torch._C._VariableFunctions):
            function = getattr(place, name, None)
            if callable(function) and not any(part in name for part in INNER):
                assert function in HANDLED, f"{place.__name__}.{name} draws and is not handled"
                found.add(name)
    assert {"bernoulli", "exponential_", "rrelu", "randperm", "lstm"} <= found


def drawn_inside(function, seen):
    """The name of a random operator in the code of a Python function or of those that it calls."""
    if not isinstance(function, types.FunctionType) or function in seen:
        return None
    seen.add(function)
    for name in function.__code__.co_names:
        if any(name == f.__name__ for f in DRAWS if f is not torch.normal):
            return name
        inner = drawn_inside(function.__globals__.get(name), seen)
        if inner:
            return inner
    return None


def test_every_python_function_of_torch_that_draws_inside_is_handled():
    """The recorder intercepts such a function as one call and does not see what it calls."""
    functions = [f for fs in get_overridable_functions().values() for f in fs if callable(f)]
    functions += [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")]
    drawing = {f for f in functions if drawn_inside(inspect.unwrap(f), set())}
    assert {F.gumbel_softmax, F.dropout, torch.svd_lowrank, nn.init.orthogonal_} <= drawing
    known = HANDLED | {inspect.unwrap(f) for f in HANDLED}
    # The helpers of nn.init take no part in the interception: what they call is seen.
    drawing = {f for f in drawing if not f.__name__.startswith("_no_grad")}
    assert not {f for f in drawing if f not in known and inspect.unwrap(f) not in known}


@torch.jit.script
def scripted(x):
    return x + torch.rand_like(x)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.rand(x.shape)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


OTHERS = {
    "Tensor.multinomial": lambda x: x * x.softmax(-1).multinomial(3, True),
    "Tensor.exponential_": lambda x: x * torch.empty(3).exponential_(),
    "torch.binomial": lambda x: x * torch.binomial(torch.ones(3), torch.ones(3) / 2),
    "torch.poisson": lambda x: x * torch.poisson(torch.ones(3)),
    "torch.normal": lambda x: x + torch.normal(torch.zeros(3), 1.0),
    "torch.randperm": lambda x: x[torch.randperm(3)],
    "torch.randint": lambda x: x * torch.randint(3, (3,)),
    "torch.native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "torch.dropout_": lambda x: torch.dropout_(x * 1, 0.5, True),
    "torch.rrelu": lambda x: torch.rrelu(x, 0.1, 0.9, True),
    "F.gumbel_softmax": F.gumbel_softmax,
    "Gamma": lambda x: x * torch.distributions.Gamma(torch.ones(3), 1.0).rsample(),
    "Beta": lambda x: x * torch.distributions.Beta(torch.ones(3), 1.0).rsample(),
    "Dirichlet": lambda x: x * torch.distributions.Dirichlet(torch.ones(3)).rsample(),
    "Categorical": lambda x: x * torch.distributions.Categorical(torch.ones(3)).sample(),
    "nn.init": lambda x: x * nn.init.normal_(torch.empty(3)),
    "an explicit generator": lambda x: x * torch.rand(3, generator=seeded(0)),
    "torch.ops": lambda x: x * torch.ops.aten.rand.default([3]),
    "a scripted function": scripted,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_draw_that_cannot_be_replaced_is_refused_and_leaves_the_global_generator_as_it_was(name):
    params = {"w": torch.ones(3)}
    problem = fp.problem(lambda p, x: OTHERS[name](x * p["w"]), fp.losses.mse, params=params)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="draws random numbers.*no generator controls"):
        fp.observe(problem, params, (torch.ones(2, 3),) * 2, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


def replayed(f, x, **options):
    """The result with numbers of a generator, the numbers, and the result with them given."""
    first = Recorder({}, generator=seeded(0))
    with first:
        out = f(x)
    second = Recorder({}, masks=tuple(first.masks))
    with second:
        assert_same(f(x), out)
    return out, first.masks


X = torch.ones(400, 50, dtype=torch.float64)
PLAIN = {
    "rand": (lambda x: torch.rand(400, 50), torch.distributions.Uniform(0, 1)),
    "rand of a tuple": (lambda x: torch.rand((400, 50), dtype=x.dtype), None),
    "rand_like": (torch.rand_like, torch.distributions.Uniform(0, 1)),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(-2, 5), torch.distributions.Uniform(-2, 5)),
    "uniform_ to": (
        lambda x: torch.empty_like(x).uniform_(to=5),
        torch.distributions.Uniform(0, 5),
    ),
    "a custom autograd.Function": (OwnFunction.apply, torch.distributions.Uniform(0, 1)),
    "randn": (lambda x: torch.randn(400, 50), torch.distributions.Normal(0, 1)),
    "randn_like": (lambda x: torch.randn_like(x), torch.distributions.Normal(0, 1)),
    "normal_": (lambda x: torch.empty_like(x).normal_(3, 2), torch.distributions.Normal(3, 2)),
    "normal_ std": (lambda x: x.clone().normal_(std=2), torch.distributions.Normal(0, 2)),
    "rsample": (
        lambda x: torch.distributions.Normal(3 * x, 2 * x).rsample(),
        torch.distributions.Normal(3, 2),
    ),
    "bernoulli": (lambda x: torch.bernoulli(0.3 * x), torch.distributions.Bernoulli(0.3)),
    "Tensor.bernoulli": (lambda x: (0.3 * x).bernoulli(), torch.distributions.Bernoulli(0.3)),
    "Tensor.bernoulli of p": (lambda x: x.bernoulli(0.3), torch.distributions.Bernoulli(0.3)),
    "bernoulli_": (lambda x: x.clone().bernoulli_(0.3), torch.distributions.Bernoulli(0.3)),
    "bernoulli_ of a tensor": (
        lambda x: torch.empty_like(x).bernoulli_(0.3 * x),
        torch.distributions.Bernoulli(0.3),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_draws_come_from_the_generator_with_the_right_moments(name):
    f, distribution = PLAIN[name]
    before = torch.get_rng_state()
    out, masks = replayed(f, X)
    assert torch.equal(torch.get_rng_state(), before)
    assert (out.shape, out.dtype, len(masks)) == (f(X).shape, f(X).dtype, 1)
    if distribution is not None:
        assert abs(out.mean() - distribution.mean) < 5 * (distribution.variance / X.numel()) ** 0.5
        assert out.var() == pytest.approx(float(distribution.variance), rel=0.05)


class Net(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.first, self.last, self.noise = nn.Linear(3, 4), nn.Linear(4, 3), noise
        initialised(self)

    def forward(self, x):
        return self.last(torch.tanh(self.noise(self.first(x))))


def stochastic_depth(x):
    """As in torchvision and timm."""
    kept = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    kept = kept.bernoulli_(0.7)
    kept.div_(0.7)
    return x * kept


def drop_path(x):
    """As in transformers."""
    kept = 0.7 + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device)
    kept.floor_()
    return x.div(0.7) * kept


def a_column_filled(x):
    noise = torch.zeros(x.shape[0], 2, dtype=x.dtype)
    noise[:, 0].normal_()
    return x * (1 + noise[:, :1])


NOISES = {
    "stochastic depth": stochastic_depth,
    "drop path": drop_path,
    "reparameterized": lambda x: torch.distributions.Normal(x, F.softplus(x)).rsample(),
    "a column filled": a_column_filled,
    "dropout in place": lambda x: F.dropout(x, 0.3, True, True),
    "svd_lowrank": lambda x: x + torch.svd_lowrank(torch.eye(4, dtype=x.dtype), 2)[0][:, 0],
}


@pytest.mark.parametrize("name", NOISES)
def test_models_with_noise_of_their_own_have_every_derivative(name):
    """One seed is one function: products against differences, examples against the gradient."""
    problem, batch = fp.problem(Net(NOISES[name]), fp.losses.mse), (normal((6, 3)), normal((6, 3)))
    params, v = problem.params, {k: normal(p.shape, 7) for k, p in problem.params.items()}
    args, before = (problem, params, batch), torch.get_rng_state()
    evidence = fp.observe(*args, generator=seeded(1))
    noise = fp.draw(*args, generator=seeded(1))
    assert_same(fp.observe(*args, noise=noise).grads, evidence.grads)

    def gradient(p):
        return fp.observe(problem, p, batch, noise=noise).grads

    product = fp.hvp(*args, v, generator=seeded(1))
    assert_close(product, reference.difference(gradient, params, v), rtol=1e-6)
    rows = fp.per_sample_grads(*args, generator=seeded(1))
    scale = 2 / batch[1].numel()
    assert_close({k: scale * g.sum(0) for k, g in rows.items()}, evidence.grads, rtol=1e-10)
    mapped = torch.vmap(lambda p: fp.observe(problem, p, batch, noise=noise).loss)(
        {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    )
    assert_close(mapped[0], evidence.loss, rtol=1e-10)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_in_place_changes_the_tensor_as_torchs_does():
    x = torch.ones(50, 4, dtype=torch.float64)

    def model(p, x):
        h = x * p["w"]
        return F.dropout(h, 0.5, True, inplace=True) + h

    problem = fp.problem(model, fp.losses.mse, params={"w": torch.ones(4, dtype=torch.float64)})
    for evaluate in (
        lambda: fp.observe(problem, problem.params, (x, x), generator=seeded(0)).outputs,
        lambda: (
            fp.Evaluation(
                problem, problem.params, (x, x), generator=seeded(0), forward_only=True
            ).outputs
        ),
    ):
        assert set(evaluate().flatten().tolist()) == {0.0, 4.0}


def test_dropout_in_place_of_a_view_changes_the_whole():
    def model(p, x):
        h = x * p["w"]
        F.dropout(h.flatten(), 0.5, True, inplace=True)
        return h

    x, params = torch.ones(50, 4), {"w": torch.ones(4)}
    problem = fp.problem(model, fp.losses.mse, params=params)
    found = fp.observe(problem, params, (x, x), generator=seeded(0)).outputs
    assert set(found.flatten().tolist()) == {0.0, 2.0}


def test_dropout_in_place_of_the_inputs_does_not_change_the_callers_batch():
    module = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 2)).double()
    problem, batch = fp.problem(module, fp.losses.mse), (normal((6, 3)), normal((6, 2)))
    before = batch[0].clone()
    for _ in range(2):
        evidence = fp.observe(problem, problem.params, batch, generator=seeded(0))
        rows = fp.per_sample_grads(problem, problem.params, batch, generator=seeded(0))
    assert torch.equal(batch[0], before)
    assert_close({k: g.sum(0) / 6 for k, g in rows.items()}, evidence.grads, rtol=1e-10)


@pytest.mark.parametrize(
    ("dropout", "shape"), [(F.dropout1d, (60, 7)), (F.dropout3d, (60, 2, 3, 2))]
)
def test_dropout_of_channels_of_one_example_without_a_batch(dropout, shape):
    recorder = Recorder({}, generator=seeded(0))
    with recorder:
        out = dropout(torch.ones(shape), 0.5, True).flatten(1)
    assert (out == out[:, :1]).all()
    assert 10 < int((out[:, 0] == 0).sum()) < 50


def test_attention_that_returns_its_weights_has_dropout_from_the_generator():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.4, batch_first=True)
            initialised(self)

        def forward(self, x):
            y, weights = self.attention(x, x, x, need_weights=True)
            return y.mean(1) + weights.sum((1, 2)).unsqueeze(-1)

    problem, batch = fp.problem(Attention(), fp.losses.mse), (normal((5, 3, 4)), normal((5, 4), 1))
    before = torch.get_rng_state()
    evidence = fp.observe(problem, problem.params, batch, generator=seeded(0))
    rows = fp.per_sample_grads(problem, problem.params, batch, generator=seeded(0))
    assert_close({k: g.sum(0) / 10 for k, g in rows.items()}, evidence.grads, rtol=1e-9)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_that_does_not_fit_the_run_is_refused():
    x = torch.ones(4, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    other = pytest.raises(ValueError, match=r"shape \(4, 3\).*have the shape \(1, 3\)")
    with other, Recorder({}, masks=(mask,)):
        F.dropout(x)
    unused = pytest.raises(RuntimeError, match="took 0 of the 1 random tensors")
    with unused, Recorder({}, masks=(mask,)):
        F.dropout(x, training=False)


def test_draws_of_other_threads_are_theirs():
    problem = fp.problem(nn.Linear(3, 2), fp.losses.mse)
    batch, going = (torch.ones(4, 3), torch.ones(4, 2)), threading.Event()

    def others():
        while not going.is_set():
            torch.rand(10)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(50):
            fp.observe(problem, problem.params, batch)
    finally:
        going.set()
        thread.join()


def test_a_hidden_draw_is_noticed_beside_the_threads_of_a_notebook():
    problem = fp.problem(
        lambda p, x: (x + torch.ops.aten.rand_like(x)) @ p["w"],
        fp.losses.mse,
        params={"w": torch.ones(3, 2)},
    )
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    try:
        if sum(not t.daemon for t in threading.enumerate()) == 1:
            with pytest.raises(RuntimeError, match="cannot be intercepted"):
                fp.observe(problem, problem.params, (torch.ones(4, 3), torch.ones(4, 2)))
    finally:
        end.set()
        thread.join()
