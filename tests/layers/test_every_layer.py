"""Every product on every kind of layer, held to central differences, which autodiff cannot fool.

One pass through the table of layers, the losses taken in turn: a layer knows of the loss by the
outputs' cotangents only, and losses have tests of their own at every rank and reduction.
"""

import itertools

import pytest
import torch

import funcprecond as fp
from funcprecond.curvature.fisher import fisher_product
from funcprecond.linalg import treemath
from tests import reference
from tests.autodiff.test_op_table import MODELS, N, build
from tests.equality import assert_close, assert_same, copy
from tests.operators.test_curvature_matrices import LOSSES
from tests.problems import normal, seeded

MATRICES = {
    "Hessian": (fp.Hessian, {}),
    "GGN": (fp.GGN, {}),
    "sampled": (fp.Fisher, {"labels": "mc", "samples": 2}),
    "empirical": (fp.Fisher, {"labels": "empirical"}),
}
REAL = normal((N, 3), 7)
TARGETS = {
    "mse": REAL,
    "huber": REAL,
    "bce": (REAL > 0).double(),
    "weighted bce": REAL > 0,
    "soft targets": REAL.softmax(-1),
}
# The outputs of the models are no variances and no log-probabilities.
TURNS = itertools.product([k for k in LOSSES if "nll" not in k], ("mean", "sum"))
CASES = [(model, *turn) for model, turn in zip(MODELS, itertools.cycle(TURNS), strict=False)]
every_case = pytest.mark.parametrize(
    ("model", "loss", "reduction"), CASES, ids=[", ".join(case) for case in CASES]
)


def case(model, loss, reduction):
    problem, (x, y) = build(model)
    loss_ = LOSSES[loss](reduction)
    return fp.problem(problem.module, loss_), (x, TARGETS.get(loss, y))


def stack_of(problem, count):
    return {k: normal((count, *p.shape), 9 + i) for i, (k, p) in enumerate(problem.params.items())}


def dense_jacobian(problem, params, batch, masks):
    """(outputs, P), column by column by central differences."""

    def outputs(p):
        return fp.Evaluation(problem, p, batch, masks=masks).outputs.reshape(-1)

    basis = reference.eye(reference.ravel(params).numel())
    columns = [reference.difference(outputs, params, reference.unravel(e, params)) for e in basis]
    return torch.stack(columns, 1)


def factor(loss, labels, outputs, targets, noise):
    """(outputs, outputs): what ``J^T . J`` makes the matrix of; rows of one example add up."""
    if labels == "exact":
        return reference.output_hessian(loss, outputs, targets)
    c = loss.constant(outputs, targets)
    if labels == "mc":
        rows = loss.sampled(outputs, targets, noise)
    else:
        rows = torch.func.grad(lambda f: loss(f, targets))(outputs).unsqueeze(0) / c
    blocks = [c * r.reshape(len(r), -1).T @ r.reshape(len(r), -1) for r in rows.unbind(1)]
    return torch.block_diag(*blocks)


@every_case
def test_hessian_products_are_differences_of_the_gradient(model, loss, reduction):
    problem, batch = case(model, loss, reduction)

    def at(params):
        return fp.Hessian(problem, params, batch, generator=seeded(3))

    v = {k: x[0] for k, x in stack_of(problem, 1).items()}
    expected = reference.difference(lambda p: at(p).gradient(), problem.params, v)
    assert_close(reference.ravel(at(problem.params) @ v), reference.ravel(expected), rtol=1e-6)


# What a plain function's own run draws or fuses, nobody controls.
PLAIN = [c for c in CASES if not any(w in c[0] for w in ("dropout", "attention", "encoder"))]


@pytest.mark.parametrize(("model", "loss", "reduction"), PLAIN, ids=[c[0] for c in PLAIN])
def test_hvp_of_the_loss_as_a_plain_function_is_the_hessians(model, loss, reduction):
    problem, (x, y) = case(model, loss, reduction)
    v = {k: x[0] for k, x in stack_of(problem, 1).items()}
    found = fp.hvp(lambda p: problem.loss(problem(p, x), y), problem.params, v)
    expected = fp.Hessian(problem, problem.params, (x, y)) @ v
    assert_close(reference.ravel(found), reference.ravel(expected), rtol=1e-9)


@every_case
def test_gauss_newton_and_fisher_products_are_those_of_a_jacobian_of_differences(
    model, loss, reduction
):
    problem, batch = case(model, loss, reduction)
    run = fp.linearize(problem, problem.params, batch, generator=seeded(3))
    outputs, targets = run.outputs, run.targets
    j = dense_jacobian(problem, problem.params, batch, run.masks)
    v = {k: x[0] for k, x in stack_of(problem, 1).items()}
    noise = problem.loss.label_noise(targets, 2, seeded(4))
    for labels in ("exact", "mc", "empirical"):
        middle = factor(problem.loss, labels, outputs, targets, noise)
        expected = j.T @ (middle @ (j @ reference.ravel(v)))
        options = {"labels": labels, "noise": noise, "generator": seeded(3)}
        once = fp.fisher_mv(problem, problem.params, batch, v, **options)
        assert_close(reference.ravel(once), expected, rtol=1e-6)
        kept = fisher_product(run, v, labels, noise)
        assert_close(reference.ravel(kept), expected, rtol=1e-6)
        if labels == "exact":
            once = fp.ggn_mv(problem, problem.params, batch, v, generator=seeded(3))
            assert_close(reference.ravel(once), expected, rtol=1e-6)


@every_case
def test_kept_streamed_and_stacked_products_are_one_linear_symmetric_map(model, loss, reduction):
    problem, batch = case(model, loss, reduction)
    stack = stack_of(problem, 2)
    u, v = ({k: x[i] for k, x in stack.items()} for i in range(2))
    before = copy((dict(problem.module.state_dict()), problem.params, problem.buffers, batch))
    for cls, options in MATRICES.values():
        kept = cls(problem, problem.params, batch, generator=seeded(3), **options)
        streamed = cls(problem, problem.params, batches=[batch], generator=seeded(3), **options)
        cu, cv = kept @ u, kept @ v
        assert_same(kept @ v, cv)
        flat = reference.ravel(cv)
        assert_close(reference.ravel(streamed @ v), flat, rtol=1e-9)
        combined = kept @ treemath.add(treemath.mul(u, 2.0), v, -3.0)
        assert_close(reference.ravel(combined), 2 * reference.ravel(cu) - 3 * flat, rtol=1e-9)
        scale = treemath.norm(u) * treemath.norm(cv)
        assert abs(treemath.dot(u, cv) - treemath.dot(v, cu)) <= 1e-11 * scale
        if cls is not fp.Hessian:
            assert treemath.dot(v, cv) >= -1e-12 * treemath.dot(v, v)
        for c in (kept, streamed):
            for chunk_size in (None, 2):
                columns = {k: x[1] for k, x in c.matmat(stack, chunk_size).items()}
                assert_close(reference.ravel(columns), flat, rtol=1e-8)
    after = (dict(problem.module.state_dict()), problem.params, problem.buffers, batch)
    assert_same(after, before)
