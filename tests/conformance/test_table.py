"""The table of methods and the table of their tests are the same length."""

from funcprecond.methods.card import CARDS
from tests.conformance.methods import METHODS, every_method, line


@every_method
def test_every_card_has_a_line(name):
    assert line(name)


def test_every_line_has_a_card():
    assert METHODS.keys() <= CARDS.keys(), "a line without a card tests nothing"
