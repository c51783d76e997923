"""Everything that is measured, on models drawn at random, beside dense references.

The references differentiate the plain function, and example by example; they share nothing with the
library but the value of the loss and its constant. ``HYPOTHESIS_PROFILE=many`` draws thousands.
"""

import functools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcprecond as fp
from tests import generated, reference
from tests.equality import assert_close
from tests.problems import seeded

LOSSES = {"mse": fp.losses.MSE, "classes": fp.losses.CrossEntropy}


class Dense:
    """A drawn model as a problem, and its derivatives as matrices by plain autograd."""

    def __init__(self, model, examples, loss, reduction, as_module):
        self.model, self.run, self.count = model, model.function(), examples
        self.loss = LOSSES[loss](reduction=reduction)
        params = model.params()
        self.batch = generated.batch(model, examples, loss)
        if as_module:
            self.problem = fp.problem(model.module(), self.loss)
        else:
            self.problem = fp.problem(self.run, self.loss, params=params)
        # A module has its parameters in an order and under names of its own.
        self.params = {generated.own_name(k): x for k, x in self.problem.params.items()}
        self.start = reference.ravel(self.problem.params)
        self.data = (self.problem, self.problem.params, self.batch)
        self.constant = self.loss.constant(self.outputs(self.start), self.batch[1])

    def outputs(self, flat, inputs=None):
        params = reference.unravel(flat, self.params)
        return self.run(params, self.batch[0] if inputs is None else inputs)

    def value(self, flat):
        return self.loss(self.outputs(flat), self.batch[1])

    def gradient(self):
        return torch.autograd.functional.jacobian(self.value, self.start)

    def hessian(self):
        # Torch's fast kernel of attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(self.value, self.start)

    def jacobian(self, inputs=None):
        """(entries of the outputs, P)."""
        j = torch.autograd.functional.jacobian(lambda v: self.outputs(v, inputs), self.start)
        return j.reshape(-1, j.shape[-1])

    @functools.cached_property
    def ggn(self):
        j, outputs = self.jacobian(), self.outputs(self.start)
        return j.T @ reference.output_hessian(self.loss, outputs, self.batch[1]) @ j

    @functools.cached_property
    def rows(self):
        """(N, P): the gradient of each example's loss, from a batch of this example alone."""
        inputs, targets = self.batch
        leaf = self.outputs(self.start).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(leaf, targets) / self.constant, leaf)
        x = inputs[0] if self.model.two_inputs else inputs
        singles = [x[n : n + 1] for n in range(self.count)]
        singles = [(one, inputs[1]) for one in singles] if self.model.two_inputs else singles
        slopes = slope.reshape(self.count, -1)
        return torch.stack([s @ self.jacobian(x) for s, x in zip(slopes, singles, strict=True)])


def close(found, expected, rtol=1e-7):
    """Entries within ``rtol`` of the largest one: a single entry may be a difference of others."""
    found = reference.ravel(found) if isinstance(found, dict) else found
    assert_close(found, expected, rtol=0, atol=rtol * max(float(expected.abs().max()), 1e-9))


def products_are_those_of_dense_matrices(d):
    flat = torch.linspace(-1, 1, len(d.start), dtype=torch.float64)
    v, hessian = reference.unravel(flat, d.problem.params), d.hessian()
    close(fp.GGN(*d.data) @ v, d.ggn @ flat)
    close(fp.ggn_mv(*d.data, v), d.ggn @ flat)
    close(fp.Hessian(*d.data) @ v, hessian @ flat)
    close(fp.hvp(*d.data, v), hessian @ flat)
    close(fp.GGN(*d.data).gradient(), d.gradient())
    fisher = fp.Fisher(*d.data, labels="empirical")
    close(fisher @ v, d.rows.T @ (d.rows @ flat) * d.constant)


def traces_and_diagonals_are_those_of_dense_matrices(d):
    empirical = d.rows.T @ d.rows * d.constant
    matrices = [
        (fp.GGN(*d.data), d.ggn),
        (fp.Fisher(*d.data, labels="empirical"), empirical),
    ]
    for matrix, dense in matrices:
        close(matrix.to_dense(), dense)
        close(matrix.trace(), dense.trace())
        close(matrix.diagonal(), dense.diagonal())


def single_examples_are_batches_of_one(d):
    grads = fp.per_sample_grads(*d.data)
    for n in range(d.count):
        close({k: g[n] for k, g in grads.items()}, d.rows[n])
    close(fp.per_sample_gram(*d.data), d.rows @ d.rows.T)
    close(fp.per_sample_norms(*d.data), d.rows.norm(dim=1))
    j = d.jacobian()
    kernel = (j @ j.T).reshape(d.count, -1, d.count, len(j) // d.count)
    close(fp.ntk(*d.data), kernel)
    close(fp.ntk(*d.data, kind="sum"), torch.einsum("nama->nm", kernel))


def directions_lose_no_part_of_the_gradient(d):
    """At a damping above every curvature, each direction is the gradient over the damping."""
    gradient, damping = d.gradient(), 1e11
    for opt in (
        fp.kflr(damping=damping),
        fp.ekfac(damping=damping, labels="exact"),
        fp.kfac(damping=damping, labels="empirical"),
        fp.smw_ng(damping=damping, labels="empirical"),
    ):
        evidence = fp.observe(*d.data, opt.needs(0), generator=seeded(0))
        close(evidence.grads, gradient)
        _, direction = opt.update(opt.init(d.problem.params), evidence.grads, evidence)
        close({k: damping * x for k, x in direction.items()}, gradient, rtol=1e-5)


def blocks_keep_the_trace_and_rows_give_the_exact_solution(d):
    close(fp.KroneckerFactored(*d.data, kind="ekfac", labels="exact").trace(), d.ggn.trace())
    layers = fp.layer_statistics(*d.data, labels="exact")
    diagonal = reference.unravel(d.ggn.diagonal(), d.problem.params)
    for name, squares in layers.others.items():
        close((layers.scale * squares).reshape(-1), diagonal[name].reshape(-1))
    opt = fp.smw_ng(damping=0.1, labels="empirical")
    evidence = fp.observe(*d.data, opt.needs(0))
    _, direction = opt.update(opt.init(d.problem.params), evidence.grads, evidence)
    damped = d.rows.T @ d.rows * d.constant + 0.1 * reference.eye(len(d.start))
    close(direction, torch.linalg.solve(damped, d.gradient()))


CHECKS = [
    products_are_those_of_dense_matrices,
    traces_and_diagonals_are_those_of_dense_matrices,
    single_examples_are_batches_of_one,
    directions_lose_no_part_of_the_gradient,
    blocks_keep_the_trace_and_rows_give_the_exact_solution,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
@given(
    generated.models(),
    st.integers(2, 3),
    st.sampled_from(list(LOSSES)),
    st.sampled_from(["mean", "sum"]),
    st.booleans(),
)
def test_on_a_drawn_model(check, model, examples, loss, reduction, as_module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters of which only the diagonal is kept
        check(Dense(model, examples, loss, reduction, as_module))
