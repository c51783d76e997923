"""Products of every operator compile to one graph."""

import pytest
import torch

import funcprecond as fp
from funcprecond.operators import algebra
from tests import problems
from tests.equality import assert_close
from tests.problems import seeded

TOY = problems.mlp()
V = {k: torch.ones_like(p) for k, p in TOY.params.items()}
SIZE = sum(p.numel() for p in V.values())
OPERATORS = {
    "hessian": lambda p: fp.Hessian(TOY.problem, p, TOY.batch),
    "ggn": lambda p: fp.GGN(TOY.problem, p, TOY.batch),
    "fisher": lambda p: fp.Fisher(TOY.problem, p, TOY.batch),
    "empirical fisher": lambda p: fp.Fisher(TOY.problem, p, TOY.batch, labels="empirical"),
    "sum": lambda p: 2 * fp.GGN(TOY.problem, p, TOY.batch) + 0.1,
    "block": lambda p: fp.GGN(TOY.problem, p, TOY.batch).blocks("tensor"),
    "matrix": lambda p: algebra.Matrix(torch.eye(SIZE, dtype=torch.float64), p),
    "product": lambda p: algebra.Identity(p, 2.0).__matmul__(algebra.Identity(p, 3.0)),
    "function": lambda p: algebra.Function(lambda v: v, p),
    "diagonal": lambda p: fp.operators.DiagonalMatrix(p, p),
}
pytestmark = pytest.mark.compile


def check(function, backend):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_close(compiled(TOY.params, V), function(TOY.params, V), rtol=1e-9)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_product_is_one_graph(name):
    check(lambda p, v: OPERATORS[name](p).matvec(v), "aot_eager")


@pytest.mark.parametrize("name", ["ggn", "empirical fisher"])
def test_a_product_is_one_graph_of_the_default_compiler(name):
    check(lambda p, v: OPERATORS[name](p).matvec(v), "inductor")


def test_a_stack_and_an_operator_from_outside_of_the_graph():
    kfac = fp.KroneckerFactored(TOY.problem, TOY.params, TOY.batch, generator=seeded(0))
    inverse = kfac.inverse(0.1)
    check(lambda p, v: inverse.matvec(v), "aot_eager")
    stack = {k: torch.stack([v, 2 * v]) for k, v in V.items()}
    check(lambda p, v: fp.GGN(TOY.problem, p, TOY.batch).matmat(stack), "aot_eager")


@pytest.mark.parametrize("matrix", [torch.float32, torch.float64])
@pytest.mark.parametrize("vector", [torch.float32, torch.float64])
def test_a_matrix_returns_the_dtype_of_the_vector(matrix, vector):
    like = {"a": torch.zeros(2, dtype=vector), "b": torch.zeros(1, dtype=vector)}
    a = algebra.Matrix(torch.full((3, 3), 2.0, dtype=matrix), like)
    ones = {k: torch.ones_like(p) for k, p in like.items()}
    for found in (a.matvec(ones), a @ ones, a.diagonal()):
        assert all(x.dtype == vector for x in found.values())
    assert_close(a @ ones, {"a": 6 * ones["a"], "b": 6 * ones["b"]})
