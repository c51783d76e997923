"""The report: table, CSV, plots, page."""

import csv
import io
import re

import pytest
from rich.console import Console

from funcprecond.compare.engine import Engine
from funcprecond.compare.plan import Setting, settings
from funcprecond.compare.report.about import about
from funcprecond.compare.report.html import lead
from funcprecond.compare.report.table import reasons, table, times
from funcprecond.compare.report.write import to_csv, write
from funcprecond.compare.store import Store
from funcprecond.compare.summary import Figure, Row, rows
from funcprecond.compare.tasks import TASKS


@pytest.fixture(scope="module")
def found(tmp_path_factory, digits, listener):
    """Rows of a comparison with two batch sizes and two intervals, and one row that failed."""
    task = TASKS["digits-mlp"]
    plan = settings(task, ["sgd", "shampoo", "adagrad_full"], [32, 64], [1, 5], 12, "cpu", 1)
    store = Store(tmp_path_factory.mktemp("report"), pytest.fail)
    engine = Engine(plan, [0, 1], 3, digits, store, listener())
    engine.run()
    return engine, rows(engine)


def test_report_is_complete_and_self_contained(found, tmp_path, digits):
    engine, table_rows = found
    written = write(tmp_path, table_rows, about(engine, digits, TASKS["digits-mlp"]))
    names = {path.name for path in written}
    assert {"results.csv", "index.html", "curves.png", "quality.png", "cost.png", "rates.png",
            "sensitivity.png"} == names  # fmt: skip
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written[1:-1])
    page = (tmp_path / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 5
    for word in ("digits of scikit-learn", "1,257 training", "seeds", "threads", "torch", "device"):
        assert word in page
    for row in table_rows:
        assert row.setting.method in page
    assert "adagrad_full (batch 32" in page  # the row that failed says why
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)


def test_plots_that_no_longer_apply_are_removed(found, tmp_path):
    _, table_rows = found
    (tmp_path / "sensitivity.png").write_bytes(b"of an earlier plan")
    one = [r for r in table_rows if r.setting.batch_size == 32 and r.setting.interval in (None, 1)]
    names = {path.name for path in write(tmp_path, one, {})}
    assert "sensitivity.png" not in names
    assert not (tmp_path / "sensitivity.png").exists()


def test_the_first_sentences_say_who_is_first_by_steps_and_by_seconds():
    def run(seconds, losses):
        curve = {"step": [10, 20, 30], "seconds": [seconds * i for i in (1, 2, 3)], "loss": losses}
        return {"status": "ok", "curve": curve}

    def row(method, seconds, losses, time_ratio):
        setting = Setting("digits-mlp", method, 32, None, 30, "cpu", 1)
        cost, figure = {"time_ratio": time_ratio}, Figure(0.9, 0.0)
        runs = [run(seconds, losses), run(seconds, losses)]
        return Row(setting, "ok", runs=runs, accuracy=figure, loss=figure, cost=cost)

    found = [
        row("kfac", 3.0, [0.5, 0.1, 0.1], 3.0),
        row("adam", 1.1, [2.0, 1.2, 1.0], 1.1),
        row("sgd", 1.0, [2.0, 1.5, 1.0], 1.0),
        row("adagrad", 0.5, [2.0, 1.5, 1.4], 0.5),
    ]
    text = lead(found)
    assert "final training loss of SGD (1 nats after 30 steps and 3 s)" in text
    assert "fewest steps by <strong>kfac</strong> (10 steps, 3 s)" in text
    assert "fewest seconds by <strong>kfac</strong>" in text
    slow = lead([row("kfac", 4.0, [0.5, 0.1, 0.1], 4.0), *found[1:]])
    assert "fewest seconds by <strong>sgd</strong> (30 steps, 3 s)" in slow
    assert lead(found[:2]).count("fewest") == 0
    assert "times as long as one of SGD" not in lead([found[2], *found[:2]])


def test_report_of_nothing_but_failures(found, tmp_path):
    _, table_rows = found
    failed = [row for row in table_rows if row.status == "failed"]
    written = write(tmp_path, failed, {})
    assert [path.name for path in written] == ["results.csv", "index.html"]
    assert "No method finished" in (tmp_path / "index.html").read_text()


def test_csv_has_a_line_a_row(found):
    _, table_rows = found
    lines = list(csv.DictReader(io.StringIO(to_csv(table_rows))))
    assert [line["method"] for line in lines] == [row.setting.method for row in table_rows]
    sgd = next(line for line in lines if line["method"] == "sgd")
    assert sgd["memory_ratio"] == "1.0"
    assert 0 <= float(sgd["test_accuracy_mean"]) <= 1
    assert lines[-1]["status"] == "failed"
    assert lines[-1]["test_accuracy_mean"] == ""


def test_table_is_readable(found):
    _, table_rows = found
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(table_rows, "title"))
    text = console.export_text()
    assert "±" in text
    assert "adagrad_full (batch 32, interval 1) failed:" in text
    assert len(reasons(table_rows)) >= 4


def test_narrow_table_keeps_every_figure_whole(found):
    _, table_rows = found
    alike = [row for row in table_rows if row.setting.batch_size == 32]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(alike, "title", 80))
    text = console.export_text()
    assert "batch 32" in text
    assert "…" not in text


def test_rows_are_best_first(found):
    _, table_rows = found
    figures = [row.metric.mean for row in table_rows if row.metric]
    assert figures == sorted(figures, reverse=True)
    assert [row.metric is None for row in table_rows] == sorted(
        row.metric is None for row in table_rows
    )


def test_figures():
    assert Figure.of([1.0, 3.0]) == Figure(2.0, pytest.approx(2**0.5))
    assert Figure.of([1.0]) == Figure(1.0, None)


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.004, "1.00×"), (9.96, "10.0×"), (99.6, "100×"), (None, "–")]
)
def test_ratios(ratio, text):
    assert times(ratio) == text


def test_unfinished_row_has_no_figures(found):
    _, table_rows = found
    row = Row(table_rows[0].setting, "unfinished", "not run yet")
    assert row.metric is None
    assert row.record()["status"] == "unfinished"
