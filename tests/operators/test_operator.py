import numpy as np
import pytest
import torch

import funcprecond as fp
from funcprecond.linalg.solution import NotConverged, Stop
from funcprecond.operators.algebra import Function, Identity, Matrix
from funcprecond.operators.vector_stacks import by_layer
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same, copy
from tests.problems import normal

LIKE = {"a.weight": normal((2, 3)), "a.bias": normal((2,), 1), "b": normal((), 2)}
SIZE = 9


def symmetric(seed: int = 0) -> torch.Tensor:
    a = normal((SIZE, SIZE), seed)
    return a + a.T


def operators(seed: int = 0):
    """A matrix, and operators that know it only by products or by their parts."""
    m = symmetric(seed)
    whole = Matrix(m, LIKE)
    yield m, whole
    yield m, Function(whole.matvec, LIKE)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_algebra_is_that_of_the_dense_matrices(kind):
    m, a = list(operators(0))[kind]
    n, b = list(operators(1))[kind]
    eye, v = reference.eye(SIZE), normal((SIZE,), 5)
    vector, rows = reference.unravel(v, LIKE), normal((3, SIZE), 6)
    cases = {
        "sum": (a + b, m + n),
        "difference": (a - b, m - n),
        "damped": (a + 0.5, m + 0.5 * eye),
        "damped by a tensor": (torch.tensor(0.5) + a, m + 0.5 * eye),
        "multiple": (2 * a, 2 * m),
        "multiple of a tensor": (a * torch.tensor(2.0), 2 * m),
        "quotient": (a / 4, m / 4),
        "negative": (-a, -m),
        "product": (a @ b, m @ n),
        "polynomial": ((a @ b + 1.0) @ a - 3 * b, (m @ n + eye) @ m - 3 * n),
    }
    for name, (operator, dense) in cases.items():
        assert_close(operator.to_dense(), dense, rtol=1e-12)
        assert_close(reference.ravel(operator @ vector), dense @ v, rtol=1e-12)
        assert_close(reference.ravel(operator.diagonal()), dense.diagonal(), rtol=1e-11, atol=1e-12)
        forms = (rows @ dense * rows).sum(1)
        for chunk_size in (None, 2):
            assert_close(operator.quadratic_forms(_split(rows), chunk_size), forms, rtol=1e-11)
        assert_close(operator.trace(), dense.trace(), rtol=1e-11, atol=1e-11)
        assert_close(operator.frobenius_norm(), dense.norm(), rtol=1e-12)
        assert_close(operator.transposed.to_dense(), dense.T, rtol=1e-12)
        assert operator.symmetric == (name not in ("product", "polynomial"))


def test_a_stack_is_multiplied_column_by_column_whatever_the_chunk():
    m, a = next(iter(operators()))
    rows = normal((5, SIZE), 3)
    columns = _split(rows)
    product = a @ columns
    assert_close(torch.cat([p.reshape(5, -1) for p in product.values()], 1), rows @ m, rtol=1e-12)
    for chunk_size in (1, 2, 5):
        assert_close(a.matmat(columns, chunk_size), product, rtol=1e-13)


def _split(rows):
    parts = rows.split([p.numel() for p in LIKE.values()], 1)
    return {k: x.reshape(-1, *LIKE[k].shape) for k, x in zip(LIKE, parts, strict=True)}


@pytest.mark.parametrize("kind", [0, 1])
def test_blocks_are_the_matrixs_own(kind):
    m, a = list(operators())[kind]
    operator = a + 0.5
    m = m + 0.5 * reference.eye(SIZE)
    assert_close(operator.block(["a.weight", "a.bias"]).to_dense(), m[:8, :8], rtol=1e-12)
    parts = operator.blocks("layer").parts
    assert {k: list(p.like) for k, p in parts.items()} == {"a": ["a.weight", "a.bias"], "b": ["b"]}
    for by, expected in {
        "layer": torch.block_diag(m[:8, :8], m[8:, 8:]),
        "tensor": torch.block_diag(m[:6, :6], m[6:8, 6:8], m[8:, 8:]),
    }.items():
        blocks = operator.blocks(by)
        assert_close(blocks.to_dense(), expected, rtol=1e-12)
        v = normal((SIZE,), 3)
        assert_close(reference.ravel(blocks @ reference.unravel(v, LIKE)), expected @ v, rtol=1e-12)
        assert_close(blocks.frobenius_norm(), expected.norm(), rtol=1e-12)
    halves = operator.blocks({"x": ["b"], "y": ["a.bias", "a.weight"]})
    assert list(halves.parts) == ["x", "y"]


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ({"x": ["b"]}, r"missing: \['a.bias', 'a.weight'\]"),
        ({"x": ["b", "b", "a.weight", "a.bias"]}, r"repeated or unknown: \['b'\]"),
        ({"x": ["b", "c", "a.weight", "a.bias"]}, r"repeated or unknown: \['c'\]"),
        ("module", "must be 'layer'"),
    ],
)
def test_a_partition_must_be_one(by, message):
    with pytest.raises(ValueError, match=message):
        Matrix(symmetric(), LIKE).blocks(by)


def test_layers_are_named_by_their_module():
    names = ["a.weight", "a.bias", "b.c.weight", "scale"]
    assert by_layer(names) == {"a": names[:2], "b.c": names[2:3], "scale": ["scale"]}


def test_vectors_of_other_shapes_or_names_are_refused():
    operator = Matrix(symmetric(), LIKE)
    with pytest.raises(ValueError, match="keys"):
        operator @ {"b": torch.zeros(())}
    with pytest.raises(ValueError, match="neither a vector"):
        operator @ (LIKE | {"a.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="different vectors"):
        operator + Identity({"b": LIKE["b"]})


@pytest.mark.parametrize("names", [[], ["nothing"], ["a.weight"]])
def test_a_block_of_unknown_parameters_is_refused(names):
    matrix = Matrix(symmetric(), LIKE)
    identity = Identity(LIKE)
    for whole in (matrix, identity, matrix + 1.0, 2.0 * matrix, matrix.blocks()):
        # Of a block, what is outside of it is unknown too.
        for operator in (whole.block(["b", "a.bias"]), *[whole] * (names != ["a.weight"])):
            with pytest.raises(ValueError, match="unknown"):
                operator.block(names)


def test_vectors_keep_their_dtype():
    like = {k: p.float() for k, p in LIKE.items()}
    product = Matrix(symmetric().float(), like) @ {k: p.double() for k, p in like.items()}
    assert {p.dtype for p in product.values()} == {torch.float64}


def test_scipy_sees_the_same_matrix():
    from scipy.sparse.linalg import eigsh

    m, a = next(iter(operators()))
    operator = a.to_scipy()
    v = normal((SIZE, 4), 3).numpy()
    assert operator.shape == (SIZE, SIZE)
    assert operator.dtype == np.float64
    np.testing.assert_allclose(operator @ v, m.numpy() @ v, rtol=1e-12)
    np.testing.assert_allclose(operator @ v[:, 0], m.numpy() @ v[:, 0], rtol=1e-12)
    np.testing.assert_allclose(operator @ v[:, :1], m.numpy() @ v[:, :1], rtol=1e-12)
    _, b = next(iter(operators(1)))
    transposed = (a @ b).to_dense().T.numpy()
    np.testing.assert_allclose((a @ b).to_scipy().rmatvec(v[:, 0]), transposed @ v[:, 0])
    expected = torch.linalg.eigvalsh(m)[-1].item()
    assert eigsh(operator, 1, which="LA")[0][0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["cg", "minres", "neumann"])
def test_every_method_solves_and_tells_how(method):
    m = strategies.with_spectrum(torch.linspace(0.2, 1.5, SIZE, dtype=torch.float64), 0)
    b = normal((SIZE,), 4)
    before = copy(reference.unravel(b, LIKE))
    vector = reference.unravel(b, LIKE)
    solution = Matrix(m, LIKE).solve(vector, damping=0.1, method=method, tol=1e-10)
    expected = torch.linalg.solve(m + 0.1 * reference.eye(SIZE), b)
    assert_close(reference.ravel(solution.solution), expected, rtol=1e-8)
    assert int(solution.reason) == Stop.RESIDUAL
    assert 0 < int(solution.iterations) <= 250
    true = b - (m + 0.1 * reference.eye(SIZE)) @ reference.ravel(solution.solution)
    assert_close(reference.ravel(solution.residual), true, atol=1e-9)
    assert_same(vector, before)


def test_what_did_not_converge_is_raised_and_can_be_had():
    operator = Matrix(-reference.eye(SIZE), LIKE)
    with pytest.raises(NotConverged, match="NOT_POSITIVE") as error:
        operator.solve(LIKE)
    assert int(error.value.result.reason) == Stop.NOT_POSITIVE
    assert int(operator.solve(LIKE, throw=False).reason) == Stop.NOT_POSITIVE
    with pytest.raises(NotConverged, match="MAX_ITERATIONS"):
        Matrix(symmetric() @ symmetric(), LIKE).solve(LIKE, max_iter=1)
    with pytest.raises(NotConverged, match="DIVERGED"):
        Matrix(symmetric() * 100, LIKE).solve(LIKE, method="neumann")


def test_products_cannot_be_solved_with_and_methods_must_be_known():
    a = Matrix(symmetric(), LIKE)
    with pytest.raises(TypeError, match="product"):
        (a @ a).solve(LIKE)
    with pytest.raises(ValueError, match="method must be"):
        a.solve(LIKE, method="qr")


def test_a_preconditioner_is_an_operator():
    values = torch.logspace(-4, 0, SIZE, dtype=torch.float64)
    m = strategies.with_spectrum(values, 1)
    b = reference.unravel(normal((SIZE,), 4), LIKE)
    inverse = Matrix(torch.linalg.inv(m), LIKE)
    assert int(Matrix(m, LIKE).solve(b, precondition=inverse).iterations) <= 2
    assert int(Matrix(m, LIKE).solve(b, precondition=inverse.matvec).iterations) <= 2
    assert int(Matrix(m, LIKE).solve(b, precondition=inverse, method="minres").iterations) <= 2


def test_operators_work_inside_of_vmap():
    toy, v = problems.mlp(), normal((31,), 3)
    vector = reference.unravel(v, toy.params)
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def solve(scale):
        params = {k: scale * p for k, p in toy.params.items()}
        return (fp.GGN(toy.problem, params, toy.batch)).solve(vector, damping=1.0, max_iter=40)

    found = torch.vmap(solve)(scales)
    for i, scale in enumerate(scales):
        params = {k: scale * p for k, p in toy.params.items()}
        g = reference.ggn(toy.problem, params, toy.batch) + reference.eye(31)
        x = reference.ravel({k: p[i] for k, p in found.solution.items()})
        assert_close(x, torch.linalg.solve(g, v), rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "option", "hint"),
    [
        ("direct", "max_iter", "'cg'"),
        ("truncated_cg", "precondition", "'cg' or 'minres'"),
        ("cg", "radius", "'truncated_cg'"),
        ("cg", "tolerance", "leave it out$"),
    ],
)
def test_solve_refuses_options_that_its_method_would_ignore(method, option, hint):
    like = {"w": torch.ones(2, dtype=torch.float64)}
    operator = fp.operators.Identity(like)
    with pytest.raises(TypeError, match=f"'{method}' does not take {option}: .*{hint}"):
        operator.solve(like, method=method, damping=0.1, **{option: torch.ones(())})
