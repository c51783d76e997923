"""Steps by a closure, compared with the functional loop on the same model and loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests.conformance.methods import needs_single_examples
from tests.equality import assert_close
from tests.optim.loops import TOY, assert_equal, fresh_model, functional, is_watched, make
from tests.problems import initialised, labelled, seeded

BY_CLOSURE = [k for k in fp.optim.CLASSES if not is_watched(k)]
MEASURED = [k for k, c in fp.optim.CLASSES.items() if issubclass(c, fp.optim.ModelOptimizer)]
BATCH = labelled(12, 3, 3, 5)


def named(model):
    return {k: p.detach() for k, p in model.named_parameters()}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("backward", [False, True])
def test_a_closure_may_go_backward(name, backward):
    model = fresh_model()
    opt = make(name, model)
    for t in range(3):

        def closure(t=t):
            if backward:
                opt.zero_grad()
            loss = F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1])
            if backward:
                loss.backward()
            return loss

        loss = opt.step(closure)
        assert not loss.requires_grad
        expected = F.cross_entropy(TOY.problem(functional(name, t), TOY.at(t)[0]), TOY.at(t)[1])
        assert torch.allclose(loss, expected, rtol=1e-12)
    assert_equal(model, functional(name, 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kfac", {"every": 2, "refresh_every": 2, "start": 0}),
        ("adahessian", {"every": 2}),
        ("adaptive_kfac", {"every": 2, "start": 0, "damping_every": 2, "gamma_every": 3}),
        ("lbfgs", {"pairs": "hvp", "every": 2}),
        ("lbfgs", {"line_search": "wolfe"}),
        ("hessian_free", {"curvature": "hessian"}),
        ("hessian_free", {"preconditioner": "fisher"}),
        ("smw_ng", {"labels": "mc", "adapt": True}),
    ],
)
def test_intervals_and_other_options(name, options):
    model = fresh_model()
    opt = make(name, model, **options)
    for t in range(5):
        opt.step(lambda t=t: F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1]))
    assert_close(named(model), functional(name, 5, **options), 1e-9)


def test_lbfgs_of_full_batches_needs_no_closure():
    model = fresh_model()
    opt = make("lbfgs", model, pairs="successive")
    for t in range(4):
        opt.zero_grad()
        F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1]).backward()
        opt.step()
    assert_equal(model, functional("lbfgs", 4, pairs="successive"))


@pytest.mark.parametrize("name", ["lbfgs", "adahessian", "smw_ng", "kfac"])
def test_what_the_closure_does_to_the_gradient_counts(name):
    model = fresh_model()
    opt = make(name, model)
    params, g = TOY.params, seeded(0)
    method = fp.optim.CLASSES[name].card.build(**({"history": 3} if name == "lbfgs" else
        {"damping": 1e-2} if name in ("kfac", "smw_ng") else {}))  # fmt: skip
    state = method.init(params)
    for t in range(3):

        def closure(t=t):
            opt.zero_grad()
            loss = F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        opt.step(closure)
        evidence = fp.observe(TOY.problem, params, TOY.at(t), method.needs(t), generator=g)
        grads = {k: x.clone().requires_grad_() for k, x in evidence.grads.items()}
        for x in grads.values():
            x.grad = x.detach()
        nn.utils.clip_grad_norm_(grads.values(), 0.1)
        clipped = {k: x.grad for k, x in grads.items()}
        state, direction = method.update(state, clipped, evidence)
        params = fp.apply(params, direction, 0.03)
    assert_close(named(model), params, 1e-9)


def test_any_loss_will_do_for_the_hessian_and_the_objective():
    def loss(outputs, targets):
        return (outputs[:, 0] - targets).abs().pow(1.5).mean()

    def penalised(model, batch):
        return loss(model(batch[0]), batch[1]) + 0.1 * sum(
            p.square().sum() for p in model.parameters()
        )

    problem = fp.problem(
        lambda p, x: (TOY.problem.module and TOY.problem(p, x), p),
        lambda o, t: loss(o[0], t) + 0.1 * sum(x.square().sum() for x in o[1].values()),
        params=TOY.params,
    )
    for name in ("adahessian", "lbfgs"):
        model, method, g = fresh_model(), getattr(fp, name)(), seeded(0)
        opt = fp.optim.CLASSES[name](model, lr=0.1)
        params = problem.params
        state = method.init(params)
        for t in range(3):
            opt.step(lambda model=model, t=t: penalised(model, TOY.at(t)))
            evidence = fp.observe(problem, params, TOY.at(t), method.needs(t), generator=g)
            state, direction = method.update(state, evidence.grads, evidence)
            params = fp.apply(params, direction, 0.1)
        assert_close(named(model), params, 1e-9)


def test_a_penalty_beside_a_known_loss_is_refused():
    model = fresh_model()
    opt = fp.optim.HessianFree(model)
    before = named(model)
    with pytest.raises(RuntimeError, match="sum with a penalty"):
        opt.step(lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]) + model[0].weight.sum())
    with pytest.raises(RuntimeError, match="computes no loss that is known here"):
        opt.step(lambda: model(BATCH[0]).square().mean())
    with pytest.raises(RuntimeError, match="two losses"):
        opt.step(
            lambda: F.mse_loss(model(BATCH[0]), BATCH[0]) + F.mse_loss(model(BATCH[0]), BATCH[0])
        )
    with pytest.raises(RuntimeError, match=r"needs GGNOperator.*opt\.step\(closure\)"), opt.watch():
        pass
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    with pytest.raises(RuntimeError, match=r"opt\.step\(closure\)"):
        opt.step()
    assert_close(named(model), before, 0.0)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("value", [1.0, "detached", "vector"])
def test_what_is_not_a_loss(value):
    model = fresh_model()
    opt = fp.optim.LBFGS(model)

    def closure():
        outputs = model(BATCH[0])
        return {"detached": outputs.sum().detach(), "vector": outputs.sum(0)}.get(value, value)

    error = RuntimeError if value == "detached" else TypeError
    with pytest.raises(error, match="closure"):
        opt.step(closure)


@pytest.mark.parametrize("name", BY_CLOSURE)
def test_buffers_are_written_once_a_step(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    expected = copy.deepcopy(model)
    options = {"hessian_free": {"max_iter": 3}}.get(name, {})
    opt = fp.optim.CLASSES[name](model, lr=0.1, **options)
    if needs_single_examples(name):
        with pytest.raises(ValueError, match="per-sample gradients are not defined"):
            opt.step(lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]))
        return
    expected(BATCH[0])
    opt.step(lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]))
    assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), 1e-12)
    opt.step(lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]))
    assert int(model[1].num_batches_tracked) == 2


def test_recurrent_layers_and_tied_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.inner = nn.LSTM(4, 4, batch_first=True)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x):
            return self.out(self.inner(self.table(x))[0])

    model = initialised(Model())
    tokens = torch.randint(5, (3, 6), generator=seeded(0))
    problem, method, g = (
        fp.problem(copy.deepcopy(model), fp.losses.cross_entropy),
        fp.adahessian(),
        seeded(0),
    )
    opt = fp.optim.AdaHessian(model, lr=0.1)
    params = problem.params
    state = method.init(params)
    for t in range(2):
        opt.step(lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
        evidence = fp.observe(problem, params, (tokens, tokens), method.needs(t), generator=g)
        state, direction = method.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction, 0.1)
    assert_close(named(model), params, 1e-8)
    assert model.out.weight is model.table.weight
    model(tokens)


def test_dropout_is_the_same_at_every_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    before = torch.get_rng_state()
    opt = fp.optim.LBFGS(model, lr=1.0, line_search="armijo")
    for t in range(4):
        opt.step(lambda t=t: F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1]))
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_that_the_loss_does_not_depend_on_sit_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.idle = fresh_model(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.inner(x)

    for name in MEASURED:
        model = Model()
        idle = model.idle.weight.detach().clone()
        opt = make(name, model, weight_decay=0.5)
        for t in range(2):
            opt.step(lambda t=t, model=model: F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1]))
        assert torch.equal(idle, model.idle.weight)
        names = {k for s in opt.state_dict()["state"].values() for k in s["names"]}
        assert not any(k.startswith("idle") for k in names)


def test_ones_own_loss():
    def loss(outputs, targets):
        return F.mse_loss(outputs, F.one_hot(targets, 3).to(outputs)) + outputs.pow(4).mean()

    problem, method = fp.problem(fresh_model(), loss), fp.hessian_free(max_iter=5)
    model = fresh_model()
    opt = fp.optim.HessianFree(model, loss, max_iter=5)
    params = problem.params
    state = method.init(params)
    for t in range(2):
        opt.step(lambda t=t: opt.loss(model(TOY.at(t)[0]), TOY.at(t)[1]))
        evidence = fp.observe(problem, params, TOY.at(t), method.needs(t))
        state, direction = method.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
    assert_close(named(model), params, 1e-9)


@pytest.mark.parametrize("name", ["lbfgs", "adahessian", "hessian_free"])
def test_a_closure_that_returns_a_copy_of_its_loss(name):
    """As the closures of Lightning do; they also set the gradients to zero and clip them."""
    model = fresh_model()
    opt = make(name, model)
    for t in range(3):

        def closure(t=t):
            opt.zero_grad()
            loss = F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1])
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1e6)
            return loss.detach().clone()

        opt.step(closure)
    params = functional(name, 3)
    assert_close(named(model), params, 1e-9)
    assert all(p.grad is not None for p in model.parameters())


def test_several_backward_passes_add_up():
    model, other = fresh_model(), fresh_model()
    opt, expected = (fp.optim.AdaHessian(m, lr=0.1) for m in (model, other))
    parts = list(zip(*(x.split(6) for x in BATCH), strict=True))

    def closure():
        losses = [F.cross_entropy(model(x), y) / 2 for x, y in parts]
        for loss in losses:
            loss.backward()
        return sum(losses).detach()

    opt.step(closure)
    expected.step(lambda: F.cross_entropy(other(BATCH[0]), BATCH[1]))
    assert_close(named(model), named(other), 1e-9)


@pytest.mark.parametrize("name", ["kfac", "lbfgs"])
def test_several_processes_are_refused(name, monkeypatch):
    model = fresh_model()
    opt = make(name, model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="train in one process"):
        opt.step(lambda: F.cross_entropy(model(BATCH[0]), BATCH[1]))
