"""The README tells the truth: its code runs, its table is the generated one."""

import re
import runpy
from pathlib import Path

import pytest

from funcprecond.methods.table import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) > 1
    namespace = {}
    exec("\n".join(blocks), namespace)
    assert namespace["evidence"].loss.shape == (3,)


@pytest.mark.parametrize(("marker", "works"), [("methods", True), ("planned", False)])
def test_the_tables_are_the_generated_ones(marker, works):
    shown = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", README, re.S)
    assert shown is not None, "the markers of the table are gone"
    expected = table(works=works)
    assert shown[1] == expected, "run: python -m funcprecond list-methods, and paste its output"


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda p: p.stem)
def test_tutorials_run_and_their_assertions_hold(path):
    runpy.run_path(str(path), run_name="__main__")
