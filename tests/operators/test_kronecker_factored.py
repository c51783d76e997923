import pytest
import torch
from torch import nn

import funcprecond as fp
from funcprecond.operators.operator import Operator
from tests import problems, reference
from tests.autodiff.test_op_table import COUPLED, MODELS, build
from tests.equality import assert_close, assert_same
from tests.operators.test_curvature_matrices import with_loss
from tests.problems import Toy, initialised, normal, seeded

KINDS = ("kfac", "ekfac", "kflr", "foof")
LAYERS = sorted(MODELS.keys() - {*COUPLED, "tied embedding"})


def make(problem, batch, kind="kfac", **options):
    options = {"labels": "exact", "generator": seeded(0)} | options
    return fp.KroneckerFactored(problem, problem.params, batch, kind=kind, **options)


def linear_regression(reduction="mean") -> Toy:
    """One linear layer with squared error: K-FAC is exact."""
    module = initialised(nn.Linear(3, 2))
    batch = (normal((6, 3), 1), normal((6, 2), 2))
    return Toy(fp.problem(module, fp.losses.MSE(reduction)), (batch,))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kflr"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_on_a_linear_model_with_squared_error_it_is_exact(kind, reduction):
    toy = linear_regression(reduction)
    dense = make(toy.problem, toy.batch, kind).to_dense()
    assert_close(dense, reference.ggn(toy.problem, toy.params, toy.batch), rtol=1e-9)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_on_one_example_each_layer_is_exact(kind):
    toy = problems.mlp(examples=1)
    c = make(toy.problem, toy.batch, kind)
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    assert_close(c.to_dense(), ggn.blocks("layer").to_dense(), rtol=1e-8)


@pytest.mark.parametrize("model", LAYERS)
def test_ekfacs_diagonal_in_its_basis_is_the_fisher_matrixs_and_its_trace_is_exact(model):
    """The rotated diagonal of the exact block, so that no other diagonal there is closer."""
    problem, batch = build(model)
    ggn = fp.GGN(problem, problem.params, batch, generator=seeded(0))
    ekfac, kfac = (make(problem, batch, k) for k in ("ekfac", "kfac"))
    for name in ekfac.layers:
        names = [k for k in name.split("+") if k]
        exact = ggn.block(names).to_dense()
        error = {c: (c.block(names).to_dense() - exact).norm() for c in (ekfac, kfac)}
        # Both are exact, up to rounding, for a bias alone.
        assert error[ekfac] <= error[kfac] * (1 + 1e-9) + 1e-12 * exact.norm()
        assert_close(ekfac.block(names).trace(), exact.trace(), rtol=1e-8)


FEW = ("conv", "conv, grouped", "embedding", "layer norm", "group norm", "multi-head attention")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", FEW)
def test_its_verbs_are_those_of_its_dense_matrix(model, kind):
    problem, batch = build(model)
    c = make(problem, batch, kind)
    dense = Operator.to_dense(c)
    assert_close(dense, dense.T, rtol=1e-9)
    v = normal((len(dense),), 1)
    vector = reference.unravel(v, problem.params)
    damped = dense + 0.1 * reference.eye(len(dense))
    assert torch.linalg.eigvalsh(damped)[0] > 0.1 * (1 - 1e-9)
    flat = lambda x: reference.ravel(x)  # noqa: E731
    assert_close(flat(c @ vector), dense @ v, rtol=1e-9)
    assert_close(flat(c.inverse(0.1) @ vector), torch.linalg.solve(damped, v), rtol=1e-8)
    assert_close(flat(c.solve(vector, damping=0.1).solution), torch.linalg.solve(damped, v), 1e-8)
    root = c.power(0.5, 0.1)
    assert_close(flat(root @ (root @ vector)), damped @ v, rtol=1e-8)
    assert_close(c.logdet(0.1), torch.logdet(damped), rtol=1e-8)
    assert_close(flat(c.diagonal()), dense.diagonal(), rtol=1e-9)
    assert_close(c.trace(), dense.trace(), rtol=1e-9)
    assert_close(c.frobenius_norm(), dense.norm(), rtol=1e-9)
    stack = {k: torch.stack([x, -3 * x]) for k, x in vector.items()}
    product = c @ stack
    assert_close(flat({k: x[1] for k, x in product.items()}), -3 * dense @ v, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["cross entropy", "weighted", "mse", "bce"])
@pytest.mark.parametrize("rank", [2, 3])
def test_it_does_not_depend_on_the_split(name, reduction, rank, kind):
    toy = with_loss(name, reduction, rank)
    x, y = toy.batch
    batches = [(x[s], y[s]) for s in (slice(0, 2), slice(2, 7))]
    whole = make(toy.problem, toy.batch, kind)
    split = fp.KroneckerFactored(
        toy.problem, toy.params, batches=batches, kind=kind, labels="exact", generator=seeded(0)
    )
    assert_close(split.to_dense(), whole.to_dense(), rtol=1e-8)


@pytest.mark.parametrize("split", ["pi", "equal"])
def test_factored_damping_is_the_papers(split):
    toy = problems.mlp()
    c = make(toy.problem, toy.batch)
    inverse = c.inverse(0.1, split=split)
    for name, block in c.layers.items():
        left, right = block.left, block.right
        ratio = (right.trace() / len(right)) / (left.trace() / len(left))
        pi = ratio.sqrt() if split == "pi" else 1.0
        expected = [
            torch.linalg.inv(left + 0.1**0.5 / pi * reference.eye(len(left))),
            torch.linalg.inv(right + 0.1**0.5 * pi * reference.eye(len(right))),
        ]
        got = inverse.layers[name]
        assert_close(reference.kron(got.left, got.right), reference.kron(*expected), rtol=1e-9)


def test_it_is_what_the_method_solves_with():
    toy = problems.mlp()
    for split in ("joint", "pi", "equal"):
        options = {"damping_split": split} if split != "joint" else {}
        opt = fp.kfac(damping=0.1, decay=None, labels="empirical", **options)
        evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0))
        _, direction = opt.update(opt.init(toy.params), evidence.grads, evidence)
        c = make(toy.problem, toy.batch, labels="empirical")
        assert_close(c.inverse(0.1, split=split) @ evidence.grads, direction, rtol=1e-8)


def test_foof_is_the_inputs_second_moment():
    toy = problems.mlp()
    c = make(toy.problem, toy.batch, "foof")
    a = torch.cat([toy.batch[0], torch.ones(5, 1, dtype=torch.float64)], 1)
    assert_close(c.layers["0.weight+0.bias"].right, a.T @ a / 5, rtol=1e-12)
    assert_close(c.layers["0.weight+0.bias"].left, reference.eye(4), rtol=1e-15)


def test_it_preconditions_cg():
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    inverse = make(toy.problem, toy.batch).inverse(1e-3)
    b = reference.unravel(normal((31,), 1), toy.params)
    found = ggn.solve(b, damping=1e-3, precondition=inverse, tol=1e-8)
    dense = reference.ggn(toy.problem, toy.params, toy.batch) + 1e-3 * reference.eye(31)
    expected = torch.linalg.solve(dense, reference.ravel(b))
    assert_close(reference.ravel(found.solution), expected, rtol=1e-6)


def test_blocks_are_layers_and_a_part_of_one_works_too():
    toy = problems.mlp()
    c = make(toy.problem, toy.batch)
    dense = c.to_dense()
    parts = c.blocks("layer").parts
    assert_close(parts["0"].to_dense(), dense[:16, :16], rtol=1e-12)
    assert_close(parts["2"].inverse(0.1).to_dense(), c.inverse(0.1).to_dense()[16:, 16:], 1e-10)
    assert_close(c.block(["0.weight"]).to_dense(), dense[:12, :12], rtol=1e-12)


def test_its_factors_are_saved(tmp_path):
    toy = problems.mlp()
    c = make(toy.problem, toy.batch)
    fp.save(tmp_path / "c.pt", c.factors)
    assert_same(fp.load(tmp_path / "c.pt", c.factors), c.factors)


def test_it_works_inside_of_vmap():
    toy = problems.mlp()
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def solve(scale):
        params = {k: scale * p for k, p in toy.params.items()}
        c = fp.KroneckerFactored(toy.problem, params, toy.batch, labels="exact")
        return c.inverse(0.1) @ toy.params

    mapped = torch.vmap(solve)(scales)
    for i, scale in enumerate(scales):
        assert_close({k: x[i] for k, x in mapped.items()}, solve(scale), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "shampoo"}, "kind must be"),
        ({"labels": "all"}, "labels must be"),
    ],
)
def test_what_is_refused(options, message):
    toy = problems.mlp()
    with pytest.raises(ValueError, match=message):
        make(toy.problem, toy.batch, **options)
    with pytest.raises(ValueError, match="split must be"):
        make(toy.problem, toy.batch).inverse(0.1, split="half")
    with pytest.raises(ValueError, match="needs blocks that are Kronecker products"):
        make(toy.problem, toy.batch, "ekfac").inverse(0.1, split="pi")
