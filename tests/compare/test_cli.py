"""The command line, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from funcprecond import taxonomy
from funcprecond.compare import cli
from funcprecond.compare.tasks import TASKS

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


def test_whole_comparison_twice(tmp_path):
    code, out, error = finish(start("compare", *QUICK, "--out", tmp_path))
    assert code == 0, error
    assert "test accuracy %" in out
    assert "adam" in out
    for name in ("results.json", "results.csv", "index.html", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    before = json.loads((tmp_path / "results.json").read_text())
    code, again, error = finish(start("compare", *QUICK, "--out", tmp_path))
    assert code == 0, error
    assert "6 finished cells were found" in error
    assert again == out
    assert json.loads((tmp_path / "results.json").read_text()) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_started_again(tmp_path, how):
    arguments = ["compare", *QUICK, "--steps", "400", "--out", tmp_path]
    process = start(*arguments)
    results = tmp_path / "results.json"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if results.exists() and len(json.loads(results.read_text())["cells"]) >= 3:
            break
        time.sleep(0.02)
    process.send_signal(how)
    code, _, error = finish(process)
    assert code == (130 if how is signal.SIGINT else -signal.SIGKILL)
    if how is signal.SIGINT:
        assert "the same command goes on from there" in error
        assert "Traceback" not in error
    kept = json.loads(results.read_text())["cells"]
    assert 3 <= len(kept) < 6
    code, _, error = finish(start(*arguments))
    assert code == 0, error
    assert f"{len(kept)} finished cells were found" in error.replace("\n", " ") or "found" in error
    cells = json.loads(results.read_text())["cells"]
    assert len(cells) == 6
    assert all(cells[name] == cell for name, cell in kept.items())


def test_damaged_results_are_set_aside(tmp_path):
    (tmp_path / "results.json").write_text('{"schema": 1, "cells": {"a')
    code, _, error = finish(start("compare", *QUICK, "--methods", "sgd", "--out", tmp_path))
    assert code == 0, error
    assert "results.json is damaged" in error
    assert (tmp_path / "results.damaged-1.json").read_text() == '{"schema": 1, "cells": {"a'
