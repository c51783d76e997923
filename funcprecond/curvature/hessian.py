"""The Hessian of the loss: products, probes, and an operator for one step.

A product pulls the vector back through the graph of the gradient (``vjp`` of ``grad``). The graph
is kept for further products, each of which costs 1.3 to 2.2 gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.graph_check import check_graph, check_recording, no_checkpoints
from funcprecond.autodiff.missing_derivatives import explained
from funcprecond.autodiff.rules.table import DifferentiatedTwice
from funcprecond.curvature.arguments import batch_and_vector
from funcprecond.curvature.jacobian import linearize
from funcprecond.linalg import random
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tracing import is_eager
from funcprecond.tree import Buffers, Params, state

__all__ = ["HessianOperator", "HessianProbes", "Probes", "hvp"]

Distribution = Literal["rademacher", "normal"]


@overload
def hvp(f: Callable[[Params], Tensor], params: Params, vector: Params, /) -> Params: ...


@overload
def hvp(
    problem: Problem,
    params: Params,
    batch: Any,
    vector: Params,
    /,
    *,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params: ...


def hvp(
    f: Any,
    params: Params,
    /,
    *rest: Any,
    buffers: Buffers | None = None,
    generator: torch.Generator | None = None,
) -> Params:
    """The Hessian of a function, or of the loss of a problem, times a vector.

    It is called as ``hvp(f, params, vector)`` or ``hvp(problem, params, batch, vector)``.

    Args:
        f: a function of a tree of tensors that returns a 0-d tensor; or a
            :class:`funcprecond.Problem`, of which the loss on ``batch`` is taken.
        params: the point at which the Hessian is taken.
        *rest: the vector, a tree like ``params``; for a problem, the batch comes before it.
        buffers: the model's buffers; by default those of the problem.
        generator: the source of randomness for the model's dropout masks.

    Returns:
        A tree like ``params``. Costs about 2.1 to 3.2 gradients; for many products at one point,
        use :func:`funcprecond.linearize` or :class:`funcprecond.Hessian`.

    Raises:
        TypeError: the number of arguments is wrong.
        ValueError: random numbers are needed and there is no generator, or the batch is empty.
        NotImplementedError: torch cannot differentiate a part of the function twice.

    Example:
        >>> import torch, funcprecond as fp
        >>> x = {"x": torch.tensor([1.0, 2.0])}
        >>> fp.hvp(lambda p: (p["x"] ** 3).sum(), x, x)
        {'x': tensor([ 6., 24.])}
    """
    batch, vector = batch_and_vector("hvp", f, rest)
    if isinstance(f, Problem):
        opened = linearize(f, params, batch, buffers=buffers, generator=generator)
        return opened.hvp(vector, keep=False)
    return _of_function(f, params, vector)


@explained
def _of_function(f: Callable[[Params], Tensor], params: Params, vector: Params) -> Params:

    mode = DifferentiatedTwice()

    def under_rules(x: Params) -> Tensor:
        with no_checkpoints(), mode:
            return f(x)

    check_recording()
    closed = torch.is_grad_enabled()
    if not is_eager((params, vector)):
        return vjp(grad(under_rules), params)[1](vector)[0]
    # Outside of transforms, an ordinary graph gives the same result in a tenth less time.
    flat, structure = tree.flatten(params)
    flat = [p.detach().requires_grad_() for p in flat]
    with torch.enable_grad():
        value = under_rules(tree.unflatten(flat, structure))
        if not value.requires_grad:
            return tree.map(torch.zeros_like, params)
        own = {id(x) for x in (*flat, *mode.own_leaves)}
        check_graph([value], own, [f], closed=closed, twice=True)
        first = torch.autograd.grad(value, flat, create_graph=True, allow_unused=True)
    pairs = [
        (g, v)
        for g, v in zip(first, tree.leaves(vector), strict=True)
        if g is not None and g.requires_grad
    ]
    second = [None] * len(flat)
    if pairs:
        outputs, cotangents = zip(*pairs, strict=True)
        second = torch.autograd.grad(outputs, flat, cotangents, allow_unused=True)
    found = [torch.zeros_like(p) if h is None else h for h, p in zip(second, flat, strict=True)]
    return tree.unflatten([h.detach() for h in found], structure)


@state
class Probes:
    """Random vectors and their products with the Hessian.

    Attributes:
        vectors: (n, *shape) for each parameter.
        products: (n, *shape) for each parameter: the Hessian times each vector.
    """

    vectors: Params
    products: Params

    def diagonal(self) -> Params:
        """Hutchinson's estimate of the Hessian's diagonal: the mean of ``v * H v`` over the v."""
        return {k: (v * self.products[k]).mean(0) for k, v in self.vectors.items()}


@dataclasses.dataclass(frozen=True)
class HessianProbes(Need):
    """Products of the Hessian with ``n`` random vectors, one after another.

    The measured value is a :class:`Probes`. Costs 1.3 to 2.2 gradients per vector.

    Attributes:
        n: the number of vectors.
        distribution: "rademacher" for random signs, or "normal" for standard normal entries.

    Raises:
        ValueError: ``n`` is less than 1 or there is no such distribution.
    """

    n: int = 1
    distribution: Distribution = "rademacher"
    twice: ClassVar[bool] = True
    gives: ClassVar[type] = Probes

    def __post_init__(self):
        if self.n < 1 or self.distribution not in ("rademacher", "normal"):
            msg = (
                "n must be at least 1 and distribution must be 'rademacher' or 'normal', not "
                f"{self.n!r} and {self.distribution!r}"
            )
            raise ValueError(msg)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Params:
        sample = random.rademacher if self.distribution == "rademacher" else random.normal
        return {
            k: sample((self.n, *p.shape), generator, dtype=p.dtype, device=p.device)
            for k, p in params.items()
        }

    def measure(self, evaluation: Evaluation, noise: Params) -> Probes:
        products = [evaluation.hvp({k: v[i] for k, v in noise.items()}) for i in range(self.n)]
        return Probes(noise, {k: torch.stack([p[k] for p in products]) for k in noise})


@dataclasses.dataclass(frozen=True)
class HessianOperator(Need):
    """The function ``vector -> H vector`` on this batch, which is valid for one step only.

    Each call costs 1.3 to 2.2 gradients.
    """

    twice: ClassVar[bool] = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Callable[[Params], Params]:
        return evaluation.hvp
