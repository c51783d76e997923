"""Runs the cells of a comparison that are not stored yet, and stores each when it finishes."""

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
    """Receives the progress of an engine; the progress display is one."""

    def found(self, cells: int) -> None:
        """Called first, with the number of cells that were finished before this run."""

    def plan(self, left: int, seconds: float) -> None:
        """Called before each cell, with the number of cells left and their expected time.

        Args:
            left: the number of cells, including the next one.
            seconds: the expected time of all of them; 0 if it is not known.
        """

    def begin(self, label: str, expected: float) -> None:
        """Called when a cell starts, with its label and its expected time (0 if not known)."""

    def advance(self, fraction: float) -> None:
        """Called during a cell, with the finished fraction of it."""

    def end(self, label: str, result: Result) -> None:
        """Called when a cell is finished, with its label and its result."""


class Engine:
    """Runs one comparison.

    The cost cells come first, because the expected times of the training runs are computed from
    them. Then the rows follow one after another.

    Args:
        rows: the rows, all of one task.
        seeds: the seeds of the training runs. The learning rate is swept with the first one, and
            the best rate is run with all of them. If one of them fails at that rate, the best rate
            at which no seed fails takes its place; if there is none, the row has no figures.
        points: the number of initial learning rates of a sweep.
        data: the data of the task on the device.
        store: the finished cells.
        watcher: receives the progress.
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
        # The finished cells of each row: its cost, and its training runs by the exponent of the
        # learning rate and the seed. They are read from the store once, and updated here.
        self.costs = {row: store.get(row.config("cost")) for row in self.rows}
        self.runs = {row: self.stored_runs(row) for row in self.rows}

    def run(self) -> None:
        """Finish every cell.

        The process may be stopped at any time, and another process may continue.
        """
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
        """Sweep the learning rate of a row, then run the other seeds at the best rate."""
        if self.cost(row)["status"] == "failed":
            return  # the training runs would fail in the same way
        while (exponent := next_exponent(self.sweep(row), self.points)) is not None:
            self.train(row, exponent, self.seeds[0])
        tried = None
        while (winner := self.winner(row)) != tried and winner is not None:
            for seed in self.seeds[1:]:
                self.train(row, winner, seed)
            tried = winner

    def train(self, row: Setting, exponent: int, seed: int) -> None:
        """Run one training cell, unless it is finished already."""
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
        """Run one cell and store its result; an exception is stored as a failure.

        Args:
            config: the configuration of the cell.
            label: its name in the log.
            work: computes the result.
            expected: the expected time in seconds; 0 if it is not known.

        Returns:
            The result, with the warnings that were issued.
        """
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

    # The finished and the remaining cells, for the plan and for the report.

    def stored_runs(self, row: Setting) -> dict[tuple[int, int], Result]:
        """The training runs of a row in the store, by exponent and seed."""
        center = CARDS[row.method].learning_rate
        exponents = {rate(center, exponent): exponent for exponent in range(-9, 10)}
        found = self.store.variants(row.config("train"), "learning_rate", "seed")
        return {(exponents[r], seed): x for (r, seed), x in found.items() if r in exponents}

    def cost(self, row: Setting) -> Result:
        """The result of the cost cell of a row; `{"status": "missing"}` if it has not run."""
        return self.costs[row] or {"status": "missing"}

    def sweep(self, row: Setting) -> dict[int, Result]:
        """The finished runs with the first seed, by the exponent of the learning rate, in order."""
        first = self.seeds[0]
        return {e: x for (e, seed), x in sorted(self.runs[row].items()) if seed == first}

    def winner(self, row: Setting) -> int | None:
        """The exponent of the best learning rate at which no seed has failed so far.

        If there is no such rate, it is the exponent of the best rate for the first seed; None if
        the first seed fails at all rates. The other seeds matter, because a rate that is best for
        one seed may diverge with another.
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
        """The finished runs at one learning rate, by seed."""
        runs = self.runs[row]
        return {seed: runs[exponent, seed] for seed in self.seeds if (exponent, seed) in runs}

    def repeats(self, row: Setting) -> dict[int, Result]:
        """The finished runs at the best learning rate, by seed; empty if there is no such rate."""
        winner = self.winner(row)
        return {} if winner is None else self.at(row, winner)

    def left(self, row: Setting) -> int:
        """The number of training runs that a row still needs, without extensions of its sweep."""
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
        """The number of finished cells of a row: cost, sweep, and other seeds at the best rate."""
        others = [seed for seed in self.repeats(row) if seed != self.seeds[0]]
        return (self.cost(row)["status"] != "missing") + len(self.sweep(row)) + len(others)

    def runs_left(self) -> int:
        """The number of training runs that are left."""
        return sum(self.left(row) for row in self.rows)

    def run_seconds(self, row: Setting) -> float:
        """The expected time of one training run of a row; 0 if its cost is not known."""
        return row.steps * self.cost(row).get("step_ms", 0.0) / 1e3

    def seconds_left(self) -> float:
        """The expected time of all remaining training runs; 0 if the cost of a row is not known."""
        if any(self.cost(row)["status"] == "missing" for row in self.rows):
            return 0.0
        return sum(self.left(row) * self.run_seconds(row) for row in self.rows)


def sentence(error: Exception) -> str:
    """The first line of an exception's message, with the type if the message may not suffice."""
    text = str(error).strip().splitlines()
    message = text[0].strip() if text else ""
    known = isinstance(error, (ValueError, LookupError, NotImplementedError)) and message
    return message if known else f"{type(error).__name__}: {message}".rstrip(": ")
