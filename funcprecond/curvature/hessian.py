"""The Hessian of the loss: products, probes, and an operator for one step.

Products are a kept pull-back of the gradient (``vjp`` of ``grad``): 1.3 to 2.2 gradients a vector.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.func import grad, vjp

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
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
    """The Hessian of a function, or of a problem's loss, times a vector.

    It is called as ``hvp(f, params, vector)`` or ``hvp(problem, params, batch, vector)``.

    Args:
        f: any function of a tree of tensors to a 0-d tensor; or a :class:`funcprecond.Problem`,
            whose loss on ``batch`` is taken.
        params: where.
        *rest: for a problem the batch first; and the vector, a tree like ``params``.
        buffers: the model's buffers; the problem's own by default.
        generator: draws the model's dropout masks.

    Returns:
        Shaped like ``params``. Costs about 2.1 to 3.2 gradients; for many products at one point
        open :func:`funcprecond.linearize`, or make a :class:`funcprecond.Hessian`.

    Raises:
        TypeError: the arguments fit neither form.
        NotImplementedError: torch cannot differentiate a part of it twice.

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

    def under_rules(x: Params) -> Tensor:
        with DifferentiatedTwice():
            return f(x)

    if not is_eager((params, vector)):
        return vjp(grad(under_rules), params)[1](vector)[0]
    # Outside of transforms an ordinary graph does the same for a tenth less.
    flat, structure = tree.flatten(params)
    flat = [p.detach().requires_grad_() for p in flat]
    with torch.enable_grad():
        value = under_rules(tree.unflatten(flat, structure))
        if not value.requires_grad:
            return tree.map(torch.zeros_like, params)
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
    """Random vectors and the Hessian's products with them.

    Attributes:
        vectors: (n, *shape) for each parameter.
        products: likewise, the Hessian times each.
    """

    vectors: Params
    products: Params

    def diagonal(self) -> Params:
        """Hutchinson's estimate of the Hessian's diagonal, the mean of ``v * Hv``."""
        return {k: (v * self.products[k]).mean(0) for k, v in self.vectors.items()}


@dataclasses.dataclass(frozen=True)
class HessianProbes(Need):
    """Products of the Hessian with ``n`` random vectors, one after another.

    Attributes:
        n: how many.
        distribution: "rademacher" signs or standard "normal" entries.
    """

    n: int = 1
    distribution: Distribution = "rademacher"
    twice: ClassVar[bool] = True
    gives: ClassVar[type] = Probes

    def __post_init__(self):
        if self.n < 1 or self.distribution not in ("rademacher", "normal"):
            msg = f"n must be at least 1 and distribution 'rademacher' or 'normal', not {self}"
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
    """The function ``vector -> H vector`` on this batch. It lives for one step."""

    twice: ClassVar[bool] = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Callable[[Params], Params]:
        return evaluation.hvp
