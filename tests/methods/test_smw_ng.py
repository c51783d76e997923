"""SMW-NG against dense natural gradients."""

import pytest
import torch
from torch import nn

import funcprecond as fp
from tests import reference
from tests.equality import assert_close, assert_same
from tests.problems import (
    Toy,
    convnet,
    initialised,
    labelled,
    mlp,
    normal,
    regression,
    seeded,
    train,
    tree,
    update,
)
from tests.representation.test_gram import CASES, dense

LAM = 0.07


def solved(matrix, vector, lam=LAM):
    return torch.linalg.solve(matrix + lam * reference.eye(len(matrix)), vector)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_natural_gradient(name):
    case = CASES[name]()
    u = dense(case)
    _, direction, evidence = update(case, fp.smw_ng(damping=LAM))
    expected = solved(u.T @ u, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-9, atol=1e-11)


def test_the_push_through_form_is_one_weighted_gradient():
    toy = mlp()
    x, y = toy.batch
    u = dense(toy)
    n = len(x)
    w = torch.linalg.solve(u @ u.T + LAM * reference.eye(n), torch.ones(n, dtype=torch.float64)) / n

    def weighted(params):
        terms = nn.functional.cross_entropy(toy.problem(params, x), y, reduction="none")
        return (w * terms).sum()

    _, direction, _ = update(toy, fp.smw_ng(damping=LAM))
    assert_close(direction, torch.func.grad(weighted)(toy.params), rtol=1e-10)


@pytest.mark.parametrize("make", [mlp, convnet, tree])
def test_any_other_gradient_takes_the_general_form(make):
    toy = make()
    opt = fp.smw_ng(damping=LAM)
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0))
    u = dense(toy) if make is not tree else None
    other = {k: normal(p.shape, 4) for k, p in toy.params.items()}
    _, direction = opt.update(opt.init(toy.params), other, evidence)
    if u is not None:
        expected = solved(u.T @ u, reference.ravel(other))
        torch.testing.assert_close(reference.ravel(direction), expected, rtol=1e-9, atol=1e-11)
    # The same gradient, but not known to be: the other form, the same answer.
    copies = {k: g.clone() for k, g in evidence.grads.items()}
    assert_close(
        opt.update(opt.init(toy.params), copies, evidence)[1],
        opt.update(opt.init(toy.params), evidence.grads, evidence)[1],
        rtol=1e-9,
    )


@pytest.mark.parametrize("make", [mlp, convnet, regression])
def test_exact_labels_give_the_gauss_newton_step(make):
    toy = make()
    _, direction, evidence = update(toy, fp.smw_ng(damping=LAM, labels="exact"))
    g = reference.ggn(toy.problem, toy.params, toy.batch)
    torch.testing.assert_close(
        reference.ravel(direction),
        solved(g, reference.ravel(evidence.grads)),
        rtol=1e-8,
        atol=1e-10,
    )


def test_sampled_labels_come_from_the_generator_and_approach_the_exact_ones():
    toy = mlp()
    opt = fp.smw_ng(damping=LAM, labels="mc", samples=400)
    once, again = (update(toy, opt)[1] for _ in range(2))
    assert_same(once, again)
    exact = reference.ravel(update(toy, fp.smw_ng(damping=LAM, labels="exact"))[1])
    assert (reference.ravel(once) - exact).norm() < 0.1 * exact.norm()


def test_one_example_has_a_closed_form():
    toy = mlp(examples=1)
    _, direction, evidence = update(toy, fp.smw_ng(damping=LAM))
    g = reference.ravel(evidence.grads)
    torch.testing.assert_close(reference.ravel(direction), g / (LAM + g @ g))


def test_the_damping_follows_the_reduction_of_the_loss():
    toy = mlp()
    for lam in (1e-3, 10.0):
        opt = fp.smw_ng(damping=lam, adapt=True, factor=1.5)
        state, direction, evidence = update(toy, opt)
        u, p = dense(toy), -reference.ravel(direction)
        g = reference.ravel(evidence.grads)
        # At the exact solve the whole quadratic model is half its slope.
        model = g @ p + p @ u.T @ u @ p / 2 + lam * p @ p / 2
        torch.testing.assert_close(model, g @ p / 2)
        x, y = toy.batch
        change = (
            toy.problem.loss(toy.problem(fp.apply(toy.params, direction), x), y) - evidence.loss
        )
        ratio = float(change / model)
        factor = 1.5 if ratio < 0.25 else 1 / 1.5 if ratio > 0.75 else 1.0
        torch.testing.assert_close(float(state.damping), lam * factor)
    assert factor < 1


def test_without_adaptation_the_damping_stays():
    state, _, _ = update(mlp(), fp.smw_ng(damping=LAM), 3)
    assert float(state.damping) == LAM


def test_a_zero_gradient_has_a_zero_direction():
    toy = mlp()
    opt = fp.smw_ng()
    _, _, evidence = update(toy, opt)
    zero = {k: torch.zeros_like(g) for k, g in evidence.grads.items()}
    assert_same(opt.update(opt.init(toy.params), zero, evidence)[1], zero)
    # A batch that the model fits exactly: all rows are zero.
    x = normal((4, 3), 1)
    target = toy.problem(toy.params, x)
    fitted = Toy(fp.problem(toy.problem.module, fp.losses.mse), ((x, target),))
    _, direction, _ = update(fitted, opt)
    assert all((d == 0).all() for d in direction.values())


def test_a_subset_of_the_parameters_has_a_matrix_of_its_own():
    toy = convnet()
    names = ["1.weight", "4.bias"]
    rules = [(k, "a") for k in names] + [("*", "b")]
    opt = fp.partition(rules, a=fp.smw_ng(damping=LAM), b=fp.sgd())
    _, direction, evidence = update(toy, opt)
    columns = dict(
        zip(toy.params, dense(toy).split([p.numel() for p in toy.params.values()], 1), strict=True)
    )
    u = torch.cat([columns[k] for k in names], 1)
    g = reference.ravel({k: evidence.grads[k] for k in names})
    found = reference.ravel({k: direction[k] for k in names})
    torch.testing.assert_close(found, solved(u.T @ u, g), rtol=1e-9, atol=1e-11)


def test_examples_that_a_batch_norm_couples_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    toy = Toy(fp.problem(model, fp.losses.cross_entropy), (labelled(5, 3, 3, 0),))
    for labels in ("empirical", "mc", "exact"):
        opt = fp.smw_ng(labels=labels)
        with pytest.raises(ValueError, match="BatchNorm1d '1' in training mode couples"):
            fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0), generator=seeded(0))


def test_float32_keeps_float32_and_learns():
    toy = mlp(torch.float32)
    toy = Toy(toy.problem, toy.batches[:1])
    opt = fp.chain(fp.smw_ng(damping=0.1), fp.scale(0.2))
    params, state, _ = train(toy, opt, 60)
    assert {x.dtype for x in (*params.values(), state[0].damping)} == {torch.float32}
    _, _, evidence = update(toy, opt)
    loss = toy.problem.loss(toy.problem(params, toy.batch[0]), toy.batch[1])
    assert loss < 0.5 * evidence.loss


def test_it_says_what_is_missing_or_wrong():
    opt = fp.smw_ng()
    g = {"x": torch.ones(2)}
    with pytest.raises(fp.MissingEvidence, match="ExampleRows"):
        opt.update(opt.init(g), g)
    for options, match in (
        ({"damping": 0.0}, "positive"),
        ({"damping": -1.0}, "positive"),
        ({"factor": 0.5}, "factor"),
        ({"labels": "all"}, "labels"),
        ({"samples": 0}, "samples"),
    ):
        with pytest.raises(ValueError, match=match):
            fp.smw_ng(**options)


def test_positions_are_not_taken_for_examples_inside_of_attention():
    """As many positions as examples, and the layers inside put the positions first."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    problem = fp.problem(initialised(Model()), fp.losses.cross_entropy)
    batch = (normal((4, 4, 4)), torch.tensor([0, 1, 2, 0]))
    rows = reference.per_example(problem, problem.params, batch)
    opt = fp.smw_ng(damping=0.1)
    evidence = fp.observe(problem, problem.params, batch, opt.needs(0))
    _, direction = opt.update(opt.init(problem.params), evidence.grads, evidence)
    matrix = rows.T @ rows / 4 + 0.1 * reference.eye(rows.shape[1])
    expected = torch.linalg.solve(matrix, reference.ravel(evidence.grads))
    torch.testing.assert_close(reference.ravel(direction), expected)
