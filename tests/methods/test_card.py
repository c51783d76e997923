"""A method's card, its row of the table and its help are one thing."""

import inspect

import pytest

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.methods.table import PLANNED, rows, table


@pytest.mark.parametrize("name", CARDS)
def test_help_shows_the_row(name):
    card = CARDS[name]
    assert card.build is getattr(fp, name)
    text = inspect.getdoc(card.build)
    for column in (card.curvature, card.representation, card.solver):
        assert column in text


@pytest.mark.parametrize("name", CARDS)
def test_a_methods_file_has_at_most_150_lines(name):
    lines = inspect.getsource(inspect.getmodule(CARDS[name].build)).count("\n")
    assert lines <= 150


def test_intervals_are_known_from_the_signature():
    with_intervals = {name for name, card in CARDS.items() if card.has_intervals}
    assert {"kfac", "shampoo", "soap"} <= with_intervals
    assert not {"sgd", "adam", "muon", "lbfgs"} & with_intervals


def test_no_method_is_planned_and_works():
    assert not set(PLANNED) & set(CARDS)
    names = [card.name for card in rows()]
    assert len(set(names)) == len(names)
    assert set(names) == set(PLANNED) | set(CARDS)
    works, planned = table(works=True).count("\n"), table(works=False).count("\n")
    assert table().count("\n") == works + planned - 1
