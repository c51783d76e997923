import inspect

import pytest

import funcprecond as fp
from funcprecond.methods.card import CARDS
from funcprecond.methods.table import PLANNED, table
from tests.conformance.methods import every_method


@every_method
def test_a_methods_name_is_the_builder_that_users_call(name):
    assert getattr(fp, name) is CARDS[name].build


@every_method
def test_hyperparameters_are_keyword_only_and_have_defaults(name):
    for parameter in inspect.signature(CARDS[name].build).parameters.values():
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        assert parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty


@every_method
def test_a_card_builds_with_its_own_options(name):
    card = CARDS[name]
    assert isinstance(card.build(**card.options), fp.Transform)
    assert card.learning_rate > 0
    if card.has_intervals:
        assert isinstance(
            card.build(**{**card.options, "every": 2, "refresh_every": 4}), fp.Transform
        )


def test_the_table_has_a_row_for_every_card():
    rows = table(works=True).split("\n")
    assert len(rows) == 2 + len(CARDS)
    for name in CARDS:
        assert sum(f"| `{name}` |" in row for row in rows) == 1


def test_what_is_planned_is_a_table_of_its_own_and_names_no_card():
    rows = table(works=False).split("\n")[2:]
    assert {row.split("|")[1].strip() for row in rows} == set(PLANNED) - CARDS.keys()
    assert len(table().split("\n")) == 2 + len(CARDS) + len(rows)


def test_every_row_has_the_columns_of_the_header():
    rows = table().replace("\\|", "").split("\n")
    assert len({row.count("|") for row in rows}) == 1
    names = [row.split("|")[1].strip(" `") for row in rows[2:]]
    assert len(names) == len(set(names))


def test_an_unknown_method_is_a_key_error():
    with pytest.raises(KeyError):
        CARDS["sgdd"]
