"""What every optimizer of torch does, the generated ones do: compared with torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.optim import ModelOptimizer
from tests.equality import assert_close
from tests.optim.loops import TOY, assert_equal, fresh_model, functional, make, step
from tests.problems import normal

GRADIENT_ONLY = [k for k, c in fp.optim.CLASSES.items() if not issubclass(c, ModelOptimizer)]
gradient_only = pytest.mark.parametrize("name", GRADIENT_ONLY)
# Their state belongs to all parameters together.
JOINT = ("mfac", "tonga")
each_by_itself = pytest.mark.parametrize("name", [k for k in GRADIENT_ONLY if k not in JOINT])
# Torch's optimizers that compute the same.
PEERS = {
    "Adam": (fp.optim.Adam, torch.optim.Adam, {"lr": 0.01}, {"lr": 0.01}),
    "AdamW": (
        fp.optim.AdamW,
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
        {"lr": 0.01, "weight_decay": 0.1},
    ),
    "SGD": (fp.optim.SGD, torch.optim.SGD, *({"lr": 0.1, "momentum": 0.9},) * 2),
}
peer = pytest.mark.parametrize("peer", list(PEERS))


def tensors(seed=0, shapes=((3, 2), (4,), (2, 2))):
    return [normal(shape, seed + i).requires_grad_() for i, shape in enumerate(shapes)]


def gradients(params, t, present):
    """Gradients of step t; None for those that are not present."""
    for i, p in enumerate(params):
        p.grad = normal(p.shape, 100 * t + i) if i in present else None


presences = st.lists(st.sets(st.integers(0, 2)), min_size=3, max_size=7)


@peer
@given(steps=presences)
def test_parameters_without_a_gradient_sit_out_as_in_torch(peer, steps):
    ours, theirs, options, their_options = PEERS[peer]
    a, b = tensors(), tensors()
    opt, expected = ours(a, **options), theirs(b, **their_options)
    for t, present in enumerate(steps):
        gradients(a, t, present)
        gradients(b, t, present)
        opt.step()
        expected.step()
        assert_close([x.detach() for x in a], [x.detach() for x in b], 1e-12)


@each_by_itself
@settings(max_examples=4)
@given(steps=presences)
def test_every_method_treats_parameters_without_a_gradient_alike(name, steps):
    together, alone = tensors(), tensors()
    build = fp.optim.CLASSES[name]
    opt, single = build(together, lr=0.1), [build([p], lr=0.1) for p in alone]
    for t, present in enumerate(steps):
        gradients(together, t, present)
        gradients(alone, t, present)
        opt.step()
        for one in single:
            one.step()
    # Only the rounding of stacked products differs.
    assert_close([x.detach() for x in together], [x.detach() for x in alone], 1e-7)


@each_by_itself
def test_nothing_changes_for_a_parameter_that_sits_out(name):
    params = tensors()
    opt = fp.optim.CLASSES[name](params, lr=0.1)
    for t in range(2):
        gradients(params, t, {0, 1, 2})
        opt.step()
    before, value = copy.deepcopy(opt.state_dict()), params[1].detach().clone()
    gradients(params, 2, {0, 2})
    opt.step()
    assert torch.equal(params[1], value)
    own = next(s for s in opt.state_dict()["state"].values() if s["params"] == [1])
    assert own["steps"] == 2
    whole = before["state"][0]["tensors"]
    for path, x in own["tensors"].items():
        assert torch.equal(x, whole[path]), path


@peer
def test_groups_have_options_of_their_own(peer):
    ours, theirs, options, their_options = PEERS[peer]
    a, b = tensors(), tensors()
    # Torch's Adam and SGD have an L2 penalty in the place of decoupled decay.
    extra = {"lr": 0.003, **({"weight_decay": 0.2} if peer == "AdamW" else {})}
    opt = ours([{"params": a[:1]}, {"params": a[1:2], **extra}], **options)
    expected = theirs([{"params": b[:1]}, {"params": b[1:2], **extra}], **their_options)
    for t in range(5):
        if t == 2:
            opt.add_param_group({"params": a[2], "lr": 0.5})
            expected.add_param_group({"params": b[2], "lr": 0.5})
        gradients(a, t, {0, 1, 2})
        gradients(b, t, {0, 1, 2})
        opt.step()
        expected.step()
    assert_close([x.detach() for x in a], [x.detach() for x in b], 1e-12)


@peer
def test_schedulers_write_into_the_groups(peer):
    ours, theirs, options, their_options = PEERS[peer]
    a, b = tensors(), tensors()
    opt, expected = ours(a, **options), theirs(b, **their_options)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8) for o in (opt, expected)
    ]
    for t in range(6):
        gradients(a, t, {0, 1, 2})
        gradients(b, t, {0, 1, 2})
        opt.step()
        expected.step()
        for scheduler in schedulers:
            scheduler.step()
    # It has cycled the momentum, or the first of the betas, too.
    assert_close([x.detach() for x in a], [x.detach() for x in b], 1e-12)


def test_the_rate_may_be_a_tensor():
    a, b = tensors(), tensors()
    opt, expected = fp.optim.SGD(a, lr=torch.tensor(0.1, dtype=torch.float64)), fp.optim.SGD(b, 0.1)
    for t in range(2):
        gradients(a, t, {0, 1, 2})
        gradients(b, t, {0, 1, 2})
        opt.step()
        expected.step()
        opt.param_groups[0]["lr"].mul_(0.5)
        expected.param_groups[0]["lr"] *= 0.5
    assert_close([x.detach() for x in a], [x.detach() for x in b], 1e-15)


def test_named_parameters():
    model = fresh_model()
    opt = fp.optim.CASPR(model.named_parameters(), lr=0.03)
    assert opt.param_groups[0]["param_names"] == list(dict(model.named_parameters()))
    for t in range(3):
        step(opt, model, TOY.at(t))
    assert_equal(model, functional("caspr", 3))
    again = fp.optim.CASPR(model.named_parameters(), lr=0.03)
    again.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", list(CARDS))
def test_parameters_are_written_in_place_without_a_graph(name):
    model = fresh_model()
    views = {k: p.detach() for k, p in model.named_parameters()}
    own = list(model.parameters())
    opt = make(name, model)
    before = {k: x.clone() for k, x in views.items()}
    for t in range(2):
        step(opt, model, TOY.at(t))
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
    assert any(not torch.equal(before[k], x) for k, x in views.items())
    assert all(p.is_leaf and p.requires_grad for p in own)
    tensors = [x for s in opt.state_dict()["state"].values() for x in s["tensors"].values()]
    assert not any(x.requires_grad for x in tensors)


@pytest.mark.parametrize("name", list(CARDS))
def test_states_do_not_share_memory_with_what_others_write_into(name):
    model = fresh_model()
    opt = make(name, model)
    for t in range(3):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("nan"))
        step(opt, model, TOY.at(t))
    assert_equal(model, functional(name, 3))


def test_a_graph_of_the_gradient_is_not_kept():
    model = fresh_model()
    opt = fp.optim.Adam(model.parameters(), lr=0.01)
    loss = F.cross_entropy(model(TOY.batch[0]), TOY.batch[1])
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    opt.step()
    states = [x for s in opt.state_dict()["state"].values() for x in s["tensors"].values()]
    assert not any(x.requires_grad for x in states)
    opt.zero_grad()


def test_zero_grad_in_place():
    a, b = tensors(), tensors()
    opt, expected = fp.optim.SGD(a, 0.1, momentum=0.9), torch.optim.SGD(b, 0.1, momentum=0.9)
    for t in range(4):
        for x in (*a, *b):
            x.grad = None if t == 0 else x.grad
        opt.zero_grad(set_to_none=False)
        expected.zero_grad(set_to_none=False)
        for x in (*a, *b):
            (x.square().sum() * (t + 1)).backward()
        opt.step()
        expected.step()
    assert_close([x.detach() for x in a], [x.detach() for x in b], 1e-14)


def test_sparse_gradients_are_refused_before_any_work():
    table, weight = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    params = [*weight.parameters(), *table.parameters()]
    opt = fp.optim.Adam(params, lr=0.1)
    weight(table(torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="'2', of the shape \\(5, 3\\), is sparse.*sparse=False"):
        opt.step()
    assert all(torch.equal(x, p) for x, p in zip(before, params, strict=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -0.1}, "lr must be a number of at least 0, not -0.1"),
        ({"lr": 0.1, "weight_decay": -1.0}, "weight_decay must be"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum must be"),
        ({"lr": 0.1, "epsilon": -1.0}, "epsilon must be"),
        ({"lr": 0.1, "decay": "mean"}, "decay must be"),
    ],
)
def test_options_out_of_range(options, error):
    params = tensors()
    with pytest.raises(ValueError, match=error):
        fp.optim.CASPR(params, **options)
    opt = fp.optim.CASPR(params[:1], lr=0.1)
    with pytest.raises(ValueError, match=error):
        opt.add_param_group({"params": params[1:], **options})
    assert len(opt.param_groups) == 1
    gradients(params, 0, {0, 1, 2})
    opt.param_groups[0].update(options)
    with pytest.raises(ValueError, match=error):
        opt.step()


def test_what_cannot_be_optimized():
    with pytest.raises(ValueError, match=r"torch.complex64.*view_as_real"):
        fp.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        fp.optim.SGD([], lr=0.1)
    with pytest.raises(TypeError, match="pass the nn.Module itself"):
        fp.optim.KFAC(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="parameter 0 of the group is not one of the model"):
        fp.optim.KFAC(nn.Linear(2, 2), params=nn.Linear(2, 2).parameters())


def test_states_of_others_are_refused():
    a = tensors()
    opt = fp.optim.Adam(a, lr=0.1)
    gradients(a, 0, {0, 1, 2})
    opt.step()
    theirs = torch.optim.Adam(tensors(), lr=0.1)
    gradients(theirs.param_groups[0]["params"], 0, {0, 1, 2})
    theirs.step()
    kept = copy.deepcopy(opt.state_dict())
    options = {**theirs.state_dict()}
    options["param_groups"] = opt.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="not one of Adam.*exp_avg"):
        opt.load_state_dict(options)
    with pytest.raises((KeyError, ValueError)):
        opt.load_state_dict(fp.optim.Adam(tensors(0, ((3, 2), (5,))), lr=0.1).state_dict())
    for x, y in zip(kept["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(x["tensors"][k], y["tensors"][k]) for k in x["tensors"])


def test_hooks_of_torch():
    a, seen = tensors(), []
    opt = fp.optim.Adam(a, lr=0.1)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("behind"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "note": [1]})
    opt.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    gradients(a, 0, {0, 1, 2})
    opt.step()
    kept = opt.state_dict()
    assert kept["note"] == [1]
    opt.load_state_dict(kept)
    assert seen == ["before", "behind", "loaded"]
    assert opt.state_dict()["state"][0]["steps"] == 1


def test_clearing_the_state_starts_anew():
    a, b = tensors(), tensors()
    opt = fp.optim.Adam(a, lr=0.1)
    gradients(a, 0, {0, 1, 2})
    opt.step()
    opt.state.clear()
    with torch.no_grad():
        for x, y in zip(a, b, strict=True):
            y.copy_(x)
    fresh = fp.optim.Adam(b, lr=0.1)
    gradients(a, 1, {0, 1, 2})
    gradients(b, 1, {0, 1, 2})
    opt.step()
    fresh.step()
    assert all(map(torch.equal, a, b))


def test_clipping_and_closures_count():
    a, b = fresh_model(), fresh_model()
    opt, expected = fp.optim.Adam(a.parameters(), 0.01), torch.optim.Adam(b.parameters(), 0.01)
    for t in range(3):

        def closure(model, t=t):
            model.zero_grad()
            loss = F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        mine, theirs = opt.step(lambda: closure(a)), expected.step(lambda: closure(b))
        assert torch.allclose(mine, theirs, rtol=1e-12)
    assert_close(*([p.detach() for p in m.parameters()] for m in (a, b)), 1e-10)


def test_a_grad_scaler_skips_infinite_gradients():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    p = torch.ones(3, requires_grad=True)
    opt = fp.optim.SGD([p], lr=0.5)
    for factor, expected in ((1.0, 0.5), (float("inf"), 0.5), (1.0, 0.0)):
        opt.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(p.detach(), torch.full((3,), expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@gradient_only
def test_mixed_dtypes_keep_statistics_wide(name, dtype):
    params = [normal((3, 2), 0, dtype).requires_grad_(), normal((2,), 1).requires_grad_()]
    opt = fp.optim.CLASSES[name](params, lr=0.1)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = normal(p.shape, 10 * t + i, p.dtype)
        opt.step()
    kept = opt.state_dict()
    opt.load_state_dict(kept)
    for path, x in opt.state_dict()["state"].get(0, {"tensors": {}})["tensors"].items():
        assert x.dtype == kept["state"][0]["tensors"][path].dtype
        if x.is_floating_point() and name != "sgd":
            assert x.dtype in (torch.float32, torch.float64), path
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.gpu
def test_the_state_follows_the_parameters_to_another_device():
    model, other = fresh_model(), fresh_model()
    opts = [make("caspr", m) for m in (model, other)]
    step(opts[0], model, TOY.at(0))
    step(opts[1], other, TOY.at(0))
    model.to("cuda")
    step(opts[0], model, tuple(x.to("cuda") for x in TOY.at(1)))
    step(opts[1], other, TOY.at(1))
    model.to("cpu")
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-8)
    step(opts[0], model, TOY.at(2))


def test_reduce_lr_on_plateau_and_swa():
    model = fresh_model()
    opt = fp.optim.CASPR(model.parameters(), lr=0.03)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for t in range(3):
        step(opt, model, TOY.at(t))
        averaged.update_parameters(model)
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] < 0.03


def test_unfrozen_parameters_begin_at_their_first_step():
    model, other = fresh_model(), fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=0.1)
    model[0].requires_grad_(False)
    other[0].requires_grad_(False)
    expected = fp.optim.KFAC(other, lr=0.03, damping=0.1)
    for t in range(2):
        step(opt, model, TOY.at(t))
        step(expected, other, TOY.at(t))
    assert torch.equal(model[0].weight, fresh_model()[0].weight)
    model[0].requires_grad_(True)
    for t in range(2, 4):
        step(opt, model, TOY.at(t))
    assert not torch.equal(model[0].weight, fresh_model()[0].weight)
    pieces = {tuple(s["names"]): s["steps"] for s in opt.state_dict()["state"].values()}
    assert pieces == {("2.weight", "2.bias"): 4, ("0.weight", "0.bias"): 2}


def test_kfac_splits_its_factors():
    model = fresh_model()
    opt = fp.optim.KFAC(model, lr=0.03, damping=0.1, every=100, refresh_every=100, start=2)
    for t in range(3):
        step(opt, model, TOY.at(t))
    whole = next(iter(opt.state_dict()["state"].values()))["tensors"]
    opt.zero_grad()
    with opt.watch():
        F.cross_entropy(model(TOY.at(3)[0]), TOY.at(3)[1]).backward()
    model[0].weight.grad = model[0].bias.grad = None
    opt.step()
    parts = list(opt.state_dict()["state"].values())
    assert sorted(s["names"][0] for s in parts) == ["0.weight", "2.weight"]
    for s in parts:
        assert any("factor" in k for k in s["tensors"])
        assert all(torch.equal(x, whole[k]) for k, x in s["tensors"].items())
    step(opt, model, TOY.at(4))


def test_lbfgs_refuses_to_leave_a_parameter_out():
    model = fresh_model()
    opt = fp.optim.LBFGS(model, lr=0.1)
    step(opt, model, TOY.at(0))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="the state of LBFGS belongs to all parameters together"):
        step(opt, model, TOY.at(1))


@pytest.mark.parametrize("name", JOINT)
def test_a_window_of_all_parameters_refuses_to_leave_one_out(name):
    params = tensors()
    opt = fp.optim.CLASSES[name](params, lr=0.1)
    gradients(params, 0, {0, 1, 2})
    opt.step()
    gradients(params, 1, {0, 2})
    with pytest.raises(ValueError, match="belongs to all parameters together"):
        opt.step()
