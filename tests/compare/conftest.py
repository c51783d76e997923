"""Small comparisons that the tests of this folder share."""

from pathlib import Path

import pytest
import torch

from funcprecond.compare.engine import Engine
from funcprecond.compare.plan import settings
from funcprecond.compare.store import Store
from funcprecond.compare.tasks import TASKS


class Listener:
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.ended, self.plans, self.kept = [], [], 0

    def found(self, cells):
        self.kept = cells

    def plan(self, left, seconds):
        self.plans.append((left, seconds))

    def begin(self, label, expected):
        pass

    def advance(self, fraction):
        assert 0 < fraction <= 1

    def end(self, label, result):
        self.ended.append((label, result))


@pytest.fixture(scope="session")
def digits():
    return TASKS["digits-mlp"].load(torch.device("cpu"))


@pytest.fixture(scope="session")
def listener():
    return Listener


@pytest.fixture
def engine(tmp_path, digits):
    """Makes an engine over the digits MLP with few steps, on a store in `folder`."""

    def make(
        methods=("sgd", "adam"),
        folder: Path = tmp_path,
        seeds=(0, 1),
        batch_sizes=(64,),
        intervals=(2,),
        steps=6,
        points=1,
    ):
        task = TASKS["digits-mlp"]
        rows = settings(task, methods, batch_sizes, intervals, steps, "cpu", 1)
        return Engine(rows, seeds, points, digits, Store(folder, pytest.fail), Listener())

    return make
