import pytest
import torch

import funcprecond as fp
from tests import problems
from tests.equality import assert_close, assert_same

RULES = [("*.bias", "small"), ("0.*", "first"), ("*", "small")]


def test_the_first_rule_that_matches_wins():
    labels = fp.assign(RULES, problems.mlp().params).labels
    assert labels == {
        "0.weight": "first",
        "0.bias": "small",
        "2.weight": "small",
        "2.bias": "small",
    }


def test_the_assignment_prints_as_a_table():
    table = str(fp.assign(RULES, problems.mlp().params))
    assert table.split("\n") == [
        "parameter  shape   method",
        "0.weight   (4, 3)  first",
        "0.bias     (4,)    small",
        "2.weight   (3, 4)  small",
        "2.bias     (3,)    small",
    ]


def test_rules_may_be_functions_of_name_and_parameter():
    rules = [(lambda name, p: p.ndim == 2, "matrix"), ("*", "rest")]
    labels = fp.assign(rules, problems.mlp().params).labels
    assert labels["0.weight"] == "matrix"
    assert labels["0.bias"] == "rest"
    assert fp.assign(lambda name, p: f"{p.ndim}d", problems.mlp().params).labels["0.bias"] == "1d"


def test_each_method_gets_its_own_parameters_only():
    toy = problems.mlp()
    opt = fp.partition(RULES, first=fp.shampoo(), small=fp.adam())
    state, direction, evidence = problems.update(toy, opt)
    assert list(direction) == list(toy.params)
    for label, method in (("first", fp.shampoo()), ("small", fp.adam())):
        part = {
            k: g
            for k, g in evidence.grads.items()
            if fp.assign(RULES, toy.params).labels[k] == label
        }
        alone, expected = method.update(method.init(part), part)
        assert_close({k: direction[k] for k in part}, expected, rtol=1e-13)
        assert_close(state.inner[label], alone, rtol=1e-13)


def test_an_unmatched_parameter_is_named():
    with pytest.raises(ValueError, match=r"no rule matches \['0.weight', '2.weight'\]"):
        fp.partition([("*.bias", "a")], a=fp.sgd()).init(problems.mlp().params)


def test_a_function_that_gives_no_label_leaves_a_parameter_unmatched():
    with pytest.raises(ValueError, match="no rule matches"):
        fp.assign(lambda name, p: None, problems.mlp().params)


def test_a_label_without_a_method_is_named():
    with pytest.raises(ValueError, match=r"\['smal'\].*\['small'\]"):
        fp.partition([("*", "smal")], small=fp.sgd()).init(problems.mlp().params)


def test_a_name_written_out_twice_with_two_labels_is_an_error():
    rules = [("0.bias", "a"), ("0.bias", "b"), ("*", "a")]
    with pytest.raises(ValueError, match=r"\['0.bias'\] are claimed by two"):
        fp.partition(rules, a=fp.sgd(), b=fp.sgd()).init(problems.mlp().params)


def test_one_tensor_under_two_names_with_two_labels_is_an_error(randn):
    w = randn(2)
    with pytest.raises(ValueError, match="claimed by two"):
        fp.assign([("a", "x"), ("b", "y")], {"a": w, "b": w})


def test_two_parameters_may_have_one_tensor_as_their_gradient(randn):
    """autograd gives both terms of a sum the same tensor: that is no double claim."""
    g = randn(3)
    params = {"a": randn(3), "b": randn(3)}
    opt = fp.partition([("a", "x"), ("b", "y")], x=fp.sgd(), y=fp.adam())
    _, direction = opt.update(opt.init(params), {"a": g, "b": g})
    assert_same(direction["a"], g)


def test_methods_of_different_needs_share_one_observation():
    toy = problems.mlp()
    opt = fp.partition(RULES, first=fp.kfac(), small=fp.shampoo(refresh_every=2))
    assert len(opt.needs(0)) == len(set(opt.needs(0)))
    params, _, _ = problems.train(toy, fp.chain(opt, fp.scale(0.1)), 3)
    assert all(torch.isfinite(p).all() for p in params.values())


def test_a_layer_method_measures_its_own_layers_as_if_they_were_alone():
    """K-FAC on one layer of two: the same direction there as K-FAC on both."""
    toy = problems.mlp()
    kfac = fp.kfac(labels="exact")
    _, whole, _ = problems.update(toy, kfac, steps=2)
    routed = fp.partition([("0.*", "layer"), ("*", "rest")], layer=kfac, rest=fp.sgd())
    _, direction, _ = problems.update(toy, routed, steps=2)
    for k in ("0.weight", "0.bias"):
        assert_close(direction[k], whole[k], rtol=1e-10)


def test_a_method_without_parameters_is_idle():
    toy = problems.mlp()
    for idle in (
        fp.adam(),
        fp.shampoo(),
        fp.adagrad_full(),
        fp.momentum(),
        fp.clip_norm(1.0),
        fp.skip_nonfinite(fp.adam()),
    ):
        opt = fp.partition([("*", "all")], all=fp.sgd(), idle=idle)
        _, direction, evidence = problems.update(toy, opt)
        assert_same(direction, evidence.grads)
