"""Every optimizer takes the steps of the functional loop, and survives being saved and copied."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.optim.generated import class_name
from tests.optim.loops import TOY, assert_equal, fresh_model, functional, make, step

every_method = pytest.mark.parametrize("name", list(CARDS))


@every_method
def test_the_steps_are_those_of_the_functional_loop(name):
    model = fresh_model()
    opt = make(name, model)
    for t in range(4):
        step(opt, model, TOY.at(t))
    assert_equal(model, functional(name, 4))


@every_method
def test_decay_momentum_and_a_schedule_are_a_chain(name):
    model, chained, options = fresh_model(), [], {}
    known = inspect.signature(fp.optim.CLASSES[name]).parameters
    if "momentum" in known and "momentum" not in inspect.signature(CARDS[name].build).parameters:
        chained.append(fp.momentum(0.8))
        options["momentum"] = 0.8
    options["weight_decay"] = 0.3
    own = {}
    if "weight_decay" in inspect.signature(CARDS[name].build).parameters:
        own["weight_decay"] = 0.3
    else:
        chained.append(fp.weight_decay(0.3))
    opt = make(name, model, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    rates = []
    for t in range(4):
        rates.append(opt.param_groups[0]["lr"])
        step(opt, model, TOY.at(t))
        scheduler.step()
    assert rates[-1] == rates[0] / 8
    assert_equal(model, functional(name, 4, *chained, rates=rates, **own))


def saved(opt, model):
    """What a checkpoint on disk holds."""
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_method
def test_a_run_is_saved_and_goes_on_bit_for_bit(name):
    model = fresh_model()
    opt = make(name, model)
    for t in range(3):
        step(opt, model, TOY.at(t))
    kept = saved(opt, model)
    other = fresh_model()
    other.load_state_dict(kept["model"])
    again = make(name, other, lr=7.0)
    again.load_state_dict(kept["opt"])
    assert again.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    for t in range(3, 6):
        step(opt, model, TOY.at(t))
        step(again, other, TOY.at(t))
    assert_equal(other, dict(model.named_parameters()))
    assert_equal(model, functional(name, 6))
    # What was loaded is still what was saved, so that it can be loaded again.
    third = fresh_model()
    third.load_state_dict(kept["model"])
    last = make(name, third)
    last.load_state_dict(kept["opt"])
    for t in range(3, 6):
        step(last, third, TOY.at(t))
    assert_equal(third, dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("name", "copied"),
    [(name, copy.deepcopy) for name in CARDS]
    + [(name, lambda x: pickle.loads(pickle.dumps(x))) for name in ("caspr", "kfac", "lbfgs")],
)
def test_a_copy_goes_on_alone(name, copied):
    model = fresh_model()
    opt = make(name, model)
    for t in range(2):
        step(opt, model, TOY.at(t))
    other, again = copied((model, opt))
    for t in range(2, 4):
        step(again, other, TOY.at(t))
    before = {k: p.clone() for k, p in model.named_parameters()}
    assert_equal(other, functional(name, 4))
    for t in range(2, 4):
        step(opt, model, TOY.at(t))
    assert_equal(model, functional(name, 4))
    assert any(not torch.equal(before[k], p) for k, p in model.named_parameters())


@every_method
def test_saving_before_the_first_step(name):
    model = fresh_model()
    kept = saved(make(name, model), model)
    again = make(name, model)
    again.load_state_dict(kept["opt"])
    for t in range(2):
        step(again, model, TOY.at(t))
    assert_equal(model, functional(name, 2))


@every_method
def test_help_is_complete(name):
    cls = fp.optim.CLASSES[name]
    text = inspect.getdoc(cls)
    arguments = text.partition("\nArgs:\n")[2].partition("\n\nRaises:\n")[0]
    listed = re.findall(r"^    (\w+(?:, \w+)*):", arguments, re.M)
    explained = {k for entry in listed for k in entry.split(", ")}
    assert set(inspect.signature(cls).parameters) <= explained
    assert f"fp.optim.{cls.__name__}(" in text
    assert getattr(fp.optim, cls.__name__) is cls
    assert f":func:`funcprecond.{name}`" in text


def test_the_names_are_those_of_the_titles():
    names = {k: class_name(card) for k, card in CARDS.items()}
    assert len(set(names.values())) == len(names)
    expected = {"kfac": "KFAC", "caspr": "CASPR", "adamw": "AdamW", "lbfgs": "LBFGS"}
    expected |= {"hessian_free": "HessianFree", "soap": "SOAP", "kl_shampoo": "KLShampoo"}
    assert {k: names[k] for k in expected} == expected


def test_a_misspelt_name_is_an_error_that_knows_better():
    with pytest.raises(AttributeError, match="but CASPR"):
        _ = fp.optim.Caspr
    with pytest.raises(TypeError, match=r"CASPR: .*'dampening'.*options are params, lr"):
        fp.optim.CASPR([torch.zeros(2, requires_grad=True)], dampening=0.1)


@every_method
def test_the_example_in_help_runs(name):
    text = inspect.getdoc(fp.optim.CLASSES[name])
    code = re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", text.partition("\nExample:\n")[2], re.M)
    exec("\n".join(code), {})
