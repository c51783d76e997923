"""The page docs/zoo.md of a run's results: ``python -m tests.zoo.table RESULTS``."""

import importlib.metadata
import json
import pathlib
import re
import sys
from collections import Counter
from typing import Any

from funcprecond.methods.card import CARDS
from tests.zoo import other_models, torch_models, transformers_models, vision_models  # noqa: F401
from tests.zoo.checks import CHECKS
from tests.zoo.model import ZOO

HEAD = """# The zoo

Models that people have, as small random configurations of their own classes ({packages}), each held
against plain torch. `make test-zoo` makes the environment, runs `tests/zoo`, and writes this page.

* **layers**: the parameters with the block of a layer, of all parameters. For the others K-FAC
  keeps a diagonal; *outside* says which function uses them, and how many.
* **methods**: of the {methods} methods, how many take three steps in training mode, with finite
  values and a sane loss. All others refuse the model with a sentence, below the table.
* **examples**: per-sample gradients are those of a loop over single examples, by plain autograd.
* **GGN**: `fp.GGN(...).trace()` and a product are those of the dense `Jᵀ H J`.
* **Hessian**: the gradient is that of plain autograd, and the products of `fp.Hessian` and `fp.hvp`
  are central differences of it.
* **step**: the time of a step of `fp.kfac(every=1, refresh_every=10)` in steps of `fp.sgd`, on one
  thread. These models are so small that it counts calls more than arithmetic;
  [the benchmarks](../tests/benchmarks/RESULTS.md) have larger ones.

The checks run in float64 where the model can, at random parameters and in evaluation mode. A number
is a footnote.
"""


def read(folder: str) -> dict[str, dict[str, Any]]:
    """The cells by model and check."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(pathlib.Path(folder).glob("*.json")):
        cell = json.loads(file.read_text())
        found.setdefault(cell["name"], {})[cell["check"]] = cell["value"]
    return found


class Notes:
    """Sentences, numbered in the order of their first use."""

    def __init__(self):
        self.sentences: list[str] = []

    def mark(self, sentence: str) -> str:
        # An address in memory is another in each run.
        sentence = re.sub(r" at 0x[0-9a-f]+", "", " ".join(sentence.split()))
        if sentence not in self.sentences:
            self.sentences.append(sentence)
        return f"<sup>{self.sentences.index(sentence) + 1}</sup>"


def row(name: str, cells: dict[str, Any], notes: Notes) -> list[str]:
    """The cells of one line of the table."""
    found = [name]
    for check in CHECKS:
        value: Any = cells.get(check, {"fault": "not run"})
        if isinstance(value, dict) and "fault" in value:
            found += ["wrong" + notes.mark(value["fault"])] * (3 if check == "layers" else 1)
        elif check == "layers":
            outside = ", ".join(f"`{k}` {n}" for k, n in Counter(value["diagonal"]).most_common())
            found += [
                f"{value['parameters']:,}",
                f"{value['recognised']} of {value['of']}",
                outside,
            ]
        elif check == "methods":
            names: dict[str, list[str]] = {}
            for method, sentence in value.items():
                names.setdefault(sentence, []).append(f"`{method}`")
            marks = [notes.mark(f"{', '.join(k)}: {sentence}") for sentence, k in names.items()]
            found.append(f"{len(CARDS) - len(value)}{''.join(marks)}")
        elif value.startswith("refused: "):
            found.append("refused" + notes.mark(value.removeprefix("refused: ")))
        else:
            found.append(value)
    time = cells.get("cost")
    return [*found, f"{time:.1f}" if isinstance(time, float) else ""]


def write(results: dict[str, dict[str, Any]]) -> str:
    packages = []
    for package in dict.fromkeys(package for package, _ in ZOO.values()):
        packages.append(f"{package} {importlib.metadata.version(package.replace('_', '-'))}")
    lines = [HEAD.format(packages=", ".join(packages), methods=len(CARDS))]
    heads = ["model", "parameters", "layers", "outside", "methods", "examples", "GGN", "Hessian"]
    lines += ["| " + " | ".join([*heads, "step"]) + " |", "|---" * 9 + "|"]
    notes = Notes()
    lines += ["| " + " | ".join(row(name, results.get(name, {}), notes)) + " |" for name in ZOO]
    lines += ["", "## What is refused", ""]
    lines += [f"{i}. {sentence}" for i, sentence in enumerate(notes.sentences, 1)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(write(read(sys.argv[1])))
