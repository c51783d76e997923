"""The results file: nothing finished is lost, nothing damaged is overwritten."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from funcprecond.compare.progress import outcome
from funcprecond.compare.results import is_complete, points
from funcprecond.compare.store import Store, StoreError, exclusive, key, parse, replace_file

CONFIG = {"kind": "train", "method": "sgd", "learning_rate": 0.1, "seed": 0, "steps": 4}
RESULT = {"status": "diverged", "why": "the loss was not finite", "seconds": 1.5}


def test_what_was_put_is_there_for_the_next_process(tmp_path):
    Store(tmp_path, pytest.fail).put(CONFIG, RESULT)
    assert Store(tmp_path, pytest.fail).get(CONFIG) == RESULT
    assert Store(tmp_path, pytest.fail).get({**CONFIG, "seed": 1}) is None


def test_variants_of_a_cell_are_found_by_what_differs(tmp_path):
    store = Store(tmp_path, pytest.fail)
    common = {"kind": "train", "method": "sgd"}
    for seed, exponent in ((0, -1), (0, 2), (1, 2)):
        store.put({**common, "seed": seed, "exponent": exponent}, {"seconds": seed + exponent})
    store.put({**common, "method": "adam", "seed": 0, "exponent": 3}, {"seconds": 9})
    store.put({**common, "seed": 0, "exponent": 4, "more": 1}, {"seconds": 9})
    found = store.variants({**common, "seed": 0}, "exponent")
    assert found == {(-1,): {"seconds": -1}, (2,): {"seconds": 2}}
    found = store.variants(common, "seed", "exponent")
    assert found == {(0, -1): {"seconds": -1}, (0, 2): {"seconds": 2}, (1, 2): {"seconds": 3}}


def test_a_result_is_returned_as_it_is_stored(tmp_path):
    store = Store(tmp_path, pytest.fail)
    assert store.put(CONFIG, {"loss": (1.0, float("nan"))}) == {"loss": [1.0, None]}


def test_key_depends_on_every_entry_and_not_on_their_order():
    assert key(CONFIG) == key(dict(reversed(CONFIG.items())))
    assert len({key({**CONFIG, name: "other"}) for name in (*CONFIG, "new")} | {key(CONFIG)}) == 7


def test_numbers_that_json_lacks_become_null(tmp_path):
    store = Store(tmp_path, pytest.fail)
    store.put(CONFIG, {"status": "diverged", "curve": {"loss": [2.3, float("inf"), float("nan")]}})
    text = store.path.read_text()
    cells = json.loads(text, parse_constant=pytest.fail)["cells"]
    assert cells[key(CONFIG)]["result"]["curve"]["loss"] == [2.3, None, None]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b'{"schema": 1, "cells": {"a": {"conf', "not JSON"),
        (b"\xff\xfe\x00garbage", "not JSON"),
        (b"[]", "cells"),
        (b'{"schema": 99, "cells": {}}', "schema 99"),
        (b'{"schema": 1, "cells": {"a": {"config": {}, "result": 3}}}', "1 cells"),
    ],
)
def test_damaged_file_is_named_and_set_aside(tmp_path, content, word):
    (tmp_path / "results.json").write_bytes(content)
    (tmp_path / "results.damaged-1.json").write_text("an earlier one")
    said = []
    store = Store(tmp_path, said.append)
    (sentence,) = said
    assert "results.json" in sentence
    assert "results.damaged-2.json" in sentence
    assert word in sentence
    assert (tmp_path / "results.damaged-2.json").read_bytes() == content
    assert (tmp_path / "results.damaged-1.json").read_text() == "an earlier one"
    store.put(CONFIG, RESULT)
    assert Store(tmp_path, pytest.fail).get(CONFIG) == RESULT


def test_good_cells_of_a_damaged_file_are_kept(tmp_path):
    store = Store(tmp_path, pytest.fail)
    store.put(CONFIG, RESULT)
    document = json.loads(store.path.read_text())
    document["cells"]["0" * 20] = {"config": {"kind": "cost"}, "result": {"status": "ok"}}
    store.path.write_text(json.dumps(document))
    said = []
    store = Store(tmp_path, said.append)
    assert store.get(CONFIG) == RESULT
    assert "1 of its cells can be read and are kept" in said[0]


POINT = {"accuracy": 0.5, "loss": 1.5}
CURVE = {"step": [1, 2, 3, 4], "seconds": [0.1, 0.2, 0.3, 0.4], "loss": [4.0, 3.0, 2.0, 1.0]}
COST = {"step_ms": 1.0, "sgd_step_ms": 1.0, "time_ratio": 1.0}
GOOD = [
    (CONFIG, {"status": "ok", "validation": POINT, "test": POINT, "curve": CURVE, "seconds": 0.4}),
    ({"kind": "cost"}, {"status": "ok", **COST, "memory_ratio": None, "warnings": ["a"]}),
    ({"kind": "cost"}, {"status": "failed", "why": "too large"}),
]
WRONG = [0, 1, True, -3, None, "text", [], {}, [1], ["x"], {"loss": 1}, float("nan"), float("inf")]


def entries(value, path=()):
    """The paths of all entries of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, entry in items:
        yield (*path, name)
        if isinstance(entry, (dict, list)):
            yield from entries(entry, (*path, name))


def with_entry(value, path, new):
    value = copy.deepcopy(value)
    place = value
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = new
    return value


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_cell_with_an_entry_of_another_type_is_a_damaged_cell(tmp_path, wrong):
    """Whatever is kept can be shown: what was replaced had the same type."""
    for number, (config, result) in enumerate(GOOD):
        for at in entries(result):
            document = {key(config): {"config": config, "result": with_entry(result, at, wrong)}}
            content = json.dumps({"schema": 1, "cells": document}).encode()
            cells, fault = parse(content)
            if not cells:
                assert "1 cells are incomplete or changed" in fault
                continue
            (cell,) = cells.values()
            kept = cell["result"]
            if kept["status"] == "ok" and number == 0:
                assert kept["curve"]["step"] == [1, 2, 3, 4]
                assert all(0 * kept[s][k] == 0 for s in ("validation", "test") for k in POINT)
                assert all(0 * x == 0 for x in kept["curve"]["loss"] + kept["curve"]["seconds"])
            elif kept["status"] == "ok":
                assert all(kept[k] > 0 for k in COST)
            outcome(kept)


def test_missing_entries_are_damage():
    for config, result in GOOD:
        assert is_complete(config, result)
        for name in result.keys() - {"seconds", "warnings", "memory_ratio"}:
            assert not is_complete(config, {k: x for k, x in result.items() if k != name})
    short = {**CURVE, "loss": CURVE["loss"][:-1]}
    assert not is_complete(CONFIG, {**GOOD[0][1], "curve": short})
    assert not is_complete({**CONFIG, "seed": [1]}, GOOD[0][1])
    assert not is_complete({"kind": "cost"}, {**GOOD[2][1], "why": "\ud800"})


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"schema": 1, "cells": {"a": NaN}}', b'{"schema": 1, "cells": [1, 2]}'],
)
def test_odd_json_is_damage(content):
    cells, fault = parse(content)
    assert not cells
    assert fault


def test_a_full_disk_is_a_sentence_and_keeps_what_is_stored(tmp_path, monkeypatch):
    store = Store(tmp_path, pytest.fail)
    store.put(CONFIG, RESULT)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"results.json: No space left on device\. Make room"):
            store.put({**CONFIG, "seed": 1}, RESULT)
    assert Store(tmp_path, pytest.fail).get(CONFIG) == RESULT
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_damaged_file_that_cannot_be_renamed_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        Store(tmp_path, print)


@pytest.mark.parametrize("steps", [1, 2, 29, 30, 31, 59, 150, 1000])
def test_a_curve_has_points_at_regular_steps_and_at_the_last(steps):
    found = points(steps)
    assert found[-1] == steps
    assert 1 <= len(found) <= 60
    assert len(set(numpy.diff([0, *found[:-1]]))) <= 1
    assert points(10**9)[-1] == 10**9


def test_parse_accepts_its_own_file(tmp_path):
    store = Store(tmp_path, pytest.fail)
    store.put(CONFIG, RESULT)
    cells, fault = parse(store.path.read_bytes())
    assert not fault
    assert list(cells) == [key(CONFIG)]


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    replace_file(path, "old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another --out"):
        Store(tmp_path / "file" / "report", pytest.fail)
    with pytest.raises(StoreError, match="choose another --out"), exclusive(tmp_path / "file"):
        pass


def test_second_comparison_on_one_folder_is_refused(tmp_path):
    (tmp_path / ".results.json-orphan").write_text("half a fi")
    with exclusive(tmp_path):
        assert not (tmp_path / ".results.json-orphan").exists()
        with pytest.raises(StoreError, match="Another comparison"), exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass


WRITER = """
import sys
from pathlib import Path
from funcprecond.compare.store import Store
store = Store(Path(sys.argv[1]), sys.exit)
for number in range(100_000):
    store.put({"number": number}, {"status": "ok", "filler": "x" * 20_000})
    print(number, flush=True)
"""


def test_killed_while_writing_loses_no_finished_cell(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(12):
        process.stdout.readline()
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    confirmed = 11 + len(process.stdout.read().split())
    process.wait()
    process.stdout.close()
    store = Store(tmp_path, pytest.fail)
    assert all(store.get({"number": number}) for number in range(confirmed + 1))
