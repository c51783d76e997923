"""Float64, float32, and bfloat16 models with float32 factors: all against the float64 values."""

import pytest
import torch
from torch import nn

import funcprecond as fp
from tests import problems, reference
from tests.problems import normal, seeded

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06}


def toy(dtype):
    module = problems.initialised(
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    )
    x, y = normal((6, 2, 5), 1), torch.arange(6) % 3
    # Rounded first, so that all dtypes start from the same values.
    module, x = (t.bfloat16().to(dtype) for t in (module, x))
    return fp.problem(module, fp.losses.cross_entropy), (x, y)


def vector(problem):
    return {
        k: normal(p.shape, i).bfloat16().float().to(torch.promote_types(p.dtype, torch.float32))
        for i, (k, p) in enumerate(problem.params.items())
    }


def tol(problem):
    return 0.02 if problem.params["0.weight"].dtype == torch.bfloat16 else 1e-6


QUANTITIES = {
    "Hessian": lambda p, b, v: fp.Hessian(p, p.params, b) @ v,
    "GGN": lambda p, b, v: fp.GGN(p, p.params, b) @ v,
    "streamed": lambda p, b, v: fp.GGN(p, p.params, batches=[b, b]) @ v,
    "empirical": lambda p, b, v: fp.Fisher(p, p.params, b, labels="empirical") @ v,
    "sampled": lambda p, b, v: fp.Fisher(p, p.params, b, labels="mc", generator=seeded(0)) @ v,
    "K-FAC": lambda p, b, v: fp.KroneckerFactored(p, p.params, b, labels="exact") @ v,
    "K-FAC, inverse": lambda p, b, v: (
        fp.KroneckerFactored(p, p.params, b, labels="exact").inverse(0.1) @ v
    ),
    "EKFAC": lambda p, b, v: (
        fp.KroneckerFactored(p, p.params, b, kind="ekfac", labels="exact").inverse(0.1) @ v
    ),
    "diagonal": lambda p, b, v: fp.DiagonalGGN(p, p.params, b) @ v,
    "trace": lambda p, b, v: fp.GGN(p, p.params, b).trace(),
    "norms": lambda p, b, v: fp.per_sample_norms(p, p.params, b),
    "Gram": lambda p, b, v: fp.per_sample_gram(p, p.params, b),
    "tangent kernel": lambda p, b, v: fp.ntk(p, p.params, b),
    "eigenvalues": lambda p, b, v: (
        fp.eigsh(fp.GGN(p, p.params, b), 2, tol=tol(p), generator=seeded(0)).values
    ),
    "CG": lambda p, b, v: fp.GGN(p, p.params, b).solve(v, damping=0.5, tol=tol(p)).solution,
    "MINRES": lambda p, b, v: (
        fp.Hessian(p, p.params, b).solve(v, damping=3.0, method="minres", tol=tol(p)).solution
    ),
    "Nyström CG": lambda p, b, v: (
        fp.nystrom_cg(
            fp.GGN(p, p.params, b), v, damping=0.5, rank=5, tol=tol(p), generator=seeded(0)
        ).solution
    ),
}


def flat(value):
    return reference.ravel(value) if isinstance(value, dict) else value.reshape(-1)


@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_quantity_is_that_of_float64_up_to_rounding(name, dtype):
    problem, batch = toy(dtype)
    found = flat(QUANTITIES[name](problem, batch, vector(problem)))
    # Vectors are float32 throughout: whatever is accumulated is in float32 or wider.
    assert found.dtype == torch.float32
    wide, batch = toy(torch.float64)
    expected = flat(QUANTITIES[name](wide, batch, vector(wide))).double()
    assert (found.double() - expected).norm() < DTYPES[dtype] * expected.norm()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_factors_of_a_bfloat16_model_are_float32(kind):
    problem, batch = toy(torch.bfloat16)
    c = fp.KroneckerFactored(problem, problem.params, batch, kind=kind, labels="exact")
    tensors = [x for block in c.layers.values() for x in fp.tree.leaves(block) if x is not None]
    assert {x.dtype for x in tensors} == {torch.float32}
    gradient = fp.observe(problem, problem.params, batch).grads
    assert {x.dtype for x in (c.inverse(0.1) @ gradient).values()} == {torch.bfloat16}
