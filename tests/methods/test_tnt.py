"""TN-1 to TN-5, X-8 and X-9."""

import math

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from funcprecond.curvature.sampled_gradient import SampledGradient, SampledGradients
from funcprecond.representation.tensor_normal import normalized
from tests import problems, reference, strategies
from tests.equality import assert_close
from tests.methods.test_kl_shampoo import covariance, samples
from tests.problems import normal, seeded
from tests.strategies import orthogonal

PLAIN = {"momentum": 0.0, "decay": None, "refresh_every": 1}


def last(opt, sampled, grads):
    """The direction after steps with these sampled gradients, (samples, *shape), and gradients."""
    state = opt.init({"w": grads[0]})
    for t, (d, g) in enumerate(zip(sampled, grads, strict=True)):
        value = SampledGradients({"w": d})
        measured = {n: value if isinstance(n, SampledGradient) else () for n in opt.needs(t)}
        evidence = fp.Evidence({}, torch.zeros(()), None, {}, {}, measured)
        state, direction = opt.update(state, {"w": g}, evidence)
    return direction["w"]


def dense(sampled, damping):
    """Equal-trace factors of the last measurement, built from the definition."""
    grams = reference.mode_grams(list(sampled))
    shape = sampled.shape[1:]
    k, total = len(shape), math.prod(shape)
    c = (grams[0].trace() / total) ** (1 / k)
    factors = [h / (c ** (k - 1) * total / n) for h, n in zip(grams, shape, strict=True)]
    return reference.kron(*(torch.linalg.inv(u + damping * reference.eye(len(u))) for u in factors))


# --------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("sizes", [(4, 3), (2, 3, 2), (5,)])
def test_an_exact_kronecker_covariance_is_recovered(sizes):
    """TN-1, of any number of axes."""
    factors = [covariance(n, i) for i, n in enumerate(sizes)]
    traces = [s.trace() for s in factors]
    exact = [s * math.prod(traces) / s.trace() for s in factors]
    assert_close(reference.kron(*normalized(tuple(exact))), reference.kron(*factors), rtol=1e-12)


@given(strategies.gradients())
def test_all_factors_have_one_mean_eigenvalue_and_the_traces_multiply_to_the_models(grads):
    """TN-2."""
    grams = reference.mode_grams(grads)
    factors = normalized(tuple(grams))
    means = torch.stack([u.trace() / len(u) for u in factors])
    assert_close(means, means[0].expand_as(means), rtol=1e-12)
    product = torch.stack([u.trace() for u in factors]).prod()
    assert_close(product, grams[0].trace(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (5,), (2, 2, 2, 3)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_direction_is_the_dense_product_of_inverses(shape, count):
    """TN-3."""
    d, g = normal((count, *shape)), normal(shape, 1)
    expected = (dense(d, 0.1) @ g.reshape(-1)).reshape(shape)
    assert_close(last(fp.tnt(damping=0.1, **PLAIN), [d], [g]), expected, rtol=1e-11)


def test_on_an_exact_covariance_it_is_the_natural_gradient():
    """X-8."""
    a, b = covariance(4, 0), covariance(3, 1)
    d, g = torch.stack(samples(a, b)), normal((4, 3))
    expected = torch.linalg.solve(torch.kron(a, b), g.reshape(-1)).reshape(4, 3)
    assert_close(last(fp.tnt(damping=0.0, **PLAIN), [d], [g]), expected, rtol=1e-11)


@given(strategies.seeds)
def test_tnt_commutes_with_rotations_of_either_side(seed):
    """TN-4."""
    d, g = normal((2, 4, 3), seed), normal((4, 3), seed + 1)
    a, b = orthogonal(4, seed), orthogonal(3, seed + 1)
    opt = fp.tnt(damping=0.1, **PLAIN)
    assert_close(last(opt, [a @ d @ b], [a @ g @ b]), a @ last(opt, [d], [g]) @ b, rtol=1e-10)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2), (5,)])
def test_the_direction_scales_as_an_inverse(shape):
    """X-9: D, G times c and λ times c^(2/k) divide the direction by c."""
    d, g = normal((1, *shape)), normal(shape, 1)
    for c in (1e-3, 1e3):
        scaled = fp.tnt(damping=0.1 * c ** (2 / len(shape)), **PLAIN)
        direction = last(fp.tnt(damping=0.1, **PLAIN), [d], [g])
        assert_close(last(scaled, [c * d], [c * g]), direction / c, rtol=1e-9)


def test_a_vector_has_the_natural_gradient_of_an_averaged_rank_one_matrix():
    """TN-5."""
    sampled, grads = [normal((1, 5), i) for i in range(4)], [normal((5,), 9 + i) for i in range(4)]
    beta, mu = 0.7, 0.9
    weights = [(1 - beta) * beta ** (3 - i) / (1 - beta**4) for i in range(4)]
    h = torch.stack([w * d.T @ d for w, d in zip(weights, sampled, strict=True)]).sum(0)
    m = torch.stack([mu ** (3 - i) * g for i, g in enumerate(grads)]).sum(0)
    opt = fp.tnt(damping=0.1, decay=beta, momentum=mu, refresh_every=1)
    expected = torch.linalg.solve(h + 0.1 * reference.eye(5), m)
    assert_close(last(opt, sampled, grads), expected, rtol=1e-12)


def test_per_sample_divides_the_curvature_by_the_losss_constant():
    toy, options = problems.mlp(examples=5), {"damping": 0.1, **PLAIN}
    batch, whole = SampledGradient(), SampledGradient(per_sample=True)
    noise = fp.draw(toy.problem, toy.params, toy.batch, (batch, whole), generator=seeded(3))
    noise = fp.Noise((), dict.fromkeys((batch, whole), noise.needs[batch]))
    found = fp.observe(toy.problem, toy.params, toy.batch, (batch, whole), noise=noise)
    expected = {k: 5**0.5 * g for k, g in found[batch].grads.items()}
    assert_close(found[whole].grads, expected, rtol=1e-12)
    assert whole in fp.tnt(per_sample=True, **options).needs(0)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_sample_that_is_zero_or_no_number_keeps_the_old_inverse(bad):
    d, g = normal((1, 4, 3)), normal((4, 3), 1)
    opt = fp.tnt(damping=0.1, **PLAIN)
    direction = last(opt, [d, torch.full_like(d, bad)], [g, g])
    assert_close(direction, last(opt, [d], [g]), rtol=1e-12)


def test_between_refreshes_the_old_inverses_meet_the_new_momentum():
    sampled = [normal((1, 4, 3), i) for i in range(3)]
    grads = [normal((4, 3), 9 + i) for i in range(3)]
    opt = fp.tnt(damping=0.1, momentum=0.0, decay=None, refresh_every=2, start=0)
    for steps, seen in ((2, 0), (3, 2)):
        expected = (dense(sampled[seen], 0.1) @ grads[steps - 1].reshape(-1)).reshape(4, 3)
        assert_close(last(opt, sampled[:steps], grads[:steps]), expected, rtol=1e-11)


# --------------------------------------------------------------------------- what is measured
def test_over_all_labels_the_sampled_gradients_outer_products_are_the_fisher_matrix():
    """TN-5's second half, one example: each label chosen by the random number in its interval."""
    toy = problems.mlp(examples=1)
    p = toy.problem(toy.params, toy.batch[0]).softmax(-1)[0]
    need, total = SampledGradient(), 0.0
    for y in range(len(p)):
        noise = fp.Noise((), {need: (p[:y].sum() + p[y] / 2).reshape(1, 1)})
        found = fp.observe(toy.problem, toy.params, toy.batch, (need,), noise=noise)[need]
        d = reference.ravel({k: g[0] for k, g in found.grads.items()})
        total = total + p[y] * torch.outer(d, d)
    assert_close(total, reference.fisher(toy.problem, toy.params, toy.batch), rtol=1e-10)


def test_a_sample_is_the_gradient_of_the_loss_at_its_labels():
    toy, need = problems.mlp(examples=5), SampledGradient()
    noise = fp.draw(toy.problem, toy.params, toy.batch, (need,), generator=seeded(3))
    found = fp.observe(toy.problem, toy.params, toy.batch, (need,), noise=noise)[need]
    outputs = toy.problem(toy.params, toy.batch[0])
    labels = (outputs.softmax(-1).cumsum(-1) <= noise.needs[need][0].unsqueeze(-1)).sum(-1)
    evidence = fp.observe(toy.problem, toy.params, (toy.batch[0], labels))
    assert_close({k: g[0] for k, g in found.grads.items()}, evidence.grads, rtol=1e-12)


def test_samples_average():
    toy, three = problems.mlp(), SampledGradient(samples=3)
    noise = fp.draw(toy.problem, toy.params, toy.batch, (three,), generator=seeded(3))
    found = fp.observe(toy.problem, toy.params, toy.batch, (three,), noise=noise)[three]
    one = SampledGradient()
    for i in range(3):
        alone = fp.Noise((), {one: noise.needs[three][i : i + 1]})
        single = fp.observe(toy.problem, toy.params, toy.batch, (one,), noise=alone)[one]
        expected = {k: g[0] / 3**0.5 for k, g in single.grads.items()}
        assert_close({k: g[i] for k, g in found.grads.items()}, expected, rtol=1e-12)


def test_empirical_labels_give_the_training_gradient_itself():
    toy, need = problems.mlp(), SampledGradient("empirical")
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (need,))
    assert_close({k: g[0] for k, g in evidence[need].grads.items()}, evidence.grads, rtol=1e-13)


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="exact"):
        fp.tnt(labels="exact")
    with pytest.raises(ValueError, match="samples"):
        fp.tnt(samples=0)
