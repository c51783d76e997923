"""Eva, Eva-f and Eva-s against dense inverses of ``λ I + v v^T``."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from tests import problems, reference
from tests.equality import assert_close
from tests.methods.layer_rows import layer_rows, matrix
from tests.methods.test_skfac import CASES
from tests.problems import Toy, initialised, normal, tree
from tests.representation.test_gram import toy
from tests.strategies import seeds

LAM = 0.07


def solved(u, v, gradient, lam=LAM):
    """``(λ I + u u^T ⊗ v v^T)^-1 G``, and with ``u=None`` the identity in place of ``u u^T``."""
    left = reference.eye(gradient.shape[0]) if u is None else torch.outer(u, u)
    dense = reference.kron(left, torch.outer(v, v)) + lam * reference.eye(gradient.numel())
    return torch.linalg.solve(dense, gradient.reshape(-1)).reshape(gradient.shape)


def means(a, g):
    """ā and ḡ of rows (N, T, .), for the mean of the examples' losses: c N = 1."""
    return a.mean((0, 1)), g.sum(1).mean(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["eva", "eva-f"])
def test_the_direction_is_the_dense_solve_with_the_means(case, form):
    case = CASES[case]()
    _, direction, evidence = problems.update(case, fp.eva(damping=LAM, form=form))
    for name, (a, g) in layer_rows(case).items():
        if name == "norm":
            assert_close(direction["norm.weight"], evidence.grads["norm.weight"] / LAM)
            continue
        gradient, found = (matrix(x, name, len(a)) for x in (evidence.grads, direction))
        for j in range(len(a)):
            v, u = means(a[j], g[j])
            expected = solved(u if form == "eva" else None, v, gradient[j])
            torch.testing.assert_close(found[j], expected, rtol=1e-9, atol=1e-11)


def test_the_vectors_are_averaged_over_the_steps():
    case = CASES["wide"]()
    batches = tuple((normal((4, 9), t), case.batch[1]) for t in range(4))
    case = Toy(case.problem, batches)
    for decay, weights in ((0.3, (0.027, 0.09, 0.3, 1.0)), (None, (0, 0, 0, 1))):
        _, direction, evidence = problems.update(case, fp.eva(damping=LAM, decay=decay), 4)
        rows = [layer_rows(Toy(case.problem, (b,))) for b in batches]
        for name in rows[0]:
            pairs = [means(*(x[0] for x in r[name])) for r in rows]
            v, u = (
                sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights)
                for xs in zip(*pairs, strict=True)
            )
            expected = solved(u, v, matrix(evidence.grads, name)[0])
            found = matrix(direction, name)[0]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_measurements_have_an_interval():
    case = CASES["wide"]()
    opt = fp.eva(every=3)
    state, seen = opt.init(case.params), []
    for t in range(5):
        batch = (normal((4, 9), t), case.batch[1])
        evidence = fp.observe(case.problem, case.params, batch, opt.needs(t))
        state, _ = opt.update(state, evidence.grads, evidence)
        seen.append(state.representation.right["0.weight+0.bias"])
    assert [seen[t] is seen[t + 1] for t in range(4)] == [True, True, False, True]


def test_one_example_is_one_layers_exact_natural_gradient():
    """EVA2: ``G / (λ + ‖g‖² ‖a‖²)``, as SMW-NG."""
    case = toy(nn.Linear(4, 3), normal((1, 4)), torch.tensor([2]))
    _, direction, evidence = problems.update(case, fp.eva(damping=LAM))
    g = reference.ravel(evidence.grads)
    assert_close(direction, {k: x / (LAM + g @ g) for k, x in evidence.grads.items()}, rtol=1e-10)
    assert_close(direction, problems.update(case, fp.smw_ng(damping=LAM))[1], rtol=1e-9)


def test_a_gradient_orthogonal_to_the_vectors_is_divided_by_the_damping():
    case = CASES["wide"]()
    opt = fp.eva(damping=LAM)
    state, _, evidence = problems.update(case, opt)
    u = state.factor.left["0.weight+0.bias"]
    other = {k: normal(g.shape, 5) for k, g in evidence.grads.items()}
    gradient = matrix(other, "0")[0]
    gradient = gradient - torch.outer(u, u @ gradient) / (u @ u)
    other |= {"0.weight": gradient[:, :-1], "0.bias": gradient[:, -1]}
    _, direction = opt.update(state, other, evidence)
    assert_close(direction["0.weight"], other["0.weight"] / LAM, rtol=1e-12)


def test_a_sum_of_losses_is_a_mean_with_another_damping():
    """``ḡ ā^T`` is in units of the loss: c is in it once."""
    model, batch = initialised(nn.Linear(4, 3)), (normal((6, 4)), torch.arange(6) % 3)
    found = [
        problems.update(
            Toy(fp.problem(model, fp.losses.CrossEntropy(reduction=r)), (batch,)),
            fp.eva(damping=LAM * n),
        )[1]
        for r, n in (("mean", 1), ("sum", 6))
    ]
    assert_close(*found, rtol=1e-10)


def test_embeddings_inputs_first_and_weights_that_are_used_twice():
    ids, targets = torch.tensor([[0, 3, 2], [2, 2, 0]]), torch.tensor([1, 0])
    params = {"table": normal((5, 3)), "inner": normal((3, 3), 1)}

    def model(p, ids, shift=0.0):
        h = F.embedding(ids, p["table"]) @ p["inner"]
        return (h.tanh() @ p["inner"] + shift).mean(1)

    case = Toy(fp.problem(model, fp.losses.cross_entropy, params=params), ((ids, targets),))
    _, direction, evidence = problems.update(case, fp.eva(damping=LAM))

    # The output gradients of the sum of the losses, as gradients of shifts.
    def loss(shifts):
        h = F.embedding(ids, params["table"]) + shifts[0]
        first = h @ params["inner"] + shifts[1]
        out = (first.tanh() @ params["inner"] + shifts[2]).mean(1)
        return F.cross_entropy(out, targets, reduction="sum")

    zeros = tuple(torch.zeros(2, 3, 3, dtype=torch.float64) for _ in range(3))
    of_table, of_first, of_second = torch.func.grad(loss)(zeros)
    u = torch.bincount(ids.reshape(-1), minlength=5).double() / 6
    expected = solved(u, of_table.sum(1).mean(0), evidence.grads["table"])
    assert_close(direction["table"], expected, rtol=1e-9)
    looked_up = F.embedding(ids, params["table"])
    inputs = torch.cat([looked_up, (looked_up @ params["inner"]).tanh()], 1)
    v = (of_first + of_second).sum(1).mean(0)
    expected = solved(inputs.mean((0, 1)), v, evidence.grads["inner"])
    assert_close(direction["inner"], expected, rtol=1e-9)


# --------------------------------------------------------------------------------------- Eva-s
@given(seeds, st.lists(st.integers(1, 3), min_size=0, max_size=4), st.booleans())
def test_eva_s_is_the_dense_solve_for_any_shape(seed, shape, summed):
    opt = fp.eva_s(damping=LAM, decay="sum" if summed else 0.6)
    gradients = [normal(shape, seed + t) for t in range(3)]
    state = opt.init({"w": gradients[0]})
    for g in gradients:
        state, direction = opt.update(state, {"w": g})
    weights = [1.0, 1.0, 1.0] if summed else [0.36 / 1.96, 0.6 / 1.96, 1 / 1.96]
    long = [a for a, n in enumerate(shape) if n > 1]
    outer = torch.zeros(()).double()
    if len(long) > 1:
        vectors = [
            sum(
                w * x.mean([b for b in range(len(shape)) if b != a])
                for w, x in zip(weights, gradients, strict=True)
            )
            for a in long
        ]
        outer = functools.reduce(torch.kron, vectors)
    flat = gradients[-1].reshape(-1)
    outer = outer.expand(len(flat)) if outer.ndim == 0 else outer
    dense = torch.outer(outer, outer) + LAM * reference.eye(len(flat))
    expected = torch.linalg.solve(dense, flat).reshape(shape)
    torch.testing.assert_close(direction["w"], expected, rtol=1e-9, atol=1e-12)


def test_eva_s_grafted_has_the_length_of_the_gradient():
    case = tree()
    opt = fp.graft(fp.eva_s(), fp.sgd())
    _, direction, evidence = problems.update(case, opt)
    for k, g in evidence.grads.items():
        torch.testing.assert_close(direction[k].norm(), g.norm())


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (fp.eva, {"form": "eva-s"}),
        (fp.eva, {"damping": 0.0}),
        (fp.eva, {"decay": 1.0}),
        (fp.eva_s, {"damping": -1.0}),
        (fp.eva_s, {"decay": "mean"}),
    ],
)
def test_wrong_options_are_refused_by_name(build, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        build(**wrong)
