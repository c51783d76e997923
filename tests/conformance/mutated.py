"""A pytest plugin that makes every method wrong: its directions are too long by one per cent.

:mod:`tests.conformance.test_values` runs the tests that pin the methods under it, and sees that
they fail.
"""

import dataclasses
import functools
import sys

import funcprecond as fp
from funcprecond.linalg import treemath
from funcprecond.methods.card import CARDS


def mutated(build):
    @functools.wraps(build)
    def wrong(**options):
        right = build(**options)

        def update(state, grads, evidence=None):
            state, direction = right.update(state, grads, evidence)
            return state, treemath.mul(direction, 1.01)

        return right._replace(update=update)

    return wrong


def pytest_configure(config):
    for name, card in list(CARDS.items()):
        build = mutated(card.build)
        CARDS[name] = dataclasses.replace(card, build=build)
        setattr(sys.modules[card.build.__module__], name, build)
        setattr(fp, name, build)
