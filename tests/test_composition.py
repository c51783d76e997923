import pytest
import torch

import funcprecond as fp
from funcprecond.composition import Composed, NoSolver
from funcprecond.curvature.gradient import BatchGradient
from funcprecond.curvature.hessian import HessianProbes
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.per_sample import PerSampleGrads
from funcprecond.representation.dense import Dense
from funcprecond.representation.diagonal import Diagonal
from funcprecond.representation.kronecker_dim import KroneckerDim
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky
from funcprecond.solver.divide import Divide
from funcprecond.solver.inverse_root import InverseRoot
from funcprecond.solver.kronecker_sum import KroneckerSum
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import seeded


def test_a_new_method_is_one_line():
    """Diagonal natural gradient, which no file of the library is."""
    toy = problems.mlp()
    opt = fp.compose(PerSampleGrads(), Diagonal, Divide(1e-3))
    _, direction, evidence = problems.update(toy, opt)
    rows = reference.per_example(toy.problem, toy.params, toy.batch)
    expected = reference.ravel(evidence.grads) / (rows.square().mean(0) + 1e-3)
    assert_close(reference.ravel(direction), expected, rtol=1e-9)


def test_another_new_method_is_one_line():
    """Newton's step with Hutchinson's diagonal, against the dense Hessian and the drawn signs."""
    toy = problems.mlp()
    need = HessianProbes(3)
    opt = fp.compose(need, Diagonal, Divide(1e-2))
    _, direction, evidence = problems.update(toy, opt)
    x, y = toy.batch
    h = reference.hessian(lambda p: toy.problem.loss(toy.problem(p, x), y), toy.params)
    signs = need.draw(toy.problem, toy.params, toy.batch, seeded(0))
    v = torch.stack([reference.ravel({k: s[i] for k, s in signs.items()}) for i in range(3)])
    diagonal = (v * (v @ h)).mean(0)
    expected = reference.ravel(evidence.grads) / (diagonal.abs() + 1e-2)
    assert_close(reference.ravel(direction), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("representation", "solver", "sentence"),
    [
        (KroneckerDim, Divide(), "Divide accepts Diagonal, LayerDiagonal, not KroneckerDim"),
        (Dense, KroneckerSum(), "KroneckerSum accepts KroneckerDim, not Dense"),
        (Diagonal, InverseRoot(), "InverseRoot accepts KroneckerDim, Dense, not Diagonal"),
    ],
)
def test_a_solver_that_does_not_fit_is_refused_with_what_would(representation, solver, sentence):
    with pytest.raises(NoSolver, match=sentence):
        fp.compose(BatchGradient(), representation, solver)


@pytest.mark.parametrize("decay", [1.0, -0.1, "mean", 2])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be"):
        fp.compose(BatchGradient(), Diagonal, Divide(), decay=decay)


@pytest.mark.parametrize("interval", [{"every": 0}, {"refresh_every": -1}, {"start": -1}])
def test_an_interval_out_of_range_is_refused(interval):
    with pytest.raises(ValueError, match="at least"):
        fp.compose(BatchGradient(), Diagonal, Divide(), **interval)


def test_measuring_is_skipped_between_intervals():
    opt = fp.compose(PerSampleGrads(), Diagonal, Divide(), every=3, refresh_every=3)
    assert [PerSampleGrads() in opt.needs(t) for t in range(5)] == [True, False, False, True, False]


def test_between_measurements_the_state_stays_and_the_gradient_is_new():
    toy = problems.mlp()
    opt = fp.compose(PerSampleGrads(), Diagonal, Divide(), every=2, refresh_every=2)
    state, _, _ = problems.update(toy, opt)
    evidence = fp.observe(toy.problem, toy.params, toy.at(1), opt.needs(1))
    new, direction = opt.update(state, evidence.grads, evidence)
    assert isinstance(new, Composed)
    assert new.representation is state.representation
    expected = Divide().apply(state.factor, evidence.grads)
    assert_close(direction, expected, rtol=1e-14)


def test_the_current_measurement_is_inside_its_own_preconditioner(randn):
    g = {"w": randn(4)}
    opt = fp.compose(BatchGradient(), Diagonal, Divide(0.0, power=0.5), decay="sum")
    assert_close(opt.update(opt.init(g), g)[1]["w"], g["w"].sign(), rtol=1e-12)


def test_without_evidence_the_missing_curvature_is_named(randn):
    g = {"w": randn(4)}
    opt = fp.compose(PerSampleGrads(), Diagonal, Divide())
    with pytest.raises(fp.MissingEvidence, match="PerSampleGrads"):
        opt.update(opt.init(g), g)


def test_evidence_without_the_measurement_that_is_due_is_an_error():
    toy = problems.mlp()
    opt = fp.compose(PerSampleGrads(), Diagonal, Divide())
    evidence = fp.observe(toy.problem, toy.params, toy.batch, opt.needs(0)[1:])
    with pytest.raises(fp.MissingEvidence, match="PerSampleGrads"):
        opt.update(opt.init(toy.params), evidence.grads, evidence)


@pytest.mark.parametrize(
    ("parts", "error", "sentence"),
    [
        ((BatchGradient, Diagonal, Divide()), TypeError, "an instance of a Need"),
        ((BatchGradient(), Diagonal.init({}), Divide()), TypeError, "must be a class"),
        ((BatchGradient(), Diagonal, Divide), TypeError, "must be an instance"),
        ((BatchGradient(), KroneckerIO, Cholesky(0.1)), fp.NoRepresentation, "Layers"),
        ((PerSampleGrads(), KroneckerDim, InverseRoot()), fp.NoRepresentation, "KroneckerDim"),
        ((LayerStatistics(), Diagonal, Divide()), fp.NoRepresentation, "LayerStatistics"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_they_are_put_together(parts, error, sentence):
    with pytest.raises(error, match=sentence):
        fp.compose(*parts)


def test_every_part_of_every_package_is_accepted_or_refused_with_a_sentence():
    """No combination fails later than at ``compose``, and each solver fits somewhere."""
    needs = [BatchGradient(), HessianProbes(), PerSampleGrads(), LayerStatistics()]
    needs += [fp.curvature.SampledGradient()]
    stores = [getattr(fp.representation, x) for x in fp.representation.__all__]
    stores = [x for x in stores if isinstance(x, type) and hasattr(x, "accepts")]
    solvers = [getattr(fp.solver, x) for x in fp.solver.__all__]
    solvers = [x() for x in solvers if hasattr(x, "accepts") and x is not fp.solver.Solver]
    toy, fitting = problems.mlp(), set()
    for need in needs:
        for store in stores:
            for solver in solvers:
                try:
                    opt = fp.compose(need, store, solver)
                except (fp.NoRepresentation, fp.NoSolver):
                    continue
                fitting |= {type(solver), store}
                _, direction, evidence = problems.update(toy, opt)
                assert direction.keys() == evidence.grads.keys()
    # These solve with the rows of one batch, which no representation accumulates.
    assert {type(s) for s in solvers} - fitting == {fp.solver.SMW, fp.solver.LeastSquares}
    assert {Dense, Diagonal, KroneckerDim, KroneckerIO} <= fitting


def test_only_a_solver_that_staggers_can_be_staggered():
    with pytest.raises(ValueError, match="Divide prepares all factors at once"):
        fp.compose(BatchGradient(), Diagonal, Divide(), stagger=True)


def test_momentum_is_preconditioned_in_the_place_of_the_gradient(randn):
    opt = fp.compose(BatchGradient(), Diagonal, Divide(1e-3, power=0.5), decay="sum", momentum=0.8)
    state = opt.init({"w": randn(5)})
    mean, total = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(3):
        g = randn(5)
        state, direction = opt.update(state, {"w": g})
        mean, total = 0.8 * mean + 0.2 * g, total + g.square()
        assert_close(direction["w"], mean / (total.sqrt() + 1e-3), rtol=1e-12)
