"""Products with kept graphs are differentiable in the vector, in every way and to any order."""

import pytest
import torch
from torch.autograd import forward_ad

import funcprecond as fp
from funcprecond.linalg import treemath
from tests import problems
from tests.equality import assert_close
from tests.problems import normal, seeded

TOY = problems.mlp()
DATA = (TOY.problem, TOY.params, TOY.batch)
RUN = fp.linearize(*DATA)
U = normal(RUN.outputs.shape, 9)
KFAC = fp.KroneckerFactored(*DATA, labels="exact")
OWN = fp.problem(TOY.problem.module, lambda outputs, y: outputs.logsumexp(-1).pow(2).mean())
SAMPLED = fp.Fisher(*DATA, labels="mc", generator=seeded(0))
FORMS = {
    "GGN": lambda v: treemath.dot(v, fp.GGN(*DATA) @ v),
    "GGN of a loss of one's own": lambda v: treemath.dot(v, fp.GGN(OWN, *DATA[1:]) @ v),
    "Hessian": lambda v: treemath.dot(v, fp.Hessian(*DATA) @ v),
    "empirical": lambda v: treemath.dot(v, fp.Fisher(*DATA, labels="empirical") @ v),
    "sampled": lambda v: treemath.dot(v, SAMPLED @ v),
    "streamed": lambda v: treemath.dot(v, fp.GGN(*DATA[:2], batches=[TOY.batch]) @ v),
    "K-FAC": lambda v: treemath.dot(v, KFAC @ v),
    "inverse": lambda v: treemath.dot(v, KFAC.inverse(0.1) @ v),
    "hvp": lambda v: treemath.dot(v, fp.hvp(*DATA, v)),
    "ggn_mv": lambda v: treemath.dot(v, fp.ggn_mv(*DATA, v)),
    "fisher_mv": lambda v: treemath.dot(v, fp.fisher_mv(*DATA, v, labels="empirical")),
    "jvp": lambda v: fp.jvp(*DATA, v).square().sum(),
    "vjp": lambda v: treemath.norm(fp.vjp(*DATA, U * v["0.bias"].sum())) ** 2,
    "kept hvp": lambda v: treemath.dot(v, RUN.hvp(v)),
    "kept ggn_mv": lambda v: treemath.dot(v, RUN.ggn_mv(v)),
    "kept form": lambda v: RUN.ggn_form(v),
    "kept jvp": lambda v: RUN.jvp(v).square().sum(),
    "kept pull": lambda v: treemath.norm(RUN.pull(U * v["0.bias"].sum())) ** 2,
}
V = {k: normal(p.shape, i) for i, (k, p) in enumerate(TOY.params.items())}
W = {k: normal(p.shape, 9 + i) for i, (k, p) in enumerate(TOY.params.items())}


def along(form):
    """A quadratic function of one number, with its exact first and second derivative at 0."""

    def f(s):
        return form({k: x + s * W[k] for k, x in V.items()})

    at = [f(torch.tensor(s, dtype=torch.float64)).detach() for s in (-1.0, 0.0, 1.0)]
    return f, (at[2] - at[0]) / 2, at[2] - 2 * at[1] + at[0]


@pytest.mark.parametrize("name", FORMS)
def test_quadratic_forms_have_the_derivatives_of_a_parabola(name):
    f, slope, curvature = along(FORMS[name])
    zero = torch.zeros((), dtype=torch.float64)
    assert_close(torch.func.grad(f)(zero), slope, rtol=1e-7)
    assert_close(torch.func.jvp(f, (zero,), (zero + 1,))[1], slope, rtol=1e-7)
    assert_close(torch.func.grad(torch.func.grad(f))(zero), curvature, rtol=1e-7)
    x = zero.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    assert_close(first.detach(), slope, rtol=1e-7)
    assert_close(torch.autograd.grad(first, x)[0], curvature, rtol=1e-7)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(zero, zero + 1))).tangent
    assert_close(tangent, slope, rtol=1e-7)


# A product with the sampled matrix draws labels, which vmap forbids.
@pytest.mark.parametrize("name", [name for name in FORMS if name != "sampled"])
def test_derivatives_can_be_vmapped(name):
    f, slope, curvature = along(FORMS[name])
    points = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    assert_close(torch.vmap(torch.func.grad(f))(points), slope + curvature * points, rtol=1e-7)
    x = points.clone().requires_grad_()
    found = torch.autograd.grad(torch.vmap(f)(x).sum(), x)[0]
    assert_close(found, slope + curvature * points, rtol=1e-7)
