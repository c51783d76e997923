# %% [markdown]
# # Equations and ground states: where Gauss-Newton wins
#
# A physics-informed network is trained so that it satisfies a differential equation at some points,
# and boundary conditions at others. The loss is half a sum of squares of residuals r, and its
# Gauss-Newton matrix `JᵀJ`, with the Jacobian J of the residuals, is small enough to be solved
# with: it has one row for each parameter, or, as `J Jᵀ`, one for each point. The method is known as
# energy natural gradient (Müller & Zeinhofer, ICML 2023).

# %%
import time

import torch
from torch.func import grad, hessian, vmap

import funcprecond as fp

torch.set_num_threads(1)
pi = torch.pi

# %% [markdown]
# ## Poisson's equation
#
# `Δu = f` on the unit square, with `u = 0` on its boundary and the solution `sin πx sin πy`. A
# block of points has a function of *one* point and a weight. Its points are a tensor, or a tuple of
# tensors: here the coordinates, and the right side of the equation.


# %%
def u(params, x):
    return params["out"] @ torch.tanh(params["in"] @ x + params["bias"])


def interior(params, x, f):
    return hessian(u, argnums=1)(params, x).trace() - f


g = torch.Generator().manual_seed(0)
options = {"generator": g, "dtype": torch.float64}
start = {
    "in": torch.randn(24, 2, **options),
    "bias": torch.randn(24, **options),
    "out": torch.randn(24, **options) / 24**0.5,
}
problem = fp.residuals({"interior": interior, "boundary": (u, 4.0)}, params=start)

middle = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
inside = torch.cartesian_prod(middle, middle)
sides = [torch.stack([middle, torch.full_like(middle, end)], 1) for end in (0.0, 1.0)]
batch = {
    "interior": (inside, -2 * pi**2 * torch.sin(pi * inside).prod(1)),
    "boundary": torch.cat([*sides, *(side.flip(1) for side in sides)]),
}
grid = torch.cartesian_prod(*[torch.linspace(0, 1, 31, dtype=torch.float64)] * 2)
exact = torch.sin(pi * grid).prod(1)


def error(params):
    """The error of u on a grid of points that were not trained on, relative to the solution."""
    return float((vmap(u, (None, 0))(params, grid) - exact).norm() / exact.norm())


# %% [markdown]
# The loop is that of every other method. `engd` chooses the length of its steps by its damping, or
# by the paper's search on a grid, and so has no learning rate. Where the points are drawn anew in
# each step, and are fewer than the parameters, `spring` keeps what they cannot see of the last
# step.


# %%
def train(opt, steps):
    step, params, state = fp.make_step(problem, opt), problem.params, None
    state, begin = opt.init(params), time.perf_counter()
    for t in range(steps):
        params, state, _ = step(params, state, batch, t)
    return params, time.perf_counter() - begin


methods = {
    "Adam": (fp.chain(fp.adam(), fp.scale(1e-2)), 200),
    "L-BFGS": (fp.lbfgs(history=100), 100),
    "engd, grid": (fp.engd(damping=1e-8, search="grid"), 30),
    "engd": (fp.engd(), 60),
}
errors = {}
for name, (opt, steps) in methods.items():
    params, seconds = train(opt, steps)
    errors[name] = error(params)
    print(f"{name:12s}{steps:5d} steps{seconds:6.1f} s   error {errors[name]:.1e}")
assert max(errors["engd"], errors["engd, grid"]) < errors["Adam"] / 10
assert errors["engd, grid"] < errors["L-BFGS"] / 5

# %% [markdown]
# ## The ground state of a quartic oscillator
#
# The energy of a wave function ψ is a mean over samples of `|ψ|²`, which move with the parameters.
# `fp.vmc` knows the gradient of such an energy, and `sr`, stochastic reconfiguration, is its
# natural gradient. In one dimension, samples can be drawn exactly from a table; elsewhere a Markov
# chain draws them. The least energy of `½ x² + x⁴` is known from a fine grid: 0.803771.


# %%
def log_psi(params, x):
    return -0.5 * x**2 + params["out"] @ torch.tanh(params["in"] * x + params["bias"])


def local_energy(params, x):
    slope = grad(log_psi, argnums=1)
    curvature = grad(slope, argnums=1)(params, x)
    return -0.5 * (curvature + slope(params, x) ** 2) + 0.5 * x**2 + x**4


table = torch.linspace(-6, 6, 2001, dtype=torch.float64)


def samples(params, count):
    density = (2 * vmap(log_psi, (None, 0))(params, table)).softmax(0)
    places = torch.multinomial(density, count, replacement=True, generator=g)
    # A sample lies anywhere between two nodes of the table.
    return table[places] + (torch.rand(count, **options) - 0.5) * (table[1] - table[0])


start = {
    "in": torch.randn(12, **options),
    "bias": torch.randn(12, **options),
    "out": torch.randn(12, **options) / 12**0.5,
}
oscillator = fp.vmc(log_psi, local_energy, params=start)
for name, opt in {
    "Adam": fp.chain(fp.adam(), fp.scale(1e-2)),
    "sr": fp.chain(fp.sr(), fp.scale(0.1), fp.clip_norm(0.1)),
}.items():
    step, params, state = fp.make_step(oscillator, opt), start, opt.init(start)
    for t in range(100):
        params, state, _ = step(params, state, samples(params, 200), t)
    # The table with the density as weights gives the energy without chance.
    weights = (2 * vmap(log_psi, (None, 0))(params, table)).softmax(0)
    energy = float(fp.observe(oscillator, params, (table, weights)).loss)
    errors[name] = energy - 0.803771
    print(f"{name:12s} energy {energy:.6f}, {errors[name]:.1e} above the least")
assert -1e-5 < errors["sr"] < errors["Adam"] / 10
