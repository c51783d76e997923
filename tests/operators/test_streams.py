"""A streamed operator is one matrix: passes that would give another one are refused."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import funcprecond as fp
from tests import reference
from tests.equality import assert_close
from tests.problems import normal, seeded


def loader(**options):
    data = TensorDataset(normal((12, 4), 0), torch.arange(12) % 2)
    return DataLoader(data, batch_size=options.pop("batch_size", 3), **options)


def problem(middle=None):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 3), middle or torch.nn.Tanh(), torch.nn.Linear(3, 2)]
    return fp.problem(torch.nn.Sequential(*layers).double(), fp.losses.cross_entropy)


def twice(operator):
    v = {k: torch.ones_like(p) for k, p in operator.like.items()}
    return operator @ v, operator @ v


CASES = {
    "sampled labels": (None, fp.Fisher, {"labels": "mc", "generator": True}),
    "dropout": (torch.nn.Dropout(0.5), fp.GGN, {"generator": True}),
    "dropout, Hessian": (torch.nn.Dropout(0.5), fp.Hessian, {"generator": True}),
    "batch norm": (torch.nn.BatchNorm1d(3), fp.GGN, {}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_depends_on_the_order_refuses_a_shuffled_loader_and_repeats_a_fixed_one(case):
    middle, kind, options = CASES[case]
    p = problem(middle)
    options = options | ({"generator": seeded(0)} if options.pop("generator", False) else {})
    first, second = twice(kind(p, p.params, batches=loader(), **options))
    assert_close(first, second, rtol=1e-12)
    options |= {"generator": seeded(0)} if "generator" in options else {}
    with pytest.raises(ValueError, match=r"another matrix at each product.*list\(loader\)"):
        twice(kind(p, p.params, batches=loader(shuffle=True), **options))


@pytest.mark.parametrize("kind", [fp.GGN, fp.Hessian, fp.Fisher])
def test_a_shuffled_loader_of_independent_examples_is_one_matrix(kind):
    p = problem()
    first, second = twice(kind(p, p.params, batches=loader(shuffle=True)))
    assert_close(first, second, rtol=1e-9)
    assert_close(first, twice(kind(p, p.params, batches=loader()))[0], rtol=1e-9)


def test_data_that_are_not_the_same_are_refused():
    p = problem()
    for batches in (loader(shuffle=True, batch_size=5, drop_last=True), Noisy()):
        with pytest.raises(ValueError, match="the data are not the same"):
            twice(fp.GGN(p, p.params, batches=batches))


class Noisy:
    """Batches with an augmentation that is drawn anew in each pass."""

    def __iter__(self):
        return iter([(torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 1]))])


def test_eigenvalues_of_a_stream_are_those_of_its_matrix():
    p = problem(torch.nn.BatchNorm1d(3))
    operator = fp.GGN(p, p.params, batches=loader())
    found = fp.eigsh(operator, 2, generator=seeded(0), tol=1e-9)
    assert_close(found.values, torch.linalg.eigvalsh(operator.to_dense())[-2:].flip(0), rtol=1e-7)
    with pytest.raises(ValueError, match="the model couples the examples"):
        fp.eigsh(fp.GGN(p, p.params, batches=loader(shuffle=True)), 2, generator=seeded(0))


def test_a_whole_batch_and_its_stream_agree():
    p = problem()
    whole = next(iter(loader(batch_size=12)))
    streamed = fp.GGN(p, p.params, batches=loader()).to_dense()
    assert_close(streamed, reference.ggn(p, p.params, whole), rtol=1e-9)
