import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests import problems
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, normal, seeded


def snapshot(module):
    return copy(dict(module.state_dict())), [
        id(x) for x in (*module.parameters(), *module.buffers())
    ]


def assert_untouched(module, before):
    values, identities = before
    assert_same(dict(module.state_dict()), values)
    assert [id(x) for x in (*module.parameters(), *module.buffers())] == identities
    assert all(p.grad is None for p in module.parameters())


# ----------------------------------------------------------------------------------------- modules
def test_params_are_copies_by_name():
    module = problems.mlp_module()
    problem = fp.problem(module, fp.losses.mse)
    assert list(problem.params) == [k for k, _ in module.named_parameters()]
    with torch.no_grad():
        module[0].weight.zero_()
    assert problem.params["0.weight"].any()
    assert not any(p.requires_grad for p in problem.params.values())


def test_calling_a_problem_runs_the_model_at_the_params_given():
    module, x = problems.mlp_module(), normal((5, 3))
    problem = fp.problem(module, fp.losses.mse)
    assert_close(problem(problem.params, x), module(x).detach(), rtol=1e-14)
    doubled = {k: 2 * p for k, p in problem.params.items()}
    h = torch.tanh(F.linear(x, doubled["0.weight"], doubled["0.bias"]))
    assert_close(problem(doubled, x), F.linear(h, doubled["2.weight"], doubled["2.bias"]))


@pytest.mark.parametrize(
    "change", [lambda p: {k: p[k] for k in list(p)[1:]}, lambda p: {**p, "no": p["0.bias"]}]
)
def test_params_that_do_not_fit_the_model_are_named(change):
    problem = problems.mlp().problem
    with pytest.raises((KeyError, RuntimeError), match=r"0\.weight|no"):
        problem(change(problem.params), normal((5, 3)))


def test_observing_changes_nothing_of_a_module():
    module = initialised(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    )
    before = snapshot(module)
    problem = fp.problem(module, fp.losses.cross_entropy)
    needs = (fp.curvature.HessianOperator(), fp.curvature.LayerStatistics())
    fp.observe(problem, problem.params, problems.labelled(5, 3, 3, 0), needs, generator=seeded(0))
    assert_untouched(module, before)
    assert not any(b.any() for k, b in problem.buffers.items() if "mean" in k)


class Tied(nn.Module):
    """One weight under two names, and one module under two."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_weights_appear_once_and_get_the_gradient_of_all_uses():
    module, batch = initialised(Tied()), (normal((4, 3)), normal((4, 3), 1))
    problem = fp.problem(module, fp.losses.mse)
    assert list(problem.params) == ["a.weight", "a.bias"]
    evidence = fp.observe(problem, problem.params, batch)
    F.mse_loss(module(batch[0]), batch[1]).backward()
    expected = {k: p.grad for k, p in module.named_parameters()}
    assert_close(evidence.grads, expected, rtol=1e-12)


def test_observing_leaves_tied_weights_and_shared_modules_in_place():
    module = initialised(Tied())
    before = snapshot(module)
    problem = fp.problem(module, fp.losses.mse)
    doubled = {k: 2 * p for k, p in problem.params.items()}
    fp.observe(problem, doubled, (normal((4, 3)), normal((4, 3), 1)))
    assert_untouched(module, before)
    assert module.c.weight is module.a.weight


def test_frozen_parameters_are_constants():
    module = problems.mlp_module()
    module[2].requires_grad_(False)
    problem = fp.problem(module, fp.losses.cross_entropy)
    assert list(problem.params) == ["0.weight", "0.bias"]
    evidence = fp.observe(problem, problem.params, problems.mlp().batch)
    whole = problems.mlp()
    expected = fp.observe(whole.problem, whole.params, whole.batch).grads
    assert_close(evidence.grads, {k: expected[k] for k in evidence.grads}, rtol=1e-13)


def test_buffers_come_back_as_the_modules_own_update_would_be():
    module = initialised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    problem, x = fp.problem(module, fp.losses.mse), normal((5, 3))
    evidence = fp.observe(problem, problem.params, (x, normal((5, 4))))
    module(x)
    assert_close(evidence.buffers, dict(module.named_buffers()), rtol=1e-14)


class Counting(nn.Module):
    """Puts a new tensor in a buffer's place, and fails on inputs that are all zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs = self.runs + 1
        if not x.any():
            raise ValueError("nothing to see")
        return self.layer(x)


def test_a_buffer_that_the_model_replaces_comes_back():
    problem = fp.problem(Counting(), fp.losses.mse)
    batch, buffers = (normal((4, 3)).float(), torch.zeros(4, 2)), None
    for runs in (1, 2):
        buffers = fp.observe(problem, problem.params, batch, buffers=buffers).buffers
        assert buffers["runs"] == runs
    assert problem.buffers["runs"] == 0


def test_a_buffer_that_the_model_takes_away_is_back_in_the_next_run():
    class Forgetful(Counting):
        def forward(self, x):
            assert self.runs is not None
            self.runs = None
            return self.layer(x)

    module = Forgetful()
    problem, before = fp.problem(module, fp.losses.mse), snapshot(module)
    batch, buffers = (normal((4, 3)).float(), torch.zeros(4, 2)), None
    for _ in range(2):
        buffers = fp.observe(problem, problem.params, batch, buffers=buffers).buffers
        assert buffers == {"runs": torch.zeros(())}
    assert_untouched(module, before)


def test_a_run_that_fails_leaves_the_module_as_it_was():
    module = Counting()
    problem, before = fp.problem(module, fp.losses.mse), snapshot(module)
    with pytest.raises(ValueError, match="nothing to see"):
        problem(problem.params, torch.zeros(4, 3))
    assert_untouched(module, before)


def test_buffers_that_do_not_fit_the_model_are_named():
    problem = fp.problem(Counting(), fp.losses.mse)
    with pytest.raises(KeyError, match=r"buffers do not fit the model: missing \['runs'\]"):
        problem(problem.params, torch.ones(4, 3), buffers={})


@pytest.mark.parametrize("wrap", [torch.jit.script, nn.DataParallel])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_module_that_hides_its_layers_is_refused(wrap):
    with pytest.raises(TypeError, match="pass the original"):
        fp.problem(wrap(nn.Linear(3, 2)), fp.losses.mse)


def test_the_mode_is_the_modules_when_it_runs():
    module = initialised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    problem, x = fp.problem(module, fp.losses.mse), normal((5, 3))
    module.eval()
    assert_close(problem(problem.params, x), module(x).detach(), rtol=1e-14)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_may_be_a_tensor_a_tuple_of_arguments_or_a_dict_of_keywords(form):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, shift=0.0):
            return self.layer(x + shift)

    module, x, shift = initialised(Sum()), normal((4, 3)), normal((4, 3), 1)
    inputs, expected = {
        "tensor": (x, module(x)),
        "tuple": ((x, shift), module(x, shift)),
        "dict": ({"x": x, "shift": shift}, module(x, shift)),
    }[form]
    problem = fp.problem(module, fp.losses.mse)
    assert_close(problem(problem.params, inputs), expected.detach(), rtol=1e-14)


def test_outputs_may_be_any_tree():
    module = problems.mlp_module()

    def model(p, x):
        h = F.linear(x, p["w"])
        return {"logits": h, "aux": (h.square().sum(1),)}

    def loss(outputs, y):
        return F.cross_entropy(outputs["logits"], y) + outputs["aux"][0].mean()

    params = {"w": module[0].weight.detach()}
    problem, batch = fp.problem(model, loss, params=params), problems.labelled(5, 3, 4, 0)
    evidence = fp.observe(problem, params, batch)
    expected = torch.func.grad(lambda p: loss(model(p, batch[0]), batch[1]))(params)
    assert_close(evidence.grads, expected, rtol=1e-12)
    assert set(evidence.outputs) == {"logits", "aux"}


# ----------------------------------------------------------------------------------------- batches
def test_a_batch_is_opaque_with_a_split_of_its_own():
    toy = problems.mlp()
    problem = fp.problem(
        problems.mlp_module(), fp.losses.cross_entropy, split=lambda b: (b["x"], b["y"])
    )
    x, y = toy.batch
    ours = fp.observe(problem, problem.params, {"x": x, "y": y, "weight": None})
    assert_close(ours.grads, fp.observe(toy.problem, toy.params, toy.batch).grads)


@pytest.mark.parametrize("batch", [(1, 2, 3), torch.ones(2), {"x": 1}])
def test_a_batch_that_is_no_pair_is_explained(batch):
    toy = problems.mlp()
    with pytest.raises(TypeError, match="neither a pair.*split="):
        fp.observe(toy.problem, toy.params, batch)


# ------------------------------------------------------------------------------------------ errors
def test_a_module_with_params_is_refused():
    with pytest.raises(TypeError, match="has its own parameters"):
        fp.problem(nn.Linear(2, 2), fp.losses.mse, params={})


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="nn.Module or a function"):
        fp.problem(3, fp.losses.mse)


def test_a_function_of_the_params_alone_is_refused():
    with pytest.raises(TypeError, match=r"two arguments \(params, inputs\)"):
        fp.problem(lambda params: params, fp.losses.mse, params={})


@pytest.mark.parametrize("bad", [torch.ones(2, dtype=torch.int64), 1.0])
def test_a_parameter_that_is_no_floating_point_tensor_is_named(bad):
    with pytest.raises(ValueError, match="'w' must be a floating-point tensor"):
        fp.problem(lambda p, x: x, fp.losses.mse, params={"w": bad})


def test_a_lazy_module_is_told_to_run_once():
    with pytest.raises(ValueError, match="no shape yet"):
        fp.problem(nn.LazyLinear(3), fp.losses.mse)


# ------------------------------------------------------------------------------- coupled examples
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
    ],
)
def test_a_layer_that_couples_the_examples_is_named(norm):
    module = nn.Sequential(nn.Linear(3, 4), norm).double()
    problem = fp.problem(module, fp.losses.mse)
    assert "BatchNorm1d '1'" in problem.couples_examples()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4).eval(), nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_a_layer_that_does_not_is_fine(norm):
    module = nn.Sequential(nn.Linear(3, 4), norm).double()
    assert fp.problem(module, fp.losses.mse).couples_examples() is None
