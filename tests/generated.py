"""Models drawn at random: layers, how they are spelled, shared, laid out, and how they are run.

A model is a list of steps on hidden values with N examples, T positions and D features. The layout
says how these axes are stored. Every model treats the examples one by one, so that the gradient of
an example is that of a batch of this example alone. Nothing here knows the library.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.problems import normal
from tests.strategies import seeds

WIDTH, INPUTS, OUTPUTS = 3, 2, 2

Params = dict[str, Tensor]
Layout = str  # "NTD", "TND", or "MD" with M = N T


@dataclasses.dataclass
class Axes:
    """The numbers of examples and positions, an input (T, D) of all examples, and the layout."""

    examples: int
    positions: int
    shared: Tensor
    layout: Layout = "NTD"


# --------------------------------------------------------------------------- linear maps, spelled
def _twice(weight: Tensor) -> Tensor:
    return weight * weight.new_tensor([[2.0], [1.0], [0.5]])[: len(weight)]


LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "F.linear": F.linear,
    "x @ W.T": lambda h, w, b: h @ w.T if b is None else h @ w.T + b,
    "matmul": lambda h, w, b: _plus(torch.matmul(h, w.t()), b),
    "einsum": lambda h, w, b: _plus(torch.einsum("...i,oi->...o", h, w), b),
    "W @ x": lambda h, w, b: _plus((w @ h.mT).mT, b),
    "addmm": lambda h, w, b: torch.addmm(
        h.new_zeros(len(w)) if b is None else b, h.flatten(0, -2), w.T
    ).unflatten(0, h.shape[:-1]),
    "masked": lambda h, w, b: F.linear(h, _twice(w), b),
    "normalized": lambda h, w, b: F.linear(h, w / w.norm(dim=1, keepdim=True), b),
    "conv1d": lambda h, w, b: F.conv1d(h.mT, w.unsqueeze(-1), b).mT,
    "unfolded": lambda h, w, b: _plus((h.unsqueeze(-2) * w).sum(-1), b),
}


def _plus(x: Tensor, b: Tensor | None) -> Tensor:
    return x if b is None else x + b


# ------------------------------------------------------------------- how a function of rows is run
class _Linear(torch.autograd.Function):
    """A linear map whose derivative is its author's."""

    @staticmethod
    def forward(h, w):
        return h @ w.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        h, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ h.flatten(0, -2)

    @staticmethod
    def jvp(ctx, dh, dw):
        h, w = ctx.saved_tensors
        parts = [dh @ w.T] if dh is not None else []
        parts += [h @ dw.T] if dw is not None else []
        return sum(parts)

    @staticmethod
    def vmap(info, in_dims, h, w):
        h = h.movedim(in_dims[0], 0) if in_dims[0] is not None else h.unsqueeze(0)
        w = w.movedim(in_dims[1], 0) if in_dims[1] is not None else w.unsqueeze(0)
        return h @ w.mT.reshape(len(w), *[1] * (h.ndim - 3), *w.mT.shape[1:]), 0


def _slope_by_autograd(f, h):
    """The derivative of the sum of ``f`` in its input, as physics-informed networks take it."""
    with torch.enable_grad():
        h = h if h.requires_grad else h.detach().requires_grad_()
        return torch.autograd.grad(f(h).sum(), h, create_graph=True)[0]


def _row_by_row(f, h):
    rows = [f(row) for row in h.flatten(0, -2)]
    return torch.stack(rows).unflatten(0, h.shape[:-1])


RUNS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "directly": lambda f, h: f(h),
    "vmap": lambda f, h: torch.vmap(f)(h),
    "func.grad": lambda f, h: torch.func.grad(lambda x: f(x).tanh().sum())(h),
    "autograd.grad": lambda f, h: _slope_by_autograd(lambda x: f(x).tanh(), h),
    "func.jvp": lambda f, h: torch.func.jvp(lambda x: f(x).sin(), (h,), (h.cos(),))[1],
    "row by row": _row_by_row,
    "loop over the first axis": lambda f, h: torch.stack([f(x) for x in h.unbind(0)]),
    "in halves": lambda f, h: torch.cat([f(x) for x in h.split(1)]),
    "twice": lambda f, h: f(f(h).tanh()),
    "in place": lambda f, h: f(h).mul_(2.0).tanh_(),
}

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "square": torch.square,
    "relu": torch.relu,
}


# ----------------------------------------------------------------------------------------- steps
@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a model, and the names of its parameters."""

    kind: str
    how: str = ""
    run: str = "directly"
    weight: str = ""
    bias: str | None = None

    def __str__(self) -> str:
        names = ", ".join(k for k in (self.weight, self.bias) if k)
        return f"{self.kind}({', '.join(x for x in (self.how, self.run, names) if x)})"

    def __call__(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return getattr(self, f"_{self.kind}")(p, h, axes)

    def _linear(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        bias = None if self.bias is None else p[self.bias]
        return RUNS[self.run](lambda x: LINEAR[self.how](x, p[self.weight], bias), h)

    def _custom(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return _plus(_Linear.apply(h, p[self.weight]), self.bias and p[self.bias])

    def _pointwise(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return POINTWISE[self.how](h)

    def _norm(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        bias = None if self.bias is None else p[self.bias]
        if self.how == "rms":
            return _plus(h / (1 + h.square().mean(-1, keepdim=True)).sqrt() * p[self.weight], bias)
        return F.layer_norm(h, (WIDTH,), p[self.weight], bias, eps=0.1)

    def _scale(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return p[self.weight] * h if self.how == "left" else h * p[self.weight]

    def _shift(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return h + p[self.weight]

    def _positions(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        table = p[self.weight][: axes.positions]
        if axes.layout == "MD":
            return h + table.repeat(axes.examples, 1)
        return h + (table if axes.layout == "NTD" else table.unsqueeze(1))

    def _attention(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        x = _to(h, axes, "NTD")
        q = F.linear(x, p[self.weight])
        return _from(F.scaled_dot_product_attention(q, x, x.tanh()), axes)

    def _mix(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        """Positions are mixed, by a matrix that is a constant."""
        x = _to(h, axes, "NTD")
        return _from(x + x.cumsum(1) / 2, axes)

    def _relayout(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        x = _to(h, axes, "NTD")
        axes.layout = self.how
        return _from(x, axes)

    def _residual(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        return h + F.linear(h.sin(), p[self.weight])

    def _pooled_conv(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        """A convolution over the positions, with a kernel of one tap per channel."""
        x = _to(h, axes, "NTD").mT
        kernel = p[self.weight].unsqueeze(1)
        return _from(F.conv1d(x, kernel, padding=1, groups=WIDTH).mT, axes)

    def _experts(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        """Rows go to one of two weights by their sign; none may get any."""
        rows = h.flatten(0, -2)
        chosen = rows.sum(-1) > 0
        ours = torch.zeros_like(rows)
        for weight, mask in ((p[self.weight], chosen), (p[self.bias or self.weight], ~chosen)):
            ours = ours.index_add(0, mask.nonzero()[:, 0], F.linear(rows[mask], weight))
        return ours.unflatten(0, h.shape[:-1])

    def _gated(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        """The weight has a use that depends on the data, as in a network that makes weights."""
        return h * torch.sigmoid(p[self.weight].diagonal() * h)

    def _shared_input(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        x = _to(h, axes, "NTD")
        return _from(x * F.linear(axes.shared, p[self.weight]).sin(), axes)

    def _submodule(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        """One of torch's modules, which sees the example or the position first."""
        first = self.how.endswith("first")
        x = _to(h, axes, "NTD")
        x = x if first else x.transpose(0, 1)
        module = _submodule(self.how.split()[0], first)
        own = {k: p[f"{self.weight}.{k}"] for k, _ in module.named_parameters()}
        args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        found = torch.func.functional_call(module, own, args)
        x = found[0] if isinstance(found, tuple) else found
        return _from(x if first else x.transpose(0, 1), axes)

    def _recurrent(self, p: Params, h: Tensor, axes: Axes) -> Tensor:
        x, state, states = _to(h, axes, "NTD"), 0.0, []
        for t in range(axes.positions):
            state = torch.tanh(F.linear(x[:, t] + state, p[self.weight]))
            states.append(state)
        return _from(torch.stack(states, 1), axes)


def _to(h: Tensor, axes: Axes, layout: Layout) -> Tensor:
    if axes.layout == "MD":
        return h.unflatten(0, (axes.examples, axes.positions))
    return h.transpose(0, 1) if axes.layout == "TND" else h


def _from(h: Tensor, axes: Axes) -> Tensor:
    if axes.layout == "MD":
        return h.flatten(0, 1)
    return h.transpose(0, 1) if axes.layout == "TND" else h


@functools.cache
def _submodule(name: str, first: bool) -> nn.Module:
    makers = {
        "attention": lambda: nn.MultiheadAttention(WIDTH, 1, batch_first=first),
        "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 1, 4, 0.0, batch_first=first),
        "gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=first),
        "lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=first),
    }
    with torch.random.fork_rng():
        return makers[name]().double()


# ---------------------------------------------------------------------------------------- models
@dataclasses.dataclass(frozen=True)
class Model:
    """A model: ``first``, the steps, ``head``; the outputs are (N, O), (N, T, O) or (N T, O)."""

    steps: tuple[Step, ...]
    ids: bool
    outputs: str
    positions: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    constants: frozenset[str]
    two_inputs: bool
    seed: int

    def __str__(self) -> str:
        steps = " > ".join(map(str, self.steps))
        return f"{steps} > {self.outputs}; frozen {sorted(self.constants)}"

    def params(self, constants: bool = False) -> Params:
        drawn = {k: normal(s, self.seed + i) / 2 for i, (k, s) in enumerate(self.shapes)}
        all_ = {k: x + 1 if k.startswith("g") else x for k, x in drawn.items()}
        return {k: x for k, x in all_.items() if (k in self.constants) == constants}

    def __call__(self, p: Params, x: Tensor, shared: Tensor | None = None) -> Tensor:
        p = _constants(self) | dict(p.items())
        table = _table(self) if shared is None else shared
        axes = Axes(len(x), self.positions, table)
        h = F.embedding(x, p["first"]) if self.ids else x @ p["first"]
        for step in self.steps:
            h = step(p, h, axes)
        h = _to(h, axes, "NTD")
        if self.outputs == "pooled":
            h = h.mean(1)
        outputs = F.linear(h, p["head"], p["b"])
        return outputs.flatten(0, 1) if self.outputs == "merged" else outputs

    def function(self) -> Callable[[Params, Any], Tensor]:
        """The model as a function of parameters and inputs."""
        _constants(self), _table(self)
        return (lambda p, inputs: self(p, *inputs)) if self.two_inputs else self

    def module(self) -> nn.Module:
        """The same model as a module that holds its parameters in a list of its own."""
        return _Module(self)


# A model must not draw anything while it runs.
@functools.cache
def _constants(model: Model) -> Params:
    """The values that are constants, as the frozen part of a model is."""
    return model.params(constants=True)


@functools.cache
def _table(model: Model) -> Tensor:
    return normal((model.positions, WIDTH), model.seed + 52)


class _Module(nn.Module):
    """A model whose parameters are held in a dict; no name of a part may have a dot in torch."""

    def __init__(self, model: Model):
        super().__init__()
        _constants(model), _table(model)
        self.model, self.held = (
            model,
            nn.ParameterDict({k.replace(".", "/"): x for k, x in model.params().items()}),
        )

    def forward(self, x, shared=None):
        return self.model({own_name(k): x for k, x in self.held.items()}, x, shared)


def own_name(name: str) -> str:
    """The name that a model gives to a parameter of its module."""
    return name.removeprefix("held.").replace("/", ".")


@st.composite
def models(draw, max_steps: int = 4) -> Model:
    """Draw a model of a few steps, in which parameters of the same shape may be shared."""
    shapes: dict[str, tuple[int, ...]] = {"first": (INPUTS, WIDTH)}
    sharing = draw(st.booleans())

    def name(letter: str, shape: tuple[int, ...]) -> str:
        known = [k for k, s in shapes.items() if s == shape and k.startswith(letter)]
        if sharing and known and draw(st.booleans()):
            return draw(st.sampled_from(known))
        new = f"{letter}{len(shapes)}"
        shapes[new] = shape
        return new

    positions = draw(st.integers(1, 3))
    square, vector = (WIDTH, WIDTH), (WIDTH,)
    steps = []
    for _ in range(draw(st.integers(1, max_steps))):
        kind = draw(
            st.sampled_from(
                [
                    "linear",
                    "linear",
                    "linear",
                    "linear",
                    "custom",
                    "pointwise",
                    "norm",
                    "scale",
                    "shift",
                    "positions",
                    "attention",
                    "mix",
                    "relayout",
                    "residual",
                    "recurrent",
                    "pooled_conv",
                    "experts",
                    "gated",
                    "shared_input",
                    "submodule",
                ]
            )
        )
        biased = draw(st.booleans())
        if kind == "linear":
            how = draw(st.sampled_from(list(LINEAR)))
            # What needs a matrix of rows cannot be run on one row.
            runs = set(RUNS) - ({"row by row", "vmap", "loop over the first axis"})
            runs = runs if how in ("W @ x", "conv1d", "addmm") else set(RUNS)
            step = Step(
                kind,
                how,
                draw(st.sampled_from(sorted(runs))),
                name("w", square),
                name("b", vector) if biased else None,
            )
        elif kind == "custom":
            step = Step(kind, "", "", name("w", square), name("b", vector) if biased else None)
        elif kind == "pointwise":
            step = Step(kind, draw(st.sampled_from(list(POINTWISE))))
        elif kind == "norm":
            how = draw(st.sampled_from(["layer", "rms"]))
            step = Step(kind, how, "", name("g", vector), name("b", vector) if biased else None)
        elif kind in ("scale", "shift"):
            letter = "g" if kind == "scale" else "b"
            step = Step(kind, draw(st.sampled_from(["left", "right"])), "", name(letter, vector))
        elif kind == "positions":
            step = Step(kind, "", "", name("t", (3, WIDTH)))
        elif kind == "submodule":
            how = draw(st.sampled_from(["attention", "encoder", "gru", "lstm"]))
            how += draw(st.sampled_from([" first", ""]))
            prefix = f"m{len(shapes)}"
            own = _submodule(how.split()[0], how.endswith("first")).named_parameters()
            shapes |= {f"{prefix}.{k}": tuple(x.shape) for k, x in own}
            step = Step(kind, how, "", prefix)
        elif kind == "experts":
            step = Step(kind, "", "", name("w", square), name("w", square))
        elif kind == "mix":
            step = Step(kind)
        elif kind == "relayout":
            step = Step(kind, draw(st.sampled_from(["NTD", "TND", "MD"])))
        else:
            step = Step(kind, "", "", name("w", square))
        steps.append(step)
    ids = draw(st.booleans())
    if ids:
        shapes["first"] = (INPUTS + 2, WIDTH)
    shapes |= {"head": (OUTPUTS, WIDTH)}
    shapes.setdefault("b", (OUTPUTS,))
    outputs = draw(st.sampled_from(["pooled", "each position", "merged"]))
    constants = draw(st.sets(st.sampled_from(sorted(shapes)), max_size=2)) - {"head"}
    return Model(
        tuple(steps),
        ids,
        outputs,
        positions,
        tuple(shapes.items()),
        frozenset(constants) if draw(st.booleans()) else frozenset(),
        draw(st.booleans()) and any(step.kind == "shared_input" for step in steps),
        draw(seeds),
    )


def batch(model: Model, examples: int, loss: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, T) or (N, T, I), and targets for the outputs; ``loss``: "mse" or "classes"."""
    n, t = examples, model.positions
    ids = torch.arange(n * t).reshape(n, t) * 7 % (INPUTS + 2)
    x = ids if model.ids else normal((n, t, INPUTS), model.seed + 50)
    lead = {"pooled": (n,), "each position": (n, t), "merged": (n * t,)}[model.outputs]
    y = normal((*lead, OUTPUTS), model.seed + 51)
    if model.two_inputs:
        x = (x, normal((model.positions, WIDTH), model.seed + 52))
    return x, y if loss == "mse" else y.argmax(-1)
