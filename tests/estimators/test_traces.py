import itertools

import pytest
import scipy.stats
import torch

import funcprecond as fp
from funcprecond.estimators.probes import draw_probes
from funcprecond.operators.algebra import Matrix
from tests import problems, reference, strategies
from tests.equality import assert_close, assert_same
from tests.problems import normal, seeded


def operator(matrix):
    return Matrix(matrix, {"a": matrix.new_zeros(2, 2), "b": matrix.new_zeros(len(matrix) - 4)})


def flat(found):
    both = found.estimate, found.standard_error
    return tuple(x.reshape(1) if isinstance(x, torch.Tensor) else reference.ravel(x) for x in both)


def signs(n):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=torch.float64)


def decaying(n=24, rate=0.6, seed=0):
    return strategies.with_spectrum(rate ** torch.arange(n, dtype=torch.float64), seed)


def test_over_all_signs_hutchinson_is_exact_and_its_variance_is_the_formulas():
    m = decaying(6)
    probes = signs(6)
    trace = fp.hutchinson_trace(operator(m), 64, probes=probes)
    assert_close(trace.estimate, m.trace(), rtol=1e-13)
    diagonal, _ = flat(fp.hutchinson_diagonal(operator(m), 64, probes=probes))
    assert_close(diagonal, m.diagonal(), rtol=1e-12)
    # The standard error is of 64 draws with the sample's variance, and a factor for their skew.
    variance = 2 * (m.square().sum() - m.diagonal().square().sum())
    assert_close((trace.standard_error / (1 + 10 / 64)) ** 2 * 63, variance, rtol=1e-11)


def test_a_parameter_may_be_a_number():
    m = decaying(8)
    a = Matrix(m, {"a": m.new_zeros(()), "b": m.new_zeros(7)})
    found = fp.xtrace(a, 8, generator=seeded(0))
    assert abs(found.estimate - m.trace()) < 5 * found.standard_error
    assert fp.xdiag(a, 8, generator=seeded(0)).estimate["a"].shape == ()


def test_one_sign_probe_is_exact_on_a_diagonal_matrix_and_gaussians_are_not():
    m = torch.diag(normal((8,), 1))
    one = fp.hutchinson_trace(operator(m), 1, generator=seeded(0))
    assert_close(one.estimate, m.trace(), rtol=1e-13)
    assert one.standard_error.isnan()
    diagonal = fp.hutchinson_diagonal(operator(m), 1, generator=seeded(0))
    assert_close(flat(diagonal)[0], m.diagonal(), rtol=1e-13)
    many = fp.hutchinson_trace(operator(m), 4000, generator=seeded(0), distribution="normal")
    assert abs(many.estimate - m.trace()) < 4 * many.standard_error


def test_hutchpp_is_exact_up_to_its_rank():
    vectors = strategies.orthogonal(12, 0)[:, :3]
    m = vectors @ torch.diag(torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)) @ vectors.T
    found = fp.hutchpp(operator(m), 12, generator=seeded(0))
    assert_close(found.estimate, m.trace(), rtol=1e-11)


def explicit(m, w):
    """XTrace and XDiag by a QR decomposition for each probe left out."""
    traces, diagonals = [], []
    for i in range(w.shape[1]):
        others = [j for j in range(w.shape[1]) if j != i]
        q = torch.linalg.qr(m @ w[:, others])[0]
        p = q @ q.T
        v = w[:, i] - p @ w[:, i]
        traces.append((q.T @ m @ q).trace() + v @ m @ v)
        diagonals.append((p @ m).diagonal() + w[:, i] * (m @ w[:, i] - p @ m @ w[:, i]))
    return torch.stack(traces), torch.stack(diagonals)


@pytest.mark.parametrize("seed", range(3))
def test_the_downdates_equal_leaving_each_probe_out(seed):
    m = decaying(10, 0.7, seed) - 0.1 * reference.eye(10)
    probes = draw_probes(operator(m), 4, seeded(seed))
    traces, diagonals = explicit(m, probes.T)
    found = fp.xtrace(operator(m), 8, probes=probes)
    assert_close(found.estimate, traces.mean(), rtol=1e-10)
    student = 1 + 1.5 / 3 + 4 / 27
    factor = (2 / (1 - 4 / 10)) ** 0.5 * student
    assert student == pytest.approx(scipy.stats.t(3).ppf(0.975) / 2, rel=0.05)
    assert_close(found.standard_error, factor * traces.std() / 2, rtol=1e-8)
    estimate, error = flat(fp.xdiag(operator(m), 8, probes=probes))
    assert_close(estimate, diagonals.mean(0), rtol=1e-10)
    assert_close(error, factor * diagonals.std(0) / 2, rtol=1e-8)


def test_xtrace_and_xdiag_are_exact_on_low_rank():
    vectors = strategies.orthogonal(12, 0)[:, :2]
    m = vectors @ torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64)) @ vectors.T
    assert_close(fp.xtrace(operator(m), 6, generator=seeded(0)).estimate, m.trace(), rtol=1e-10)
    estimate, _ = flat(fp.xdiag(operator(m), 6, generator=seeded(0)))
    assert_close(estimate, m.diagonal(), rtol=1e-9)


@pytest.mark.parametrize("estimator", [fp.hutchinson_trace, fp.hutchpp, fp.xtrace])
def test_traces_are_unbiased_and_their_errors_are_honest(estimator):
    m = decaying(24, 0.8)
    found = [estimator(operator(m), 12, generator=seeded(i)) for i in range(400)]
    estimates = torch.stack([f.estimate for f in found])
    deviation = estimates.std()
    assert abs(estimates.mean() - m.trace()) < 4 * deviation / 20
    errors = torch.stack([f.standard_error for f in found])
    assert 1 < errors.square().mean().sqrt() / deviation < 4


SPECTRA = {
    "flat": lambda n: 1 + torch.rand(n, generator=seeded(6), dtype=torch.float64),
    "1/i^2": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64) ** 2,
    "0.7^i": lambda n: 0.7 ** torch.arange(n, dtype=torch.float64),
    "random": lambda n: normal((n,), 7),
}


def coverage(estimator, spectrum, n, products, seeds):
    """The share of estimates within two standard errors of the truth."""
    m = strategies.with_spectrum(SPECTRA[spectrum](n), 5)
    m = (m + m.T) / 2
    found = [flat(estimator(operator(m), products, generator=seeded(i))) for i in range(seeds)]
    estimates, errors = (torch.stack(x) for x in zip(*found, strict=True))
    truth = m.trace() if estimates.shape[1] == 1 else m.diagonal()
    return ((estimates - truth).abs() <= 2 * errors).double().mean().item()


@pytest.mark.parametrize("spectrum", ["flat", "0.7^i"])
@pytest.mark.parametrize("estimator", [fp.hutchpp, fp.xtrace, fp.xdiag])
def test_two_standard_errors_cover_the_truth(estimator, spectrum):
    assert coverage(estimator, spectrum, 100, 30, 150) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 100, 400])
@pytest.mark.parametrize("products", [30, 60])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("estimator", [fp.hutchinson_trace, fp.hutchpp, fp.xtrace, fp.xdiag])
def test_two_standard_errors_cover_the_truth_on_every_spectrum(estimator, spectrum, products, n):
    least = 0.9 if estimator is fp.hutchinson_trace else 0.93
    assert coverage(estimator, spectrum, n, products, 300) >= least


@pytest.mark.parametrize("estimator", [fp.hutchpp, fp.xtrace, fp.xdiag])
def test_as_many_products_as_rows_are_exact(estimator):
    """And no estimate from two coinciding probes claims an error of zero."""
    m = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) + 0.5
    a = Matrix(m, {"w": m[0]})
    products = 3 if estimator is fp.hutchpp else 4
    for i in range(20):
        estimate, error = flat(estimator(a, products, generator=seeded(i)))
        truth = m.trace() if estimate.numel() == 1 else m.diagonal()
        assert ((estimate - truth).abs() <= error).all()
        assert (error < 1e-12).all()


@pytest.mark.parametrize("estimator", [fp.hutchinson_diagonal, fp.xdiag])
def test_diagonals_are_unbiased(estimator):
    m = decaying(12, 0.8)
    found = torch.stack(
        [flat(estimator(operator(m), 8, generator=seeded(i)))[0] for i in range(400)]
    )
    assert ((found.mean(0) - m.diagonal()).abs() < 5 * found.std(0) / 20).all()


def test_at_equal_cost_the_newer_ones_are_closer_where_eigenvalues_decay():
    m = decaying(24, 0.6)
    spread = {
        e: torch.stack([e(operator(m), 12, generator=seeded(i)).estimate for i in range(100)]).std()
        for e in (fp.hutchinson_trace, fp.hutchpp, fp.xtrace)
    }
    assert spread[fp.hutchpp] < 0.5 * spread[fp.hutchinson_trace]
    assert spread[fp.xtrace] < spread[fp.hutchpp]


def test_probes_that_coincide_do_not_break_it():
    m = decaying(6)
    probes = torch.ones(3, 6, dtype=torch.float64)
    probes[1] *= -1
    found = fp.xtrace(operator(m), 6, probes=probes)
    assert torch.isfinite(found.estimate)
    zero = fp.xtrace(operator(0 * m), 6, generator=seeded(0))
    assert_close(zero.estimate, torch.zeros((), dtype=torch.float64), atol=1e-15)


def test_estimates_are_those_of_the_seed_whatever_the_chunk():
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    exact = reference.ggn(toy.problem, toy.params, toy.batch)
    for estimator in (fp.hutchinson_trace, fp.hutchpp, fp.xtrace):
        one = estimator(ggn, 12, generator=seeded(0))
        assert_same(one, estimator(ggn, 12, generator=seeded(0)))
        chunked = estimator(ggn, 12, generator=seeded(0), chunk_size=3)
        assert_close(one.estimate, chunked.estimate, rtol=1e-9)
        assert abs(one.estimate - exact.trace()) < 6 * one.standard_error + 1e-9
    for estimator in (fp.hutchinson_diagonal, fp.xdiag):
        found = estimator(ggn, 12, generator=seeded(0))
        assert {k: d.shape for k, d in found.estimate.items()} == {
            k: p.shape for k, p in toy.params.items()
        }
        assert_same(found, estimator(ggn, 12, generator=seeded(0)))


@pytest.mark.parametrize(
    "estimator",
    [fp.hutchinson_trace, fp.hutchinson_diagonal, fp.hutchpp, fp.xtrace, fp.xdiag],
)
def test_estimates_of_several_models_at_once_and_their_derivatives(estimator):
    toy = problems.mlp()
    products, drawn = 6, {fp.hutchinson_trace: 6, fp.hutchinson_diagonal: 6, fp.hutchpp: 4}
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    probes = draw_probes(ggn, drawn.get(estimator, 3), seeded(0))

    def total(params):
        found = estimator(fp.GGN(toy.problem, params, toy.batch), products, probes=probes)
        return sum(x.sum() for x in fp.tree.leaves(found))

    other = {k: 0.9 * p for k, p in toy.params.items()}
    both = {k: torch.stack([p, other[k]]) for k, p in toy.params.items()}
    assert_close(torch.vmap(total)(both), torch.stack([total(toy.params), total(other)]), rtol=1e-9)
    slope = torch.func.grad(total)(toy.params)
    vector = {k: normal(p.shape, 5) for k, p in toy.params.items()}
    ahead, behind = ({k: p + s * vector[k] for k, p in toy.params.items()} for s in (1e-5, -1e-5))
    expected = (total(ahead) - total(behind)) / 2e-5
    assert_close(sum((slope[k] * v).sum() for k, v in vector.items()), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: fp.hutchpp(c, 10, generator=seeded(0)), "multiple of three"),
        (lambda c: fp.xtrace(c, 7, generator=seeded(0)), "even number"),
        (lambda c: fp.xtrace(c, 30, generator=seeded(0)), "more than twice"),
        (lambda c: fp.hutchinson_trace(c, 5), "generator"),
        (lambda c: fp.hutchinson_trace(c, 5, probes=torch.ones(2, 6)), "shape"),
        (lambda c: draw_probes(c, 5, seeded(0), "uniform"), "distribution"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(operator(decaying(6)))
