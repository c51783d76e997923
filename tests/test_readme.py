"""README, CONTRIBUTING and the tutorials tell the truth: their code runs, tables are generated."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.curvature import quadratic_form
from funcprecond.losses import logistic
from funcprecond.methods.card import CARDS
from funcprecond.methods.table import table
from tests.equality import assert_close, assert_same, finite
from tests.problems import initialised, normal, seeded

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING = ((ROOT / f"{name}.md").read_text() for name in ("README", "CONTRIBUTING"))
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_code_runs_from_top_to_bottom():
    assert len(BLOCKS) > 1
    namespace = {}
    exec("\n".join(BLOCKS), namespace)
    assert namespace["evidence"].loss.shape == (3,)


def test_a_run_is_saved_and_loaded_as_described(tmp_path):
    saved, loaded = re.findall(r"`(fp\.(?:save|load)\(path, tree\))`", README)
    tree = re.search(r"the tree is\s+`(\{.*?\})`", README)
    assert tree is not None
    names = {"path": tmp_path / "run.pt", "fp": fp}
    exec(BLOCKS[0], names)
    exec(f"tree = {tree[1]}\n{saved}\ntree_again = {loaded}", names)
    assert_same(names["tree_again"], names["tree"])


def test_the_number_of_methods_is_that_of_the_table():
    first = README.split("```")[0]
    named = [k for k in ("K-FAC", "Shampoo", "CASPR", "SOAP", "Hessian-free") if k in first]
    assert f"{len(CARDS) - len(named)} other methods" in first


def test_pages_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_loop_trains_a_model_with_buffers():
    # The inputs are far from zero, so that BatchNorm's first averages ruin the evaluation.
    inputs = normal((512, 8), dtype=torch.float32) * 3 + 5
    targets = (inputs[:, 0] > 5).long() + (inputs[:, 1] > 5).long()
    order = torch.cat([torch.randperm(512, generator=seeded(i)) for i in range(25)])
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    given = {
        "model": initialised(model, dtype=torch.float32),
        "loader": [(inputs[i], targets[i]) for i in order.split(64)],
    }
    loop, replaced = re.subn(r"^(?:model|loader) = .*\n", "", BLOCKS[0], flags=re.M)
    assert replaced == 2, "the first block makes its model and its loader in one line each"
    exec(loop, given)
    model.eval()
    problem, params, buffers = given["problem"], given["params"], given["buffers"]
    accuracy = (problem(params, inputs, buffers).argmax(1) == targets).float().mean()
    forgotten = (problem(params, inputs).argmax(1) == targets).float().mean()
    assert accuracy > 0.9 > 0.6 > forgotten


def test_the_recipes_for_contributors_run(monkeypatch):
    # The real decorator would add the example to the table of methods.
    monkeypatch.setattr("funcprecond.methods.card.card", lambda *_, **__: lambda build: build)
    composed, written, _line, a_loss, a_need = re.findall(
        r"```python\n(.*?)```", CONTRIBUTING, re.S
    )
    names: list[dict[str, Any]] = [{"__name__": "recipe"} for _ in range(2)]
    names += [vars(module) | {"__name__": "recipe"} for module in (logistic, quadratic_form)]
    for code, scope in zip((composed, written, a_loss, a_need), names, strict=True):
        exec(code, scope)
    methods = [scope["name"]() for scope in names[:2]]
    loss, need = names[2]["Binomial"](), names[3]["GradientNorm"]()
    problem = fp.problem(initialised(nn.Linear(3, 2)), loss)
    batch = normal((5, 3)), (normal((5, 2), 1) > 0).double()
    needs = [need, *(one for opt in methods for one in opt.needs(0))]
    evidence = fp.observe(problem, problem.params, batch, needs, generator=seeded(0))
    expected = nn.functional.binary_cross_entropy_with_logits(
        problem(problem.params, batch[0]), batch[1]
    )
    assert_close(evidence.loss, expected)
    assert_close(evidence[need], sum((g**2).sum() for g in evidence.grads.values()))
    for opt in methods:
        _, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
        assert finite(direction)


@pytest.mark.parametrize(("marker", "works"), [("methods", True), ("planned", False)])
def test_the_tables_are_the_generated_ones(marker, works):
    shown = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", README, re.S)
    assert shown is not None, "the markers of the table are gone"
    expected = table(works=works)
    assert shown[1] == expected, "run: python -m funcprecond list-methods, and paste its output"


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda p: p.stem)
def test_tutorials_run_and_their_assertions_hold(path):
    runpy.run_path(str(path), run_name="__main__")
