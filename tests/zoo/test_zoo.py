"""Models that people have, small and with random weights, against plain torch.

`make test-zoo` makes an environment with all packages, runs this, and writes docs/zoo.md. Without a
package, its models are skipped.
"""

import importlib.util
import itertools
import json
import os
import pathlib

import pytest
import torch

from tests.zoo import other_models, torch_models, transformers_models, vision_models  # noqa: F401
from tests.zoo.checks import CHECKS, cost
from tests.zoo.model import ZOO

# The packages warn of much.
pytestmark = pytest.mark.filterwarnings("ignore")

RESULTS = os.environ.get("ZOO_RESULTS")
HERE = [name for name, (package, _) in ZOO.items() if importlib.util.find_spec(package)]
# Without them, `make test` runs the models of torch alone in fifteen seconds.
LONG = {
    ("nn.TransformerEncoder", "methods"),
    ("U-Net", "methods"),
    ("PINN, torch.func in the model", "methods"),
    ("LSTM cells in a loop", "methods"),
}


def lines():
    for name, check in itertools.product(HERE, CHECKS):
        slow = (name, check) in LONG and not RESULTS
        yield pytest.param(name, check, marks=[pytest.mark.slow] if slow else [])


def record(name: str, check: str, value) -> None:
    """Keep a cell of the table."""
    if RESULTS:
        path = pathlib.Path(RESULTS)
        path.mkdir(parents=True, exist_ok=True)
        file = path / f"{list(ZOO).index(name):03d} {check}.json"
        file.write_text(json.dumps({"name": name, "check": check, "value": value}))


def built(name):
    torch.manual_seed(0)
    return ZOO[name][1]()


@pytest.mark.parametrize("package", sorted({package for package, _ in ZOO.values()}))
def test_the_package_is_there(package):
    pytest.importorskip(package)


@pytest.mark.parametrize(("name", "check"), list(lines()))
def test_zoo(name, check):
    try:
        record(name, check, CHECKS[check](built(name)))
    except Exception as error:
        record(name, check, {"fault": f"{type(error).__name__}: {error}"})
        raise


@pytest.mark.skipif(not RESULTS, reason="no test asserts a time; make test-zoo measures it")
@pytest.mark.parametrize("name", HERE)
def test_cost(name):
    record(name, "cost", cost(built(name)))
