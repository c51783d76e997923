"""MU-1 to MU-4 on the method, its routing, and X-2 with Shampoo and CASPR."""

import math

import pytest
import torch
from hypothesis import given

import funcprecond as fp
from tests import strategies
from tests.equality import assert_close
from tests.methods.test_adagrad import last
from tests.peers import gradient
from tests.problems import normal
from tests.strategies import orthogonal

EXACT = {"polynomial": "svd", "adjust": "none"}


def exact(**options):
    return fp.muon(**{**EXACT, **options})


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
def test_the_direction_is_the_orthogonal_factor_of_the_nesterov_momentum(shape):
    mu, grads = 0.9, [normal(shape, i) for i in range(4)]
    b = torch.zeros(shape, dtype=torch.float64)
    for g in grads:
        b = mu * b + (1 - mu) * g
    for nesterov, m in ((True, (1 - mu) * grads[-1] + mu * b), (False, b)):
        u, _, vt = torch.linalg.svd(m, full_matrices=False)
        direction = last(exact(momentum=mu, nesterov=nesterov), grads)
        assert_close(direction, u @ vt, rtol=1e-10)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_optim_muon_to_the_rounding_of_bfloat16(adjust, nesterov):
    shapes = {"square": (8, 8), "tall": (16, 4), "wide": (4, 12)}
    start = {k: normal(s, i, torch.float32) for i, (k, s) in enumerate(shapes.items())}
    leaves = {k: p.clone().requires_grad_() for k, p in start.items()}
    peer = torch.optim.Muon(
        list(leaves.values()), lr=0.1, weight_decay=0.0, nesterov=nesterov, adjust_lr_fn=adjust
    )
    opt = fp.chain(fp.muon(nesterov=nesterov, adjust=adjust, dtype=torch.bfloat16), fp.scale(0.1))
    params, state = start, opt.init(start)
    for t in range(6):
        grads = gradient(start, t)
        for k, p in leaves.items():
            p.grad = grads[k].clone()
        peer.step()
        state, direction = opt.update(state, grads)
        params = fp.apply(params, direction)
    assert_close(params, {k: p.detach() for k, p in leaves.items()}, rtol=1e-2)


def test_in_float32_muon_is_torchs_up_to_bfloat16():
    g = normal((8, 6), 0, torch.float32)
    p = torch.zeros(8, 6, requires_grad=True)
    p.grad = g.clone()
    torch.optim.Muon([p], lr=1.0, weight_decay=0.0).step()
    assert_close(last(fp.muon(), [g]), -p.detach(), rtol=5e-2)


@given(strategies.gradients(max_axes=2), strategies.seeds)
def test_muon_commutes_with_rotations_of_either_side(grads, seed):
    a, b = orthogonal(grads[0].shape[0], seed), orthogonal(grads[0].shape[1], seed + 1)
    rotated = last(fp.muon(), [a @ g @ b for g in grads])
    assert_close(rotated, a @ last(fp.muon(), grads) @ b, rtol=1e-9)


@given(strategies.gradients(max_axes=2))
def test_muon_is_blind_to_scale_and_to_transposition_up_to_the_shapes_factor(grads):
    direction = last(fp.muon(adjust="none"), grads)
    for c in (1e-3, 1e6):
        assert_close(last(fp.muon(adjust="none"), [c * g for g in grads]), direction, rtol=1e-9)
    transposed = last(fp.muon(adjust="none"), [g.T.contiguous() for g in grads])
    assert_close(transposed.T, direction, rtol=1e-12)
    rows, columns = direction.shape
    scaled = last(fp.muon(adjust="original"), grads)
    assert_close(scaled, direction * math.sqrt(max(1, rows / columns)), rtol=1e-12)
    scaled = last(fp.muon(adjust="match_rms_adamw"), grads)
    assert_close(scaled, direction * 0.2 * math.sqrt(max(rows, columns)), rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_without_accumulation_shampoo_and_caspr_are_exact_muon(shape):
    g = normal(shape, 3)
    expected = last(exact(), [g])
    assert_close(last(fp.shampoo(epsilon=1e-13), [g]), expected, rtol=1e-5)
    assert_close(last(fp.caspr(epsilon=1e-13), [g]), expected, rtol=1e-5)


def test_a_convolution_is_the_matrix_of_its_first_axis_by_the_rest(randn):
    grads = [randn(4, 3, 2, 2) for _ in range(3)]
    flat = last(fp.muon(), [g.reshape(4, 12) for g in grads])
    assert_close(last(fp.muon(), grads), flat.reshape(4, 3, 2, 2), rtol=1e-13)
    padded = last(fp.muon(), [g.reshape(1, 4, 1, 12) for g in grads])
    assert_close(padded, flat.reshape(1, 4, 1, 12), rtol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (5, 1), (1, 5), (1, 1, 1)])
def test_a_vector_gets_its_momentum(shape):
    grads = [normal(shape, i) for i in range(2)]
    b = 0.1 * grads[0]
    b = 0.9 * b + 0.1 * grads[1]
    expected = 0.1 * grads[1] + 0.9 * b
    assert_close(last(fp.muon(momentum=0.9), grads), expected, rtol=1e-13)


def test_equal_shapes_of_several_parameters_are_as_each_alone(randn):
    grads = {"a": randn(4, 3), "b": randn(4, 3), "c": randn(3, 4), "d": randn(5)}
    opt = fp.muon()
    _, together = opt.update(opt.init(grads), grads)
    for k, g in grads.items():
        assert_close(together[k], last(opt, [g]), rtol=1e-12)


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="adjust"):
        fp.muon(adjust="rms")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="quartic"):
        fp.muon(polynomial="quartic")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------- routing
def shapes(**kwargs):
    return {k.replace("__", "."): torch.zeros(s) for k, s in kwargs.items()}


def test_the_rules_send_hidden_matrices_to_muon_and_the_rest_to_adam():
    params = shapes(
        wte__weight=(10, 4),
        model__embed_tokens__weight=(10, 4),
        h__0__multihead_attn__in_proj_weight=(12, 4),
        h__0__mlp__c_fc__weight=(8, 4),
        h__0__mlp__c_fc__bias=(8,),
        stem__conv__weight=(4, 3, 3, 3),
        norm__weight=(4, 1),
        lm_head__weight=(10, 4),
        last__weight=(3, 4),
    )
    labels = fp.assign(fp.muon_rules("last.*"), params).labels
    hidden = {"h.0.multihead_attn.in_proj_weight", "h.0.mlp.c_fc.weight", "stem.conv.weight"}
    assert {k for k, label in labels.items() if label == "muon"} == hidden
    assert fp.assign(fp.muon_rules(), params).labels["last.weight"] == "muon"


def test_the_usual_routing_trains():
    params = shapes(embed__weight=(5, 3), body__weight=(4, 3), body__bias=(4,))
    opt = fp.partition(
        fp.muon_rules(),
        muon=fp.chain(fp.muon(), fp.scale(0.02)),
        adam=fp.chain(fp.adam(), fp.scale(3e-4)),
    )
    grads = {k: normal(p.shape, i, torch.float32) for i, (k, p) in enumerate(params.items())}
    _, direction = opt.update(opt.init(params), grads)
    expected = last(fp.chain(fp.adam(), fp.scale(3e-4)), [grads["embed.weight"]])
    assert_close(direction["embed.weight"], expected, rtol=1e-6)
    expected = 0.02 * last(fp.muon(), [grads["body.weight"]])
    assert_close(direction["body.weight"], expected, rtol=1e-6)
