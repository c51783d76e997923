"""The rows of the result table: one per setting, at its best learning rate."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from funcprecond.compare.engine import Engine
from funcprecond.compare.plan import Setting
from funcprecond.compare.sweep import rate
from funcprecond.compare.tasks import TASKS, Task
from funcprecond.methods.card import CARDS


@dataclass(frozen=True)
class Figure:
    """The mean and the spread of a number over the seeds.

    Attributes:
        mean: the arithmetic mean.
        spread: the sample standard deviation; None for one seed.
    """

    mean: float
    spread: float | None

    @staticmethod
    def of(values: Iterable[float]) -> "Figure":
        """The figure of one or more values."""
        values = list(values)
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Figure(statistics.fmean(values), spread)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        setting: the task, method, batch size and interval.
        status: "ok", if every seed ended well at the best learning rate; otherwise "diverged",
            "failed" or "unfinished", and the row has no figures.
        why: the reason, if the status is not "ok", or if a seed failed at another learning rate.
        learning_rate: the best learning rate of the sweep.
        sweep: (exponent, learning rate, result) for each rate that was tried, in order.
        runs: the results at the best rate, one per seed; empty if the status is not "ok".
        accuracy: the accuracy on the test split, between 0 and 1.
        loss: the loss on the test split, in nats.
        train_loss: the training loss over the last tenth of the steps, in nats.
        cost: the result of the cost cell.
    """

    setting: Setting
    status: str
    why: str = ""
    learning_rate: float | None = None
    sweep: list[tuple[int, float, dict[str, Any]]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    accuracy: Figure | None = None
    loss: Figure | None = None
    train_loss: Figure | None = None
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task of the row."""
        return TASKS[self.setting.task]

    @property
    def metric(self) -> Figure | None:
        """The figure by which the task ranks the methods."""
        return self.accuracy if self.task.metric == "accuracy" else self.loss

    def order(self) -> float:
        """The sort key of the row: better rows come first, and rows without a metric last."""
        if self.metric is None:
            return float("inf")
        return -self.metric.mean if self.task.higher_is_better else self.metric.mean

    def warnings(self) -> list[str]:
        """The distinct warnings that the library issued."""
        results = [self.cost, *self.runs, *(result for _, _, result in self.sweep)]
        return sorted({said for result in results for said in result.get("warnings", [])})

    def record(self) -> dict[str, Any]:
        """The row as a flat dict for a CSV file, with times in ms and memory in bytes."""
        setting, card = self.setting, CARDS[self.setting.method]
        figures = {
            f"{name}_{part}": getattr(figure, part) if figure else None
            for name, figure in (
                ("test_accuracy", self.accuracy),
                ("test_loss", self.loss),
                ("train_loss", self.train_loss),
            )
            for part in ("mean", "spread")
        }
        costs = ("step_ms", "time_ratio", "memory_ratio", "peak_bytes", "state_bytes")
        return {
            "task": setting.task,
            "method": setting.method,
            "curvature": card.curvature,
            "representation": card.representation,
            "solver": card.solver,
            "batch_size": setting.batch_size,
            "interval": setting.interval,
            "steps": setting.steps,
            "status": self.status,
            "learning_rate": self.learning_rate,
            "seeds": len(self.runs),
            **figures,
            **{name: self.cost.get(name) for name in costs},
            "why": self.why,
        }


def rows(engine: Engine) -> list[Row]:
    """All rows of a comparison, best first; rows without a metric come last."""
    found = [row(engine, setting) for setting in engine.rows]
    return sorted(found, key=lambda row: row.order())


def row(engine: Engine, setting: Setting) -> Row:
    """One row, from the finished cells of its setting."""
    cost = engine.cost(setting)
    if cost["status"] == "failed":
        return Row(setting, "failed", cost["why"])
    results = engine.sweep(setting)
    center = CARDS[setting.method].learning_rate
    sweep = [(e, rate(center, e), result) for e, result in sorted(results.items())]
    winner = engine.winner(setting)
    if winner is None:
        whys = [f"at learning rate {lr:g}, {result['why']}" for _, lr, result in sweep]
        status = sweep[0][2]["status"] if sweep else "unfinished"
        why = "; ".join(whys) if len(set(whys)) < 3 else f"at all {len(whys)} rates: {whys[0]}"
        return Row(setting, status, why or "not run yet", sweep=sweep, cost=cost)
    runs = engine.repeats(setting)
    lost = {seed: r for seed, r in runs.items() if r["status"] != "ok"}
    if lost:
        # The mean of the seeds that remain would say how good the method is when it works.
        rest = ", ".join(
            f"seed {seed} ended with test {TASKS[setting.task].metric} "
            f"{r['test'][TASKS[setting.task].metric]:.3g}"
            for seed, r in runs.items()
            if seed not in lost
        )
        whys = "; ".join(f"seed {seed}: {r['why']}" for seed, r in lost.items())
        return Row(
            setting,
            next(iter(lost.values()))["status"],
            f"{len(lost)} of {len(runs)} seeds did not end well at learning rate "
            f"{rate(center, winner):g} ({whys}), and none of the rates "
            f"that were run with all seeds did better; {rest}",
            rate(center, winner),
            sweep,
            cost=cost,
        )
    # The failures of other seeds, at rates at which the first seed did not fail.
    bad = [
        f"at learning rate {lr:g}, seed {seed}: {r['why']}"
        for e, lr, first in sweep
        if first["status"] == "ok"
        for seed, r in engine.at(setting, e).items()
        if r["status"] != "ok"
    ]
    return Row(
        setting,
        "ok",
        "; ".join(bad),
        rate(center, winner),
        sweep,
        list(runs.values()),
        Figure.of(result["test"]["accuracy"] for result in runs.values()),
        Figure.of(result["test"]["loss"] for result in runs.values()),
        Figure.of(last_loss(result, setting.steps) for result in runs.values()),
        cost,
    )


def last_loss(result: dict[str, Any], steps: int) -> float:
    """The mean training loss over the last tenth of the steps."""
    curve = result["curve"]
    tail = [
        loss for step, loss in zip(curve["step"], curve["loss"], strict=True) if step > 0.9 * steps
    ]
    return statistics.fmean(tail or curve["loss"][-1:])
