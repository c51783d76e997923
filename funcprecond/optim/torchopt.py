"""The methods behind the functional interface of torchopt, which other libraries build on.

Libraries such as posteriors take an object with ``init(params)`` and
``update(grads, state, *, params=None, inplace=True)``, where parameters are any tree of tensors,
and add the updates that it returns to the parameters.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.evidence import Evidence, MissingEvidence
from funcprecond.need import Need, is_mark
from funcprecond.transform import Transform
from funcprecond.tree import Params, state, static

__all__ = ["GradientTransformation", "TreeState", "apply_updates", "gradient_transformation"]


@state
class TreeState:
    """The state of a :class:`GradientTransformation`.

    Attributes:
        inner: the state of the method.
        step: the number of updates so far.
    """

    inner: Any
    step: int = static(default=0)


class GradientTransformation(NamedTuple):
    """A method with the interface of torchopt; make one with :func:`gradient_transformation`.

    Attributes:
        method: the method.
    """

    method: Transform

    def init(self, params: Any) -> TreeState:
        """Make the initial state.

        Args:
            params: a tensor, or a nest of dicts, lists and tuples of tensors.

        Returns:
            A :class:`TreeState`.

        Raises:
            ValueError: two parameters have the same path in the tree.
        """
        return TreeState(self.method.init(_named(params)))

    def update(
        self,
        updates: Any,
        state: TreeState,
        *,
        params: Any = None,
        inplace: bool = True,
        evidence: Evidence | None = None,
    ) -> tuple[Any, TreeState]:
        """Turn a gradient into an update, which :func:`apply_updates` adds to the parameters.

        Args:
            updates: the gradient, a tree like the parameters.
            state: the state.
            params: the parameters, which weight decay needs.
            inplace: accepted for the sake of the interface. Nothing is changed in place.
            evidence: the result of ``fp.observe(problem, params, batch, opt.needs(state))``, for a
                method that needs more than the gradient. Its parameters are then a dict.

        Returns:
            (updates, new state), where the updates are shaped like the gradient, and have the
            opposite sign of a direction.

        Raises:
            MissingEvidence: the method needs the parameters or a measurement.
            ValueError: the state belongs to other parameters.

        Example:
            >>> import torch, funcprecond as fp
            >>> opt = fp.optim.gradient_transformation(fp.chain(fp.sgd(), fp.scale(0.5)))
            >>> params = [torch.ones(2)]
            >>> updates, state = opt.update([torch.ones(2)], opt.init(params), params=params)
            >>> fp.optim.apply_updates(params, updates, inplace=False)
            [tensor([0.5000, 0.5000])]
        """
        grads = _named(updates)
        if evidence is None:
            own = _Absent() if params is None else _named(params)
            marks = {n: () for n in self.method.needs(state.step) if is_mark(n)}
            loss = next(iter(grads.values()), torch.zeros(())).new_zeros(())
            evidence = Evidence(own, loss, None, grads, {}, marks)
        inner, direction = self.method.update(state.inner, grads, evidence)
        found = iter([-direction[k] for k in grads])
        shaped = tree.map(lambda x: next(found) if isinstance(x, Tensor) else x, updates)
        return shaped, TreeState(inner, state.step + 1)

    def needs(self, state: TreeState) -> tuple[Need, ...]:
        """What to measure for the next update.

        Args:
            state: the state.

        Returns:
            The needs, for :func:`funcprecond.observe`.
        """
        return self.method.needs(state.step)


def gradient_transformation(opt: Transform) -> GradientTransformation:
    """Give a method the interface of torchopt.

    Args:
        opt: the method, with its learning rate: ``fp.chain(fp.shampoo(), fp.scale(0.02))``.

    Returns:
        A :class:`GradientTransformation`, with ``init`` and ``update`` as torchopt has them. Its
        state is saved and loaded by ``fp.save`` and ``fp.load``.

    Example:
        >>> import torch, funcprecond as fp
        >>> opt = fp.optim.gradient_transformation(fp.chain(fp.shampoo(), fp.scale(0.02)))
        >>> params = {"layer": (torch.ones(3, 2), torch.zeros(3))}
        >>> state = opt.init(params)
        >>> grads = {"layer": (torch.ones(3, 2), torch.ones(3))}
        >>> updates, state = opt.update(grads, state, params=params, inplace=False)
        >>> params = fp.optim.apply_updates(params, updates, inplace=False)
        >>> params["layer"][0].shape
        torch.Size([3, 2])
    """
    return GradientTransformation(opt)


def apply_updates(params: Any, updates: Any, *, inplace: bool = True) -> Any:
    """Add updates to parameters, as ``torchopt.apply_updates`` does.

    Args:
        params, updates: two trees of the same structure. What has the update None stays as it is.
        inplace: whether to write into the parameters, as torchopt does by default.

    Returns:
        The new parameters; the old tensors with ``inplace``.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.optim.apply_updates((torch.ones(1),), (torch.ones(1),), inplace=False)
        (tensor([2.]),)
    """

    def added(p: Any, u: Any) -> Any:
        if not isinstance(p, Tensor) or u is None:
            return p
        if not inplace:
            return p + u.to(p.dtype)
        with torch.no_grad():
            return p.add_(u)

    return tree.map(added, params, updates)


class _Absent(dict[str, Tensor]):
    """Parameters that were not given, which is an error only where they are used."""

    def __missing__(self, name: str) -> Tensor:
        msg = (
            f"the method needs the parameter {name!r} itself, as weight decay does: call "
            "update(grads, state, params=params)"
        )
        raise MissingEvidence(msg)


def _named(nest: Any) -> Params:
    """The tensors of a tree by path; those of a flat dict by name."""
    if isinstance(nest, Tensor):
        return {"params": nest}
    pairs: Iterable[tuple[str, Any]] = tree.leaves_by_path(nest)
    pairs = [(path, x) for path, x in pairs if isinstance(x, Tensor)]
    found = dict(pairs)
    if len(found) < len(pairs):
        paths = [path for path, _ in pairs]
        msg = (
            f"two parameters have the path {next(p for p in paths if paths.count(p) > 1)!r}: "
            "rename one of the keys"
        )
        raise ValueError(msg)
    return found
