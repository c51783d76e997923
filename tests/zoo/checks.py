"""What is checked of each model, against plain torch: nothing here is the library's own output."""

import fnmatch
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import funcprecond as fp
from funcprecond.layers.blocks import split_block
from funcprecond.methods.card import CARDS, Card
from tests.zoo.model import Model

# Central differences with these steps: a wrong product agrees with none of them. Models that
# compute in float32 inside need long steps, and those with kinks need short ones.
STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------- plain torch
class Plain:
    """The model in evaluation mode and float64, and its loss, by ``functional_call`` and autograd.

    Args:
        line: the model.
    """

    def __init__(self, line: Model):
        self.line, self.module = line, isinstance(line.model, nn.Module)
        if self.module:
            line.model.eval()
        if line.wide:
            line.model = line.model.double() if self.module else line.model
            line.batch = _wide(line.batch)
            line.params = line.params and _wide(line.params)
        self.problem = line.problem()
        generator = seeded(3)
        # The initial weights are small, and biases zero: at other values all terms count.
        self.params = {
            k: p + torch.randn(p.shape, generator=generator, dtype=p.dtype) * _scale(p)
            for k, p in self.problem.params.items()
        }
        self.generator = generator
        self.inputs, self.targets = line.batch

    def outputs(self, params: Any, inputs: Any) -> list[Tensor]:
        """The floating-point tensors of the outputs that the loss takes."""
        return fp.tree.floating(self._run(params, inputs))

    def _run(self, params: Any, inputs: Any) -> Any:
        if not self.module:
            found = self.line.model(params, inputs)
        else:
            named = isinstance(inputs, dict)
            args = inputs if isinstance(inputs, tuple) else () if named else (inputs,)
            tensors = {**params, **{k: b.clone() for k, b in self.problem.buffers.items()}}
            found = torch.func.functional_call(
                self.line.model, tensors, args, inputs if named else {}, tie_weights=True
            )
        choose = self.line.outputs
        if isinstance(choose, str):
            return getattr(found, choose)
        return choose(found) if choose else found

    def gradient(self, params: Any, example: int | None = None) -> dict[str, Tensor]:
        """The gradient of the sum of all terms, or of those of one example run alone."""
        leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        inputs, targets = self.inputs, self.targets
        if example is not None:
            targets = _one(targets, example)
            if self.line.in_axes is not None:
                inputs = _one(inputs, example, self.line.shared)
        outputs = self._run(leaves, inputs)
        if example is not None and self.line.in_axes is None:
            outputs = outputs[example : example + 1]
        terms = self.line.terms(outputs, targets)
        found = torch.autograd.grad(
            terms, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """(M, P) of the M outputs, row by row, and (M, M), the Hessian of the terms in them."""
        leaves = {k: p.detach().clone().requires_grad_() for k, p in self.params.items()}
        outputs = self._run(leaves, self.inputs)
        tensors = fp.tree.floating(outputs)
        flat = torch.cat([x.reshape(-1) for x in tensors])
        rows = [self._ravel(_pull(x, leaves.values())) for x in flat]
        cut = [x.detach().requires_grad_() for x in tensors]
        terms = self.line.terms(fp.tree.with_floating(outputs, cut), self.targets)
        slopes = torch.autograd.grad(
            terms, cut, create_graph=True, allow_unused=True, materialize_grads=True
        )
        flat = torch.cat([x.reshape(-1) for x in slopes])
        curved = [self._ravel(_pull(x, cut)) for x in flat]
        # Some models return float32 whatever they compute in.
        return torch.stack(rows), torch.stack(curved).to(rows[0].dtype)

    def vector(self) -> dict[str, Tensor]:
        """A random direction of length one."""
        draws = {
            k: torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
            for k, p in self.params.items()
        }
        length = sum(float(x.square().sum()) for x in draws.values()) ** 0.5
        return {k: x / length for k, x in draws.items()}

    def constant(self) -> float:
        """The constant c of the loss, from its value."""
        value = self.problem.loss(self._run(self.params, self.inputs), self.targets)
        terms = self.line.terms(self._run(self.params, self.inputs), self.targets)
        return float(value.detach() / terms.detach())

    @staticmethod
    def _ravel(tensors: Any) -> Tensor:
        return torch.cat([x.reshape(-1) for x in tensors])


def _scale(p: Tensor) -> float:
    return 0.1 if p.ndim < 2 else 0.3 / max(p[0].numel(), 1) ** 0.5


def _wide(tensors: Any) -> Any:
    def one(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return one(tensors) if isinstance(tensors, Tensor) else fp.tree.map(one, tensors)


def _one(tensors: Any, example: int, shared: tuple[int | str, ...] = ()) -> Any:
    """The part of one example, as a batch of one."""
    if isinstance(tensors, Tensor):
        return tensors[example : example + 1]
    if isinstance(tensors, dict):
        return {k: x if k in shared else _one(x, example) for k, x in tensors.items()}
    return tuple(x if i in shared else _one(x, example) for i, x in enumerate(tensors))


def _pull(x: Tensor, inputs: Any) -> tuple[Tensor, ...]:
    if not x.requires_grad:
        return tuple(torch.zeros_like(p) for p in inputs)
    return torch.autograd.grad(
        x, list(inputs), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def _error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    top = max(float(x.abs().max()) for x in expected.values() if x.numel())
    assert top > 0
    return max(float((found[k] - x).abs().max()) for k, x in expected.items() if x.numel()) / top


# --------------------------------------------------------------------------------------- the checks
def layers(line: Model) -> dict[str, Any]:
    """Which parameters have a block of their layer, and by which function the others are used."""
    problem = line.problem()
    run = fp.Evaluation(problem, problem.params, line.batch, generator=seeded(), layers=True)
    covered = {part for name in run.blocks(tied=True) for part in split_block(name) if part}
    rest = [k for k in problem.params if k not in covered]
    unknown = [k for k in rest if not any(fnmatch.fnmatch(k, p) for p in line.diagonal)]
    assert not unknown, {k: run.unrecorded.get(k, "unused") for k in unknown}
    gone = [p for p in line.diagonal if not fnmatch.filter(rest, p)]
    assert not gone, f"they are recognised now: {gone}"
    return {
        "parameters": sum(p.numel() for p in problem.params.values()),
        "recognised": len(covered),
        "of": len(problem.params),
        "diagonal": dict(Counter(run.unrecorded.get(k, "unused") for k in rest)),
    }


def methods(line: Model) -> dict[str, str]:
    """Three steps of every method in training mode, and the sentences of those that refuse."""
    refusals, faults = {}, {}
    for name, card in CARDS.items():
        fragment = _refusal(line, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _train(line, card)
        except (RuntimeError, TypeError, ValueError) as error:
            refusals[name] = str(error)
            if not fragment or fragment not in str(error):
                faults[name] = f"{type(error).__name__}: {error}"
        except AssertionError as error:
            faults[name] = str(error)
        else:
            if fragment:
                faults[name] = f"is not refused: {fragment!r}"
    assert not faults, faults
    return refusals


# Methods that refuse what another one does, and those that always take the exact Fisher matrix.
ALIKE = {
    **dict.fromkeys(("engd", "layerwise_ng", "natural_gradient", "smw_gn"), "smw_ng"),
    **dict.fromkeys(("spring", "sr"), "smw_ng"),
    **dict.fromkeys(("diagonal_ng", "seng", "tonga_unit", "unit_ng"), "ekfac"),
    **dict.fromkeys(("eva", "foof", "singd", "skfac"), "kfac"),
}
EXACT = ("engd", "kflr", "smw_gn", "spring", "sr")


def _refusal(line: Model, name: str) -> str | None:
    sizes = [p.numel() for p in line.problem().params.values()]
    if name == "natural_gradient" and sum(sizes) > 4096:
        return "would have"
    if fragment := line.refused.get(ALIKE.get(name, name)):
        return fragment
    if name == "layerwise_ng" and max(sizes) > 4000:
        return "would have"
    unknown = name in EXACT and _labels(line) == "empirical"
    return "the likelihood of" if unknown else None


def _labels(line: Model) -> Any:
    """Labels can be sampled where the loss is a known likelihood."""
    known = not isinstance(fp.losses.as_loss(line.loss), fp.losses.Custom)
    return "mc" if known else "empirical"


def _train(line: Model, card: Card) -> None:
    problem, generator = line.problem(), seeded()
    opt = fp.chain(_build(line, card, problem.params), fp.scale(0.1 * card.learning_rate))
    params, buffers = problem.params, problem.buffers
    state, losses = opt.init(params), []
    for t in range(4):
        needs = opt.needs(t) if t < 3 else ()
        evidence = fp.observe(
            problem, params, line.batch, needs, buffers=buffers, generator=generator
        )
        losses.append(float(evidence.loss))
        if t < 3:
            state, direction = opt.update(state, evidence.grads, evidence)
            params, buffers = fp.apply(params, direction), evidence.buffers
    assert all(bool(p.isfinite().all()) for p in params.values()), f"not finite: {losses}"
    assert losses[-1] < losses[0] + abs(losses[0]) + 1, f"losses {losses}"
    moved = any(not torch.equal(p, problem.params[k]) for k, p in params.items())
    assert moved, "no parameter has changed"


def _build(line: Model, card: Card, params: dict[str, Tensor]) -> fp.Transform:
    options = dict(card.options)
    assert card.build is not None
    if "labels" in inspect.signature(card.build).parameters:
        options["labels"] = _labels(line)
    if card.name != "adagrad_full":
        return card.build(**options)
    # A full matrix is for small tensors.
    small = {k for k, p in params.items() if p.numel() <= 128}
    rules = [(lambda k, p: k in small, "full"), ("*", "diagonal")]
    parts = {"full": fp.adagrad_full(), "diagonal": fp.adagrad()}
    return fp.partition(rules, **parts)  # pyright: ignore[reportArgumentType]


def per_sample(line: Model) -> str:
    """Per-sample gradients against a loop over single examples."""
    plain = Plain(line)
    count = len(next(iter(fp.tree.leaves(line.batch[1]))))

    def check() -> None:
        found = fp.per_sample_grads(plain.problem, plain.params, line.batch, generator=seeded())
        rows = [plain.gradient(plain.params, n) for n in range(count)]
        expected = {k: torch.stack([r[k] for r in rows]) for k in plain.params}
        _close(_error(found, expected), line.tolerance)

    return _right_or_refused(line, "per-sample gradients", check)


def ggn(line: Model) -> str:
    """``GGN.trace()`` and a product against ``Jᵀ H J`` with dense J and H."""
    plain = Plain(line)

    def check() -> None:
        matrix = fp.GGN(plain.problem, plain.params, line.batch)
        trace, v = matrix.trace(), plain.vector()
        product = matrix @ v
        jacobian, curved = plain.jacobian()
        c = plain.constant()
        expected = c * (jacobian * (curved @ jacobian)).sum()
        _close(float((trace - expected).abs() / expected.abs()), line.tolerance)
        flat = c * jacobian.T @ (curved @ (jacobian @ plain._ravel(v.values())))
        parts = flat.split([p.numel() for p in plain.params.values()])
        pairs = zip(plain.params.items(), parts, strict=True)
        expected = {k: x.reshape(p.shape) for (k, p), x in pairs}
        _close(_error(product, expected), line.tolerance)

    return _right_or_refused(line, "GGN", check)


def hessian(line: Model) -> str:
    """The gradient, and Hessian products by both routes, against differences of the gradient."""
    plain = Plain(line)

    def check() -> None:
        c, v = plain.constant(), plain.vector()
        grads = fp.observe(plain.problem, plain.params, line.batch, generator=seeded()).grads
        expected = {k: c * g for k, g in plain.gradient(plain.params).items()}
        _close(_error(grads, expected), line.tolerance)
        if not line.smooth:
            return
        products = {
            "Hessian": fp.Hessian(plain.problem, plain.params, line.batch) @ v,
            "hvp": fp.hvp(
                lambda p: plain.problem.loss(plain.problem(p, plain.inputs), plain.targets),
                plain.params,
                v,
            ),
        }
        for found in products.values():
            errors = [_error(found, _difference(plain, v, step, c)) for step in STEPS]
            _close(min(errors), max(1e-4, 100 * line.tolerance))

    return _right_or_refused(line, "Hessian", check)


def _difference(plain: Plain, v: Any, step: float, c: float) -> dict[str, Tensor]:
    up = plain.gradient({k: p + step * v[k] for k, p in plain.params.items()})
    down = plain.gradient({k: p - step * v[k] for k, p in plain.params.items()})
    return {k: c * (x - down[k]) / (2 * step) for k, x in up.items()}


def _close(error: float, tolerance: float) -> None:
    assert error < tolerance, f"relative error {error:.2g}"


def _right_or_refused(line: Model, name: str, check: Callable[[], None]) -> str:
    fragment = line.refused.get(name)
    try:
        check()
    except (RuntimeError, TypeError, ValueError) as error:
        if not fragment or fragment not in str(error):
            raise
        return f"refused: {error}"
    assert not fragment, f"is not refused: {fragment!r}"
    return "right"


def cost(line: Model, rounds: int = 3, interval: int = 10) -> float | None:
    """The time of a step of K-FAC in steps of SGD, through the same loop and interleaved."""
    if "kfac" in line.refused:
        return None
    labels = _labels(line)
    problem = line.problem()
    steps = {}
    for name, method in {
        "sgd": fp.sgd(),
        "kfac": fp.kfac(damping=0.1, labels=labels, every=1, refresh_every=interval),
    }.items():
        steps[name] = _stepper(problem, fp.chain(method, fp.scale(1e-4)), line.batch)
        for _ in range(interval + 1):
            steps[name]()
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(interval):
                step()
            spent[name].append(time.process_time() - start)
    return sorted(spent["kfac"])[rounds // 2] / sorted(spent["sgd"])[rounds // 2]


def _stepper(problem: fp.Problem, opt: fp.Transform, batch: Any) -> Callable[[], None]:
    params, buffers, state = problem.params, problem.buffers, opt.init(problem.params)
    generator, t = seeded(), 0

    def step() -> None:
        nonlocal params, buffers, state, t
        evidence = fp.observe(
            problem, params, batch, opt.needs(t), buffers=buffers, generator=generator
        )
        state, direction = opt.update(state, evidence.grads, evidence)
        params, buffers, t = fp.apply(params, direction), evidence.buffers, t + 1

    return step


CHECKS: dict[str, Callable[[Model], Any]] = {
    "layers": layers,
    "methods": methods,
    "per-sample gradients": per_sample,
    "GGN": ggn,
    "Hessian": hessian,
}
