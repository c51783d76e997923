import pytest
import torch

import funcprecond as fp
from tests.equality import assert_close, assert_same


def test_a_number_and_a_tensor_scale_alike(randn):
    g = {"w": randn(2, 3), "s": randn()}
    by_float, by_tensor = (
        fp.scale(f).update(fp.scale(f).init(g), g)[1]
        for f in (0.25, torch.tensor(0.25, dtype=torch.float64))
    )
    assert_same(by_float, {k: 0.25 * x for k, x in g.items()})
    assert_same(by_tensor, by_float)


def test_a_schedule_sees_the_steps_counted_from_zero(randn):
    opt = fp.scale(lambda t: torch.where(t < 2, 1.0, 0.5) / (1 + t))
    g = {"w": randn(3)}
    state, factors = opt.init(g), []
    for _ in range(4):
        state, direction = opt.update(state, g)
        factors.append((direction["w"] / g["w"])[0].item())
    assert factors == pytest.approx([1, 1 / 2, 0.5 / 3, 0.5 / 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.1, torch.tensor(0.1), lambda t: 0.1 / (1 + t)])
def test_the_dtype_of_the_gradient_stays(factor, dtype, randn):
    g = {"w": randn(3, dtype=dtype)}
    opt = fp.scale(factor)
    assert opt.update(opt.init(g), g)[1]["w"].dtype == dtype


def test_a_tensor_of_another_precision_does_not_change_the_dtype(randn):
    g = {"w": randn(3, dtype=torch.float32), "v": randn(2, 2, dtype=torch.float32)}
    _, direction = fp.scale(torch.tensor(0.1, dtype=torch.float64)).update((), g)
    assert {d.dtype for d in direction.values()} == {torch.float32}


def test_vmap_over_learning_rates_equals_the_loop(randn):
    g = {"w": randn(2, 3), "s": randn()}
    rates = torch.tensor([0.1, 1.0, 10.0])
    mapped = torch.vmap(lambda r: fp.scale(r).update((), g)[1])(rates)
    for i, r in enumerate(rates):
        assert_close({k: x[i] for k, x in mapped.items()}, fp.scale(r).update((), g)[1])


def test_gradients_flow_to_the_learning_rate(randn):
    g = {"w": randn(3)}
    rate = torch.tensor(0.1, dtype=torch.float64)
    slope = torch.func.grad(lambda r: fp.scale(r).update((), g)[1]["w"].sum())(rate)
    assert_close(slope, g["w"].sum())
