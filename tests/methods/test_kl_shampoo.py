"""KL-1 to KL-5, X-8, and the authors' trajectory."""

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from funcprecond.linalg.whitening import whitened
from tests import reference, strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.methods.test_soap import directions, project, project_back
from tests.problems import normal
from tests.strategies import with_spectrum

B1, B2, EPS = 0.9, 0.98, 1e-8


def covariance(n, seed):
    return with_spectrum(torch.linspace(0.5, 2.0, n, dtype=torch.float64), seed)


def samples(*factors):
    """Gradients whose sum of outer products is the Kronecker product of the factors, exactly."""
    roots = [reference.power(s, 0.5) for s in factors]
    shape = [len(s) for s in factors]
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return [project_back(e.reshape(shape), roots) for e in units]


def expected_grams(gradients, factors):
    """The whitened statistics summed over gradients, by the library's own function."""
    pairs = [torch.linalg.eigh(s) for s in factors]
    bases, roots = tuple(q for _, q in pairs), tuple(x.rsqrt() for x, _ in pairs)
    parts = [whitened(g, bases, roots, tuple(range(g.ndim)))[0] for g in gradients]
    return [torch.stack(list(of)).sum(0) for of in zip(*parts, strict=True)]


# ----------------------------------------------------------------------------- the estimator
@pytest.mark.parametrize("c", [1e-2, 1.0, 30.0])
def test_the_true_factors_are_a_fixed_point_at_every_split_of_the_scale(c):
    """KL-1."""
    a, b = covariance(4, 0), covariance(3, 1)
    found = expected_grams(samples(a, b), (c * a, b / c))
    assert_close(found, [c * a, b / c], rtol=1e-12)


def test_the_true_factors_are_a_fixed_point_with_three_axes():
    factors = (covariance(2, 0), covariance(3, 1), covariance(2, 2))
    assert_close(expected_grams(samples(*factors), factors), list(factors), rtol=1e-12)


@given(strategies.seeds)
def test_one_flip_flop_finds_the_covariance_from_any_start(seed):
    """KL-2."""
    a, b, start = covariance(4, 0), covariance(3, 1), covariance(3, seed)
    gradients = samples(a, b)
    first = expected_grams(gradients, (reference.eye(4), start))[0]
    second = expected_grams(gradients, (first, start))[1]
    assert_close(torch.kron(first, second), torch.kron(a, b), rtol=1e-12)


def test_the_estimator_turns_and_stretches_with_the_gradient():
    """KL-4, for any invertible matrices."""
    gradients = [normal((4, 3), i) for i in range(5)]
    left, right = covariance(4, 0), covariance(3, 1)
    a, b = normal((4, 4), 7), normal((3, 3), 8)
    plain = expected_grams(gradients, (left, right))
    moved = expected_grams([a @ g @ b for g in gradients], (a @ left @ a.T, b.T @ right @ b))
    assert_close(moved, [a @ plain[0] @ a.T, b.T @ plain[1] @ b], rtol=1e-9)


def test_at_the_fixed_point_the_divergence_is_stationary():
    """KL-5, for a second moment that is no Kronecker product."""
    gradients = [normal((3, 2), i) / 20**0.5 for i in range(20)]
    factors = [reference.eye(3), reference.eye(2)]
    for _ in range(60):
        factors[0] = expected_grams(gradients, factors)[0]
        factors[1] = expected_grams(gradients, factors)[1]
    moment = sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in gradients)

    def divergence(left, right):
        s = torch.kron(left, right)
        return torch.logdet(s) + (torch.linalg.inv(s) @ moment).trace()

    slopes = torch.func.grad(divergence, (0, 1))(*factors)
    assert max(x.abs().max() for x in slopes) < 1e-9
    elsewhere = torch.func.grad(divergence, (0, 1))(2 * factors[0], factors[1])
    assert max(x.abs().max() for x in elsewhere) > 1e-2


# -------------------------------------------------------------------------------- the method
def whitened_by(g, inverses, axis):
    """``C_i`` of the gradient with the other axes multiplied by the inverses, over their count."""
    x = g
    for j, inverse in enumerate(inverses):
        if j != axis:
            x = torch.tensordot(x, inverse, ([j], [0])).movedim(-1, j)  # pyright: ignore
    rows, others = g.movedim(axis, 0).flatten(1), x.movedim(axis, 0).flatten(1)
    return rows @ others.T / rows.shape[1]


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_the_idealised_method_is_the_dense_inverse_root(shape):
    """KL-3: both factors from the other's old value; the direction before either sees G."""
    grads = [normal(shape, i) for i in range(7)]
    factors = [0.1 * reference.eye(n) for n in shape]
    m = torch.zeros(shape, dtype=torch.float64)
    ours = directions(fp.kl_shampoo(refresh="eigh", refresh_every=1, damping=0.0), grads)
    for g, direction in zip(grads, ours, strict=True):
        m = B1 * m + (1 - B1) * g
        dense = reference.power(reference.kron(*factors), -0.5)
        assert_close(direction, (dense @ m.reshape(-1)).reshape(shape), rtol=1e-9)
        inverses = [torch.linalg.inv(s) for s in factors]
        grams = [whitened_by(g, inverses, i) for i in range(len(shape))]
        factors = [B2 * s + (1 - B2) * c for s, c in zip(factors, grams, strict=True)]


def test_on_an_exact_kronecker_covariance_it_is_the_inverse_root_of_that():
    """X-8: the mean of many samples whose every epoch is exact."""
    a, b = covariance(3, 0), covariance(2, 1)
    epoch = [6**0.5 * g for g in samples(a, b)]
    opt = fp.kl_shampoo(betas=(0.0, 0.99), refresh="eigh", refresh_every=1, damping=0.0)
    direction = directions(opt, epoch * 150 + epoch[:1])[-1]
    dense = reference.power(torch.kron(a, b), -0.5)
    expected = (dense @ epoch[0].reshape(-1)).reshape(3, 2)
    assert_close(direction, expected, rtol=5e-2)


def authors(grads, frequency, limit=10.0):
    """The authors' algorithm as a plain loop: inverse roots kept, columns never sorted."""
    axes = range(grads[0].ndim)
    shape = grads[0].shape
    counts = [grads[0].numel() / n for n in shape]
    grams = reference.mode_grams(grads[:1])
    stats = [(1 - B2) * s / c for s, c in zip(grams, counts, strict=True)]
    bases = [torch.linalg.eigh(s)[1].flip(1) for s in stats]
    roots = [torch.full((n,), 0.1**-0.5, dtype=torch.float64) for n in shape]
    m, found = torch.zeros_like(grads[0]), [torch.zeros_like(grads[0])]
    for t, g in enumerate(grads[1:], 1):
        m = B1 * m + (1 - B1) * g
        scale = torch.ones_like(g)
        for i in axes:
            scale = scale * roots[i].reshape([-1 if j == i else 1 for j in axes])
        found.append(project_back(project(m, bases) * scale / (1 + EPS * scale), bases))
        inverses = [(q * r**2) @ q.T for q, r in zip(bases, roots, strict=True)]
        grams = [whitened_by(g, inverses, i) for i in axes]
        stats = [B2 * s + (1 - B2) * c for s, c in zip(stats, grams, strict=True)]
        seen = [(q.T @ c @ q).diag() for q, c in zip(bases, grams, strict=True)]
        new = [B2 / r**2 + (1 - B2) * v for r, v in zip(roots, seen, strict=True)]
        roots = [x.rsqrt().clamp_max(limit) for x in new]
        if t % frequency == 0:
            bases = [torch.linalg.qr(s @ q)[0] for s, q in zip(stats, bases, strict=True)]
    return found


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_kl_shampoo_follows_its_authors_trajectory_step_by_step(shape, frequency, size):
    scales = size * torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    grads = [scales * normal(shape, i) for i in range(12)]
    opt = fp.kl_shampoo(first="skip", epsilon=0.0, refresh_every=frequency)
    for ours, theirs in zip(directions(opt, grads), authors(grads, frequency), strict=True):
        assert_close(ours, theirs, rtol=1e-8)


def test_eigenvalues_meet_the_limit():
    opt = fp.kl_shampoo(betas=(0.9, 0.5))
    g = torch.zeros(12, 3, dtype=torch.float64)
    state = opt.init({"w": g})
    for _ in range(60):
        state, direction = opt.update(state, {"w": g})
    left, right = state.inner["matrix"].eigenvalues["w"]
    assert_close(left.rsqrt(), torch.full_like(left, 12.0), rtol=1e-12)
    assert_close(right.rsqrt(), torch.full_like(right, 10.0), rtol=1e-12)
    assert not direction["w"].any()


def test_the_first_step_is_the_gradient_on_the_initial_eigenvalues_scale():
    g = normal((4, 3))
    assert_close(last(fp.kl_shampoo(damping=0.0), [g]), (1 - B1) / 0.1 * g, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
def test_vectors_go_to_adam(shape):
    grads = [normal(shape, i) for i in range(4)]
    expected = last(fp.adam(betas=(B1, B2), damping=EPS), grads)
    assert_close(last(fp.kl_shampoo(), grads), expected, rtol=1e-13)


def test_axes_of_length_one_are_as_if_they_were_not_there():
    grads = [normal((4, 3), i) for i in range(5)]
    flat = directions(fp.kl_shampoo(), grads)[-1]
    padded = directions(fp.kl_shampoo(), [g.reshape(4, 1, 3, 1) for g in grads])[-1]
    assert_close(padded, flat.reshape(4, 1, 3, 1), rtol=1e-9)
