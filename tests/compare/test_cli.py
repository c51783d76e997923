"""The command line, as a user runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funcprecond.compare import cli
from funcprecond.compare.tasks import TASKS
from funcprecond.methods import table as taxonomy

QUICK = ["--methods", "sgd,adam", "--steps", "5", "--sweep", "1", "--seeds", "0,1"]


def start(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "150"}
    command = [sys.executable, "-m", "funcprecond", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        cwd=Path(__file__).parents[2], **options,
    )  # fmt: skip


def finish(process):
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def test_list_methods_prints_the_table(capsys):
    assert cli.main(["list-methods"]) == 0
    assert capsys.readouterr().out == taxonomy.table() + "\n"


def test_list_tasks(capsys):
    assert cli.main(["list-tasks"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "shampo"], ["'shampo'", "shampoo?", "sgd", "adam", "caspr"]),
        (["--task", "imagenet"], ["'imagenet'", *TASKS]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
        (["--batch-sizes", "0"], ["--batch-sizes", "at least 1"]),
        (["--intervals", "one"], ["--intervals", "'one'"]),
        (["--methods", " , "], ["--methods", "empty"]),
        (["--sweep", "2"], ["--sweep is 2", "odd"]),
        (["--steps", "0"], ["--steps is 0", "at least 1"]),
    ],
)
def test_wrong_argument_is_one_sentence_and_exit_code_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert len(captured.err.strip().splitlines()) == 1
    assert all(word in captured.err for word in words)


def test_missing_extra_is_a_sentence(capsys):
    def work():
        import matplotlib_is_not_here as _  # noqa: F401

    with pytest.raises(ModuleNotFoundError):  # not one of the extra's: a fault, shown as one
        cli.guarded(work)

    def missing():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    assert cli.guarded(missing) == 1
    assert "pip install 'funcprecond[compare]'" in capsys.readouterr().err


def test_whole_comparison_twice(tmp_path, capsys):
    command = ["compare", *QUICK, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert "test accuracy %" in first.out
    assert "adam" in first.out
    assert "cells left, about" in first.err
    for name in ("results.json", "results.csv", "index.html", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    before = json.loads((tmp_path / "results.json").read_text())
    assert cli.main(command) == 0
    second = capsys.readouterr()
    assert second.err.startswith("6 finished cells were found")
    assert second.out == first.out
    assert json.loads((tmp_path / "results.json").read_text()) == before


def test_damaged_results_are_set_aside(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"schema": 1, "cells": {"a')
    assert cli.main(["compare", *QUICK, "--methods", "sgd", "--out", str(tmp_path)]) == 0
    assert "results.json is damaged" in capsys.readouterr().err
    assert (tmp_path / "results.damaged-1.json").read_text() == '{"schema": 1, "cells": {"a'


def test_folder_that_cannot_be_used_is_a_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", *QUICK, "--out", str(tmp_path / "file")]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_batch_larger_than_the_data_is_a_sentence(tmp_path, capsys):
    arguments = ["compare", *QUICK, "--batch-sizes", "32,5000", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "1,257 training examples" in capsys.readouterr().err


@pytest.fixture
def _sigint_is_heard():
    # A shell starts background jobs deaf to it, which their children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint_is_heard")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_started_again(tmp_path, how):
    arguments = ["compare", *QUICK, "--steps", "1500", "--out", tmp_path]
    process = start(*arguments)
    results = tmp_path / "results.json"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if results.exists() and json.loads(results.read_text())["cells"]:
            break
        time.sleep(0.02)
    process.send_signal(how)
    code, _, error = finish(process)
    assert code == (130 if how is signal.SIGINT else -signal.SIGKILL)
    if how is signal.SIGINT:
        assert "the same command continues from there" in error
        assert "Traceback" not in error
    kept = json.loads(results.read_text())["cells"]
    assert 1 <= len(kept) < 6
    code, _, error = finish(start(*arguments))
    assert code == 0, error
    assert re.match(rf"{len(kept)} finished cells? (was|were) found", error)
    cells = json.loads(results.read_text())["cells"]
    assert len(cells) == 6
    assert all(cells[name] == cell for name, cell in kept.items())
