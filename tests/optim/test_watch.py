"""Layer statistics from a loop's own forward run, compared with those of ``fp.observe``."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests.equality import assert_close, assert_same
from tests.optim.loops import TOY, assert_equal, fresh_model, functional, make, step
from tests.problems import initialised, labelled, normal, seeded

WATCHED = ("kfac", "ekfac", "kflr", "skfac", "tnt")
watched = pytest.mark.parametrize("name", WATCHED)
# Every measurement counts as much, so that a difference in one shows.
LAW = {"damping": 0.1}


def one_step(opt, model, batches, loss, shares):
    """A step for several micro-batches, whose gradients are added with these shares."""
    for batch, share in zip(batches, shares, strict=True):
        with opt.watch():
            value = loss(model(batch[0]), batch[1])
        (value * share).backward()
    opt.step()


def directions(name, batches, shares, loss=F.cross_entropy, **options):
    model = fresh_model()
    opt = fp.optim.CLASSES[name](model, lr=1.0, **LAW, **options)
    before = [p.detach().clone() for p in model.parameters()]
    one_step(opt, model, batches, loss, shares)
    return [x - p.detach() for x, p in zip(before, model.parameters(), strict=True)]


def cut(batch, *sizes):
    return list(zip(*(x.split(sizes) for x in batch), strict=True))


BATCH = labelled(12, 3, 3, 5)


@pytest.mark.parametrize("sizes", [(6, 6), (2, 7, 3), (1, 11)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kfac", {"labels": "empirical"}),
        ("kfac", {"labels": "mc"}),
        ("kfac", {"labels": "exact"}),
        ("kfac", {"labels": "exact", "sharing": "reduce"}),
        ("kfac", {"labels": "empirical", "decay": None, "damping_split": "pi"}),
        ("ekfac", {"labels": "empirical"}),
        ("ekfac", {"labels": "mc", "samples": 2}),
        ("kflr", {}),
        ("skfac", {"labels": "empirical"}),
        ("skfac", {"labels": "mc"}),
        ("tnt", {"labels": "empirical"}),
        ("tnt", {"labels": "mc", "per_sample": True}),
    ],
)
def test_micro_batches_add_up_to_one_batch(name, options, sizes):
    whole = directions(name, [BATCH], [1.0], **options)
    # The noise of each micro-batch is the next part of the generator's stream.
    parts = directions(name, cut(BATCH, *sizes), [n / 12 for n in sizes], **options)
    sampled = options.get("labels", "mc") == "mc" and options.get("samples", 1) > 1
    assert_close(parts, whole, 0.9 if sampled else 1e-5 if name == "kfac" else 1e-6)


@pytest.mark.parametrize("labels", ["empirical", "mc", "exact"])
def test_a_sum_that_is_divided_later_is_a_mean(labels):
    def summed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum") / 12

    whole = directions("kfac", [BATCH], [1.0], labels=labels)
    parts = directions("kfac", cut(BATCH, 5, 7), [1.0, 1.0], summed, labels=labels)
    assert_close(parts, whole, 1e-5)


def test_a_sum_is_a_sum():
    def summed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    model = fresh_model()
    problem = fp.problem(model, nn.CrossEntropyLoss(reduction="sum"))
    opt = fp.kfac(labels="exact", **LAW)
    evidence = fp.observe(problem, problem.params, BATCH, opt.needs(0))
    _, expected = opt.update(opt.init(problem.params), evidence.grads, evidence)
    found = directions("kfac", [BATCH], [1.0], summed, labels="exact")
    assert_close(found, list(expected.values()), 1e-8)


def test_a_sum_of_unknown_scale_is_refused():
    def summed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    with pytest.raises(RuntimeError, match="GradScaler.*reduction='mean'"):
        directions("kfac", [BATCH], [65536.0], summed)
    with pytest.raises(RuntimeError, match="another number in each micro-batch"):
        directions("kfac", cut(BATCH, 5, 7), [1 / 5, 1 / 7], summed)


LOSSES = {
    "module": (nn.CrossEntropyLoss(label_smoothing=0.1), None),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), None),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), None),
    "nll": (lambda o, t: F.nll_loss(o.log_softmax(-1), t), None),
    "mse": (lambda o, t: F.mse_loss(o, F.one_hot(t, 3).double()), None),
    "logistic": (
        lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 3).double()),
        None,
    ),
    "huber": (nn.HuberLoss(delta=0.5), None),
}


@pytest.mark.parametrize("key", list(LOSSES))
def test_losses_are_recognised(key):
    loss = LOSSES[key][0]
    targets = BATCH[1] if key != "huber" else F.one_hot(BATCH[1], 3).double()
    labels = "empirical" if key == "huber" else "exact"
    model = fresh_model()
    problem = fp.problem(model, loss)
    if key in ("nll", "mse", "logistic"):
        ours = {"nll": fp.losses.nll, "mse": fp.losses.mse, "logistic": fp.losses.bce_with_logits}
        outer = nn.LogSoftmax(-1) if key == "nll" else nn.Identity()
        problem = fp.problem(nn.Sequential(*model, outer), ours[key])
    given = targets if key in ("nll", "module", "weighted", "ignored", "huber") else None
    batch = BATCH[0], F.one_hot(BATCH[1], 3).double() if given is None else given
    opt = fp.kfac(labels=labels, **LAW)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    _, expected = opt.update(opt.init(problem.params), evidence.grads, evidence)
    found = directions("kfac", [(BATCH[0], targets)], [1.0], loss, labels=labels)
    assert_close(found, list(expected.values()), 1e-8)


def attention():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.out = nn.Linear(8, 7)

        def forward(self, x):
            h = self.table(x)
            h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
            return self.out(h)

    tokens = torch.randint(7, (4, 5), generator=seeded(0))
    return initialised(Model()), tokens, lambda o, t: F.cross_entropy(o.view(-1, 7), t.view(-1))


def convolution():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return initialised(model), normal((4, 2, 4, 4)), F.cross_entropy


def position_first():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.inner(x.transpose(0, 1)).mean(0))

    return initialised(Model(), scale=0.3), normal((4, 4, 8)), F.cross_entropy


@watched
@pytest.mark.parametrize("make", [attention, convolution, position_first])
def test_other_models_agree_with_the_functional_loop(name, make):
    model, inputs, loss = make()
    targets = inputs if inputs.dtype == torch.int64 else torch.arange(4) % 3
    other = copy.deepcopy(model)
    problem = fp.problem(other, fp.losses.cross_entropy)
    method = getattr(fp, name)(damping=0.1)
    opt = fp.optim.CLASSES[name](model, lr=0.05, damping=0.1)
    params, g = problem.params, seeded(0)
    state = method.init(params)
    for t in range(2):
        evidence = fp.observe(problem, params, (inputs, targets), method.needs(t), generator=g)
        state, direction = method.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction, 0.05)
        step(opt, model, (inputs, targets), loss)
    assert_close({k: p.detach() for k, p in model.named_parameters()}, params, 1e-7)


def test_parameters_outside_of_layers_get_an_estimate():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 4))
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.first(x)) @ torch.matrix_exp(self.scale))

    model = initialised(Model())
    problem = fp.problem(copy.deepcopy(model), fp.losses.cross_entropy)
    need = fp.kfac(samples=500).needs(0)[1]
    exact = fp.layer_statistics(problem, problem.params, BATCH, labels="exact")
    opt = fp.optim.KFAC(model, lr=0.0, samples=500)
    with opt.watch():
        F.cross_entropy(model(BATCH[0]), BATCH[1])
    (value,) = (x for n, x in opt._pending[0].values.items() if n == need)
    found = value.others["scale"] * value.scale
    assert_close(found, exact.others["scale"] * exact.scale, 0.2)


def test_the_loss_may_be_ones_own():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.01 * outputs.square().mean()

    problem = fp.problem(fresh_model(), loss)
    method = fp.kfac(labels="empirical", **LAW)
    evidence = fp.observe(problem, problem.params, BATCH, method.needs(0))
    _, expected = method.update(method.init(problem.params), evidence.grads, evidence)

    class Criterion(nn.Module):
        def forward(self, outputs, targets):
            return loss(outputs, targets)

    for given in (loss, Criterion()):
        model = fresh_model()
        opt = fp.optim.KFAC(model, given, lr=1.0, labels="empirical", **LAW)
        before = [p.detach().clone() for p in model.parameters()]
        with opt.watch():
            call = given if isinstance(given, nn.Module) else opt.loss
            value = call(model(BATCH[0]), BATCH[1])
        value.backward()
        opt.step()
        moved = [x - p.detach() for x, p in zip(before, model.parameters(), strict=True)]
        assert_close(moved, list(expected.values()), 1e-8)


def test_zero_grad_between_the_passes_and_backward_inside():
    models = [fresh_model() for _ in range(3)]
    for i, model in enumerate(models):
        opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2)
        for t in range(3):
            inputs, targets = TOY.at(t)
            if i == 0:
                opt.zero_grad()
            with opt.watch():
                loss = F.cross_entropy(model(inputs), targets)
                if i == 1:
                    model.zero_grad()
                    loss.backward()
            if i != 1:
                opt.zero_grad()
                loss.backward()
            opt.step()
    expected = functional("kfac", 3)
    for model in models:
        assert_equal(model, expected)


@pytest.mark.parametrize("forget", ["optimizer", "model"])
def test_a_skipped_step_leaves_nothing_behind(forget):
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2, labels="exact")
    with opt.watch():
        loss = F.cross_entropy(model(TOY.at(1)[0] * float("inf")), TOY.at(1)[1])
    loss.backward()
    (opt if forget == "optimizer" else model).zero_grad()
    with opt.watch():
        loss = F.cross_entropy(model(TOY.at(0)[0]), TOY.at(0)[1])
    loss.backward()
    opt.step()
    assert_equal(model, functional("kfac", 1, labels="exact"))


def test_nothing_is_measured_when_nothing_is_due():
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2, every=3, start=0, refresh_every=3)
    for t in range(7):
        opt.zero_grad()
        inputs, targets = TOY.at(t)
        if t % 3 == 0:
            with opt.watch():
                loss = F.cross_entropy(model(inputs), targets)
        else:
            loss = F.cross_entropy(model(inputs), targets)
            with opt.watch():
                pass
        loss.backward()
        opt.step()
    assert_equal(model, functional("kfac", 7, every=3, start=0, refresh_every=3))


def test_a_forgotten_watch_is_an_error():
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03)
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(fp.MissingEvidence, match=r"with opt\.watch\(\): loss = "):
        opt.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda o, t: (o - 1).abs().mean(), "no loss with a known likelihood"),
        (lambda o, t: F.l1_loss(o, o.detach() + 1), "l1_loss was called"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none").mean(), "cross_entropy was called"),
        (lambda o, t: F.cross_entropy(o, t) + F.mse_loss(o, o.detach()), "two losses"),
    ],
)
def test_a_loss_that_is_not_recognised_is_an_error(loss, error):
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03)
    with pytest.raises(RuntimeError, match=error), opt.watch():
        loss(model(BATCH[0]), BATCH[1])
    # The optimizer is as before.
    step(opt, model, TOY.at(0))


def test_a_loss_that_is_not_differentiated_does_not_count():
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2, labels="exact")
    with opt.watch():
        F.cross_entropy(model(BATCH[0]), BATCH[1])
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    with pytest.raises(fp.MissingEvidence, match="was not differentiated"):
        opt.step()
    opt.zero_grad()
    with opt.watch():
        loss = F.cross_entropy(model(TOY.at(0)[0]), TOY.at(0)[1])
    loss.backward()
    opt.step()
    assert_equal(model, functional("kfac", 1, labels="exact"))


def test_two_optimizers_share_a_forward_pass():
    """The two players of an adversarial network, or an encoder and a head."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    both = nn.Sequential(first, nn.Tanh(), second)
    alone = copy.deepcopy(both)
    opts = [fp.optim.KFAC(m, lr=0.1, damping=0.1, labels="exact") for m in (first, second)]
    groups = [{"params": alone[i].parameters()} for i in (0, 2)]
    single = fp.optim.KFAC(alone, params=groups, lr=0.1, damping=0.1, labels="exact")
    for t in range(3):
        for opt in opts:
            opt.zero_grad()
        with opts[0].watch(), opts[1].watch():
            loss = F.cross_entropy(both(TOY.at(t)[0]), TOY.at(t)[1])
        loss.backward()
        for opt in opts:
            opt.step()
        step(single, alone, TOY.at(t))
    assert_close(
        [p.detach() for p in both.parameters()], [p.detach() for p in alone.parameters()], 1e-9
    )


def test_evaluation_inside_a_watch_is_not_seen():
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2)
    with opt.watch():
        with torch.no_grad():
            F.cross_entropy(model(BATCH[0]), BATCH[1])
        loss = F.cross_entropy(model(TOY.at(0)[0]), TOY.at(0)[1])
        F.cross_entropy(model(BATCH[0]).detach(), BATCH[1])
    loss.backward()
    opt.step()
    assert_equal(model, functional("kfac", 1))


def test_the_randomness_of_the_model_is_torchs_own():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    losses = []
    for watch in (False, True):
        opt = fp.optim.KFAC(model, lr=0.0)
        torch.manual_seed(3)
        if watch:
            with opt.watch():
                losses.append(F.cross_entropy(model(BATCH[0]), BATCH[1]))
        else:
            losses.append(F.cross_entropy(model(BATCH[0]), BATCH[1]))
        after = torch.rand(1)
    torch.manual_seed(3)
    F.cross_entropy(model(BATCH[0]), BATCH[1])
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(*losses)


def test_seeds():
    found = []
    for seed in (0, 0, 1):
        model = fresh_model()
        opt = fp.optim.KFAC(model, lr=0.1, seed=seed)
        for t in range(2):
            step(opt, model, TOY.at(t))
        found.append([p.detach() for p in model.parameters()])
    assert_same(found[0], found[1])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    inputs, targets = labelled(32, 3, 3, 0, torch.float32)
    opt = fp.optim.KFAC(model, lr=0.3, damping=0.1)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        with opt.watch(), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    tensors = [x for s in opt.state_dict()["state"].values() for x in s["tensors"].values()]
    assert {x.dtype for x in tensors if x.is_floating_point()} == {torch.float32}


def test_a_loss_scaler_does_not_change_the_curvature():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=1e-2)
    for t in range(3):
        opt.zero_grad()
        with opt.watch():
            loss = F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1])
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert_close({k: p.detach() for k, p in model.named_parameters()}, functional("kfac", 3), 1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["kfac", "adahessian"])
def test_a_compiled_model_is_seen(name):
    model = fresh_model()
    compiled = torch.compile(model, backend="eager")
    opt = make(name, model, damping=0.01)
    for t in range(3):
        compiled(TOY.at(t)[0])
        step(opt, compiled, TOY.at(t))
    assert_equal(model, functional(name, 3, damping=0.01))


def test_checkpoints_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = fresh_model()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model = Model()
    opt = fp.optim.KFAC(model, lr=0.03)
    with pytest.raises(RuntimeError, match="checkpoint"), opt.watch():
        F.cross_entropy(model(BATCH[0]), BATCH[1])


def test_groups_of_a_model():
    model = fresh_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "damping": 0.5},
        {"params": model[2].parameters()},
    ]
    opt = fp.optim.KFAC(model, params=groups, lr=0.03, damping=1e-2, labels="exact")
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    step(opt, model, TOY.at(0))
    problem = fp.problem(fresh_model(), fp.losses.cross_entropy)
    method = fp.partition(
        [("0.*", "first"), ("*", "second")],
        first=fp.chain(fp.kfac(damping=0.5, labels="exact"), fp.scale(0.1)),
        second=fp.chain(fp.kfac(damping=1e-2, labels="exact"), fp.scale(0.03)),
    )
    evidence = fp.observe(problem, problem.params, TOY.at(0), method.needs(0))
    _, direction = method.update(method.init(problem.params), evidence.grads, evidence)
    moved = {k: start[k] - p.detach() for k, p in model.named_parameters()}
    assert_close(moved, direction, 1e-9)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("make", [attention, convolution, position_first])
def test_micro_batches_of_other_models_add_up(name, make):
    found = []
    # The tokens of a single example could be positions that all examples share.
    uneven = (2, 2) if make is attention else (1, 3)
    for sizes in ((4,), uneven, (2, 2)):
        model, inputs, loss = make()
        targets = inputs if inputs.dtype == torch.int64 else torch.arange(4) % 3
        opt = fp.optim.CLASSES[name](model, lr=0.1, damping=0.1, labels="exact")
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        batches = cut((inputs, targets), *sizes)
        one_step(opt, model, batches, loss, [n / 4 for n in sizes])
        found.append({k: before[k] - p.detach() for k, p in model.named_parameters()})
    assert_close(found[1], found[0], 1e-6)
    assert_close(found[2], found[0], 1e-6)


def test_a_layer_that_micro_batches_use_differently_keeps_its_diagonal():
    model, inputs, loss = attention()
    opt = fp.optim.KFAC(model, lr=0.1, damping=0.1, labels="exact", decay=None)
    one_step(opt, model, cut((inputs, inputs), 1, 3), loss, (0.25, 0.75))
    kept = opt.state_dict()["state"][0]["tensors"]
    others = {k: x for k, x in kept.items() if ".others.table.weight" in k}
    assert others
    rows = torch.zeros(7, 8, dtype=torch.float64)
    other, _, _ = attention()
    problem = fp.problem(other, fp.losses.cross_entropy)
    for example in inputs:
        batch = example[None], example[None]
        exact = fp.DiagonalGGN(problem, problem.params, batch).diagonal()["table.weight"]
        rows += exact / 4
    assert_close(next(iter(others.values())), rows, 1e-6)
