import pytest
import torch
from hypothesis import given

from funcprecond.representation.average import Average
from funcprecond.representation.diagonal import Diagonal
from funcprecond.solver.divide import Divide
from tests import strategies
from tests.equality import assert_close
from tests.problems import normal


def diagonal(d):
    return Diagonal(Average(d, torch.ones((), dtype=torch.float64)))


@pytest.mark.parametrize("power", [0.5, 1.0, 0.25])
@given(x=strategies.vectors(), seed=strategies.seeds)
def test_it_divides_by_the_power_of_the_magnitude_plus_the_damping(power, x, seed):
    g = {k: normal(v.shape, seed + i) for i, (k, v) in enumerate(x.items())}
    solver = Divide(0.1, power)
    factor = solver.prepare(diagonal(x), solver.init(diagonal(x)))
    expected = {k: g[k] / (x[k].abs() ** power + 0.1) for k in x}
    assert_close(solver.apply(factor, g), expected, rtol=1e-13)


def test_before_any_measurement_it_divides_by_the_damping():
    g = {"w": normal((3,))}
    solver = Divide(0.5)
    assert_close(solver.apply(solver.init(Diagonal.init(g)), g)["w"], 2 * g["w"])


def test_its_first_factor_shares_no_memory_with_the_representation():
    rep = Diagonal.init({"w": torch.zeros(3)})
    assert Divide().init(rep)["w"].data_ptr() != rep.average.total["w"].data_ptr()


def test_the_direction_keeps_the_gradients_dtype():
    g = {"w": normal((3,)).bfloat16()}
    solver, rep = Divide(), Diagonal.init(g)
    assert solver.apply(solver.init(rep), g)["w"].dtype == torch.bfloat16


def test_the_damping_may_be_a_tensor_under_vmap():
    g = {"w": normal((3,))}
    rep = diagonal({"w": normal((3,), 1)})

    def direction(damping):
        solver = Divide(damping)
        return solver.apply(solver.prepare(rep, solver.init(rep)), g)["w"]

    dampings = torch.tensor([0.1, 1.0], dtype=torch.float64)
    looped = torch.stack([direction(d) for d in dampings])
    assert_close(torch.vmap(direction)(dampings), looped, rtol=1e-13)
