"""The training problem: a model, a loss, and the initial parameters."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcprecond import tree
from funcprecond.losses import Loss, as_loss

__all__ = ["Buffers", "Params", "Problem", "as_pair", "problem"]

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model and a loss as pure functions; make one with :func:`problem`.

    ``problem(params, inputs)`` runs the model.

    Attributes:
        forward: a pure function ``(params, buffers, inputs) -> (outputs, new buffers)``.
        loss: the loss to minimize, see :mod:`funcprecond.losses`.
        params: the initial values of the trainable parameters, by name.
        buffers: the initial values of the model's buffers, by name, such as the running statistics
            of BatchNorm.
        split: a function ``batch -> (inputs, targets)``.
        module: the ``nn.Module`` that ``forward`` runs, or None for a plain function.
        draws_masks: whether the model draws dropout masks in training mode (key True) and in eval
            mode (key False). It is filled in by the first run in each mode.
    """

    forward: Callable[[Params, Buffers, Any], tuple[Any, Buffers]]
    loss: Loss
    params: Params
    buffers: Buffers
    split: Callable[[Any], tuple[Any, Any]]
    module: nn.Module | None = None
    draws_masks: dict[bool, bool] = dataclasses.field(default_factory=dict)

    def __call__(self, params: Params, inputs: Any, buffers: Buffers | None = None) -> Any:
        """Run the model at ``params``, in the current mode (train or eval) of the module.

        Args:
            params: the parameters, by name.
            inputs: the inputs of the model.
            buffers: the model's buffers; by default the initial ones of the problem.

        Returns:
            The outputs of the model. Costs one forward run.
        """
        return self.forward(params, self.buffers if buffers is None else buffers, inputs)[0]

    def couples_examples(self) -> str | None:
        """Find a layer that makes the output of one example depend on the other examples.

        Only the BatchNorm layers of a module are found. A plain function is not examined.

        Returns:
            A description of the first such layer, or None if none is found.
        """
        for name, module in self.module.named_modules() if self.module else ():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.training:
                return f"{type(module).__name__} {name!r} in training mode"
            if module.running_mean is None:
                return f"{type(module).__name__} {name!r} without running statistics"
        return None


def as_pair(batch: Any) -> tuple[Any, Any]:
    """Split a batch that is a pair into its inputs and targets.

    Args:
        batch: a tuple or a list of length two.

    Returns:
        The pair (inputs, targets).

    Raises:
        TypeError: the batch is not a pair.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    msg = (
        f"the batch is a {type(batch).__name__}{length}, not a pair (inputs, targets): pass "
        "fp.problem a function split= that maps your batch to such a pair"
    )
    raise TypeError(msg)


def problem(
    model: nn.Module | Callable[[Params, Any], Any],
    loss: Any,
    *,
    params: Mapping[str, Tensor] | None = None,
    split: Callable[[Any], tuple[Any, Any]] = as_pair,
) -> Problem:
    """Define a training problem from a model and a loss.

    Args:
        model: an ``nn.Module``, or any function ``(params, inputs) -> outputs`` in which ``params``
            is a dict of tensors. The inputs of a module may be one tensor, a tuple (its positional
            arguments) or a dict (its keyword arguments). The module's own parameters and buffers
            are never changed. Parameters with ``requires_grad=False`` are treated as constants, and
            a tied parameter appears once.
        loss: a loss of :mod:`funcprecond.losses`, a loss of torch (a function or a module), or any
            callable ``(outputs, targets) -> 0-d tensor``.
        params: the initial parameters of a plain function. For a module, the initial parameters are
            its own, and this argument must be None.
        split: a function ``batch -> (inputs, targets)``. The default expects the batch to be such a
            pair. A batch may have any type that ``split`` takes.

    Returns:
        A :class:`Problem`.

    Raises:
        TypeError: ``model`` or ``loss`` is not callable; a plain function does not take the two
            arguments ``(params, inputs)``; a module was given together with ``params``; or the
            module hides the layers inside it (a scripted module or ``nn.DataParallel``).
        ValueError: a trainable parameter is not a floating-point tensor, or it belongs to a lazy
            module and has no shape yet; or the loss is a module of torch with
            ``reduction="none"``.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> sorted(problem.params)
        ['bias', 'weight']
        >>> problem(problem.params, torch.ones(8, 4)).shape
        torch.Size([8, 3])
    """
    loss = as_loss(loss)
    if isinstance(model, nn.Module):
        if params is not None:
            msg = "a module has its own parameters: pass params= only with a plain function"
            raise TypeError(msg)
        if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
            msg = (
                f"a {type(model).__name__} hides the layers of the model: pass the original "
                "nn.Module instead"
            )
            raise TypeError(msg)
        return _from_module(model, loss, split)
    if not callable(model):
        msg = f"the model must be an nn.Module or a function, not a {type(model).__name__}"
        raise TypeError(msg)
    try:
        inspect.signature(model).bind({}, None)
    except TypeError as error:
        msg = f"a model that is a plain function must take two arguments (params, inputs): {error}"
        raise TypeError(msg) from None

    def forward(params, buffers, inputs):
        return model(params, inputs), buffers

    return Problem(forward, loss, _trainable(params or {}), {}, split)


def _from_module(model: nn.Module, loss: Loss, split: Callable) -> Problem:
    named = dict(model.named_parameters())
    frozen = {k: p.detach() for k, p in named.items() if not p.requires_grad}
    start = _trainable({k: p for k, p in named.items() if p.requires_grad})
    start_buffers = {k: b.detach().clone() for k, b in model.named_buffers()}
    # ``forward`` compares with these sets and not with ``start``: otherwise a compiler would guard
    # on ``params is start`` and recompile at the second step.
    names, buffer_names = frozenset(start), frozenset(start_buffers)
    # All places of a tied tensor share one name. They are found only once, because a search at
    # every call, as in torch's ``functional_call``, would slow down small steps.
    name_of = {id(x): name for name, x in (*named.items(), *model.named_buffers())}
    places = [(*place, name_of[id(x)]) for place, x in _places(model)]

    def forward(params, buffers, inputs):
        _fit("params", params, names)
        _fit("buffers", buffers, buffer_names)
        # Layers write into the buffers that they receive, so they receive clones. The clones are
        # made here so that a transform around this function covers them.
        fresh = {k: b.clone() for k, b in buffers.items()}
        tensors = {**frozen, **params, **fresh}
        args, kwargs = _arguments(inputs)
        own = [held[key] for held, key, _ in places]
        try:
            for held, key, name in places:
                held[key] = tensors[name]
            outputs = model(*args, **kwargs)
            # A layer may also replace a buffer with a new tensor. If a layer removes a buffer, then
            # the next run starts from the buffer's old value.
            found = ((name, held.get(key)) for held, key, name in places if name in fresh)
            fresh |= {name: x for name, x in found if x is not None}
        finally:
            for (held, key, _), tensor in zip(places, own, strict=True):
                held[key] = tensor
        return outputs, fresh

    return Problem(forward, loss, start, start_buffers, split, model)


def _fit(what: str, given: Mapping[str, Tensor], names: frozenset[str]) -> None:
    if given.keys() != names:
        missing, unknown = names - given.keys(), given.keys() - names
        msg = (
            f"{what} do not fit the model: missing {sorted(missing) or 'none'}, "
            f"unknown {sorted(unknown) or 'none'}; pass a dict with the names of problem.{what}"
        )
        raise KeyError(msg)


def _places(model: nn.Module) -> list[tuple[tuple[dict, str], Tensor]]:
    """Each place that holds a parameter or a buffer (a dict and a key), with the tensor in it."""
    return [
        ((held, key), tensor)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for key, tensor in held.items()
        if tensor is not None
    ]


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _trainable(params: Mapping[str, Tensor]) -> Params:
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
            msg = (
                f"parameter {name!r} must be a floating-point tensor, not {kind}: leave constants "
                "out of params"
            )
            raise ValueError(msg)
        if isinstance(p, nn.parameter.UninitializedParameter):
            msg = f"parameter {name!r} has no shape yet: run the lazy module on one batch first"
            raise ValueError(msg)
    # These are copies, so that later changes to the module do not affect them.
    return {name: p.detach().clone() for name, p in params.items()}


def example_count(outputs: Any) -> int:
    """Return N, the length of axis 0 of the outputs.

    Raises:
        ValueError: the outputs have no axis 0, or its length is zero.
    """
    leaves = [outputs] if isinstance(outputs, Tensor) else tree.leaves(outputs)
    first = next(x for x in leaves if isinstance(x, Tensor))
    if first.ndim == 0 or first.shape[0] == 0:
        msg = (
            f"the model's outputs have shape {tuple(first.shape)}: axis 0 must count the examples "
            "of the batch, and there must be at least one"
        )
        raise ValueError(msg)
    return first.shape[0]


def detach(tensors: Any) -> Any:
    """Return the same tree with all tensors detached from their autograd graph."""
    if isinstance(tensors, Tensor):
        return tensors.detach()
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, tensors)
