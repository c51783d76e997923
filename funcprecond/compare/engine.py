"""Runs the cells of a comparison that are not in the store yet, and keeps each as it finishes."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from funcprecond.compare.data import Data
from funcprecond.compare.measure import cost
from funcprecond.compare.plan import Setting
from funcprecond.compare.store import Store
from funcprecond.compare.sweep import best, next_exponent, rate
from funcprecond.compare.train import train
from funcprecond.methods.card import CARDS

Result = dict[str, Any]


class Watcher(Protocol):
    """Hears what the engine does; the progress display is one."""

    def found(self, cells: int) -> None:
        """So many cells of the plan were finished before this run."""

    def plan(self, left: int, seconds: float) -> None:
        """So many cells are left, expected to take so many seconds (0 when nothing is known)."""

    def begin(self, label: str, expected: float) -> None:
        """A cell starts."""

    def advance(self, fraction: float) -> None:
        """So much of the current cell is done."""

    def end(self, label: str, result: Result) -> None:
        """A cell is finished."""


class Engine:
    """One comparison: costs first, since they tell how long the rest will take, then row by row.

    Args:
        rows: what to compare, all of one task.
        seeds: the first one sweeps the learning rate; all of them run the best rate, and if one of
            them fails there, the best where none does.
        points: learning rates in the sweep.
        data: the task's data on the device.
        store: finished cells.
        watcher: is told about progress.
    """

    def __init__(
        self,
        rows: Sequence[Setting],
        seeds: Sequence[int],
        points: int,
        data: Data,
        store: Store,
        watcher: Watcher,
    ) -> None:
        self.rows, self.seeds, self.points = list(rows), list(seeds), points
        self.data, self.store, self.watcher = data, store, watcher
        # What the store has of each row, read once and kept up: its cost, and its training runs by
        # exponent of the learning rate and seed.
        self.costs = {row: store.get(row.config("cost")) for row in self.rows}
        self.runs = {row: self.stored_runs(row) for row in self.rows}

    def run(self) -> None:
        """Finish every cell. May be stopped at any moment and called again by another process."""
        self.watcher.found(sum(map(self.finished, self.rows)))
        for index, row in enumerate(self.rows):
            self.watcher.plan(len(self.rows) - index + self.runs_left(), self.seconds_left())
            if self.costs[row] is None:
                label = f"{row.label()}: cost"
                work = functools.partial(cost, row, self.data)
                self.costs[row] = self.cell(row.config("cost"), label, work, 0)
        for row in self.rows:
            self.finish(row)

    def finish(self, row: Setting) -> None:
        """Sweep the row's learning rate, then run the other seeds at the best steady one."""
        if self.cost(row)["status"] == "failed":
            return  # it would fail again, once for each learning rate
        while (exponent := next_exponent(self.sweep(row), self.points)) is not None:
            self.train(row, exponent, self.seeds[0])
        tried = None
        while (winner := self.winner(row)) != tried and winner is not None:
            for seed in self.seeds[1:]:
                self.train(row, winner, seed)
            tried = winner

    def train(self, row: Setting, exponent: int, seed: int) -> None:
        """Run one training cell, unless it is finished."""
        if (exponent, seed) in self.runs[row]:
            return
        learning_rate = rate(CARDS[row.method].learning_rate, exponent)
        self.watcher.plan(self.runs_left(), self.seconds_left())
        self.runs[row][exponent, seed] = self.cell(
            row.config("train", learning_rate=learning_rate, seed=seed),
            f"{row.label()}: learning rate {learning_rate:g}, seed {seed}",
            lambda: train(
                row,
                self.data,
                learning_rate,
                seed,
                lambda step: self.watcher.advance(step / row.steps),
            ),
            self.run_seconds(row),
        )

    def cell(
        self,
        config: dict[str, Any],
        label: str,
        work: Callable[[], Result],
        expected: float,
    ) -> Result:
        """Do the work of one cell and keep its result; a failure is a result too."""
        self.watcher.begin(label, expected)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            result: Result
            try:
                result = work()
            except Exception as error:
                result = {"status": "failed", "why": sentence(error)}
        said = sorted({str(warning.message).strip() for warning in heard})
        if said:
            result["warnings"] = said
        result = self.store.put(config, result)
        self.watcher.end(label, result)
        return result

    # What is known so far, for the plan and for the report.

    def stored_runs(self, row: Setting) -> dict[tuple[int, int], Result]:
        """The row's finished training runs in the store, by exponent and seed."""
        centre = CARDS[row.method].learning_rate
        exponents = {rate(centre, exponent): exponent for exponent in range(-9, 10)}
        found = self.store.variants(row.config("train"), "learning_rate", "seed")
        return {(exponents[r], seed): x for (r, seed), x in found.items() if r in exponents}

    def cost(self, row: Setting) -> Result:
        """The row's cost cell; `{"status": "missing"}` before it has run."""
        return self.costs[row] or {"status": "missing"}

    def sweep(self, row: Setting) -> dict[int, Result]:
        """Finished runs of the first seed by exponent of the learning rate, in order."""
        first = self.seeds[0]
        return {e: x for (e, seed), x in sorted(self.runs[row].items()) if seed == first}

    def winner(self, row: Setting) -> int | None:
        """Exponent of the best rate at which no seed is known to fail; of the best, if all fail.

        One seed cannot tell: at the rate that it likes best another one may diverge.
        """
        sweep = self.sweep(row)
        steady = {
            exponent: result
            for exponent, result in sweep.items()
            if all(r["status"] == "ok" for r in self.at(row, exponent).values())
        }
        winner = best(steady)
        return best(sweep) if winner is None else winner

    def at(self, row: Setting, exponent: int) -> dict[int, Result]:
        """Finished runs at one learning rate by seed."""
        runs = self.runs[row]
        return {seed: runs[exponent, seed] for seed in self.seeds if (exponent, seed) in runs}

    def repeats(self, row: Setting) -> dict[int, Result]:
        """Finished runs at the best steady learning rate by seed; empty while there is none."""
        winner = self.winner(row)
        return {} if winner is None else self.at(row, winner)

    def left(self, row: Setting) -> int:
        """Training runs the row still needs, further rates of its sweep not counted."""
        if self.cost(row)["status"] == "failed":
            return 0
        sweep = self.sweep(row)
        over = next_exponent(sweep, self.points) is None
        first = 0 if over else max(1, self.points - len(sweep))
        if over and self.winner(row) is None:
            return 0
        done = [seed for seed in self.repeats(row) if seed != self.seeds[0]] if over else []
        return first + len(self.seeds) - 1 - len(done)

    def finished(self, row: Setting) -> int:
        """Finished cells of the row: its cost, its sweep, the other seeds at the best rate."""
        others = [seed for seed in self.repeats(row) if seed != self.seeds[0]]
        return (self.cost(row)["status"] != "missing") + len(self.sweep(row)) + len(others)

    def runs_left(self) -> int:
        """Training runs still to do."""
        return sum(self.left(row) for row in self.rows)

    def run_seconds(self, row: Setting) -> float:
        """Expected time of one training run, from the row's cost; 0 when it is not known."""
        return row.steps * self.cost(row).get("step_ms", 0.0) / 1e3

    def seconds_left(self) -> float:
        """Expected time of all runs still to do; 0 while some row's cost is not known."""
        if any(self.cost(row)["status"] == "missing" for row in self.rows):
            return 0.0
        return sum(self.left(row) * self.run_seconds(row) for row in self.rows)


def sentence(error: Exception) -> str:
    """First line of an exception's message, or its name where it has none."""
    text = str(error).strip().splitlines()
    message = text[0].strip() if text else ""
    known = isinstance(error, (ValueError, LookupError, NotImplementedError)) and message
    return message if known else f"{type(error).__name__}: {message}".rstrip(": ")
