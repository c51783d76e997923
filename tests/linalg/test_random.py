import pytest
import torch

from funcprecond.linalg import random

DRAWS = [random.uniform, random.normal, random.rademacher]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_draw_has_the_asked_shape_and_dtype(draw, dtype, generator):
    x = draw((2, 3), generator, dtype=dtype, device="cpu")
    assert (x.shape, x.dtype) == ((2, 3), dtype)


@pytest.mark.parametrize("draw", DRAWS)
def test_one_seed_gives_one_sequence(draw):
    def two():
        g = torch.Generator().manual_seed(5)
        return [draw((4,), g, dtype=torch.float64, device="cpu") for _ in range(2)]

    (a, b), (c, d) = two(), two()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("draw", DRAWS)
def test_torchs_global_generator_stays(draw, generator):
    before = torch.get_rng_state()
    draw((4,), generator, dtype=torch.float32, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", DRAWS)
def test_without_a_generator_it_says_what_to_pass(draw):
    with pytest.raises(ValueError, match="pass generator="):
        draw((1,), None, dtype=torch.float32, device="cpu")


def test_the_moments_are_those_of_the_distributions(generator):
    n = (40_000,)
    u, z, s = (d(n, generator, dtype=torch.float64, device="cpu") for d in DRAWS)
    assert u.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (u.min() >= 0) & (u.max() < 1)
    assert z.var().item() == pytest.approx(1.0, abs=0.03)
    assert s.unique().tolist() == [-1, 1]
    assert s.mean().item() == pytest.approx(0.0, abs=0.02)
