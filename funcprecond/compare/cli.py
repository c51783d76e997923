"""The command line: `compare`, `list-methods` and `list-tasks`."""

import argparse
import codecs
import contextlib
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from funcprecond.compare.arguments import check_device, check_names, names, numbers
from funcprecond.compare.tasks import TASKS
from funcprecond.methods.card import CARDS
from funcprecond.methods.table import PLANNED, table

# For terminals without Unicode; other letters lose their accents, or become question marks.
SPELLINGS = {
    "±": "+-",
    "×": "x",
    "–": "-",
    "−": "-",
    "★": "*",
    "…": "...",
    "\u0302": "^",
    "\u2044": "/",
}
MISSING = "The comparison needs {name}, which is missing: run pip install 'funcprecond[compare]'."


def working() -> list[str]:
    """The names of the methods that are implemented."""
    return [name for name, card in CARDS.items() if card.build is not None]


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error as one sentence, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message, without the usage text that argparse prints before it, and exit."""
        self.exit(2, f"{message[:1].upper()}{message[1:].rstrip('.')}.\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    root = Parser(prog="python -m funcprecond", description="Compare gradient preconditioners.")
    commands = root.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("list-methods", help="print the table of methods")
    commands.add_parser("list-tasks", help="print the tasks of the comparison")
    compare = commands.add_parser(
        "compare",
        help="train every method on a task, and report quality and cost",
        description="Train every method on a task, and report quality and cost. The results of "
        "finished cells (cost measurements and training runs) are stored, so that the same command "
        "continues after an interruption.",
    )
    add = compare.add_argument
    add(
        "--methods",
        type=names,
        default=working(),
        help="comma-separated names from list-methods; default: all that are implemented",
    )
    add("--task", default="digits-mlp", help="a name from list-tasks; default: digits-mlp")
    add(
        "--batch-sizes",
        type=numbers(1),
        help="comma-separated; default: the batch size of the task",
    )
    add(
        "--intervals",
        type=numbers(1),
        default=[10],
        help="comma-separated numbers of steps between two refreshes of the curvature; default: 10",
    )
    add(
        "--seeds",
        type=numbers(0),
        default=[0, 1, 2],
        help="comma-separated; learning rates are swept with the first seed; default: 0,1,2",
    )
    add("--steps", type=int, help="steps per training run; default: the number of the task")
    add(
        "--sweep",
        type=int,
        default=3,
        help="number of learning rates that are tried first, odd; default: 3",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1 or mps; default: cpu")
    add("--threads", type=int, default=1, help="number of CPU threads of torch; default: 1")
    add("--out", type=Path, default=Path("report"), help="folder of the report; default: report/")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the arguments of the command line; those of the process by default.

    Returns:
        The exit code: 0 for success, 1 if the comparison cannot run or its output cannot be
        written, 2 for an invalid argument, 130 after an interruption.
    """
    codecs.register_error("funcprecond.spell", spelled)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="funcprecond.spell")  # pyright: ignore
    try:
        code = run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # A closed pipe, as of `| head`, is no fault: its reader has seen enough.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                where = f" {error.filename}" if error.filename else ""
                print(f"Cannot write{where}: {error.strerror or error}.", file=sys.stderr)
        # What is still in the buffer would raise again when Python exits.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # pyright: ignore
        return 1
    return code


def spelled(error: UnicodeError) -> tuple[str, int]:
    """Spell letters that the encoding of the output lacks; a handler for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = unicodedata.normalize("NFKD", error.object[error.start : error.end])
    plain = ("" if unicodedata.combining(x) else x if x.isascii() else "?" for x in letters)
    found = (SPELLINGS.get(x, y) for x, y in zip(letters, plain, strict=True))
    return "".join(found), error.end


def run(arguments: Sequence[str] | None) -> int:
    """Run a command; see `main`."""
    root = parser()
    options = root.parse_args(arguments)
    if options.command == "list-methods":
        print(table())
        return 0
    if options.command == "list-tasks":
        for task in TASKS.values():
            print(f"{task.name:16}{task.title}; ranked by test {task.metric}")
        return 0
    try:
        for name in options.methods:
            if name in PLANNED and name not in CARDS:
                message = (
                    f"The method {name!r} is planned, and not there yet; choose from: "
                    f"{', '.join(working())}."
                )
                raise ValueError(message)
        check_names("method", options.methods, working())
        check_names("task", [options.task], TASKS)
        check_device(options.device)
        for name, high in (("steps", 10**9), ("sweep", 15), ("threads", 1024)):
            value = getattr(options, name)
            if value is not None and not (1 <= value <= high and (name != "sweep" or value % 2)):
                kind = "an odd number" if name == "sweep" else "a number"
                root.error(f"--{name} is {value}; it must be {kind} of at least 1, at most {high}")
    except ValueError as error:
        root.error(str(error))
    # The measured times belong to this number of threads, which torch can only set globally.
    torch.set_num_threads(options.threads)
    return guarded(lambda: compare(options))


def compare(options: argparse.Namespace) -> int:
    """Run the cells that are not finished yet, then write the report.

    Args:
        options: the parsed command line.

    Returns:
        The exit code; see `main`.
    """
    # These modules need rich, matplotlib and scikit-learn, which are optional dependencies, and
    # list-methods must work without them.
    from rich.console import Console

    from funcprecond.compare.engine import Engine
    from funcprecond.compare.plan import settings
    from funcprecond.compare.progress import Display
    from funcprecond.compare.report.about import about
    from funcprecond.compare.report.table import table as rich_table
    from funcprecond.compare.report.write import write
    from funcprecond.compare.store import Store, exclusive, unwritable
    from funcprecond.compare.summary import rows

    log, out = Console(stderr=True), Console()
    if not out.is_terminal:
        out = Console(width=150)  # a file does not need a narrow table
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
                f"--batch-sizes contains {max(batch_sizes)}, but {task.name} has only "
                f"{len(data.train):,} training examples; choose smaller batch sizes."
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
                    f"Interrupted. {len(store.cells)} finished cells are stored in {store.path}; "
                    "the same command continues from there."
                )
                return 130
        found = rows(engine)
        say("Writing the report.")
        try:
            written = write(options.out, found, about(engine, data, task))
        except OSError as error:
            raise unwritable(options.out, error) from error
        out.print(data.description, markup=False, highlight=False, soft_wrap=True)
        out.print(rich_table(found, task.title, out.width))
        out.print(f"Report: {written[-1]}", markup=False, highlight=False, soft_wrap=True)
    return 0


def guarded(work: Callable[[], int]) -> int:
    """Run the comparison, and print errors that the user can correct as one sentence.

    Args:
        work: runs the comparison, and returns the exit code.

    Returns:
        The exit code; see `main`.
    """
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
        print("Interrupted. The finished cells are stored.", file=sys.stderr)
        return 130
