"""Residual problems and wave functions: their loss, gradient, rows and products, by other means."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import funcprecond as fp
from funcprecond.curvature import ResidualRows
from funcprecond.representation.gram import Gram
from tests import reference, scientific
from tests.equality import assert_close
from tests.problems import normal, seeded
from tests.scientific import jacobian, poisson, poisson_residual

NEED = ResidualRows()


def measured(problem, params, batch):
    evidence = fp.observe(problem, params, batch, (NEED,))
    found = evidence[NEED]
    return evidence, Gram.from_layers(found.layers, params).rows(), found.residual


# ------------------------------------------------------------------------------------- residuals
def test_laplacians_by_nested_derivatives_are_those_of_the_jets():
    problem, batch = poisson()
    x = batch["interior"][0]
    nested = vmap(scientific.laplacian, (None, 0))(problem.params, x)
    torch.testing.assert_close(nested, scientific.jets(problem.params, x)[1])


def test_the_loss_the_rows_and_the_residuals_are_those_of_the_jets():
    problem, batch = poisson()
    evidence, rows, residual = measured(problem, problem.params, batch)
    expected = poisson_residual(problem.params, batch)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(evidence.loss, expected.square().sum() / 2)
    torch.testing.assert_close(
        rows, jacobian(lambda p: poisson_residual(p, batch), problem.params), rtol=1e-9, atol=1e-10
    )


def test_the_gradient_is_the_residuals_pulled_back():
    problem, batch = poisson()
    evidence, rows, residual = measured(problem, problem.params, batch)
    torch.testing.assert_close(
        rows.T @ residual, reference.ravel(evidence.grads), rtol=1e-8, atol=1e-10
    )

    def loss(params):
        return poisson_residual(params, batch).square().sum() / 2

    assert_close(evidence.grads, reference.gradient(loss, problem.params), rtol=1e-6)


def test_the_operators_are_gauss_newton_and_that_plus_the_curvature_of_the_residuals():
    problem, batch = poisson(n=3, sizes=(2, 3, 1))
    params = problem.params
    _, rows, residual = measured(problem, params, batch)
    ggn = fp.GGN(problem, params, batch).to_dense()
    torch.testing.assert_close(ggn, rows.T @ rows, rtol=1e-8, atol=1e-9)

    def slopes(v):
        return jacobian(lambda p: poisson_residual(p, batch), reference.unravel(v, params))

    flat, step = reference.ravel(params), 1e-5
    curved = torch.zeros_like(ggn)
    for i, e in enumerate(torch.eye(len(flat), dtype=flat.dtype)):
        change = (slopes(flat + step * e) - slopes(flat - step * e)) / (2 * step)
        curved[i] = residual @ change
    hessian = fp.Hessian(problem, params, batch).to_dense()
    torch.testing.assert_close(hessian, ggn + curved, rtol=1e-5, atol=1e-5)
    assert (hessian - ggn).norm() > 0.1 * ggn.norm()


def test_products_with_the_jacobian_are_those_of_the_rows():
    problem, batch = poisson()
    _, rows, _ = measured(problem, problem.params, batch)
    v = {k: normal(p.shape, 9 + i) for i, (k, p) in enumerate(problem.params.items())}
    pushed = fp.jvp(problem, problem.params, batch, v)
    scaled = [pushed["interior"] / 6, pushed["boundary"] * (4.0 / 24) ** 0.5]
    torch.testing.assert_close(torch.cat(scaled), rows @ reference.ravel(v), rtol=1e-8, atol=1e-9)


def test_blocks_may_have_vector_residuals_other_inputs_and_tensor_weights():
    params = {"w": normal((2, 3)), "unused": normal((2,))}
    blocks = {
        "pairs": (lambda p, x: torch.tanh(p["w"] @ x), torch.tensor(3.0, dtype=torch.float64)),
        "sums": lambda p, x, y: p["w"].sum() * x + y,
    }
    problem = fp.residuals(blocks, params=params)
    batch = {"pairs": normal((4, 3), 1), "sums": (normal((5,), 2), normal((5,), 3))}
    _, rows, residual = measured(problem, params, batch)

    def expected(p):
        first = torch.tanh(batch["pairs"] @ p["w"].T) * (3 / 4) ** 0.5
        x, y = batch["sums"]
        return torch.cat([first.reshape(-1), (p["w"].sum() * x + y) / 5**0.5])

    torch.testing.assert_close(residual, expected(params))
    torch.testing.assert_close(rows, jacobian(expected, params))


def test_a_problem_of_examples_has_the_errors_of_the_squared_loss():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = normal((5, 3)), normal((5, 2), 1)
    for loss in (fp.losses.mse, fp.losses.MSE("sum")):
        problem = fp.problem(model, loss)
        evidence, rows, residual = measured(problem, problem.params, batch)
        torch.testing.assert_close(evidence.loss, residual.square().sum() / 2)
        torch.testing.assert_close(rows.T @ residual, reference.ravel(evidence.grads))
        ggn = reference.ggn(problem, problem.params, batch)
        torch.testing.assert_close(rows.T @ rows, ggn)


def test_a_module_is_called_at_one_point():
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    plain = {k: p.detach() for k, p in model.named_parameters()}

    def slope(params, x):
        return grad(lambda x: functional_call(model, params, x)[0])(x).sum() - 1.0

    problem = fp.residuals({"slope": slope}, params=plain)
    batch = {"slope": normal((6, 2))}
    evidence, rows, residual = measured(problem, plain, batch)
    torch.testing.assert_close(rows.T @ residual, reference.ravel(evidence.grads))
    found = torch.stack([slope(plain, x) for x in batch["slope"]])
    torch.testing.assert_close(evidence.outputs["slope"], found)


@pytest.mark.parametrize(
    "opt",
    [fp.adam(), fp.shampoo(), fp.lbfgs(), fp.adahessian(), fp.hessian_free(max_iter=5, trials=2)],
)
def test_other_methods_train_it(opt):
    problem, batch = poisson(n=3, sizes=(2, 4, 1))
    step, params, state = fp.make_step(problem, opt, rate=1e-3), problem.params, None
    state, losses = opt.init(params), []
    for t in range(4):
        noise = fp.draw(problem, params, batch, opt.needs(t), generator=seeded(t))
        params, state, evidence = step(params, state, batch, t, noise)
        losses.append(float(evidence.loss))
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("opt", [fp.engd(damping=1.0), fp.spring(damping=1.0)])
def test_a_compiled_step_is_the_eager_one(opt):
    torch._dynamo.reset()

    def curved(params, x):
        slope = grad(scientific.net, argnums=1)
        basis = torch.eye(2, dtype=x.dtype)
        return sum(jvp(lambda x: slope(params, x), (x,), (e,))[1] @ e for e in basis)

    params = scientific.network((2, 4, 1))
    problem, batch = fp.residuals({"all": curved}, params=params), {"all": normal((5, 2))}
    ends = []
    for compile_ in (False, True):
        step = fp.make_step(problem, opt, compile=compile_, rate=0.1)
        p, state = params, opt.init(params)
        for t in range(2):
            p, state, evidence = step(p, state, batch, t)
        ends.append((p, state, evidence.loss))
    assert_close(ends[1], ends[0], rtol=1e-9)


@pytest.mark.parametrize("opt", [fp.kfac(labels="empirical"), fp.ekfac(labels="empirical")])
def test_methods_of_layers_are_refused(opt):
    problem, batch = poisson(n=2)
    with pytest.raises(TypeError, match="no examples of one kind.*fp.engd"):
        fp.observe(problem, problem.params, batch, opt.needs(0))


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="at least one block"):
        fp.residuals({}, params={})
    with pytest.raises(TypeError, match="block 'a' must be a function"):
        fp.residuals({"a": 3.0}, params={})
    params = {"w": normal((3,))}
    problem = fp.residuals({"a": lambda p, x: p["w"] @ x}, params=params)
    for batch, sentence in (
        ({"b": normal((4, 3))}, r"dict with the blocks \['a'\], not \['b'\]"),
        (normal((4, 3)), r"not Tensor"),
        ({"a": normal((0, 3))}, r"points of 'a'.*at least one, not \[\(0, 3\)\]"),
        ({"a": (normal((4, 3)), normal((5,)))}, r"one length.*\[\(4, 3\), \(5,\)\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fp.observe(problem, params, batch)
    wide = fp.residuals({"a": lambda p, x: torch.outer(x, p["w"])}, params=params)
    with pytest.raises(ValueError, match=r"'a' must return \(\) or \(C,\).*\(3, 3\)"):
        fp.observe(wide, params, {"a": normal((4, 3))})


# -------------------------------------------------------------------------------- wave functions
def oscillator(seed=3, **options):
    params = scientific.network((1, 16, 1), seed)
    local = scientific.energy_of(scientific.harmonic)
    return fp.vmc(scientific.log_psi, local, params=params, **options)


def by_quadrature(params):
    """The energy as a function of the parameters: the weights move with them."""
    x, weights = scientific.quadrature(scientific.log_density(params))
    local = scientific.energy_of(scientific.harmonic)
    return (weights * vmap(local, (None, 0))(params, x)).sum()


def test_the_energy_its_gradient_and_its_rows():
    problem = oscillator()
    params = problem.params
    batch = scientific.quadrature(scientific.log_density(params))
    evidence, rows, residual = measured(problem, params, batch)
    torch.testing.assert_close(evidence.loss, by_quadrature(params))
    expected = reference.gradient(by_quadrature, params, step=1e-5)
    assert_close(evidence.grads, expected, rtol=1e-6)
    flat = reference.ravel(evidence.grads)
    torch.testing.assert_close(2 * rows.T @ residual, flat, rtol=1e-9, atol=1e-12)
    # The derivative of the value at fixed samples is another vector.
    x, weights = batch
    local = scientific.energy_of(scientific.harmonic)
    fixed = grad(lambda p: (weights * vmap(local, (None, 0))(p, x)).sum())(params)
    assert (reference.ravel(fixed) - flat).norm() > 0.1 * flat.norm()


def test_the_rows_are_half_the_scores_of_the_density():
    problem = oscillator()
    params = problem.params
    x, weights = scientific.quadrature(scientific.log_density(params), nodes=101)
    _, rows, _ = measured(problem, params, (x, weights))
    scores = jacobian(lambda p: scientific.log_density(p)(x).log_softmax(0), params)
    fisher = scores.T @ (weights.unsqueeze(1) * scores)
    torch.testing.assert_close(4 * rows.T @ rows, fisher, rtol=1e-8, atol=1e-10)


def test_samples_without_weights_count_equally():
    problem = oscillator()
    x = scientific.drawn(scientific.log_density(problem.params), 50, 0)
    first = measured(problem, problem.params, x)
    second = measured(problem, problem.params, (x, torch.ones(50, dtype=torch.float64)))
    assert_close(first[1:], second[1:])
    assert_close(first[0].grads, second[0].grads)


def test_clipping_changes_the_gradient_and_not_the_energy():
    x = normal((20,)) * 3
    plain, clipped = oscillator(), oscillator(clip=1.0)
    energies = fp.observe(plain, plain.params, x).outputs["local_energy"]
    centred = energies - energies.mean()
    bound = centred.abs().mean()
    limited = centred.clamp(-bound, bound)
    assert not torch.equal(limited, centred)
    evidence, rows, residual = measured(clipped, plain.params, x)
    torch.testing.assert_close(evidence.loss, energies.mean())
    torch.testing.assert_close(residual, (limited - limited.mean()) / 20**0.5)
    torch.testing.assert_close(2 * rows.T @ residual, reference.ravel(evidence.grads))


def test_at_the_ground_state_every_local_energy_is_the_same():
    def ground(params, x):
        return -params["a"] * x**2

    local = scientific.energy_of(scientific.harmonic, ground)
    problem = fp.vmc(ground, local, params={"a": torch.tensor(0.5, dtype=torch.float64)})
    x = scientific.drawn(scientific.log_density(problem.params, ground), 100000, 0)
    assert abs(float(x.var()) - 0.5) < 5 * 0.5 * (2 / 1e5) ** 0.5
    evidence = fp.observe(problem, problem.params, x)
    assert float((evidence.outputs["local_energy"] - 0.5).abs().max()) < 1e-12
    assert abs(float(evidence.grads["a"])) < 1e-12


def test_the_energies_of_the_grid_are_known():
    assert abs(scientific.ground_energy(scientific.harmonic) - 0.5) < 1e-10
    quartic = scientific.ground_energy(scientific.quartic)
    assert abs(quartic - scientific.QUARTIC_ENERGY) < 1e-9


def step_of(method):
    def step(problem, x):
        opt = method()
        evidence = fp.observe(problem, problem.params, x, opt.needs(0), generator=seeded(0))
        opt.update(opt.init(problem.params), evidence.grads, evidence)

    return step


def product_of(operator):
    return lambda problem, x: operator(problem, problem.params, x).to_dense()


@pytest.mark.parametrize(
    "use",
    [
        *map(step_of, (fp.engd, fp.hessian_free, fp.adahessian)),
        *map(product_of, (fp.GGN, fp.Hessian)),
    ],
)
def test_what_needs_the_energy_at_other_parameters_is_refused(use):
    with pytest.raises(TypeError, match="samples of this problem belong to the parameters"):
        use(oscillator(), normal((10,)))


def test_a_step_is_differentiable_and_maps_over_members():
    problem, opt = oscillator(), fp.chain(fp.spring(damping=1e-2), fp.scale(0.1))
    step, params = fp.make_step(problem, opt), problem.params
    x = scientific.drawn(scientific.log_density(params), 12, 0)

    def trained(scale):
        p, state = {k: scale * v for k, v in params.items()}, opt.init(params)
        for t in range(2):
            p, state, _ = step(p, state, x, t)
        return sum(v.sin().sum() for v in p.values())

    one = torch.ones((), dtype=torch.float64)
    slope = (trained(one + 1e-5) - trained(one - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(trained)(one), slope, rtol=1e-6, atol=1e-8)
    scales = torch.tensor([0.9, 1.1], dtype=torch.float64)
    torch.testing.assert_close(vmap(trained)(scales), torch.stack([trained(s) for s in scales]))


def test_functions_that_do_not_return_one_real_number_are_refused():
    params = {"a": normal((2,))}
    with pytest.raises(TypeError, match="local_energy must be a function"):
        fp.vmc(lambda p, x: x, 1.0, params=params)
    for psi in (lambda p, x: p["a"] * x, lambda p, x: p["a"].sum() * x * 1j):
        problem = fp.vmc(psi, lambda p, x: x, params=params)
        with pytest.raises(ValueError, match="log_psi must return a real 0-d tensor"):
            fp.observe(problem, params, normal((4,)))
