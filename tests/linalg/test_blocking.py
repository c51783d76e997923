"""Cutting parameters into blocks, and the methods on them."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcprecond as fp
from funcprecond.linalg.blocking import Blocking, merged
from funcprecond.need import Turn
from tests.equality import assert_close, assert_same
from tests.problems import normal
from tests.strategies import orthogonal

BUILDERS = [fp.shampoo, fp.caspr]


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [
        ([1, 2, 512, 1, 2048, 1, 3, 4], 1024, [1024, 2048, 12]),
        ([1, 2, 768, 1, 2048], 1024, [2, 768, 2048]),
        ([1, 1, 1], 1024, [1]),
        ([64, 64, 3, 3], 1024, [64, 576]),
    ],
)
def test_small_neighbouring_axes_are_merged_from_left_to_right(shape, limit, expected):
    assert merged(shape, limit) == expected


def test_long_axes_are_cut_and_the_last_piece_is_shorter():
    blocks = Blocking(block=256).split("w", torch.zeros(600, 500))
    assert [tuple(x.shape) for x in blocks.values()] == [
        (rows, columns) for rows in (256, 256, 88) for columns in (256, 244)
    ]
    assert list(blocks)[:2] == ["w[0,0]", "w[0,1]"]


@given(
    st.lists(st.integers(0, 5), max_size=4), st.integers(0, 8), st.integers(0, 4), st.integers(0, 4)
)
def test_joining_undoes_splitting(shape, merge, block, max_dim):
    blocking = Blocking(merge, block, max_dim)
    x = normal(tuple(shape))
    assert torch.equal(blocking.join("w", blocking.split("w", x), x), x)


@pytest.mark.parametrize("build", BUILDERS)
def test_blocks_as_large_as_every_axis_change_nothing(build):
    g = {"w": normal((4, 5)), "cube": normal((2, 3, 4), 1)}
    whole, cut = (opt.update(opt.init(g), g)[1] for opt in (build(), build(block=5)))
    assert_same(whole, cut)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_block_is_a_parameter_of_its_own(build):
    g = normal((4, 6))
    opt = build(block=3)
    _, direction = opt.update(opt.init({"w": g}), {"w": g})
    for rows in (slice(0, 3), slice(3, 4)):
        for columns in (slice(0, 3), slice(3, 6)):
            part = {"w": g[rows, columns]}
            if rows == slice(3, 4):
                continue  # alone it would be a vector
            _, alone = build().update(build().init(part), part)
            assert_close(direction["w"][rows, columns], alone["w"], rtol=1e-10)


@pytest.mark.parametrize("build", BUILDERS)
def test_merged_axes_are_one_axis(build):
    g = normal((3, 2, 2))
    opt = build(merge=4)
    _, direction = opt.update(opt.init({"w": g}), {"w": g})
    flat = {"w": g.reshape(3, 4)}
    _, expected = build().update(build().init(flat), flat)
    assert_close(direction["w"].reshape(3, 4), expected["w"], rtol=1e-10)


FOLLOWERS = [
    *BUILDERS,
    functools.partial(fp.soap, refresh_every=2),
    functools.partial(fp.splus, refresh_every=2),
    functools.partial(fp.kl_shampoo, refresh_every=2),
]


def path(opt, grads):
    state, directions = opt.init(grads[0]), []
    for t, g in enumerate(grads):
        evidence = fp.Evidence({}, torch.zeros(()), {}, g, {}, dict.fromkeys(opt.needs(t), ()))
        state, direction = opt.update(state, g, evidence)
        directions.append(direction)
    return directions


@pytest.mark.parametrize("build", FOLLOWERS)
def test_over_steps_blocks_are_parameters_of_their_own(build):
    grads = [normal((4, 6), t) for t in range(5)]
    found = path(build(block=3), [{"w": g, "v": g[0]} for g in grads])
    for rows in (slice(0, 3), slice(3, 4)):
        for columns in (slice(0, 3), slice(3, 6)):
            alone = path(build(), [{"w": g[rows, columns]} for g in grads])
            if rows == slice(3, 4) and build in BUILDERS:
                continue  # there a block of one row keeps two axes
            ours = [d["w"][rows, columns] for d in found]
            assert_close(ours, [d["w"] for d in alone], rtol=1e-7)
    whole = path(build(), [{"v": g[0]} for g in grads])
    assert_close([d["v"] for d in found], [d["v"] for d in whole], rtol=1e-12)


@pytest.mark.parametrize("build", FOLLOWERS)
def test_over_steps_merged_axes_are_one_axis(build):
    grads = [normal((3, 2, 1, 2), t) for t in range(5)]
    found = path(build(merge=4), [{"w": g} for g in grads])
    flat = path(build(), [{"w": g.reshape(3, 4)} for g in grads])
    assert_close([d["w"].reshape(3, 4) for d in found], [d["w"] for d in flat], rtol=1e-7)


@pytest.mark.parametrize("build", FOLLOWERS)
def test_over_steps_an_axis_that_is_too_long_is_left_alone(build):
    """It may be rotated, and the direction turns with it, unless a method looks at entries."""
    grads = [normal((3, 9), t) for t in range(5)]
    found = path(build(max_dim=5), [{"w": g} for g in grads])
    assert all(torch.isfinite(d["w"]).all() for d in found)
    if build in (FOLLOWERS[2], FOLLOWERS[3]):
        return
    turn = orthogonal(9, 0)
    turned = path(build(max_dim=5), [{"w": g @ turn} for g in grads])
    assert_close([d["w"] for d in turned], [d["w"] @ turn for d in found], rtol=1e-6)


@pytest.mark.parametrize("build", BUILDERS)
def test_with_one_axis_too_long_the_other_takes_the_whole_degree(build):
    """One factor left, exponent 1/2: one-sided Shampoo."""
    g = normal((3, 9))
    opt = build(max_dim=5, epsilon=1e-12)
    _, direction = opt.update(opt.init({"w": g}), {"w": g})
    values, vectors = torch.linalg.eigh(g @ g.T)
    expected = vectors @ torch.diag(values**-0.5) @ vectors.T @ g
    assert_close(direction["w"], expected, rtol=1e-6)


def test_all_axes_too_long_leave_the_diagonal():
    g = {"w": normal((6, 7))}
    state, _ = fp.shampoo(max_dim=5).update(fp.shampoo(max_dim=5).init(g), g)
    assert list(state.representation.diagonals) == ["w"]


def test_shares_of_a_turn_are_all_items_once_and_about_equal():
    costs = [float(n**3) for n in (10, 9, 8, 8, 7, 3, 3, 2, 1, 1)]
    shares = [Turn("refresh", 3, i).share(costs) for i in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(10))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) <= min(loads) + max(costs)


def stepped(opt, grads):
    state, states = opt.init(grads[0]), []
    for t, g in enumerate(grads):
        evidence = fp.Evidence({}, torch.zeros(()), {}, g, {}, dict.fromkeys(opt.needs(t), ()))
        state, _ = opt.update(state, g, evidence)
        states.append(state)
    return states


def test_staggered_refreshes_take_each_root_once_an_interval():
    grads = [{"a": normal((4, 3), t), "b": normal((5, 2), 9 + t)} for t in range(9)]
    states = stepped(fp.shampoo(refresh_every=4, stagger=True, start=1), grads)
    whole = stepped(fp.shampoo(), grads)
    fresh = []
    for t in range(1, 9):
        changed = [
            (name, i)
            for name, roots in states[t].factor.roots.items()
            for i, root in enumerate(roots)
            if not torch.equal(root, states[t - 1].factor.roots[name][i])
        ]
        for name, i in changed:
            assert_close(
                states[t].factor.roots[name][i], whole[t].factor.roots[name][i], rtol=1e-10
            )
        fresh.append(changed)
    assert sorted(x for changed in fresh[:4] for x in changed) == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1)
    ]  # fmt: skip
    assert fresh[:4] == fresh[4:]


def test_negative_lengths_are_refused():
    with pytest.raises(ValueError, match="block"):
        fp.shampoo(block=-1)
