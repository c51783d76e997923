"""``python -m tests.conformance.resume folder``: go on from the checkpoints in a folder.

The other half of ``test_resume.py``, run in a process of its own.
"""

import pathlib
import sys
import traceback

import torch

import funcprecond as fp
from funcprecond.methods.card import CARDS
from tests import problems
from tests.conformance.methods import METHODS, intervals

SAVED, STEPS = 3, 6


def main(folder: pathlib.Path) -> None:
    torch.set_num_threads(1)
    for name in METHODS.keys() & CARDS.keys():
        try:
            toy, opt = problems.mlp(), intervals(name)
            like = {"params": toy.params, "state": opt.init(toy.params)}
            run = fp.load(folder / f"{name}.saved", like)
            params, state, _ = problems.train(toy, opt, STEPS, **run, start=SAVED)
            fp.save(folder / f"{name}.resumed", {"params": params, "state": state})
        except Exception:
            (folder / f"{name}.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
