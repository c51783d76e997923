"""Command line: `compare`, `list-methods`, `list-tasks`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from funcprecond.compare.arguments import check_device, check_names, names, numbers
from funcprecond.compare.tasks import TASKS
from funcprecond.methods.card import CARDS
from funcprecond.methods.table import table

MISSING = "The comparison needs {name}, which is not installed: pip install 'funcprecond[compare]'."


def working() -> list[str]:
    """Names of the methods that can be built today."""
    return [name for name, card in CARDS.items() if card.build is not None]


class Parser(argparse.ArgumentParser):
    """Argument errors as one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong, without the usage in front of it."""
        self.exit(2, f"{message[:1].upper()}{message[1:].rstrip('.')}.\n")


def parser() -> argparse.ArgumentParser:
    """The command line as argparse sees it; `--help` prints it."""
    root = Parser(prog="python -m funcprecond", description="Gradient preconditioners, compared.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("list-methods", help="the table of methods, and which work today")
    commands.add_parser("list-tasks", help="the tasks of the comparison")
    compare = commands.add_parser(
        "compare",
        help="train every method on a task and report quality and cost",
        description="Trains every method on a task and reports quality and cost. Started again "
        "after an interruption, it goes on where it was.",
    )
    add = compare.add_argument
    add("--methods", type=names, default=working(), help="comma-separated; default: all")
    add("--task", default="digits-mlp", help="one of list-tasks; default: digits-mlp")
    add("--batch-sizes", type=numbers(1), help="comma-separated; default: the task's own")
    add("--intervals", type=numbers(1), default=[10], help="steps between refreshes; default: 10")
    add("--seeds", type=numbers(0), default=[0, 1, 2], help="default: 0,1,2; the first one sweeps")
    add("--steps", type=int, help="of each training run; default: the task's own")
    add("--sweep", type=int, default=3, help="learning rates to begin with, odd; default: 3")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps; default: cpu")
    add("--threads", type=int, default=1, help="CPU threads of torch; default: 1")
    add("--out", type=Path, default=Path("report"), help="folder of the report; default: report/")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None reads the process's own.

    Returns:
        0 done; 1 the comparison could not be run; 2 a wrong argument; 130 interrupted.
    """
    root = parser()
    options = root.parse_args(arguments)
    if options.command == "list-methods":
        print(table())
        return 0
    if options.command == "list-tasks":
        for task in TASKS.values():
            print(f"{task.name:16}{task.title}; judged by test {task.metric}")
        return 0
    try:
        check_names("method", options.methods, working())
        check_names("task", [options.task], TASKS)
        check_device(options.device)
        for name, low in (("steps", 1), ("sweep", 1), ("threads", 1)):
            value = getattr(options, name)
            if value is not None and (value < low or (name == "sweep" and value % 2 == 0)):
                kind = "an odd number" if name == "sweep" else "a number"
                root.error(f"--{name} is {value}; it must be {kind} of at least {low}")
    except ValueError as error:
        root.error(str(error))
    # The numbers of a report say how many threads they took; torch has no other way to set them.
    torch.set_num_threads(options.threads)
    return guarded(lambda: compare(options))


def compare(options: argparse.Namespace) -> int:
    """Run what is not finished yet, then write the report. See `main` for the exit codes."""
    # rich, matplotlib and scikit-learn come with an extra: list-methods must work without them.
    from rich.console import Console

    from funcprecond.compare.engine import Engine
    from funcprecond.compare.plan import settings
    from funcprecond.compare.progress import Display
    from funcprecond.compare.report.about import about
    from funcprecond.compare.report.table import table as rich_table
    from funcprecond.compare.report.write import write
    from funcprecond.compare.store import Store, exclusive
    from funcprecond.compare.summary import rows

    log, out = Console(stderr=True), Console()
    if not out.is_terminal:
        out = Console(width=150)  # a log or a file need not wrap the table
    task = TASKS[options.task]
    batch_sizes = options.batch_sizes or [task.batch_size]
    steps = options.steps or task.steps

    def say(sentence: str) -> None:
        log.print(sentence, markup=False, highlight=False, soft_wrap=True)

    with exclusive(options.out):
        store = Store(options.out, say)
        data = task.load(torch.device(options.device))
        if max(batch_sizes) > len(data.train):
            say(
                f"--batch-sizes has {max(batch_sizes)}, and {task.name} has {len(data.train):,} "
                f"training examples; choose at most that many."
            )
            return 2
        plan = settings(
            task,
            options.methods,
            batch_sizes,
            options.intervals,
            steps,
            options.device,
            options.threads,
        )
        with Display(log) as display:
            engine = Engine(plan, options.seeds, options.sweep, data, store, display)
            try:
                engine.run()
            except KeyboardInterrupt:
                display.bar.stop()
                say(
                    f"Interrupted. {len(store.cells)} finished cells are in {store.path}; "
                    "the same command goes on from there."
                )
                return 130
        found = rows(engine)
        say("Drawing the report.")
        written = write(options.out, found, about(engine, data, task))
        out.print(data.description, markup=False, highlight=False, soft_wrap=True)
        out.print(rich_table(found, task.title, out.width))
        out.print(f"Report: {written[-1]}", markup=False, highlight=False, soft_wrap=True)
    return 0


def guarded(work: Callable[[], int]) -> int:
    """Turn what a user can put right into a sentence on standard error."""
    from funcprecond.compare.store import StoreError

    try:
        return work()
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in {"rich", "matplotlib", "sklearn"}:
            raise
        print(MISSING.format(name=error.name), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; finished cells are kept.", file=sys.stderr)
        return 130
