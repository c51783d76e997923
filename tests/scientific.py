"""Residual problems and wave functions, and the same by other means: jets, quadrature, grids.

Float64 throughout. Networks are dicts of tensors, applied to one point.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

import funcprecond as fp
from tests import reference
from tests.problems import normal, seeded

PI = math.pi


def network(sizes, seed=0):
    """Tanh layers, with weights of variance one over their inputs and zero biases."""
    params = {}
    for n, (i, o) in enumerate(pairwise(sizes)):
        params[f"w{n}"] = normal((o, i), 100 * seed + n) / math.sqrt(i)
        params[f"b{n}"] = torch.zeros(o, dtype=torch.float64)
    return params


def net(params, x):
    """The network at one point, (d,)."""
    for n in range(len(params) // 2):
        x = params[f"w{n}"] @ (torch.tanh(x) if n else x) + params[f"b{n}"]
    return x[0]


def laplacian(params, x):
    """By derivatives of derivatives."""
    return hessian(net, argnums=1)(params, x).trace()


def jets(params, x):
    """The values and the Laplacians, (N,), at points (N, d), by Taylor's formula in each layer."""
    d = x.shape[-1]
    first = torch.eye(d, dtype=x.dtype).expand(len(x), d, d)
    second = torch.zeros(len(x), d, d, dtype=x.dtype)
    for n in range(len(params) // 2):
        if n:
            t = torch.tanh(x)
            slope = (1 - t * t).unsqueeze(1)
            second = slope * second - 2 * t.unsqueeze(1) * slope * first**2
            x, first = t, slope * first
        w = params[f"w{n}"]
        x, first, second = x @ w.T + params[f"b{n}"], first @ w.T, second @ w.T
    return x[:, 0], second[..., 0].sum(1)


# --------------------------------------------------------------------------- Poisson's equation
def solution(x):
    return torch.sin(PI * x).prod(-1)


BOUNDARY = 4.0


def poisson(n=6, sizes=(2, 8, 1), seed=0):
    """``Δu = f`` on the unit square, on midpoints, with the solution ``sin πx sin πy``."""
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    inside = torch.cartesian_prod(s, s)
    sides = [(s, zero), (s, one), (zero, s), (one, s)]
    edge = torch.cat([torch.stack(side, 1) for side in sides])
    batch = {
        "interior": (inside, -2 * PI**2 * solution(inside)),
        "boundary": (edge, solution(edge)),
    }
    blocks = {
        "interior": lambda p, x, y: laplacian(p, x) - y,
        "boundary": (lambda p, x, y: net(p, x) - y, BOUNDARY),
    }
    return fp.residuals(blocks, params=network(sizes, seed)), batch


def poisson_residual(params, batch):
    """r, written out with the jets."""
    (x, f), (edge, y) = batch["interior"], batch["boundary"]
    inside = (jets(params, x)[1] - f) / len(x) ** 0.5
    return torch.cat([inside, (jets(params, edge)[0] - y) * (BOUNDARY / len(edge)) ** 0.5])


def jacobian(function, params):
    """J, (R, P), of a function of a dict, one reverse pass a row."""

    def flat(v):
        return function(reference.unravel(v, params))

    return torch.autograd.functional.jacobian(flat, reference.ravel(params))


def poisson1d(seed=0):
    """``u'' = f`` on (0, 1) with the solution ``sin πx``, and the relative error of a network."""
    s = ((torch.arange(40, dtype=torch.float64) + 0.5) / 40).unsqueeze(1)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    batch = {"interior": (s, -(PI**2) * torch.sin(PI * s[:, 0])), "ends": ends}
    blocks = {"interior": lambda p, x, y: laplacian(p, x) - y, "ends": (net, 10.0)}
    grid = torch.linspace(0, 1, 201, dtype=torch.float64).unsqueeze(1)
    exact = torch.sin(PI * grid[:, 0])

    def error(params):
        return float((jets(params, grid)[0] - exact).norm() / exact.norm())

    return fp.residuals(blocks, params=network((1, 16, 1), seed)), batch, error


# -------------------------------------------------------------------------------- linear problems
def linear(a, b, theta):
    """``½ ‖A θ - b‖²`` as a residual problem: J is A, and r is ``A θ - b``."""
    problem = fp.residuals(
        {"rows": (lambda p, a, b: a @ p["theta"] - b, float(len(a)))}, params={"theta": theta}
    )
    return problem, {"rows": (a, b)}


# -------------------------------------------------------------------------------- wave functions
def log_psi(params, x):
    return -0.3 * x**2 + net(params, x.reshape(1) / 2)


def energy_of(potential, psi=log_psi):
    """The local energy of ``H = -½ d²/dx² + V``."""

    def local_energy(params, x):
        slope = grad(psi, argnums=1)
        return -0.5 * (grad(slope, argnums=1)(params, x) + slope(params, x) ** 2) + potential(x)

    return local_energy


def harmonic(x):
    return 0.5 * x**2


def quartic(x):
    return 0.5 * x**2 + x**4


QUARTIC_ENERGY = 0.803770651234


def quadrature(log_density, low=-8.0, high=8.0, nodes=801):
    """Nodes and weights with the sum 1 for a density ``exp(log_density)``."""
    x = torch.linspace(low, high, nodes, dtype=torch.float64)
    return x, log_density(x).softmax(0)


def drawn(log_density, count, seed, low=-8.0, high=8.0, nodes=20001):
    """Exact samples of a density on a line, by its distribution function: no Markov chain."""
    x = torch.linspace(low, high, nodes, dtype=torch.float64)
    total = log_density(x).softmax(0).cumsum(0)
    u = torch.rand(count, generator=seeded(seed), dtype=torch.float64) * total[-1]
    i = torch.searchsorted(total, u).clamp(1, nodes - 1)
    share = (u - total[i - 1]) / (total[i] - total[i - 1]).clamp_min(1e-300)
    return x[i - 1] + (x[i] - x[i - 1]) * share


def log_density(params, psi=log_psi):
    """``2 log ψ`` at many points."""
    return lambda x: 2 * vmap(psi, (None, 0))(params, x)


def ground_energy(potential, low=-8.0, high=8.0, nodes=400):
    """The least eigenvalue of the Hamiltonian on a Fourier grid."""
    x = torch.linspace(low, high, nodes, dtype=torch.float64)
    d = x.new_tensor(range(nodes)).unsqueeze(1) - x.new_tensor(range(nodes))
    off = (-1.0) ** d.abs() / d.square().clamp_min(1)
    kinetic = torch.where(d == 0, PI**2 / 6, off) / (x[1] - x[0]) ** 2
    return float(torch.linalg.eigvalsh(kinetic + torch.diag(potential(x)))[0])


def push(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    """``Jᵀ (J Jᵀ + λ I)⁻¹ r``."""
    gram = matrix @ matrix.T + damping * reference.eye(len(matrix))
    return matrix.T @ torch.linalg.solve(gram, vector)
