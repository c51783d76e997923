import dataclasses

import pytest
import torch

import funcprecond as fp
from tests import problems, reference
from tests.autodiff.test_op_table import COUPLED, MODELS, N, build
from tests.equality import assert_close
from tests.problems import initialised, normal, seeded

# The reference maps over the examples.
SINGLE = [m for m in MODELS if m not in COUPLED]


@pytest.mark.parametrize("model", SINGLE)
def test_norms_and_inner_products_are_those_of_the_formed_gradients(model):
    problem, batch = build(model)
    grads = fp.per_sample_grads(problem, problem.params, batch, generator=seeded(3))
    rows = torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)
    options = {"generator": seeded(3)}
    gram = fp.per_sample_gram(problem, problem.params, batch, **options)
    assert_close(gram, rows @ rows.T, rtol=1e-8)
    norms = fp.per_sample_norms(problem, problem.params, batch, generator=seeded(3))
    assert_close(norms, rows.norm(dim=1), rtol=1e-8)


def test_they_have_no_trace_of_the_reduction():
    toy = problems.mlp()
    summed = fp.problem(toy.problem.module, fp.losses.CrossEntropy(reduction="sum"))
    one = fp.per_sample_norms(toy.problem, toy.params, toy.batch)
    assert_close(fp.per_sample_norms(summed, toy.params, toy.batch), one, rtol=1e-10)
    rows = reference.per_example(toy.problem, toy.params, toy.batch)
    assert_close(one, rows.norm(dim=1), rtol=1e-9)


@pytest.mark.parametrize("model", SINGLE)
def test_the_tangent_kernel_is_that_of_the_pulled_back_entries(model):
    problem, (x, y) = build(model)
    run = fp.linearize(problem, problem.params, (x, y), generator=seeded(3))
    basis = reference.eye(run.outputs.numel()).reshape(-1, *run.outputs.shape)
    j = torch.stack([reference.ravel(run.pull(e)) for e in basis]).reshape(N, 3, -1)
    of = lambda *batches, **o: fp.ntk(  # noqa: E731
        problem, problem.params, *batches, generator=seeded(3), **o
    )
    kernel = of((x, y))
    assert_close(kernel, torch.einsum("nop,mqp->nomq", j, j), rtol=1e-8)
    assert_close(of((x, y), kind="sum"), torch.einsum("nomo->nm", kernel), rtol=1e-9)
    if "dropout" not in model:
        assert_close(of((x, y), (x[:2], y[:2])), kernel[:, :, :2], rtol=1e-8)
        assert_close(of((x[:2], y[:2]), (x, y), kind="sum"), of((x, y), kind="sum")[:2], rtol=1e-8)


def test_the_tangent_kernel_is_that_of_a_jacobian_of_differences():
    toy = problems.convnet()
    x, y = toy.batch

    def outputs(p):
        return toy.problem(p, x).reshape(-1)

    basis = reference.eye(reference.ravel(toy.params).numel())
    columns = [
        reference.difference(outputs, toy.params, reference.unravel(e, toy.params)) for e in basis
    ]
    j = torch.stack(columns, 1).reshape(4, 3, -1)
    kernel = fp.ntk(toy.problem, toy.params, toy.batch)
    assert_close(kernel, torch.einsum("nop,mqp->nomq", j, j), rtol=1e-7)
    with pytest.raises(ValueError, match="kind must be"):
        fp.ntk(toy.problem, toy.params, toy.batch, kind="mean")
    with pytest.raises(TypeError, match="one tensor as its output"):
        fp.ntk(
            fp.problem(lambda p, x: (x @ p["w"],), fp.losses.mse, params={"w": normal((3, 2))}),
            {"w": normal((3, 2))},
            (normal((4, 3)), None),
        )


def test_the_noise_scale_is_that_of_the_examples_covariance_however_they_are_split():
    toy = problems.mlp(examples=9)
    x, y = toy.batch
    rows = reference.per_example(toy.problem, toy.params, toy.batch)
    variance = (rows - rows.mean(0)).square().sum() / 8
    signal = rows.mean(0).square().sum() - variance / 9
    found = fp.gradient_noise_scale(toy.problem, toy.params, toy.batch)
    assert_close(found.variance, variance, rtol=1e-9)
    assert_close(found.squared_norm, signal, rtol=1e-9)
    assert_close(found.scale, variance / signal, rtol=1e-9)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    split = fp.gradient_noise_scale(toy.problem, toy.params, batches=batches)
    assert_close(split.scale, found.scale, rtol=1e-8)
    with pytest.raises(ValueError, match="at least two examples"):
        fp.gradient_noise_scale(toy.problem, toy.params, (x[:1], y[:1]))


def test_coupled_examples_are_refused():
    problem, batch = build("batch norm, train")
    for statistic in (fp.per_sample_norms, fp.per_sample_gram, fp.ntk):
        with pytest.raises(ValueError, match="per-sample gradients are not defined"):
            statistic(problem, problem.params, batch)


def test_wide_layers_are_not_formed():
    """Norms of 64 gradients of a million entries each, in far less memory than they would take."""
    module = initialised(torch.nn.Linear(1000, 1000), dtype=torch.float32)
    problem = fp.problem(module, fp.losses.mse)
    batch = (normal((64, 1000), 1, torch.float32), normal((64, 1000), 2, torch.float32))
    norms = fp.per_sample_norms(problem, problem.params, batch)
    x, y = batch
    errors = 2 * (problem(problem.params, x) - y)
    # The example's terms of a mean over all entries have c = 2 / numel and gradient errors / 2.
    expected = (errors / 2).norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    assert_close(norms, expected, rtol=1e-4)


LOSSES = {
    "sum": (fp.losses.CrossEntropy(reduction="sum"), None),
    "mse, sum": (fp.losses.MSE("sum"), None),
    "mse": (fp.losses.MSE(), None),
    "ignored": (fp.losses.CrossEntropy(ignore_index=0), "kept"),
    "weighted": (fp.losses.CrossEntropy(weight=torch.tensor([0.5, 2.0, 1.0]).double()), "weights"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_noise_scale_has_the_losss_units_and_no_trace_of_the_split(name):
    """Against the covariance of gradients that are taken one by one."""
    loss, share = LOSSES[name]
    toy = problems.mlp(examples=9)
    x, labels = toy.batch
    y = problems.normal((9, 3), 5) if "mse" in name else labels
    problem = fp.problem(problems.mlp_module(), loss)
    one = dataclasses.replace(
        problem, loss=dataclasses.replace(loss, reduction="mean" if name == "mse" else "sum")
    )
    rows = reference.per_example(one, toy.params, (x, y))
    if share is not None:
        terms = (labels != 0).double() if share == "kept" else loss.weight[labels]
        rows = rows * len(rows) / terms.sum()
    mean = rows.mean(0)
    variance = (rows - mean).square().sum() / (len(rows) - 1)
    signal = mean.square().sum() - variance / len(rows)
    pieces = [slice(0, 2), slice(2, 3), slice(3, 9)]
    for found in (
        fp.gradient_noise_scale(problem, toy.params, (x, y)),
        fp.gradient_noise_scale(problem, toy.params, batches=[(x[s], y[s]) for s in pieces]),
    ):
        assert_close(found.variance, variance, rtol=1e-10)
        assert_close(found.squared_norm, signal, rtol=1e-9)
        assert_close(found.scale, variance / signal, rtol=1e-9)


def test_a_batch_whose_targets_are_all_ignored_adds_nothing_to_the_noise_but_its_examples():
    problem = fp.problem(problems.mlp_module(), fp.losses.cross_entropy)
    (x, y), params = problems.mlp(examples=6).batch, problem.params
    y = torch.cat([y[:4], torch.full((2,), -100)])
    whole = fp.gradient_noise_scale(problem, params, (x, y))
    split = fp.gradient_noise_scale(problem, params, batches=[(x[:4], y[:4]), (x[4:], y[4:])])
    assert_close(split, whole, rtol=1e-10)
