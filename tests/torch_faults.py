"""Which derivatives torch lacks or gets wrong, tried one by one.

``python -m tests.torch_faults`` prints what this torch does, as JSON. With the paths of other
Pythons, it asks each of them and prints the table of ``docs/torch-faults.md``::

    make torch-faults VERSIONS="2.11.0 2.13.0 2.14.1 2.15.0"

Each fault is a function that returns what torch computes and what is right, by a closed form or by
central differences of derivatives of lower order.
"""

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

Pair = tuple[Tensor, Tensor]
Function = Callable[[Tensor], Tensor]

FAULTS: dict[str, "Fault"] = {}
STEP = 1e-4


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        title: what goes wrong.
        matters: what in this library would be wrong with it.
        try_it: returns what torch computes, and what is right.
        compiles: whether it calls the compiler, which takes seconds.
    """

    title: str
    matters: str
    try_it: Callable[[], Pair]
    compiles: bool = False

    def found(self) -> str:
        """What this torch is: "right", "wrong by ..." (of the largest entry), or "missing"."""
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torchs, right = self.try_it()
        except (RuntimeError, NotImplementedError):
            return "missing"
        error = ((torchs - right).abs().max() / right.abs().max()).item()
        if not math.isfinite(error):
            return "wrong (NaN)"
        return "right" if error < 1e-5 else f"wrong by {error:.1g}"


def fault(title: str, matters: str, compiles: bool = False):
    """Enter a function into the table."""

    def enter(try_it: Callable[[], Pair]) -> Callable[[], Pair]:
        FAULTS[try_it.__name__] = Fault(title, matters, try_it, compiles)
        return try_it

    return enter


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def difference(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """The derivative of f along v by central differences, of order four in the step."""
    near = (f(x + STEP * v) - f(x - STEP * v)) / (2 * STEP)
    far = (f(x + 2 * STEP * v) - f(x - 2 * STEP * v)) / (4 * STEP)
    return (4 * near - far) / 3


def gradient(f: Function) -> Function:
    def of(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    return of


def twice(f: Function, x: Tensor, v: Tensor) -> Pair:
    """H v by differentiating the gradient backward, and by central differences of the gradient."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    found = torch.autograd.grad(g, x, v, allow_unused=True, materialize_grads=True)[0]
    return found, difference(gradient(f), x.detach(), v)


def thrice(f: Function, x: Tensor, v: Tensor) -> Pair:
    """The gradient of v . H v, and its entries by central differences of v . H v."""

    def curvature(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        (h,) = torch.autograd.grad(g, x, v, create_graph=True)
        return (h * v).sum()

    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(curvature(x), x)
    along = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    start = x.detach()

    def at(y: Tensor) -> Tensor:
        return curvature(y.detach().requires_grad_()).detach()

    right = torch.stack([difference(at, start, e) for e in along]).reshape(x.shape)
    return found, right


def forward(f: Function, x: Tensor, v: Tensor) -> Pair:
    """The derivative of f along v in forward mode."""
    return jvp(f, (x,), (v,))[1], difference(f, x, v)


def backward_over_forward(f: Function, x: Tensor, v: Tensor) -> Pair:
    """H v as the gradient of the derivative along v."""
    found = grad(lambda y: jvp(f, (y,), (v,))[1])(x)
    return found, difference(gradient(f), x, v)


def forward_over_backward(f: Function, x: Tensor, v: Tensor) -> Pair:
    """H v as the derivative of the gradient along v."""
    return jvp(grad(f), (x,), (v,))[1], difference(gradient(f), x, v)


# ------------------------------------------------------------------------------------------- norms
X, V = normal(4, 6, seed=1), normal(4, 6, seed=2)
SCALE, SHIFT = normal(6, seed=3), normal(6, seed=4)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (6,), SCALE, SHIFT).sin().sum()


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, SCALE, SHIFT, training=True).sin().sum()


def instance_norm(x: Tensor) -> Tensor:
    y = x.reshape(2, 2, 6)
    return F.instance_norm(y, weight=SCALE[:2], bias=SHIFT[:2]).sin().sum()


def group_norm(x: Tensor) -> Tensor:
    return F.group_norm(x, 2, SCALE, SHIFT).sin().sum()


def weight_norm(x: Tensor) -> Tensor:
    return torch._weight_norm(x, SCALE[:4, None], 0).sin().sum()


THIRD = "derivatives of curvature products (meta-gradients, `differentiate through a step`)"
MIXED = "`torch.func.grad` of `jvp`; the library takes `vjp` of `grad`"


@fault("`_weight_norm`: second derivative, CPU", "every Hessian product")
def weight_norm_twice() -> Pair:
    return twice(weight_norm, X, V)


@fault("`_weight_norm`: forward derivative", "`fp.jvp`, compiled GGN products")
def weight_norm_forward() -> Pair:
    return forward(weight_norm, X, V)


@fault("`layer_norm`: second derivative", "every Hessian product")
def layer_norm_twice() -> Pair:
    return twice(layer_norm, X, V)


@fault("`layer_norm`: third derivative", THIRD)
def layer_norm_thrice() -> Pair:
    return thrice(layer_norm, X, V)


@fault("`batch_norm` in training: third derivative", THIRD)
def batch_norm_thrice() -> Pair:
    return thrice(batch_norm, X, V)


@fault("`instance_norm`: third derivative", THIRD)
def instance_norm_thrice() -> Pair:
    return thrice(instance_norm, X, V)


@fault("`group_norm`: third derivative", THIRD)
def group_norm_thrice() -> Pair:
    return thrice(group_norm, X, V)


@fault("`layer_norm`: backward over forward", MIXED)
def layer_norm_mixed() -> Pair:
    return backward_over_forward(layer_norm, X, V)


@fault("`batch_norm` in training: backward over forward", MIXED)
def batch_norm_mixed() -> Pair:
    return backward_over_forward(batch_norm, X, V)


@fault("`instance_norm`: backward over forward", MIXED)
def instance_norm_mixed() -> Pair:
    return backward_over_forward(instance_norm, X, V)


def with_weight(norm: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    """``torch.func.hessian`` of a norm layer, in its input and its weight."""

    def f(both: Tensor) -> Tensor:
        return norm(both[:4], both[4]).sin().sum()

    both, along = torch.cat([X, SCALE[None]]), normal(5, 6, seed=19)
    found = torch.einsum("abcd,cd->ab", torch.func.hessian(f)(both), along)
    return found, difference(gradient(f), both, along)


@fault("`layer_norm`: `torch.func.hessian`", "the tests' dense references, which avoid it")
def layer_norm_hessian() -> Pair:
    return with_weight(lambda x, w: F.layer_norm(x, (6,), w, SHIFT))


@fault("`batch_norm` in training: `torch.func.hessian`", "the same")
def batch_norm_hessian() -> Pair:
    return with_weight(lambda x, w: F.batch_norm(x, None, None, w, SHIFT, training=True))


# ---------------------------------------------------------------------------------- linear algebra
POSITIVE = X @ X.mT + 4 * torch.eye(4, dtype=torch.float64)
LOWER, ALONG = torch.linalg.cholesky(POSITIVE), normal(4, 4, seed=5)


@fault("`cholesky_inverse`: forward derivative", "forward mode through `tnt` and Cholesky solvers")
def cholesky_inverse_forward() -> Pair:
    return forward(torch.cholesky_inverse, LOWER, ALONG.tril())


@fault("`cholesky_inverse`: gradient", "gradients through Cholesky solvers")
def cholesky_inverse_gradient() -> Pair:
    weights = normal(4, 4, seed=6)

    def f(lower: Tensor) -> Tensor:
        return (torch.cholesky_inverse(lower) * weights).sum()

    along = ALONG.tril()
    return (gradient(f)(LOWER) * along).sum(), difference(f, LOWER, along)


@fault("`linalg.solve`: backward over forward", MIXED)
def solve_mixed() -> Pair:
    right = normal(4, seed=7)
    return backward_over_forward(
        lambda a: torch.linalg.solve(a, right).sin().sum(), POSITIVE, ALONG
    )


@fault("`logdet`: backward over forward", MIXED)
def logdet_mixed() -> Pair:
    return backward_over_forward(torch.logdet, POSITIVE, ALONG)


# --------------------------------------------------------------------------------- other functions
@fault("`logcumsumexp`: derivative of the pull-back at 0", "GGN products, `fp.jvp`")
def logcumsumexp_double_pull() -> Pair:
    def f(x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)

    outputs, pull = vjp(f, X)
    # The pull-back is linear in output gradients, so that its own pull-back is J v anywhere.
    _, pull_again = vjp(lambda u: pull(u)[0], torch.zeros_like(outputs))
    return pull_again(V)[0], difference(f, X, V)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@fault("`@once_differentiable`: second derivative silently zero", "every Hessian product")
def once_differentiable_twice() -> Pair:
    found, _ = twice(lambda x: Sine.apply(x).sum() + x.pow(3).sum(), X, V)
    return found, (6 * X - X.sin()) * V


@fault("`cdist`: second derivative", "every Hessian and GGN product")
def cdist_twice() -> Pair:
    centres = normal(3, 6, seed=8)
    return twice(lambda x: torch.cdist(x, centres).sin().sum(), X, V)


@fault("`pdist`: second derivative", "every Hessian and GGN product")
def pdist_twice() -> Pair:
    return twice(lambda x: F.pdist(x).sin().sum(), X, V)


@fault("`hardsigmoid`: second derivative", "every Hessian and GGN product")
def hardsigmoid_twice() -> Pair:
    return twice(lambda x: (F.hardsigmoid(x) ** 3).sum(), X, V)


@fault("`huber_loss`: forward over backward", "compiled Hessian products")
def huber_mixed() -> Pair:
    return forward_over_backward(lambda x: F.huber_loss(x, torch.zeros_like(x)), X, V)


@fault("`ctc_loss`: second derivative", "every Hessian and GGN product")
def ctc_twice() -> Pair:
    targets, lengths = torch.tensor([[1, 2], [3, 1]]), (torch.tensor([4, 4]), torch.tensor([2, 2]))

    def f(x: Tensor) -> Tensor:
        return F.ctc_loss(x.log_softmax(-1), targets, *lengths)

    return twice(f, normal(4, 2, 5, seed=9), normal(4, 2, 5, seed=10))


@fault("`multi_margin_loss`: second derivative", "every Hessian and GGN product")
def multi_margin_twice() -> Pair:
    return twice(lambda x: F.multi_margin_loss(x, torch.arange(4), p=2), X, V)


@fault("`embedding_bag`: second derivative", "every Hessian and GGN product")
def embedding_bag_twice() -> Pair:
    bags = torch.tensor([[0, 1], [2, 3], [1, 1]])
    return twice(lambda w: F.embedding_bag(bags, w).sin().sum(), X, V)


@fault("`grid_sample`: forward derivative", "compiled GGN products")
def grid_sample_forward() -> Pair:
    images, grid = normal(1, 2, 3, 4, seed=11), 0.3 * normal(1, 2, 2, 2, seed=12)
    along = normal(1, 2, 3, 4, seed=13)
    return forward(lambda x: F.grid_sample(x, grid, align_corners=False), images, along)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).sin().sum()


HEADS = (normal(1, 2, 3, 4, seed=14), normal(1, 2, 3, 4, seed=15))


@fault("attention by the default kernel, CPU: second derivative", "every Hessian product")
def attention_twice() -> Pair:
    return twice(attention, *HEADS)


@fault("attention by the default kernel, CPU: forward derivative", "`fp.jvp`")
def attention_forward() -> Pair:
    return forward(attention, *HEADS)


@fault("`glu`: backward over forward", MIXED)
def glu_mixed() -> Pair:
    return backward_over_forward(lambda x: F.glu(x, 1).sin().sum(), X, V)


@fault("RNN: gradients of examples under `vmap`", "exact per-sample gradients of RNNs")
def rnn_per_sample() -> Pair:
    module = nn.RNN(3, 2, batch_first=True).double()
    params, inputs = dict(module.named_parameters()), normal(4, 5, 3, seed=16)

    def loss(params, x):
        return functional_call(module, params, (x.unsqueeze(0),))[0].square().sum()

    rows = [grad(loss)(params, x)["weight_hh_l0"] for x in inputs]
    return vmap(grad(loss), (None, 0))(params, inputs)["weight_hh_l0"], torch.stack(rows)


@fault("`checkpoint` in `functional_call`: gradient at other weights", "activation checkpoints")
def checkpoint_gradient() -> Pair:
    module = nn.Linear(6, 6).double()
    weight = normal(6, 6, seed=17).requires_grad_()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(module, nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    def loss(weight, net):
        return functional_call(net, {"inner.0.weight": weight}, (X,)).square().sum()

    net = Checkpointed()
    (found,) = torch.autograd.grad(loss(weight, net), weight)
    plain = (X @ weight.mT + module.bias).tanh()
    (right,) = torch.autograd.grad(plain.square().sum(), weight)
    return found, right


# ---------------------------------------------------------------------------------------- compiler
def compiled(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True)(*inputs)


A, B, C = (normal(*shape, seed=18).float() for shape in ((4, 5), (5, 3), (4, 3)))


@fault("compiled `add(a @ b, c, alpha=α)`: α is lost", "momentum, weight decay, rates", True)
def compiled_add_alpha() -> Pair:
    return compiled(lambda a, b, c: torch.add(a @ b, c, alpha=0.1), A, B, C), A @ B + 0.1 * C


@fault("compiled `add(c, a @ b, alpha=α)`: α is lost", "momentum, weight decay, rates", True)
def compiled_add_product() -> Pair:
    return compiled(lambda a, b, c: torch.add(c, a @ b, alpha=0.1), A, B, C), C + 0.1 * A @ B


@fault("compiled `_foreach_add([a @ b], [c], alpha=α)`: α is lost", "momentum, weight decay", True)
def compiled_foreach_alpha() -> Pair:
    found = compiled(lambda a, b, c: torch._foreach_add([a @ b], [c], alpha=0.1)[0], A, B, C)
    return found, A @ B + 0.1 * C


@fault("compiled `sub(a @ b, c, alpha=α)`: α is lost", "momentum, weight decay", True)
def compiled_sub_alpha() -> Pair:
    return compiled(lambda a, b, c: torch.sub(a @ b, c, alpha=0.1), A, B, C), A @ B - 0.1 * C


@fault("compiled `addmm(c, a, b, beta=β, alpha=α)`: a factor is lost", "factors' averages", True)
def compiled_addmm() -> Pair:
    found = compiled(lambda a, b, c: torch.addmm(c, a, b, beta=0.9, alpha=0.1), A, B, C)
    return found, 0.9 * C + 0.1 * A @ B


@fault("compiled `baddbmm(c, a, b, beta=β, alpha=α)`: a factor is lost", "factors' averages", True)
def compiled_baddbmm() -> Pair:
    stacks = [x.expand(2, *x.shape).contiguous() for x in (A, B, C)]
    found = compiled(lambda a, b, c: torch.baddbmm(c, a, b, beta=0.9, alpha=0.1), *stacks)
    return found, 0.9 * stacks[2] + 0.1 * stacks[0] @ stacks[1]


@fault("compiled write into a 0-d float64 argument is lost", "`make_step(donate=True)`", True)
def compiled_write() -> Pair:
    def f(count: Tensor, weights: Tensor) -> Tensor:
        count.copy_(count + 1)
        return 2 * weights

    number = torch.tensor(1.0, dtype=torch.float64)
    compiled(f, number, A)
    return number, torch.tensor(2.0, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- table
def version() -> str:
    return torch.__version__.split("+")[0]


def main(pythons: list[str]) -> None:
    if not pythons:
        found = {name: one.found() for name, one in FAULTS.items()}
        print(json.dumps({"torch": version(), "found": found}))
        return
    columns = []
    for python in pythons:
        command = [python, "-m", "tests.torch_faults"]
        out = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        columns.append(json.loads(out.stdout.splitlines()[-1]))
    versions = [column["torch"] for column in columns]
    print("# Faults of torch's derivatives\n")
    print("`make torch-faults` makes this page: it tries each of them (`tests/torch_faults.py`)")
    print("in several versions of torch, on a CPU. Errors are relative to the largest entry of the")
    print("right value, which is a closed form or a central difference. What is missing raises an")
    print("error.\n")
    print(f"| torch's fault | what it would affect | {' | '.join(versions)} |")
    print("|---" * (2 + len(versions)) + "|")
    for name, one in FAULTS.items():
        row = [one.title, one.matters, *(column["found"][name] for column in columns)]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
