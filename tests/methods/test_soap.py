"""SO-1 to SO-5 (SO-6 is of the solver), and the authors' trajectory."""

import dataclasses

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from funcprecond.linalg.eigenbases import eigenvectors, rotate_back
from tests import reference, strategies
from tests.equality import assert_close
from tests.peers import run, run_torch
from tests.problems import normal
from tests.strategies import orthogonal

B1, B2, EPS = 0.95, 0.95, 1e-8


def directions(opt, grads):
    """The direction of each step on a path of gradients of one tensor, due as ``needs`` says."""
    state, found = opt.init({"w": grads[0]}), []
    for t, g in enumerate(grads):
        state, direction = opt.update(state, {"w": g}, due(opt, t))
        found.append(direction["w"])
    return found


def due(opt, t):
    """Evidence of nothing but what is due at step ``t``."""
    return fp.Evidence({}, torch.zeros(()), None, {}, {}, dict.fromkeys(opt.needs(t), ()))


def project(x, matrices):
    """Every axis of x against axis 0 of its matrix, as the authors write it."""
    for q in matrices:
        x = torch.einsum("a...,ab->...b", x, q)
    return x


def project_back(x, matrices):
    for q in matrices:
        x = torch.einsum("a...,ba->...b", x, q)
    return x


def authors(grads, frequency):
    """The reference algorithm: a plain loop, m unrotated, rotated anew at every step."""
    stats = [(1 - B2) * s for s in reference.mode_grams(grads[:1])]
    bases = [torch.linalg.eigh(s)[1].flip(1) for s in stats]
    m = v = torch.zeros_like(grads[0])
    found = [torch.zeros_like(grads[0])]
    for t, g in enumerate(grads[1:], 1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * project(g, bases) ** 2
        step = (1 - B2**t) ** 0.5 / (1 - B1**t)
        found.append(step * project_back(project(m, bases) / (v.sqrt() + EPS), bases))
        grams = reference.mode_grams([g])
        stats = [B2 * s + (1 - B2) * c for s, c in zip(stats, grams, strict=True)]
        if t % frequency:
            continue
        for axis, (s, q) in enumerate(zip(stats, bases, strict=True)):
            order = torch.argsort((q.T @ s @ q).diag(), descending=True)
            v = v.index_select(axis, order)
            bases[axis] = torch.linalg.qr((s @ q)[:, order])[0]
    return found


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3), (3, 4), (2, 3, 2)])
def test_soap_follows_its_authors_trajectory_step_by_step(shape, frequency):
    scales = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    grads = [scales * normal(shape, i) for i in range(14)]
    opt = fp.soap(first="skip", epsilon=0.0, refresh_every=frequency)
    for ours, theirs in zip(directions(opt, grads), authors(grads, frequency), strict=True):
        assert_close(ours, theirs, rtol=1e-9)


def test_the_shift_of_the_qr_step_is_small_against_the_trajectory():
    grads = [normal((4, 3), i) for i in range(14)]
    ours = directions(fp.soap(first="skip", refresh_every=1), grads)
    assert_close(ours[-1], authors(grads, 1)[-1], rtol=1e-3)


def adam_with_outer_damping(grads, b1=B1, b2=B2):
    m = v = torch.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = m / (v.sqrt() + EPS) * (1 - b2**t) ** 0.5 / (1 - b1**t)
    return direction


@pytest.mark.parametrize("first", ["identity", "skip"])
@pytest.mark.parametrize(("shape", "max_dim"), [((4, 3), 2), ((5,), 100), ((), 100), ((3, 1), 100)])
def test_without_bases_soap_is_adam(shape, max_dim, first):
    grads = [normal(shape, i) for i in range(6)]
    ours = directions(fp.soap(max_dim=max_dim, first=first, refresh_every=2), grads)
    seen = grads if first == "identity" else grads[1:]
    assert_close(ours[-1], adam_with_outer_damping(seen), rtol=1e-12)


def test_without_bases_and_damping_soap_is_torch_optim_adam_over_50_steps():
    opt = fp.chain(fp.soap(betas=(0.9, 0.99), max_dim=1, damping=1e-30), fp.scale(0.01))
    peer = run_torch(lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-30), 50)
    assert_close(run(opt, 50), peer, rtol=1e-10)


def test_the_first_step_is_adams():
    g = normal((4, 3))
    assert_close(directions(fp.soap(), [g])[0], adam_with_outer_damping([g]), rtol=1e-12)


@pytest.mark.parametrize("refresh_every", [1, 2])
@given(seed=strategies.seeds)
def test_signs_and_order_of_the_bases_columns_do_not_matter(refresh_every, seed):
    """SO-2: m and v follow; the direction stays, now and after the next turn."""
    opt = fp.soap(refresh_every=refresh_every)
    grads = [normal((4, 3), seed + i) for i in range(7)]
    state = opt.init({"w": grads[0]})
    for g in grads[:4]:
        state, _ = opt.update(state, {"w": g})
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (4, 3)]
    signs = [normal((n,), seed + n).sign() for n in (4, 3)]
    p = [
        torch.eye(len(o), dtype=torch.float64)[:, o] * s for o, s in zip(orders, signs, strict=True)
    ]
    other = dataclasses.replace(
        state,
        bases={"w": tuple(q @ x for q, x in zip(state.bases["w"], p, strict=True))},
        mean={k: p[0].T @ m @ p[1] for k, m in state.mean.items()},
        second_moment={"w": p[0].T.abs() @ state.second_moment["w"] @ p[1].abs()},
    )
    for t, g in enumerate(grads[4:], 4):
        state, expected = opt.update(state, {"w": g}, due(opt, t))
        other, direction = opt.update(other, {"w": g}, due(opt, t))
        assert_close(direction, expected, rtol=1e-8)


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_soap_commutes_with_rotations_of_either_side(refresh_every):
    """SO-3: with decompositions, of statistics of full rank, from the first step."""
    grads = [normal((4, 4), i) for i in range(8)]
    a, b = orthogonal(4, 1), orthogonal(4, 2)
    opt = fp.soap(first="skip", refresh="eigh", refresh_every=refresh_every)
    rotated = directions(opt, [a @ g @ b for g in grads])
    for x, y in zip(rotated, directions(opt, grads), strict=True):
        assert_close(x, a @ y @ b, rtol=1e-7)


def test_shampoo_squared_is_adafactor_in_the_eigenbasis():
    """SO-4."""
    g = normal((4, 4), 3)
    left, right = g @ g.T, g.T @ g
    q_l, q_r = (eigenvectors(s, s) for s in (left, right))
    lam, mu = ((q.T @ s @ q).diag() for q, s in ((q_l, left), (q_r, right)))
    factored = (q_l.T @ g @ q_r) / (lam[:, None] * mu / lam.sum()).sqrt()
    opt = fp.shampoo(exponent=0.5, epsilon=1e-14)
    shampoo = opt.update(opt.init({"w": g}), {"w": g})[1]["w"]
    assert_close(shampoo * lam.sum().sqrt(), q_l @ factored @ q_r.T, rtol=1e-7)


@pytest.mark.parametrize("refresh", ["qr", "eigh"])
def test_in_a_fixed_basis_soap_is_adam_on_the_singular_values(refresh):
    """SO-5."""
    u, v = orthogonal(4, 0), orthogonal(4, 1)
    scales = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    d = [scales * (1 + 0.2 * normal((4,), i)) for i in range(12)]
    grads = [u @ x.diag() @ v.T for x in d]
    ours = directions(fp.soap(first="skip", refresh=refresh, refresh_every=2), grads)[-1]
    assert_close((u.T @ ours @ v).diag(), adam_with_outer_damping(d[1:]), rtol=1e-5)
    off = u.T @ ours @ v
    assert (off - off.diag().diag()).abs().max() < 1e-5


def test_between_turns_the_basis_stays_and_statistics_are_taken():
    opt, grads = fp.soap(refresh_every=5), [normal((4, 3), i) for i in range(6)]
    state = opt.init({"w": grads[0]})
    seen = []
    for t, g in enumerate(grads):
        state, _ = opt.update(state, {"w": g}, due(opt, t))
        seen.append(state)
    assert torch.equal(seen[0].bases["w"][0], seen[4].bases["w"][0])
    assert not torch.equal(seen[4].bases["w"][0], seen[5].bases["w"][0])
    weights = [(1 - B2) * B2 ** (5 - i) for i in range(6)]
    expected = sum(w * g @ g.T for w, g in zip(weights, grads, strict=True))
    assert_close(state.statistics["w"][0], expected, rtol=1e-12)


def test_a_state_goes_on_at_another_interval():
    """In whichever coordinates m is; but it is not restored into a state that has the other."""
    grads = [normal((4, 3), i) for i in range(9)]
    often, seldom = fp.soap(refresh_every=1), fp.soap(refresh_every=4)
    a, b = often.init({"w": grads[0]}), seldom.init({"w": grads[0]})
    for t, g in enumerate(grads):
        opt = often if t < 4 else seldom
        a, expected = opt.update(a, {"w": g}, due(opt, t))
        b, direction = opt.update(b, {"w": g}, due(opt, t))
        assert_close(direction, expected, rtol=1e-9)
    assert_close(rotate_back(b.mean["w"], b.bases["w"], (0, 1)), a.plain_mean["w"], rtol=1e-9)
    saved = fp.to_dict(a)
    assert_close(fp.from_dict(often.init({"w": grads[0]}), saved).plain_mean, a.plain_mean)
    with pytest.raises(KeyError, match="missing"):
        fp.from_dict(seldom.init({"w": grads[0]}), saved)


def test_a_decomposition_carries_the_second_moment_over():
    """v becomes the diagonal of the old diag(v) in the new basis."""
    opt, grads = fp.soap(), [normal((4, 3), i) for i in range(2)]
    state = opt.init({"w": grads[0]})
    state, _ = opt.update(state, {"w": grads[0]})
    dense = ((1 - B2) * grads[0].square()).reshape(-1).diag()
    basis = reference.kron(*state.bases["w"])
    expected = (basis.T @ dense @ basis).diag().reshape(4, 3)
    assert_close(state.second_moment["w"], expected, rtol=1e-12)
