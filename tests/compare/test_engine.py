"""Running cells: failures are rows, interruptions lose nothing, the same plan is not run twice."""

import dataclasses
import types

import pytest
import torch

import funcprecond as fp
from funcprecond.compare import engine as engine_module
from funcprecond.compare import plan, recipe, summary
from funcprecond.compare.engine import sentence
from funcprecond.compare.report import html
from funcprecond.compare.report.table import cells
from funcprecond.compare.tasks import TASKS
from funcprecond.compare.train import train
from funcprecond.methods import table as taxonomy
from funcprecond.transform import stateless


@pytest.fixture
def cards(monkeypatch):
    """Adds methods that misbehave to the table."""
    sgd = taxonomy.CARDS["sgd"]

    def refuse():
        message = "This method refuses '0.weight': it has too many entries.\nDetails follow."
        raise ValueError(message)

    def poison():
        return stateless(lambda grads: {name: g * float("nan") for name, g in grads.items()})

    def explode():
        return stateless(lambda grads: {name: -1e3 * g for name, g in grads.items()})

    extra = {
        name: dataclasses.replace(sgd, name=name, build=build, options={})
        for name, build in (("refuse", refuse), ("poison", poison), ("explode", explode))
    }
    everything = types.MappingProxyType({**taxonomy.CARDS, **extra})
    for module in (engine_module, plan, recipe, summary):
        monkeypatch.setattr(module, "CARDS", everything)
    monkeypatch.setattr("funcprecond.compare.measure.CARDS", everything)


def test_a_failing_method_is_a_row_that_says_why_and_the_rest_goes_on(engine, cards):
    comparison = engine(["refuse", "poison", "sgd"], points=3)
    comparison.run()
    rows = {row.setting.method: row for row in summary.rows(comparison)}
    assert rows["refuse"].status == "failed"
    assert rows["refuse"].why == "This method refuses '0.weight': it has too many entries."
    assert rows["poison"].status == "diverged"
    assert "no longer finite" in rows["poison"].why
    assert rows["sgd"].status == "ok"
    assert next(iter(rows)) == "sgd"
    assert rows["refuse"].record()["why"]


def test_a_loss_far_above_guessing_is_divergence(engine, cards, digits):
    (setting,) = engine(["explode"]).rows
    result = train(setting, digits, 1.0, 0)
    assert result["status"] == "diverged"


def test_a_second_run_finds_everything(engine):
    first = engine()
    first.run()
    assert len(first.watcher.ended) == 6  # two costs, two methods with two seeds each
    second = engine()
    assert second.runs_left() == 0
    second.run()
    assert not second.watcher.ended
    assert second.watcher.kept == 6
    assert [r.record() for r in summary.rows(first)] == [r.record() for r in summary.rows(second)]


def test_interrupted_it_goes_on_where_it_was(engine, monkeypatch):
    calls = []

    def interrupted(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(engine_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine().run()
    monkeypatch.setattr(engine_module, "train", train)
    again = engine()
    assert again.runs_left() == 2
    again.run()
    assert len(again.watcher.ended) == 2
    assert again.watcher.kept == 4


def fails_at(monkeypatch, *cells):
    """Training whose validation loss is best at the highest rate; the seeds fail in ``cells``."""

    def training(row, data, learning_rate, seed, advance):
        if (learning_rate, seed) in cells:
            return {"status": "diverged", "why": "diverged"}
        figures = {"accuracy": 0.5, "loss": 1 / learning_rate}
        curve = {"step": [row.steps], "loss": [1.0]}
        return {"status": "ok", "validation": figures, "test": figures, "curve": curve}

    monkeypatch.setattr(engine_module, "train", training)


def test_a_rate_at_which_another_seed_fails_is_not_the_best(engine, monkeypatch):
    # The method's own rate is 0.1, and half decades around it are swept.
    fails_at(monkeypatch, (3.16, 0), (1.0, 1))
    comparison = engine(["sgd"], points=3)
    comparison.run()
    assert comparison.runs_left() == 0
    (row,) = summary.rows(comparison)
    assert (row.status, row.learning_rate, len(row.runs)) == ("ok", 0.316, 2)
    assert row.why == "at learning rate 1, seed 1: diverged"


def test_where_a_seed_fails_at_every_rate_the_best_one_says_so(engine, monkeypatch):
    fails_at(monkeypatch, *((rate, 1) for rate in (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)))
    comparison = engine(["sgd"], points=1)
    comparison.run()
    (row,) = summary.rows(comparison)
    assert (row.status, row.learning_rate, row.runs) == ("diverged", 0.1, [])
    assert row.metric is None
    assert "1 of 2 seeds did not end well at learning rate 0.1 (seed 1: diverged)" in row.why
    assert "seed 0 ended with test accuracy 0.5" in row.why


def test_a_method_that_diverges_for_a_seed_is_behind_one_that_does_not(engine, monkeypatch, cards):
    """The survivor's accuracy would be the best of the table."""

    def training(row, data, learning_rate, seed, advance):
        if (row.method, seed) == ("poison", 1):
            return {"status": "diverged", "why": "the loss is not finite"}
        figures = {"accuracy": 0.9 if row.method == "poison" else 0.1, "loss": 1.0}
        curve = {"step": [row.steps], "seconds": [1.0], "loss": [1.0]}
        return {"status": "ok", "validation": figures, "test": figures, "curve": curve}

    monkeypatch.setattr(engine_module, "train", training)
    comparison = engine(["poison", "sgd"], points=1)
    comparison.run()
    found = summary.rows(comparison)
    assert [row.setting.method for row in found] == ["sgd", "poison"]
    assert found[1].record()["test_accuracy_mean"] is None
    lead = html.lead(found)
    assert "Best test accuracy: <strong>sgd</strong>" in lead
    assert "1 of 2 rows have no result" in lead


def test_one_seed_has_no_spread(engine, monkeypatch):
    fails_at(monkeypatch)
    comparison = engine(["sgd"], seeds=(0,))
    comparison.run()
    (row,) = summary.rows(comparison)
    assert row.accuracy == summary.Figure(0.5, None)
    assert cells(row)[4:6] == ["50.0", "10.000"]
    assert row.record()["test_accuracy_spread"] is None


def test_a_cell_is_its_whole_configuration(engine):
    (base,) = engine(["shampoo"]).rows
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"batch_size": 32}, {"interval": 3}, {"steps": 7}, {"threads": 2}, {"method": "sgd"},
            {"task": "digits-convnet"},
        )
    ]  # fmt: skip
    configs = [setting.config("cost") for setting in (base, *others)]
    configs += [base.config("train", seed=0, learning_rate=lr) for lr in (0.1, 0.2)]
    assert len({repr(config) for config in configs}) == len(configs)
    assert {"code", "torch", "device_name"} <= set(base.config("cost")["environment"])


def test_batch_sizes_and_intervals_are_axes_and_methods_without_intervals_have_one(engine):
    rows = engine(["sgd", "shampoo"], batch_sizes=(32, 64), intervals=(1, 5)).rows
    assert [(r.method, r.batch_size, r.interval) for r in rows] == [
        ("sgd", 32, None), ("sgd", 64, None),
        ("shampoo", 32, 1), ("shampoo", 32, 5), ("shampoo", 64, 1), ("shampoo", 64, 5),
    ]  # fmt: skip


def test_time_left_is_known_once_costs_are(engine):
    comparison = engine()
    assert comparison.seconds_left() == 0
    comparison.run()
    lefts = [left for left, _ in comparison.watcher.plans]
    assert lefts == sorted(lefts, reverse=True)
    assert comparison.watcher.plans[-1] == (1, pytest.approx(comparison.watcher.plans[-1][1]))
    assert comparison.watcher.plans[-1][1] > 0


def test_same_seed_same_curve(engine, digits):
    (setting,) = engine(["sgd"]).rows
    first, second = (train(setting, digits, 0.1, 3) for _ in range(2))
    assert first["curve"]["loss"] == second["curve"]["loss"]
    assert first["test"] == second["test"]
    assert train(setting, digits, 0.1, 4)["curve"]["loss"] != first["curve"]["loss"]


def test_training_learns(engine, digits):
    (setting,) = engine(["sgd"], steps=60).rows
    result = train(setting, digits, 0.1, 0)
    assert result["test"]["accuracy"] > 0.85
    assert result["curve"]["step"][-1] == 60
    assert result["curve"]["seconds"] == sorted(result["curve"]["seconds"])
    assert result["curve"]["loss"][-1] < 0.5


def test_momentum_follows_every_method_that_has_none(digits):
    assert recipe.momentum("sgd") == recipe.momentum("shampoo") == recipe.momentum("caspr") == 0.9
    assert recipe.momentum("adam") == 0
    state = recipe.recipe("sgd", 0.1, None).init({"w": torch.zeros(3)})
    plain = fp.chain(fp.sgd(), fp.scale(0.1)).init({"w": torch.zeros(3)})
    assert len(state) == len(plain) + 1


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_muon_gets_the_hidden_matrices_of_every_task_and_adam_the_rest(task):
    network = task.network(10)
    params = {k: p.detach() for k, p in network.named_parameters()}
    routed = fp.assign(fp.muon_rules(*task.ends), params).labels
    last = next(k for k in reversed(params) if k.endswith("weight"))
    assert routed[last] == "adam"
    hidden = {k for k, label in routed.items() if label == "muon"}
    assert hidden
    assert all(params[k].ndim > 1 for k in hidden)
    state = recipe.recipe("muon", 0.1, None, task.ends).init(params)
    assert state.inner["muon"][0].momentum.keys() == hidden


def test_a_planned_method_cannot_be_built(monkeypatch):
    planned = dataclasses.replace(taxonomy.CARDS["sgd"], name="psgd", build=None)
    monkeypatch.setattr(recipe, "CARDS", {"psgd": planned})
    with pytest.raises(ValueError, match="cannot be built yet"):
        recipe.recipe("psgd", 0.1, None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("A sentence.\nAnd more."), "A sentence."),
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
        (ValueError(), "ValueError"),
    ],
)
def test_reason_is_one_sentence(error, expected):
    assert sentence(error) == expected
