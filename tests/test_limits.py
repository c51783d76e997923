"""docs/limits.md is true: what it lists as refused is refused, and the rest is not noticed."""

import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import funcprecond as fp
from tests.problems import initialised, normal, seeded

PAGE = (Path(__file__).parents[1] / "docs" / "limits.md").read_text(encoding="utf-8")
BATCH = normal((6, 3), 1), normal((6, 2), 2)
GIVEN = normal((2,), 3).abs().requires_grad_()


class Model(nn.Module):
    """A linear layer in a function of it and of the inputs."""

    def __init__(self, function: Callable):
        super().__init__()
        self.layer, self.function = initialised(nn.Linear(3, 2)), function

    def forward(self, x):
        return self.function(self.layer, x)


def of(function: Callable = lambda layer, x: layer(x)) -> fp.Problem:
    return fp.problem(Model(function), fp.losses.mse)


def observed(problem: fp.Problem, needs=(), batch=BATCH, **options) -> fp.Evidence:
    return fp.observe(problem, problem.params, batch, needs, **options)


def copied(problem: fp.Problem) -> tuple:
    """Parameters and a batch that may be changed."""
    params = {k: p.clone() for k, p in problem.params.items()}
    return problem, params, tuple(x.clone() for x in BATCH)


class ConstantBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0].cos()


class ConstantInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.slope


def matrix(kind: Callable = fp.GGN, problem=None, **data):
    problem = of() if problem is None else problem
    return kind(problem, problem.params, **({"batch": BATCH} | data))


def products(kind, model, *, drop_last=False, **options):
    """Products of one vector with a shuffled stream."""
    loader = DataLoader(
        TensorDataset(*BATCH), 4, shuffle=True, drop_last=drop_last, generator=seeded(0)
    )
    problem = fp.problem(initialised(model), fp.losses.mse)
    ones = {k: torch.ones_like(p) for k, p in problem.params.items()}
    operator = kind(problem, problem.params, batches=loader, **options)
    return [operator @ ones for _ in range(3)]


# ------------------------------------------------------------------------------------- the model
def coupled(function=lambda layer, x: layer(x - x.mean(0))):
    problem = of(function)
    fp.per_sample_grads(problem, problem.params, BATCH)


def batch_norm():
    problem = fp.problem(initialised(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), F.mse_loss)
    fp.per_sample_norms(problem, problem.params, BATCH)


def checkpointed(reentrant):
    observed(
        of(lambda layer, x: checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant))
    )


def constant_backward(kind):
    _ = matrix(kind, of(lambda layer, x: ConstantBackward.apply(layer(x)))) @ of().params


def no_second_derivative():
    def loss(outputs, targets):
        return F.multi_margin_loss(outputs, (targets[:, 0] > 0).long())

    problem = fp.problem(initialised(nn.Linear(3, 2)), loss)
    fp.hvp(problem, problem.params, BATCH, problem.params)


def held_by_the_loss():
    observed(fp.problem(initialised(nn.Linear(3, 2)), lambda x, y: ((x * GIVEN - y) ** 2).mean()))


def changes_its_inputs():
    fp.observe(*copied(of(lambda layer, x: layer(x.mul_(2.0)))))


def changes_its_parameters():
    def model(layer, x):
        with torch.no_grad():
            layer.weight.mul_(1.5)
        return layer(x)

    fp.observe(*copied(of(model)))


def draws(function):
    observed(of(lambda layer, x: layer(x) * function(x[:, :2])), generator=seeded(0))


def embedding(**options):
    problem = fp.problem(nn.Embedding(4, 2, **options), fp.losses.mse)
    observed(problem, batch=(torch.tensor([0, 1, 1]), torch.ones(3, 2)))


def parallel(wrap):
    """A module that one process wraps for data parallelism."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings(action="ignore"):
            wrapped = wrap(nn.Linear(3, 2))
        fp.problem(wrapped, fp.losses.mse)
    finally:
        dist.destroy_process_group()


def sharded(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module


def scripted():
    with warnings.catch_warnings(action="ignore"):
        module = torch.jit.script(nn.Linear(3, 2))
    fp.problem(module, fp.losses.mse)


def under_inference_mode():
    problem = of()
    with torch.inference_mode():
        observed(problem)


def labels_of_ones_own_loss():
    problem = fp.problem(initialised(nn.Linear(3, 2)), lambda x, y: ((x - y) ** 2).mean())
    fp.Fisher(problem, problem.params, BATCH, labels="exact").trace()


# ------------------------------------------------------------------------------------ the method
def no_needs(opt):
    evidence = observed(of())
    opt.update(opt.init(of().params), evidence.grads, evidence)


def another_state(opt):
    problem = of()
    evidence = observed(problem, opt.needs(0), generator=seeded(0))
    opt.update(opt.init({"other": torch.ones(2)}), evidence.grads, evidence)


def shared_buffers():
    problem = fp.problem(initialised(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), F.mse_loss)
    step = fp.make_step(problem, fp.adam())
    params = {k: torch.stack([p, 2 * p]) for k, p in problem.params.items()}
    torch.vmap(lambda p, s: step(p, s, BATCH, 0)[0])(params, torch.vmap(fp.adam().init)(params))


def old_compiler():
    with mock.patch("funcprecond.step.COMPILES", (99, 0)):
        fp.make_step(of(), fp.adam(), compile=True)


# -------------------------------------------------------------------------- the curvature matrix
def preconditioned():
    return matrix(fp.KroneckerFactored, labels="exact").inverse(damping=0.1) @ matrix()


def traced_operator():
    operator = matrix()
    torch.compile(lambda v: operator @ v, fullgraph=True)(of().params)


def damaged(tmp_path):
    path = tmp_path / "state.pt"
    fp.save(path, of().params)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fp.load(path, of().params)


def differentiating_loss():
    def model(p, x):
        x = x.detach().requires_grad_()
        return (x @ p["w"]).tanh(), x

    def loss(outputs, _):
        return torch.autograd.grad(outputs[0].sum(), outputs[1], create_graph=True)[0].sum()

    problem = fp.problem(model, loss, params={"w": torch.ones(3)})
    fp.layer_statistics(problem, problem.params, (torch.ones(2, 3), None), labels="empirical")


Case = tuple[Callable, type[Exception], str]
NOISE = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
NORM = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
OTHERS = "would be another matrix at each product"


# By the beginning of the page's line.
def watched(*losses: Callable, **options: Any) -> None:
    layer = initialised(nn.Linear(3, 2))
    opt = fp.optim.KFAC(layer, lr=0.1)
    for i, loss in enumerate(losses):
        with opt.watch():
            value = loss(layer(BATCH[0]), BATCH[1], **options)
        (value * (i + 2)).backward()
    if not losses:
        F.mse_loss(layer(BATCH[0]), BATCH[1]).backward()
    opt.step()


def two_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(outputs, targets) + F.mse_loss(outputs, 2 * targets)


def by_closure(penalty: Callable | None) -> None:
    layer = initialised(nn.Linear(3, 2))
    opt = fp.optim.HessianFree(layer)
    if penalty is None:
        F.mse_loss(layer(BATCH[0]), BATCH[1]).backward()
        opt.step()
    else:
        opt.step(lambda: F.mse_loss(layer(BATCH[0]), BATCH[1]) + penalty(layer))


def sparse_gradient() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    fp.optim.Adam(table.parameters(), lr=0.1).step()


def a_parameter_less() -> None:
    layer = initialised(nn.Linear(3, 2))
    opt = fp.optim.LBFGS(layer)
    for _ in range(2):
        opt.step(lambda: F.mse_loss(layer(BATCH[0]), BATCH[1]))
        layer.bias.requires_grad_(False)


def own_loss(measure):
    """Measures a model whose output is its loss."""
    problem = fp.problem(Model(lambda layer, x: layer(x).square().mean()), lambda loss, _: loss)
    found = measure(problem, problem.params, (BATCH[0], None))
    return found @ problem.params


def without_gradient(opt, *instead):
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    grads: dict = {"w": torch.ones(2), **dict.fromkeys(["b"][: len(instead)], None)}
    opt.update(opt.init(params), grads)


REFUSED: dict[str, list[Case]] = {
    "a loss that the model computes itself": [
        (lambda: own_loss(fp.GGN), TypeError, "outputs='logits'"),
        (lambda: own_loss(fp.per_sample_grads), TypeError, "outputs='logits'"),
    ],
    "examples that depend on each other": [
        (coupled, ValueError, "in_axes=None"),
        (batch_norm, ValueError, "GroupNorm, or eval mode"),
    ],
    "activation checkpointing": [
        (lambda: checkpointed(True), RuntimeError, "switch it off"),
        (lambda: checkpointed(False), RuntimeError, "switch it off"),
    ],
    "a custom `autograd.Function`": [
        (lambda: constant_backward(fp.GGN), NotImplementedError, "Write its backward"),
        (lambda: constant_backward(fp.Hessian), NotImplementedError, "Write its backward"),
    ],
    "a function of torch without a second derivative": [
        (no_second_derivative, NotImplementedError, "cannot be differentiated twice")
    ],
    "a tensor that requires a gradient": [
        (lambda: observed(of(lambda layer, x: layer(x) * GIVEN)), ValueError, "detach it"),
        (held_by_the_loss, ValueError, "detach it"),
    ],
    "a model that changes": [
        (changes_its_inputs, RuntimeError, "changes a copy"),
        (changes_its_parameters, RuntimeError, "changes a copy"),
    ],
    "random numbers by other functions": [
        (lambda: draws(lambda x: torch.poisson(x.abs())), RuntimeError, "with poisson"),
        (lambda: draws(lambda x: x.clone().exponential_()), RuntimeError, "with exponential_"),
        (
            lambda: draws(lambda x: torch.distributions.Gamma(2.0, 1.0).sample(x.shape)),
            RuntimeError,
            "no generator controls here",
        ),
    ],
    "`nn.Embedding`": [
        (lambda: embedding(max_norm=1.0), RuntimeError, "remove the option"),
        (lambda: embedding(scale_grad_by_freq=True), RuntimeError, "remove the option"),
    ],
    "modules wrapped by": [
        (
            lambda: parallel(nn.parallel.DistributedDataParallel),
            TypeError,
            "average evidence.grads over the processes",
        ),
        (lambda: parallel(sharded), TypeError, "average evidence.grads over the processes"),
        (
            lambda: fp.problem(nn.DataParallel(nn.Linear(3, 2)), fp.losses.mse),
            TypeError,
            "pass the original",
        ),
    ],
    "scripted modules": [(scripted, TypeError, "pass the original")],
    "lazy modules": [
        (lambda: fp.problem(nn.LazyLinear(2), fp.losses.mse), ValueError, "on one batch first")
    ],
    "`torch.inference_mode`": [(under_inference_mode, RuntimeError, "use torch.no_grad")],
    "a loss that differentiates the model": [
        (differentiating_loss, TypeError, "Take these derivatives in the model")
    ],
    "layer statistics, per-sample gradients": [
        (lambda: on_points(fp.layer_statistics, labels="empirical"), TypeError, "fp.engd"),
        (lambda: on_points(fp.per_sample_grads), TypeError, "fp.engd"),
        (lambda: on_points(fp.layer_statistics), TypeError, "likelihood"),
    ],
    "the loss at other parameters": [
        (lambda: at_samples(fp.engd()), TypeError, "fp.spring"),
        (lambda: at_samples(fp.adahessian()), TypeError, "fp.spring"),
        (lambda: at_samples(fp.hessian_free()), TypeError, "fp.spring"),
    ],
    "sampled or exact labels": [(labels_of_ones_own_loss, TypeError, "labels='empirical'")],
    "an update without the needs": [
        (lambda: no_needs(fp.kfac(damping=0.1)), fp.MissingEvidence, r"opt.needs\(t\)"),
        (lambda: no_needs(fp.shampoo()), fp.MissingEvidence, r"opt.needs\(t\)"),
    ],
    "a gradient that is `None`": [
        (lambda: without_gradient(fp.adam(), None), ValueError, r"torch.zeros_like\(param\)"),
        (lambda: without_gradient(fp.clip_norm(1.0), None), ValueError, "torch.zeros_like"),
        (lambda: without_gradient(fp.adam()), ValueError, "which the gradient lacks"),
    ],
    "a state of other parameters": [
        (lambda: another_state(fp.adam()), ValueError, r"opt.init\(params\)"),
        (lambda: another_state(fp.ekfac(damping=0.1)), ValueError, r"opt.init\(params\)"),
    ],
    "hyperparameters out of range": [
        (lambda: fp.adam(betas=(0.9, 1.0)), ValueError, r"betas must be a number in \[0, 1\)"),
        (lambda: fp.momentum(-0.5), ValueError, "decay must be a number in"),
    ],
    "`damping=0`": [(lambda: fp.kfac(damping=0.0), ValueError, "damping must be positive")],
    "a vmapped step": [(shared_buffers, RuntimeError, "stack one copy of problem.buffers")],
    "`compile=True`": [(old_compiler, RuntimeError, "needs torch 99.0 or newer")],
    "`donate=True`": [
        (lambda: fp.make_step(of(), fp.adam(), donate=True), ValueError, "requires compile=True")
    ],
    "eigenvalues, densities": [
        (lambda: fp.spectral_density(preconditioned()), TypeError, "symmetric"),
        (lambda: fp.eigsh(preconditioned(), 2, generator=seeded(0)), TypeError, "symmetric"),
        (lambda: preconditioned().solve(of().params, damping=0.1), TypeError, "symmetric"),
        (lambda: fp.xdiag(preconditioned(), 4, generator=seeded(0)), TypeError, "symmetric"),
    ],
    "a stream whose batches": [
        (lambda: products(fp.GGN, NOISE, generator=seeded(0)), ValueError, OTHERS),
        (lambda: products(fp.GGN, NORM), ValueError, OTHERS),
        (lambda: products(fp.Hessian, nn.Linear(3, 2), drop_last=True), ValueError, OTHERS),
        (
            lambda: products(fp.Fisher, nn.Linear(3, 2), labels="mc", generator=seeded(0)),
            ValueError,
            OTHERS,
        ),
    ],
    "an iterator": [
        (lambda: matrix(batch=None, batches=iter([BATCH])), TypeError, "not an iterator")
    ],
    "`C @ v`": [(traced_operator, Unsupported, "matmul")],
    "a checkpoint file": [(damaged, ValueError, "intact file")],
    "a step that measures": [(lambda: watched(), fp.MissingEvidence, r"opt\.watch\(\)")],
    "a watch without": [
        (lambda: watched(lambda o, t: (o - t).abs().mean()), RuntimeError, "opt.loss"),
        (
            lambda: watched(lambda o, t: F.mse_loss(o, t) + F.mse_loss(o, 2 * t)),
            RuntimeError,
            "two",
        ),
        (
            lambda: watched(F.mse_loss, F.mse_loss, reduction="sum"),
            RuntimeError,
            "reduction='mean'",
        ),
    ],
    "`opt.step()` without": [(lambda: by_closure(None), RuntimeError, r"opt\.step\(closure\)")],
    "a closure with a penalty": [
        (lambda: by_closure(lambda layer: layer.weight.sum()), RuntimeError, "weight_decay=")
    ],
    "sparse gradients": [(sparse_gradient, RuntimeError, "sparse=False")],
    "`fp.optim.LBFGS`": [(a_parameter_less, ValueError, "make a new optimizer")],
}


# --------------------------------------------------------------------------- what is not noticed
def a_micro_batch_that_was_not_watched() -> bool:
    factors = []
    for unwatched in (False, True):
        layer = initialised(nn.Linear(3, 2))
        opt = fp.optim.KFAC(layer, lr=0.1)
        if unwatched:
            F.mse_loss(layer(BATCH[0]), BATCH[1]).backward()
        with opt.watch():
            F.mse_loss(layer(BATCH[0][:2]), BATCH[1][:2]).backward()
        opt.step()
        factors.append(opt.state_dict()["state"][0]["tensors"])
    return all(torch.equal(x, factors[1][k]) for k, x in factors[0].items() if "right" in k)


def on_points(function: Callable, **options) -> Any:
    params = {"w": normal((3,))}
    problem = fp.residuals({"a": lambda p, x: p["w"] @ x}, params=params)
    return function(problem, params, {"a": BATCH[0]}, **options)


def at_samples(opt: fp.Transform) -> None:
    params = {"w": normal((3,))}
    problem = fp.vmc(lambda p, x: p["w"] @ x, lambda p, x: p["w"] @ x.square(), params=params)
    evidence = observed(problem, opt.needs(0), BATCH[0], generator=seeded(0))
    opt.update(opt.init(params), evidence.grads, evidence)


def written_through_data() -> bool:
    def model(layer, x):
        x.data.mul_(2.0)
        return layer(x)

    problem, params, batch = copied(of(model))
    fp.observe(problem, params, batch)
    return torch.equal(batch[0], 2 * BATCH[0])


def a_gradient_written_through_data() -> bool:
    problem, opt = of(), fp.smw_ng(damping=1.0)
    evidence = observed(problem, opt.needs(0))
    before = opt.update(opt.init(problem.params), evidence.grads, evidence)[1]
    for g in evidence.grads.values():
        g.data.mul_(2.0)
    after = opt.update(opt.init(problem.params), evidence.grads, evidence)[1]
    return all(torch.equal(before[k], x) for k, x in after.items())


def numbers_of_python() -> bool:
    problem = of(lambda layer, x: layer(x) * random.random())
    return not torch.equal(observed(problem).loss, observed(problem).loss)


def rand_like_in_a_compiled_function() -> bool:
    problem = of(lambda layer, x: layer(x + torch.rand_like(x)))
    step = fp.make_step(problem, fp.sgd(), compile=True)
    with pytest.raises((RuntimeError, ValueError), match="generator"):
        step(problem.params, (), BATCH, 0)
    compiled = torch.compile(lambda p: fp.observe(problem, p, BATCH).loss, fullgraph=True)
    return not torch.equal(compiled(problem.params), compiled(problem.params))


def draws_beside_another_thread() -> bool:
    problem = of(lambda layer, x: layer(x + torch.ops.aten.rand_like(x)))
    # A test before this one may have left a thread of torch's compiler.
    if sum(not thread.daemon for thread in threading.enumerate()) == 1:
        with pytest.raises(RuntimeError, match="cannot be intercepted"):
            observed(problem)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        return not torch.equal(observed(problem).loss, observed(problem).loss)
    finally:
        end.set()
        thread.join()


def constant_backward_under_vmap() -> bool:
    problem = of(lambda layer, x: ConstantBackward.apply(layer(x)))
    ones = {k: torch.ones(1, *p.shape, dtype=p.dtype) for k, p in problem.params.items()}
    found = torch.vmap(lambda v: fp.ggn_mv(problem, problem.params, BATCH, v))(ones)
    return not any(x.any() for x in found.values())


def constant_inputs() -> bool:
    problem = of(lambda layer, x: ConstantInputs.apply(layer(x)))
    right = of(lambda layer, x: layer(x).sin())
    v = {k: torch.ones_like(p) for k, p in problem.params.items()}
    found, expected = (fp.hvp(p, p.params, BATCH, v)["layer.bias"] for p in (problem, right))
    return not found.allclose(expected)


def held_out_of_sight() -> bool:
    class Holder:
        __slots__ = ("value",)

    holder = Holder()
    holder.value = GIVEN
    return bool(observed(of(lambda layer, x: layer(x) * holder.value)).loss)


NOT_NOTICED: dict[str, list[Callable[[], bool]]] = {
    "writes through `x.data`": [written_through_data, a_gradient_written_through_data],
    "random numbers of Python": [numbers_of_python],
    "`rand_like` and `randn_like`": [rand_like_in_a_compiled_function],
    "draws in a scripted function": [draws_beside_another_thread],
    "a custom function with a constant backward": [constant_backward_under_vmap],
    "a custom backward": [constant_inputs],
    "a micro-batch outside": [a_micro_batch_that_was_not_watched],
    "a tensor that requires a gradient": [held_out_of_sight],
}


def lines(title: str) -> list[str]:
    """The first cells of the table under a title, without the headings."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0].lstrip("| ") for line in section.splitlines() if line[:1] == "|"]
    return [cell for cell in cells[2:] if not cell.startswith("**")]


def each(cases: dict[str, list]) -> list:
    slow = [pytest.mark.compile, pytest.mark.slow]
    compiled = ("`C @ v`", "`rand_like` and `randn_like`")
    return [
        pytest.param(case, id=f"{line} {i}", marks=slow if line in compiled else [])
        for line, found in cases.items()
        for i, case in enumerate(found)
    ]


@pytest.mark.parametrize(
    ("title", "cases"),
    [("What is refused", REFUSED), ("What is not noticed", NOT_NOTICED)],
    ids=["refused", "not noticed"],
)
def test_every_line_of_the_page_is_tried(title, cases):
    for line, beginning in zip(lines(title), cases, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize("case", each(REFUSED))
def test_what_the_page_says_is_refused(case, tmp_path):
    call, error, words = case
    arguments = (tmp_path,) if call is damaged else ()
    with pytest.raises(error, match=words):
        call(*arguments)


@pytest.mark.parametrize("silent", each(NOT_NOTICED))
def test_what_the_page_says_is_not_noticed(silent):
    assert silent(), "this is noticed now: move the line of docs/limits.md to what is refused"


def test_a_shuffled_stream_without_random_numbers_is_one_matrix():
    first, *others = products(fp.GGN, nn.Linear(3, 2))
    for other in others:
        for k, x in first.items():
            torch.testing.assert_close(other[k], x, rtol=1e-12, atol=1e-14)
