"""Saved after k steps and loaded in a new process, a run goes on bit for bit."""

import pathlib
import subprocess
import sys

import pytest
import torch

import funcprecond as fp
from funcprecond.methods.card import CARDS
from tests import problems
from tests.conformance.methods import METHODS, every_method, intervals
from tests.conformance.resume import SAVED, STEPS
from tests.equality import assert_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of all methods, and what another process made of them."""
    folder = tmp_path_factory.mktemp("runs")
    for name in METHODS.keys() & CARDS.keys():
        toy, opt = problems.mlp(), intervals(name)
        try:
            params, state, _ = problems.train(toy, opt, SAVED)
            fp.save(folder / f"{name}.saved", {"params": params, "state": state})
        except Exception:
            continue
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "tests.conformance.resume", folder], check=True, cwd=root)
    return folder


@every_method
def test_a_run_resumed_in_a_new_process_goes_on_bit_for_bit(name, folder):
    toy, opt = problems.mlp(), intervals(name)
    params, state, _ = problems.train(toy, opt, STEPS)
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    resumed = torch.load(folder / f"{name}.resumed", weights_only=True)
    assert_same(resumed, fp.to_dict({"params": params, "state": state}))
