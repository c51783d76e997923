"""On another device all methods, layers and utilities give the CPU's numbers and make nothing here.

The device is :mod:`tests.elsewhere`, which every machine has, and CUDA where there is one.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.linalg import precision
from tests import problems
from tests.conformance.methods import every_method, intervals
from tests.elsewhere import DEVICE, Elsewhere, back, elsewhere
from tests.equality import assert_close
from tests.layers.test_every_layer import CASES, case
from tests.problems import seeded

SIZES = {"block": 3, "merge": 12}
COMPOSED = {
    "momentum": fp.chain(fp.momentum(0.9), fp.scale(0.05)),
    "clipped": fp.chain(fp.clip_norm(0.1), fp.scale(0.05)),
    "decayed": fp.chain(fp.adam(), fp.weight_decay(0.1), fp.scale(0.05)),
    "kl clip": fp.chain(fp.kl_clip(fp.kfac(), rate=0.05), fp.scale(0.05)),
    "grafted": fp.chain(fp.graft(fp.shampoo(), fp.adam()), fp.scale(0.05)),
    "accumulated": fp.accumulate(fp.chain(fp.adam(), fp.scale(0.05)), 2),
    "guarded": fp.skip_nonfinite(fp.chain(fp.kfac(), fp.scale(0.05))),
    "staggered": fp.chain(fp.shampoo(stagger=True, refresh_every=2, **SIZES), fp.scale(0.05)),
    "packed": fp.chain(fp.caspr(packed=True, state_dtype=torch.float32), fp.scale(0.05)),
    "blocks": fp.chain(fp.soap(refresh_every=2, **SIZES), fp.scale(0.05)),
    "newton": fp.chain(fp.shampoo(method="coupled_newton"), fp.scale(0.05)),
}
# They ask how far they have come, once a product or a trial.
ASKING = {"hessian_free"}


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)])
def there(request):
    """(within, to, back): the device."""
    if request.param == "elsewhere":
        return Elsewhere(), elsewhere, back
    tree_map = torch.utils._pytree.tree_map_only

    def home(tree):
        tensors = [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
        assert all(x.is_cuda for x in tensors)
        return tree_map(torch.Tensor, torch.Tensor.cpu, tree)

    return (
        contextlib.nullcontext(),
        lambda tree: tree_map(torch.Tensor, torch.Tensor.cuda, tree),
        home,
    )


def moved(problem, to):
    """The problem with its module there."""
    module, shared = copy.deepcopy(problem.module), {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part._parameters[name] = shared.setdefault(p, nn.Parameter(to(p)))
        for name, b in part.named_buffers(recurse=False):
            part._buffers[name] = to(b)
    return fp.problem(module, problem.loss)


def train(problem, opt, params, batches):
    state = opt.init(params)
    for t, batch in enumerate(batches):
        evidence = fp.observe(problem, params, batch, opt.needs(t), generator=seeded(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
    return params, state


def assert_trains_there(toy, opt, there, reads):
    within, to, home = there
    batches = [toy.at(t) for t in range(3)]
    expected, _ = train(toy.problem, opt, toy.params, batches)
    with within:
        found = train(toy.problem, opt, to(toy.params), to(batches))
        found, _ = home(found)
    # Roots and eigenvectors are taken in float64 here, by products or in float32 there.
    assert_close(found, expected, rtol=1e-4)
    if isinstance(within, Elsewhere) and not reads:
        assert within.reads == 0


@every_method
def test_a_method_trains_there_and_the_host_does_not_wait(name, there):
    assert_trains_there(problems.convnet(), intervals(name), there, name in ASKING)


@pytest.mark.parametrize("name", COMPOSED)
def test_transforms_and_options_train_there(name, there):
    assert_trains_there(problems.mlp(), COMPOSED[name], there, reads=False)


@pytest.mark.parametrize(("model", "loss", "reduction"), CASES, ids=[c[0] for c in CASES])
def test_every_layer_is_differentiated_there(model, loss, reduction, there):
    within, to, home = there
    # A loss with a weight of its own is its owner's to move.
    loss = "cross entropy" if loss == "weighted" else loss
    problem, batch = case(model, loss, reduction)

    def asked(problem, batch):
        params = problem.params
        run = fp.linearize(problem, params, batch, generator=seeded(3))
        options = {"labels": "mc", "generator": seeded(3)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factors = fp.KroneckerFactored(problem, params, batch, kind="foof", generator=seeded(3))
        sampled = fp.fisher_mv(problem, params, batch, params, **options)
        return run.loss, run.buffers, run.hvp(params), run.ggn_mv(params), sampled, factors @ params

    expected = asked(problem, batch)
    with within:
        found = home(asked(moved(problem, to), to(batch)))
    assert_close(found, expected, rtol=1e-9)


def asked_of_factors(kind):
    def ask(problem, params, batch):
        options = {"kind": kind, "generator": seeded(3)}
        c = fp.KroneckerFactored(problem, params, batch, **options)
        streamed = fp.KroneckerFactored(problem, params, batches=[batch, batch], **options)
        norms = c.frobenius_norm(), c.trace(), c.logdet(1e-2)
        splits = () if kind == "ekfac" else ("pi", "equal")
        inverses = [c.inverse(1e-2) @ params, *(c.inverse(0.1, split=s) @ params for s in splits)]
        return c @ params, streamed @ params, c.diagonal(), norms, inverses, c.to_dense()

    return ask


def ggn(problem, params, batch):
    return fp.GGN(problem, params, batch)


def estimated(name):
    return lambda *at: getattr(fp, name)(ggn(*at), 6, generator=seeded(3))


def solved(method, **options):
    def ask(problem, params, batch):
        damped = ggn(problem, params, batch) + 0.5
        return damped.solve(params, method=method, throw=False, **options).solution

    return ask


ASKED = {
    **{kind: asked_of_factors(kind) for kind in ("kfac", "ekfac", "kflr", "foof")},
    **{n: estimated(n) for n in ("hutchinson_trace", "hutchinson_diagonal", "hutchpp")},
    **{n: estimated(n) for n in ("xtrace", "xdiag")},
    "cg": solved("cg"),
    "minres": solved("minres"),
    "truncated_cg": solved("truncated_cg", radius=1.0),
    "nystrom_cg": lambda *at: (
        fp.nystrom_cg(ggn(*at), at[1], damping=0.1, rank=5, generator=seeded(3)).solution
    ),
    "eigsh": lambda *at: fp.eigsh(ggn(*at), 3, generator=seeded(3)) @ at[1],
    "spectral_density": lambda *at: fp.spectral_density(
        ggn(*at), probes=2, steps=5, generator=seeded(3)
    ).trace(torch.log1p),
    "quality": lambda *at: [
        layer["foof"].error
        for layer in fp.plots.approximation_quality(
            ggn(*at),
            {"foof": fp.KroneckerFactored(*at, kind="foof")},
            damping=0.1,
            generator=seeded(3),
        ).values()
    ],
    "dense": lambda *at: (fp.Hessian(*at).to_dense(), ggn(*at).blocks().frobenius_norm()),
    "exact diagonal": lambda *at: fp.DiagonalGGN(*at).diagonal(),
    "chunks": lambda *at: (
        fp.GGN(*at, chunk_size=2) @ {k: torch.stack([p, 2 * p, 3 * p]) for k, p in at[1].items()}
    ),
    "per-sample gradients": fp.per_sample_grads,
    "per-sample norms": fp.per_sample_norms,
    "per-sample Gram matrix": fp.per_sample_gram,
    "tangent kernel": fp.ntk,
    "noise scale": fp.gradient_noise_scale,
    "layers": lambda *at: fp.layer_statistics(*at, generator=seeded(3)),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_curvature_is_measured_there(name, there):
    within, to, home = there
    toy = problems.mlp()
    expected = ASKED[name](toy.problem, toy.params, toy.batch)
    with within:
        found = home(ASKED[name](toy.problem, to(toy.params), to(toy.batch)))
    assert_close(found, expected, rtol=1e-7)


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {DEVICE.type})
    return Elsewhere(float64=False), elsewhere, back


@every_method
def test_a_method_trains_where_there_is_no_float64(name, without_float64):
    within, to, home = without_float64
    toy, opt = problems.convnet(torch.float32), intervals(name)
    batches = [toy.at(t) for t in range(3)]
    expected, _ = train(toy.problem, opt, toy.params, batches)
    with within:
        found, _ = home(train(toy.problem, opt, to(toy.params), to(batches)))
    assert_close(found, expected, rtol=1e-2)


@pytest.mark.parametrize("name", ASKED)
def test_the_curvature_is_measured_where_there_is_no_float64(name, without_float64):
    within, to, home = without_float64
    toy = problems.mlp(torch.float32)
    with within:
        found = home(ASKED[name](toy.problem, to(toy.params), to(toy.batch)))
    expected = ASKED[name](toy.problem, toy.params, toy.batch)
    assert_close(found, expected, rtol=1e-2)


def test_the_device_refuses_what_a_gpu_refuses():
    with Elsewhere(float64=False), pytest.raises(TypeError, match="float64"):
        elsewhere(torch.ones(2)).double()
    with Elsewhere() as within:
        x = elsewhere(torch.arange(6.0).reshape(2, 3))
        assert x.device == DEVICE
        with pytest.raises(RuntimeError, match="on the CPU"):
            x @ torch.ones(3)
        with pytest.raises(RuntimeError, match="on the CPU"):
            x[torch.tensor([0])]
        two = torch.tensor(2.0)
        assert (x * two).device == torch.ones(2, device=x.device).device == DEVICE
        assert within.reads == 0
        assert float(x.sum()) == 15.0
        assert within.reads == 1
        assert torch.equal(back(nn.functional.linear(x, x)), torch.tensor([[5.0, 14], [14, 50]]))
        with pytest.raises(AssertionError, match="on the CPU"):
            back((x, torch.ones(1)))
