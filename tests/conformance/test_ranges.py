"""Numbers out of range are refused by name, for every builder; tensors are never read."""

import inspect
import math

import pytest
import torch

import funcprecond as fp
from funcprecond.checks import INVERT, RANGES
from funcprecond.methods.card import CARDS
from tests.conformance.methods import line

TRANSFORMS = {
    "momentum": ((), "decay"),
    "weight_decay": ((), "coefficient"),
    "clip_norm": ((), "limit"),
    "kl_clip": ((fp.sgd(),), "rate bound"),
    "accumulate": ((fp.sgd(),), "steps"),
    "graft": ((fp.sgd(), fp.sgd()), "start"),
}
# These numbers are not in the table of ranges; each has a check or a test of its own.
OTHERS = {"factor", "p", "exponent"}


def numbers(build):
    """The arguments of a builder whose defaults are numbers or pairs of numbers."""
    for name, p in inspect.signature(build).parameters.items():
        default = p.default[0] if isinstance(p.default, tuple) else p.default
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            yield name, p.default


def outside(name, default):
    """Values out of the range of an argument."""
    allowed = RANGES[name]
    values = [-1.0, math.nan, math.inf, allowed.low - 1]
    values += [allowed.high, 1.5] if math.isfinite(allowed.high) else []
    values += [0.5, 2.5] if allowed.whole else []
    values += [allowed.low] if allowed.open_low else []
    return [v for v in values if v != default]


CASES = [(name, k) for name, c in CARDS.items() if c.build for k, _ in numbers(c.build)]


@pytest.mark.parametrize(("method", "name"), [c for c in CASES if c[1] not in OTHERS])
def test_a_number_out_of_range_is_refused_by_name(method, name):
    build = CARDS[method].build
    default = inspect.signature(build).parameters[name].default
    for bad in outside(name, default):
        for value in [(bad, 0.5), (0.5, bad)] if isinstance(default, tuple) else [bad]:
            with pytest.raises(ValueError, match=rf"^{name} must be "):
                build(**{name: value})


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_are_checked_by_position_and_by_name(name):
    given, arguments = TRANSFORMS[name]
    build = getattr(fp, name)
    for argument in arguments.split():
        for bad in outside(argument, None):
            rest = {"rate": 0.1} if name == "kl_clip" and argument != "rate" else {}
            with pytest.raises(ValueError, match=rf"^{argument} must be "):
                build(*given, **rest, **{argument: bad})
    if name in ("momentum", "weight_decay", "clip_norm"):
        with pytest.raises(ValueError, match="must be"):
            build(-1.0)


@pytest.mark.parametrize("method", [n for n, c in CARDS.items() if c.build])
def test_defaults_and_tensors_are_accepted(method):
    """A tensor may be mapped or have a gradient, so that its value is not read."""
    build = CARDS[method].build
    build(**line(method).options)
    names = {"damping", "epsilon", "decay", "weight_decay"}
    for name, default in numbers(build):
        if name in names:
            torch.vmap(lambda v, k=name: (build(**{k: v}), v)[1])(torch.tensor([-1.0, default]))


@pytest.mark.parametrize("method", sorted(INVERT))
def test_methods_that_invert_refuse_a_damping_of_zero(method):
    with pytest.raises(ValueError, match=r"damping must be .* 0.*can be singular"):
        getattr(fp, method)(damping=0.0)
    with pytest.raises(ValueError, match=r"damping must be .* 0"):
        getattr(fp, method)(damping=0)


def test_builders_keep_their_names_signatures_and_documents():
    assert fp.kfac.__name__ == "kfac"
    assert "damping" in inspect.signature(fp.kfac).parameters
    assert "Curvature:" in fp.kfac.__doc__
