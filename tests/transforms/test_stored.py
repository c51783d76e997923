import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond import tree
from funcprecond.transforms.stored import pack, unpack
from tests import strategies
from tests.equality import assert_close, assert_same
from tests.linalg.test_blocking import path
from tests.problems import normal

BUILDERS = [fp.shampoo, fp.caspr, fp.soap]


def size(state):
    return sum(x.numel() * x.element_size() for x in tree.leaves(state))


@given(st.integers(0, 9), strategies.seeds)
def test_a_symmetric_matrix_is_its_triangle(n, seed):
    a = normal((n, n), seed)
    a = a + a.T
    assert pack(a).shape == (n * (n + 1) // 2,)
    assert torch.equal(unpack(pack(a)), a)
    assert_same(torch.vmap(lambda x: unpack(pack(x)))(torch.stack([a, 2 * a]))[1], 2 * a)


@pytest.mark.parametrize("build", BUILDERS)
@given(strategies.gradients(max_axes=2))
def test_triangles_change_no_direction(build, grads):
    # The second parameter has the name of a field whose matrices are symmetric.
    named = [{"w": g, "statistics": g, "totals": g, "roots": g} for g in grads]
    assert_close(path(build(packed=True), named), path(build(), named), rtol=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_triangles_take_about_half_of_the_statistics(build):
    g = {"w": normal((30, 20)), "v": normal((5,))}
    whole, halves = (size(build(packed=p).init(g)) for p in (False, True))
    statistics = 8 * (30 * 29 + 20 * 19) // 2
    assert whole - halves in (statistics, 2 * statistics)


@given(strategies.seeds, st.integers(1, 20))
def test_a_sum_in_bfloat16_is_within_the_bound_that_is_documented(seed, steps):
    grads = [normal((4, 3), seed + t) for t in range(steps)]
    opt = fp.shampoo(state_dtype=torch.bfloat16)
    state = opt.init({"w": grads[0]})
    for g in grads:
        state, _ = opt.update(state, {"w": g})
    exact = sum(g @ g.T for g in grads)
    found = state.kept.representation.totals["w"][0]
    assert found.dtype == torch.bfloat16
    scale = exact.diag().sqrt()
    # Each rounding is of a sum that is larger than the exact one by those before.
    bound = (1 + 2.0**-8) ** steps - 1
    assert ((found.double() - exact).abs() <= bound * torch.outer(scale, scale)).all()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_of_a_narrow_state_are_close(build, dtype):
    grads = [{"w": normal((6, 5), t)} for t in range(4)]
    options = {} if build is fp.soap else {"epsilon": 1e-2}
    narrow = path(build(state_dtype=dtype, **options), grads)
    whole = path(build(**options), grads)
    bound = 1e-4 if dtype is torch.float32 else 0.1
    for ours, expected in zip(narrow, whole, strict=True):
        assert ours["w"].dtype == torch.float64
        assert (ours["w"] - expected["w"]).norm() < bound * expected["w"].norm()


def test_what_is_kept_has_the_dtype_asked_for_and_counts_exactly():
    g = {"w": normal((6, 5)), "v": normal((3,))}
    opt = fp.soap(state_dtype=torch.bfloat16, packed=True)
    state, _ = opt.update(opt.init(g), g)
    kept = tree.leaves(state)
    assert {x.dtype for x in kept if x.ndim} == {torch.bfloat16}
    assert int(state.kept.step) == 1


@pytest.mark.compile
@pytest.mark.parametrize("build", BUILDERS)
def test_a_compiled_update_keeps_the_same(build):
    opt = build(state_dtype=torch.bfloat16, packed=True)
    g = {"w": normal((6, 5), dtype=torch.float32)}
    eager, compiled = (fp.make_update(opt, compile=c)(g, opt.init(g), g, 0) for c in (False, True))
    assert_close(tree.leaves(eager), tree.leaves(compiled), rtol=2.0**-7)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="floating"):
        fp.shampoo(state_dtype=torch.int8)
