"""SINGD and IKFAC against plain loops of dense algebra, their fixed points, and K-FAC."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.representation.inverse_roots import InverseRoots
from tests import problems, reference
from tests.equality import assert_close, assert_same
from tests.methods.layer_rows import layer_rows, matrix
from tests.methods.test_skfac import CASES
from tests.problems import Toy, normal
from tests.representation.test_gram import toy

LAM, BETA, ALPHA = 0.3, 0.1, 0.6


def mean_trace(x):
    return x.trace() / len(x)


def kept(x, structure):
    return torch.diag(x.diagonal()) if structure == "diagonal" else x


class Plain:
    """The update of one layer's K and C in the letters of the paper."""

    def __init__(self, i, o, form, structure, normalize):
        self.k, self.c = reference.eye(i), reference.eye(o)
        self.mk, self.mc = torch.zeros_like(self.k), torch.zeros_like(self.c)
        self.form, self.structure, self.normalize = form, structure, normalize

    def step(self, a, b):
        k, c = self.k, self.c
        hk, hc = (kept(x, self.structure) for x in (k.T @ a @ k, c.T @ b @ c))
        eyes = reference.eye(len(k)), reference.eye(len(c))
        if self.form == "ikfac":
            self.mk = (hk + LAM * k.T @ k - eyes[0]) / 2
            self.mc = (hc + LAM * c.T @ c - eyes[1]) / 2
        else:
            new = mean_trace(hc) * hk + LAM * mean_trace(c.T @ c) * k.T @ k - eyes[0]
            self.mc = ALPHA * self.mc + (
                mean_trace(hk) * hc + LAM * mean_trace(k.T @ k) * c.T @ c - eyes[1]
            ) / 2  # fmt: skip
            self.mk = ALPHA * self.mk + new / 2
        self.k = k - self.rate(self.mk) * k @ self.mk
        self.c = c - self.rate(self.mc) * c @ self.mc

    def rate(self, m):
        return BETA / max(1.0, float(m.abs().sum(1).max())) if self.normalize else BETA

    def direction(self, g):
        return self.c @ self.c.T @ g @ self.k @ self.k.T


def factors(a, g, sharing):
    """A and B of rows (N, T, .) of one group, for the mean of the examples' losses."""
    n = len(a)
    a = a.mean(1) if sharing == "reduce" else a.flatten(0, 1)
    g = g.sum(1) if sharing == "reduce" else g.flatten(0, 1)
    return a.T @ a / len(a), g.T @ g / n


def follows(case, steps=3, sharing="expand", **options):
    """Compare every direction of a method on one model with the plain loops."""
    opt = fp.singd(damping=LAM, rate=BETA, momentum=ALPHA, every=1, sharing=sharing, **options)
    form, structure = options.get("form", "singd"), options.get("structure", "dense")
    state, plain = opt.init(case.params), {}
    for t in range(steps):
        batch = (normal(case.batch[0].shape, t), case.batch[1])
        evidence = fp.observe(case.problem, case.params, batch, opt.needs(t))
        state, direction = opt.update(state, evidence.grads, evidence)
        for name, (a, g) in layer_rows(Toy(case.problem, (batch,))).items():
            if name == "norm":
                continue
            gradient, found = (matrix(x, name, len(a)) for x in (evidence.grads, direction))
            for j in range(len(a)):
                o, i = gradient[j].shape
                key = (name, j)
                if key not in plain:
                    plain[key] = Plain(i, o, form, structure, options.get("normalize", True))
                plain[key].step(*factors(a[j], g[j], sharing))
                expected = plain[key].direction(gradient[j])
                torch.testing.assert_close(found[j], expected, rtol=1e-9, atol=1e-11)


def test_every_step_is_that_of_the_papers_equations():
    follows(CASES["wide"](), normalize=False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("form", ["singd", "ikfac"])
@pytest.mark.parametrize("normalize", [False, True])
def test_all_layers_and_forms_follow_the_equations(case, structure, form, normalize):
    follows(CASES[case](), 2, structure=structure, form=form, normalize=normalize)


@pytest.mark.parametrize("case", ["sequence", "conv groups"])
def test_positions_can_be_reduced(case):
    follows(CASES[case](), 2, "reduce")


def linear(n=7):
    case = toy(nn.Linear(4, 3), 2 * normal((n, 4)), torch.arange(n) % 3)
    (a, g) = layer_rows_of(case)
    return case, *factors(a, g, "expand")


def layer_rows_of(case):
    x, y = case.batch
    g = torch.softmax(case.problem(case.params, x), 1) - F.one_hot(y, 3)
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return rows.unsqueeze(1), g.unsqueeze(1)


def settled(case, **options):
    """The roots on one batch after many steps."""
    opt = fp.singd(damping=LAM, rate=0.2, every=1, **options)
    evidence = fp.observe(case.problem, case.params, case.batch, opt.needs(0))
    state = opt.init(case.params)
    for _ in range(1500):
        state, direction = opt.update(state, evidence.grads, evidence)
    return state.left["weight+bias"], state.right["weight+bias"], direction, evidence


@pytest.mark.parametrize("normalize", [False, True])
def test_the_fixed_point_of_ikfac_is_the_damped_inverse_of_each_factor(normalize):
    """SINGD1: and its direction is K-FAC's with λ added to both factors."""
    case, a, b = linear()
    c, k, direction, evidence = settled(case, form="ikfac", normalize=normalize)
    inverse = torch.linalg.inv(a + LAM * reference.eye(5))
    torch.testing.assert_close(k @ k.T, inverse, rtol=1e-8, atol=1e-10)
    left = torch.linalg.inv(b + LAM * reference.eye(3))
    torch.testing.assert_close(c @ c.T, left, rtol=1e-8, atol=1e-10)
    found = torch.cat([direction["weight"], direction["bias"].unsqueeze(1)], 1)
    gradient = torch.cat([evidence.grads["weight"], evidence.grads["bias"].unsqueeze(1)], 1)
    torch.testing.assert_close(found, left @ gradient @ inverse, rtol=1e-8, atol=1e-10)


def test_the_fixed_point_of_singd_weighs_each_factor_by_the_other():
    """SINGD2."""
    case, a, b = linear()
    c, k, _, _ = settled(case)
    right = mean_trace(c.T @ b @ c) * a + LAM * mean_trace(c.T @ c) * reference.eye(5)
    torch.testing.assert_close(torch.linalg.inv(k @ k.T), right, rtol=1e-7, atol=1e-9)
    left = mean_trace(k.T @ a @ k) * b + LAM * mean_trace(k.T @ k) * reference.eye(3)
    torch.testing.assert_close(torch.linalg.inv(c @ c.T), left, rtol=1e-7, atol=1e-9)


def test_one_step_of_ikfac_is_a_moving_average_up_to_the_square_of_its_rate():
    """SINGD3."""
    case, a, b = linear()
    opt = fp.singd(damping=LAM, form="ikfac", rate=0.2, every=1)
    evidence = fp.observe(case.problem, case.params, case.batch, opt.needs(0))
    start = opt.init(case.params)
    for _ in range(1500):
        start, _ = opt.update(start, evidence.grads, evidence)
    other = (3 * normal((7, 4), 8), case.batch[1])
    a2, _ = factors(*layer_rows_of(Toy(case.problem, (other,))), "expand")
    errors = []
    for rate in (1e-2, 1e-3):
        opt = fp.singd(damping=LAM, form="ikfac", rate=rate, every=1, normalize=False)
        evidence = fp.observe(case.problem, case.params, other, opt.needs(0))
        state, _ = opt.update(start, evidence.grads, evidence)
        k = state.right["weight+bias"]
        average = (1 - rate) * a + rate * a2 + LAM * reference.eye(5)
        errors.append((torch.linalg.inv(k @ k.T) - average).norm())
    assert errors[1] < errors[0] / 50


def test_without_a_step_of_the_roots_the_direction_is_the_gradient():
    case, _, _ = linear()
    _, direction, evidence = problems.update(case, fp.singd(rate=0.0))
    assert_close(direction, evidence.grads, rtol=1e-14)


def test_large_inputs_do_not_make_normalized_roots_diverge():
    case = toy(nn.Linear(40, 3), 100 + normal((7, 40)), torch.arange(7) % 3)
    for t, normalize in enumerate((True, False)):
        opt = fp.singd(form="ikfac", normalize=normalize, every=1)
        state, _, _ = problems.update(case, opt, 60)
        sizes = [float(x.abs().max()) for x in state.right.values()]
        assert (max(sizes) < 10) == (t == 0)


def test_embeddings_have_diagonal_roots_and_inputs_first_is_the_left_side():
    ids, targets = torch.tensor([[0, 3, 2], [2, 2, 0]]), torch.tensor([1, 0])
    params = {"table": normal((5, 3)), "inner": normal((3, 4), 1)}

    def model(p, ids):
        return (F.embedding(ids, p["table"]).tanh() @ p["inner"]).mean(1)

    case = Toy(fp.problem(model, fp.losses.cross_entropy, params=params), ((ids, targets),))
    opt = fp.singd(damping=LAM, rate=BETA, form="ikfac", normalize=False)
    state, direction, evidence = problems.update(case, opt)
    assert state.left["table"].shape == (1, 5)
    assert state.left["inner"].shape == (3, 3)
    counts = torch.bincount(ids.reshape(-1), minlength=5).double() / 6
    root = 1 - BETA * (counts + LAM - 1) / 2
    torch.testing.assert_close(state.left["table"][0], root)
    left, right = state.left["inner"], state.right["inner"]
    expected = left @ left.T @ evidence.grads["inner"] @ right @ right.T
    assert_close(direction["inner"], expected, rtol=1e-10)
    rows = F.embedding(ids, params["table"]).tanh().flatten(0, 1)
    moment = rows.T @ rows / 6 + LAM * reference.eye(3) - reference.eye(3)
    torch.testing.assert_close(left, reference.eye(3) - BETA * moment / 2)


def test_norm_layers_and_other_parameters_are_treated_as_by_kfac():
    case = CASES["sequence"]()
    opt = fp.singd(damping=LAM)
    _, direction, evidence = problems.update(case, opt)
    kfac = fp.kfac(damping=LAM, labels="empirical")
    _, expected, _ = problems.update(case, kfac)
    for k in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(direction[k], expected[k], rtol=1e-9, atol=1e-12)


def test_the_roots_take_a_step_at_an_interval_and_absent_layers_keep_theirs():
    params = {"a": normal((3, 4)), "b": normal((3, 4), 1)}
    problem = fp.problem(
        lambda p, inputs: F.linear(inputs[0], p[inputs[1]]), fp.losses.cross_entropy, params=params
    )
    opt = fp.singd(every=2)
    state, states = opt.init(params), []
    for t, head in enumerate("aabbaa"):
        batch = ((normal((6, 4), t), head), torch.arange(6) % 3)
        evidence = fp.observe(problem, params, batch, opt.needs(t))
        state, _ = opt.update(state, evidence.grads, evidence)
        states.append(state)
    assert states[1] is states[0]
    assert all(states[t].right["a"] is states[0].right["a"] for t in (1, 2, 3))
    assert not torch.equal(states[4].right["a"], states[3].right["a"])
    assert all(states[t].right["b"] is states[2].right["b"] for t in (3, 4, 5))


def test_ikfac_has_no_momentum_in_its_state():
    case, _, _ = linear()
    state, _, _ = problems.update(case, fp.singd(form="ikfac"))
    assert isinstance(state, InverseRoots)
    assert_same((state.left_momentum, state.right_momentum), ({}, {}))


@pytest.mark.parametrize(
    "wrong",
    [{"form": "kfac"}, {"structure": "toeplitz"}, {"damping": 0.0}, {"rate": -1.0},
     {"momentum": 1.0}, {"every": 0}],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fp.singd(**wrong)
