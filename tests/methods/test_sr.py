"""Stochastic reconfiguration against dense solves, imaginary time, and exact energies."""

import math

import pytest
import torch
from torch.func import vmap

import funcprecond as fp
from tests import problems, reference, scientific
from tests.problems import Toy
from tests.scientific import QUARTIC_ENERGY, jacobian

LAM = 1e-3


def dense(params, x, weights, potential, psi=scientific.log_psi):
    """U, r and the energy from their definitions."""
    scores = jacobian(lambda p: vmap(psi, (None, 0))(p, x), params)
    energies = vmap(scientific.energy_of(potential, psi), (None, 0))(params, x)
    mean = weights @ energies
    root = weights.sqrt()
    return root.unsqueeze(1) * (scores - weights @ scores), root * (energies - mean), mean


def oscillator(potential=scientific.harmonic, seed=3):
    params = scientific.network((1, 16, 1), seed)
    return fp.vmc(scientific.log_psi, scientific.energy_of(potential), params=params)


# More samples than the 49 parameters, and fewer.
@pytest.mark.parametrize("count", [801, 30])
def test_the_direction_is_the_dense_solve(count):
    problem = oscillator()
    x, weights = scientific.quadrature(scientific.log_density(problem.params), nodes=count)
    u, r, _ = dense(problem.params, x, weights, scientific.harmonic)
    _, direction, evidence = problems.update(Toy(problem, ((x, weights),)), fp.sr(damping=LAM))
    found, eye = reference.ravel(direction), reference.eye(u.shape[1])
    expected = torch.linalg.solve(u.T @ u + LAM * eye, u.T @ r)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    small = u.T @ torch.linalg.solve(u @ u.T + LAM * reference.eye(len(u)), r)
    torch.testing.assert_close(found, small, rtol=1e-7, atol=1e-9)
    natural = torch.linalg.solve(4 * u.T @ u + 4 * LAM * eye, reference.ravel(evidence.grads))
    torch.testing.assert_close(found, 2 * natural, rtol=1e-7, atol=1e-9)


def test_any_other_gradient_is_taken_for_that_of_the_energy():
    problem = oscillator()
    x = scientific.drawn(scientific.log_density(problem.params), 60, 0)
    opt = fp.sr(damping=LAM)
    evidence = fp.observe(problem, problem.params, x, opt.needs(0))
    copies = {k: g.clone() for k, g in evidence.grads.items()}
    first, second = (opt.update((), g, evidence)[1] for g in (copies, evidence.grads))
    a, b = reference.ravel(first), reference.ravel(second)
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_adding_the_constant_vector_to_the_centred_kernel_changes_nothing():
    problem = oscillator()
    x = scientific.drawn(scientific.log_density(problem.params), 40, 0)
    weights = torch.full_like(x, 1 / 40)
    u, r, _ = dense(problem.params, x, weights, scientific.harmonic)
    kernel = u @ u.T + LAM * reference.eye(40)
    other = u.T @ torch.linalg.solve(kernel + 1 / 40, r)
    _, direction, _ = problems.update(Toy(problem, (x,)), fp.sr(damping=LAM))
    torch.testing.assert_close(reference.ravel(direction), other, rtol=1e-8, atol=1e-10)


def test_small_steps_are_imaginary_time():
    """``da/dτ = ½ - 2 a²`` for ``ψ = exp(-a x²)``, so ``a = ½ tanh(τ + artanh 2 a₀)``."""

    def gaussian(params, x):
        return -params["a"] * x**2

    start = {"a": torch.tensor(0.2, dtype=torch.float64)}
    local = scientific.energy_of(scientific.harmonic, gaussian)
    problem = fp.vmc(gaussian, local, params=start)
    opt = fp.chain(fp.sr(damping=1e-12), fp.scale(0.01))
    step, params = fp.make_step(problem, opt), start
    state = opt.init(params)
    for t in range(50):
        batch = scientific.quadrature(scientific.log_density(params, gaussian), nodes=201)
        params, state, evidence = step(params, state, batch, t)
        if t == 0:
            a = start["a"]
            torch.testing.assert_close(evidence.loss, a / 2 + 1 / (8 * a))
            torch.testing.assert_close(params["a"] - a, 0.01 * (0.5 - 2 * a * a), rtol=1e-8, atol=0)
    assert abs(float(params["a"]) - 0.5 * math.tanh(0.5 + math.atanh(0.4))) < 2e-3


def test_hydrogen():
    """``ψ = exp(-z r)`` with the weight r²: ``E = z²/2 - z``, and ``d = (2/3) z² (z - 1)``."""

    def psi(params, r):
        return -params["z"] * r

    def local_energy(params, r):
        z = params["z"]
        return -0.5 * (z * z - 2 * z / r) - 1 / r

    z = torch.tensor(0.7, dtype=torch.float64)
    problem = fp.vmc(psi, local_energy, params={"z": z})
    batch = scientific.quadrature(lambda r: -2 * z * r + 2 * r.log(), 1e-6, 40.0, 40001)
    _, direction, evidence = problems.update(Toy(problem, (batch,)), fp.sr(damping=1e-12))
    torch.testing.assert_close(evidence.loss, z * z / 2 - z, rtol=1e-5, atol=0)
    torch.testing.assert_close(direction["z"], 2 / 3 * z * z * (z - 1), rtol=1e-4, atol=0)


def trained(opt, potential, steps=100):
    """The energy by quadrature, after steps with 200 exact samples each."""
    problem = oscillator(potential)
    step, params, state = fp.make_step(problem, opt), problem.params, opt.init(problem.params)
    for t in range(steps):
        x = scientific.drawn(scientific.log_density(params), 200, 1000 + t, nodes=4001)
        params, state, _ = step(params, state, x, t)
    x, weights = scientific.quadrature(scientific.log_density(params))
    return float(dense(params, x, weights, potential)[2])


def test_the_harmonic_oscillator_is_found():
    energy = trained(fp.chain(fp.sr(damping=1e-4), fp.scale(0.3)), scientific.harmonic)
    assert -1e-12 < energy - 0.5 < 1e-3


@pytest.mark.parametrize(
    ("method", "rate"), [(fp.sr(damping=LAM), 0.1), (fp.spring(damping=LAM, decay=0.9), 0.05)]
)
def test_the_quartic_oscillator_is_found_and_never_undercut(method, rate):
    opt = fp.chain(method, fp.scale(rate), fp.clip_norm(0.1))
    energy = trained(opt, scientific.quartic)
    assert -1e-9 < energy - QUARTIC_ENERGY < 5e-3
