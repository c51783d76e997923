"""The one table of the conformance suite: a line a method, and every law holds it to account.

A line gives the hyperparameters for small problems and what pins the method's values: a dense
reference of its first direction (:mod:`tests.conformance.references`), or the name of a test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import funcprecond as fp
from funcprecond.curvature import ExampleRows, ResidualRows
from funcprecond.methods.card import CARDS
from tests.conformance import references


@dataclasses.dataclass(frozen=True)
class Line:
    """One method under test.

    Attributes:
        reference: ``(problem, params, batch) -> P x P matrix`` that the first direction is, times
            the gradient; or the test that compares the method with an independent computation,
            ``"tests/methods/test_name.py::test_what"``. A test must fail for a direction that is
            one per cent too long.
        options: the builder's arguments.
        dense: further arguments where the reference is compared, to take the chance out of it.
        learns_layers: the state is empty until the first evidence, so the first step has a graph of
            its own, and there is nothing to keep if it is not finite.
    """

    reference: Callable | str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dense: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learns_layers: bool = False


EXACT = {"labels": "exact"}
AT_EVERY_STEP = {"refresh_every": 1, "start": 0}
METHODS: dict[str, Line] = {
    "sgd": Line(references.identity),
    "adam": Line(references.inverse_magnitude),
    "adamw": Line(references.inverse_magnitude, {"weight_decay": 0.0}),
    "adagrad": Line(references.inverse_magnitude),
    "adagrad_full": Line(references.adagrad_full),
    "shampoo": Line(references.shampoo, AT_EVERY_STEP),
    "caspr": Line(references.caspr, AT_EVERY_STEP),
    "kfac": Line(references.kfac, {"damping": 1e-2}, EXACT, learns_layers=True),
    "adaptive_kfac": Line(
        "tests/methods/test_adaptive_kfac.py::test_every_step_is_the_papers",
        {"damping": 1.0},
        learns_layers=True,
    ),
    "kflr": Line(references.kfac, {"damping": 1e-2}, learns_layers=True),
    "skfac": Line(references.kfac_of_one_batch, {"damping": 1e-2}, EXACT, learns_layers=True),
    "ekfac": Line(references.ekfac, {"damping": 1e-2}, EXACT, learns_layers=True),
    "eva": Line(references.eva, learns_layers=True),
    "eva_s": Line(references.eva_s),
    "foof": Line(references.foof, {"damping": 1e-2}, learns_layers=True),
    "unit_ng": Line(references.unit_ng, {"damping": 1e-2}, EXACT, learns_layers=True),
    "diagonal_ng": Line(references.diagonal_ng, {"damping": 1e-2}, EXACT),
    "singd": Line(
        "tests/methods/test_singd.py::test_every_step_is_that_of_the_papers_equations",
        {"every": 1},
        learns_layers=True,
    ),
    "adahessian": Line(
        "tests/methods/test_adahessian.py::test_equals_the_formula_over_steps_with_an_interval"
    ),
    "muon": Line(references.orthogonal_factor, dense={"polynomial": "svd"}),
    "one_sided_shampoo": Line(
        "tests/methods/test_one_sided_shampoo.py::"
        "test_the_direction_is_the_inverse_root_of_one_gram_matrix",
        AT_EVERY_STEP,
    ),
    "splus": Line("tests/methods/test_splus.py::test_splus_is_the_plain_loop_step_by_step"),
    "kl_shampoo": Line(
        "tests/methods/test_kl_shampoo.py::"
        "test_kl_shampoo_follows_its_authors_trajectory_step_by_step"
    ),
    "tnt": Line("tests/methods/test_tnt.py::test_the_direction_is_the_dense_product_of_inverses"),
    "ggt": Line(
        "tests/methods/test_ggt.py::test_before_the_window_is_full_it_is_full_matrix_adagrad",
        {"window": 5},
    ),
    "soap": Line(
        "tests/methods/test_soap.py::test_soap_follows_its_authors_trajectory_step_by_step"
    ),
    "seng": Line(references.damped_empirical_layers, {"damping": 1e-2}, learns_layers=True),
    "mfac": Line(
        "tests/methods/test_mfac.py::test_a_window_of_one_has_a_closed_form",
        {"window": 3, "damping": 0.1},
    ),
    "tonga": Line(
        "tests/methods/test_tonga.py::test_without_evidence_each_update_truncates",
        {"rank": 2, "every": 2},
    ),
    "natural_gradient": Line(references.damped_fisher, {"damping": 1e-2}, learns_layers=True),
    "layerwise_ng": Line(references.damped_fisher_layers, {"damping": 1e-2}, learns_layers=True),
    "smw_gn": Line(references.damped_fisher, {"damping": 1e-2}),
    "tonga_unit": Line(
        "tests/methods/test_tonga_unit.py::test_a_parameter_outside_of_layers_is_one_unit",
        {"rank": 2, "every": 2},
        learns_layers=True,
    ),
    "smw_ng": Line(references.damped_empirical, {"damping": 1e-2}),
    "engd": Line(references.damped_ggn, {"damping": 1.0}),
    "spring": Line(references.damped_ggn, {"damping": 1.0}),
    "sr": Line(references.damped_ggn, {"damping": 1.0}),
    "lbfgs": Line(references.unit_norm, {"history": 3}),
    "hessian_free": Line(
        references.damped_ggn,
        {"max_iter": 3, "trials": 2, "backtracking": 1},
        {"max_iter": 80, "rule": "none", "backtracking": 0},
    ),
}


def line(name: str) -> Line:
    """The method's line, or a failure that says what to do."""
    if name not in METHODS:
        pytest.fail(
            f"the method {name!r} has a card but no line in tests/conformance/methods.py: add "
            f'"{name}": Line(...), and it is held to every law'
        )
    return METHODS[name]


def build(name: str, **options) -> fp.Transform:
    """The method with the table's hyperparameters."""
    return CARDS[name].build(**{**line(name).options, **options})


def trained(name: str, **options) -> fp.Transform:
    """The method as a user trains with it: with a learning rate."""
    return fp.chain(build(name, **options), fp.scale(0.05))


def needs_single_examples(name: str) -> bool:
    """Whether the method is refused where the examples are coupled."""
    return any(isinstance(need, (ExampleRows, ResidualRows)) for need in build(name).needs(0))


def intervals(name: str) -> fp.Transform:
    """The same, with both intervals at work where the method has them."""
    slow = {"every": 2, "refresh_every": 2} if CARDS[name].has_intervals else {}
    return trained(name, **slow)


every_method = pytest.mark.parametrize("name", list(CARDS))
