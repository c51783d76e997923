"""Per-sample gradients never give up: by vmap, an example at a time, or through the whole batch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.autodiff import single_examples
from tests.equality import assert_close
from tests.problems import initialised, labelled, normal, seeded

BATCH = labelled(5, 3, 2, 0)
SLOWER = "are computed for one example after another"


class Sine(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(x):  # pyright: ignore
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore
        return g * ctx.saved_tensors[0].cos()


class OldSine(torch.autograd.Function):
    """In the old style, which torch.func does not take at all."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore
        return g * ctx.saved_tensors[0].cos()


def batched(h):
    """Runs an example alone otherwise than in a batch of two or more."""
    return h.sin() if len(h) > 1 else h.cos()


def batched_item(h):
    return batched(h) * float(h.detach().isfinite().all().item())


@torch.jit.script
def scripted(h):
    if bool(h.isfinite().all()):
        return h.sin()
    return h.cos()


def selected(h):
    rows = (h[:, 0] > 0).nonzero()[:, 0]
    return h + torch.zeros_like(h).index_copy(0, rows, h[rows])


def in_place(h):
    out = torch.zeros(h.shape[0], 4, dtype=h.dtype)
    out[:, :2] = h[:, :2]
    out[:, 2:] += h[:, 2:]
    return out


def asserting(h):
    assert h.detach().abs().max().item() < 1e9
    return h


def lookup(h):
    return h * {True: 2.0}[bool((h.abs() < 99).all())]


def half(h):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(h.float(), torch.eye(4)).to(h.dtype)


# What a model does, and what is said about it.
WAYS = {
    "item": (lambda h: h * float((h.detach()[0, 0] > -9).item()), "5 runs of the model"),
    "control flow": (lambda h: h if (h.abs() < 9).all() else -h, "5 runs of the model"),
    "dynamic shapes": (selected, "5 runs of the model"),
    "in place": (in_place, "5 runs of the model"),
    "numpy": (lambda h: h * float(h.detach().numpy().shape[1]), "5 runs of the model"),
    "an assertion": (asserting, "5 runs of the model"),
    "a key": (lookup, "5 runs of the model"),
    "a function without a rule": (Sine.apply, "5 runs of the model"),
    "a function in the old style": (OldSine.apply, "5 runs of the model"),
    "other shapes alone": (lambda h: h.squeeze(0), "5 pull-backs through the whole batch"),
    "a scripted function": (scripted, "5 runs of the model"),
    "other values alone": (batched_item, "5 pull-backs through the whole batch"),
    "other values by vmap": (batched, "5 pull-backs through the whole batch"),
    "autocast": (half, None),
    "a mask of ones": (lambda h: h[torch.ones(len(h), dtype=torch.bool)], None),
}


class Net(nn.Module):
    """With a gain that no layer covers, and parameters that no batch uses."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b = way, nn.Linear(3, 4), nn.Linear(4, 2)
        self.gain, self.idle = nn.Parameter(torch.ones(4)), nn.Linear(2, 2)
        self.idle_gain = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.b(self.way(torch.tanh(self.a(x)) * self.gain.relu().cumsum(0)))


def problem_of(way):
    return fp.problem(initialised(Net(way)), fp.losses.cross_entropy)


def by_loop(problem):
    """The gradient of each term of the loss in the run of the whole batch."""
    p = {k: x.clone().requires_grad_() for k, x in problem.params.items()}
    x, y = BATCH
    losses = F.cross_entropy(
        torch.func.functional_call(problem.module, p, (x,)), y, reduction="none"
    )
    rows = [
        torch.autograd.grad(
            loss, list(p.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses
    ]
    return {k: torch.stack(r) for k, r in zip(p, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", WAYS)
def test_whatever_the_model_does_the_rows_are_those_of_the_examples(kind):
    way, cost = WAYS[kind]
    problem = problem_of(way)
    args = problem, problem.params, BATCH
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = fp.per_sample_grads(*args)
        again = fp.per_sample_grads(*args)
        fp.observe(*args, fp.smw_ng().needs(0))
    expected = by_loop(problem)
    assert_close(rows, expected, rtol=1e-2 if kind == "autocast" else 1e-11)
    assert_close(again, rows, rtol=1e-12)
    messages = [str(w.message) for w in said if SLOWER in str(w.message)]
    assert len(messages) == (cost is not None)
    assert all("['gain']" in m and cost in m and "fp.partition" in m for m in messages)


@pytest.mark.parametrize("kind", ["item", "other shapes alone", "other values alone"])
def test_matrices_and_methods_take_the_same_routes(kind):
    problem = problem_of(WAYS[kind][0])
    args = problem, problem.params, BATCH
    ggn = fp.GGN(*args)
    assert_close(ggn.trace(), ggn.to_dense().trace(), rtol=1e-11)
    diagonal = fp.DiagonalGGN(*args).diagonal()
    whole = ggn.to_dense().diagonal()
    assert_close(torch.cat([d.flatten() for d in diagonal.values()]), whole, rtol=1e-10)
    for opt in (fp.kfac(), fp.ekfac(), fp.smw_ng()):
        e = fp.observe(*args, opt.needs(0), generator=seeded(0))
        direction = opt.update(opt.init(problem.params), e.grads, e)[1]
        assert all(bool(d.isfinite().all()) for d in direction.values())
        assert not direction["idle.weight"].any()


def test_parameters_that_the_batch_does_not_use_need_no_run(monkeypatch):
    problem = problem_of(lambda h: h)
    e = fp.Evaluation(problem, problem.params, BATCH)
    (cotangent,) = e.cotangents("empirical", ())
    e.examples  # noqa: B018
    monkeypatch.setattr(single_examples, "_first_route", None)
    rows = e.pull_each(cotangent, ["idle_gain", "idle.weight"])
    assert {k: tuple(r.shape) for k, r in rows.items()} == {
        "idle_gain": (5, 2),
        "idle.weight": (5, 2, 2),
    }
    assert not any(r.any() for r in rows.values())


@pytest.mark.parametrize("twice", [False, True])
def test_only_used_parameters_are_asked_for(monkeypatch, twice):
    problem, asked = problem_of(lambda h: h), []
    by_vmap = single_examples._by_vmap

    def spied(evaluation, cotangents, names, chunk_size):
        asked.append(list(names))
        return by_vmap(evaluation, cotangents, names, chunk_size)

    monkeypatch.setattr(single_examples, "_by_vmap", spied)
    e = fp.Evaluation(problem, problem.params, BATCH, twice=twice)
    (cotangent,) = e.cotangents("empirical", ())
    rows = e.pull_each(cotangent, list(problem.params))
    assert asked == [[k for k in problem.params if "idle" not in k]]
    assert_close(rows, by_loop(problem), rtol=1e-11)


def test_under_a_transform_the_rows_come_through_the_whole_batch():
    problem = problem_of(Sine.apply)
    p = problem.params

    def norm(gain):
        rows = fp.per_sample_grads(problem, {**p, "gain": gain}, BATCH)
        return sum(r.square().sum() for r in rows.values())

    got = torch.func.grad(norm)(p["gain"])
    eps = 1e-6
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = eps
        central = (norm(p["gain"] + step) - norm(p["gain"] - step)) / (2 * eps)
        assert_close(got[i], central, rtol=1e-6)


def test_what_no_route_takes_is_explained_under_a_transform():
    problem = problem_of(WAYS["item"][0])
    with pytest.raises(RuntimeError, match=r"\.item\(\)|vmap"):
        torch.vmap(lambda s: fp.per_sample_grads(problem, {**problem.params, "gain": s}, BATCH))(
            torch.ones(2, 4, dtype=torch.float64)
        )


def test_a_partition_needs_no_rows_of_the_parameters_that_a_simple_method_owns():
    problem = problem_of(WAYS["item"][0])
    opt = fp.partition([("*gain", "adam"), ("*", "kfac")], adam=fp.adam(), kfac=fp.kfac())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e = fp.observe(problem, problem.params, BATCH, opt.needs(0), generator=seeded(0))
        opt.update(opt.init(problem.params), e.grads, e)


def test_one_example_and_dropout_masks_take_the_slower_route_too():
    class Dropped(Net):
        def forward(self, x):
            return self.b(F.dropout(self.way(torch.tanh(self.a(x)) * self.gain.cumsum(0)), 0.5))

    problem = fp.problem(initialised(Dropped(WAYS["item"][0])), fp.losses.cross_entropy)
    easy = fp.problem(initialised(Dropped(lambda h: h)), fp.losses.cross_entropy)
    rows = fp.per_sample_grads(problem, problem.params, BATCH, generator=seeded(0))
    assert_close(rows, fp.per_sample_grads(easy, easy.params, BATCH, generator=seeded(0)))
    alone = fp.per_sample_grads(
        problem, problem.params, tuple(x[:1] for x in BATCH), generator=seeded(0)
    )
    assert all(len(r) == 1 for r in alone.values())


def test_a_failure_by_vmap_is_not_tried_again(monkeypatch):
    problem, tried = problem_of(WAYS["item"][0]), []
    by_vmap = single_examples._by_vmap

    def spied(*args):
        tried.append(1)
        return by_vmap(*args)

    monkeypatch.setattr(single_examples, "_by_vmap", spied)
    for _ in range(3):
        fp.per_sample_grads(problem, problem.params, BATCH)
    assert len(tried) == 1


def test_many_names_are_shortened():
    class Many(Net):
        def __init__(self):
            super().__init__(WAYS["item"][0])
            self.gains = nn.ParameterList(torch.ones(4) for _ in range(300))

        def forward(self, x):
            h = torch.tanh(self.a(x))
            for gain in self.gains:
                h = h * gain.cumsum(0).cos()
            return self.b(self.way(h))

    problem = fp.problem(Many().double(), fp.losses.cross_entropy)
    with pytest.warns(UserWarning, match="'gains.2'. and 297 others") as said:
        fp.per_sample_grads(problem, problem.params, (normal((2, 3)), torch.tensor([0, 1])))
    assert all(len(str(w.message)) < 700 for w in said)
