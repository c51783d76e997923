"""The command line, as a user runs it."""

import codecs
import io
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
        (["--methods", "sgd,psgd"], ["'psgd' is planned, and not there yet", "sgd", "adam"]),
        (["--task", "imagenet"], ["'imagenet'", *TASKS]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'", "cpu"]),
        (["--batch-sizes", "0"], ["--batch-sizes", "at least 1"]),
        (["--intervals", "one"], ["--intervals", "'one'"]),
        (["--methods", " , "], ["--methods", "empty"]),
        (["--seeds", ""], ["--seeds", "list of integers"]),
        (["--seeds", "0,-1"], ["--seeds", "at least 0"]),
        (["--seeds", "9" * 30], ["--seeds", "below 2**63"]),
        (["--sweep", "2"], ["--sweep is 2", "odd"]),
        (["--sweep", "17"], ["--sweep is 17", "at most 15"]),
        (["--threads", "1000000000000"], ["--threads is 1000000000000", "at most 1024"]),
        (["--steps", "-5"], ["--steps is -5", "at least 1"]),
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


def test_results_of_wrong_types_are_set_aside(tmp_path, capsys):
    command = ["compare", *QUICK, "--methods", "sgd", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    capsys.readouterr()
    document = json.loads((tmp_path / "results.json").read_text())
    for cell in document["cells"].values():
        cell["result"]["step_ms" if cell["config"]["kind"] == "cost" else "test"] = "fast"
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert "3 cells are incomplete or changed" in said
    assert "none of its cells can be read" in said


DISK = """
import resource, signal, sys
from funcprecond.compare.cli import main
# What is written beyond a few bytes of a file is refused, as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_a_sentence(tmp_path):
    arguments = ["compare", *QUICK, "--methods", "sgd", "--out", tmp_path / "report"]
    done = subprocess.run(
        [sys.executable, "-c", DISK, *arguments], cwd=Path(__file__).parents[2], capture_output=True
    )
    error = done.stderr.decode()
    assert done.returncode == 1
    assert "File too large. Make room there or choose another --out" in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path / "report") == [".lock"]


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    (tmp_path / "index.html").mkdir()
    assert cli.main(["compare", *QUICK, "--methods", "sgd", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "Is a directory. Make room there or choose another --out" in error
    assert json.loads((tmp_path / "results.json").read_text())["cells"]


def test_an_ascii_terminal_gets_other_spellings(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["compare", *QUICK, "--methods", "sgd", "--out", str(tmp_path)]) == 0
    assert cli.main(["list-methods"]) == 0
    text = out.buffer.getvalue().decode("ascii")
    assert " +- " in text
    assert "1.00x" in text
    assert "F^_emp" in text
    assert "?" not in text


def test_a_reader_that_has_seen_enough_is_no_fault(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["list-methods"]) == 1
    assert not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_to_a_full_disk_is_a_sentence(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["list-methods"]) == 1
    assert capsys.readouterr().err == "Cannot write: No space left on device.\n"


def test_letters_without_a_spelling_are_question_marks():
    codecs.register_error("funcprecond.spell", cli.spelled)
    text = "F̂_emp 1 ± 2 – 3×, Ĥ, é, ψ"
    assert text.encode("ascii", "funcprecond.spell") == b"F^_emp 1 +- 2 - 3x, H^, e, ?"


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
