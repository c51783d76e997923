"""The training problem: a model, a loss, and the initial parameters."""

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcprecond import tree
from funcprecond.checks import listed
from funcprecond.functional_module import FunctionalModule, check_names
from funcprecond.losses import Loss, as_loss
from funcprecond.tree import Buffers, Params

__all__ = ["Problem", "as_pair", "problem"]

# The number of structures of runs that are remembered.
REMEMBERED = 64
# The key of the targets in a batch that is a mapping, by the convention of transformers.
LABELS = "labels"


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model and a loss as pure functions; make one with :func:`problem`.

    ``problem(params, inputs)`` runs the model.

    Attributes:
        forward: a pure function ``(params, buffers, inputs) -> (outputs, new buffers)``, where the
            outputs are those that the loss takes.
        loss: the loss to minimize, see :mod:`funcprecond.losses`.
        params: the initial values of the trainable parameters, by name.
        buffers: the initial values of the model's buffers, by name, such as the running statistics
            of BatchNorm.
        split: a function ``batch -> (inputs, targets)``.
        module: the ``nn.Module`` that ``forward`` runs, or None for a plain function.
        in_axes: the axis of each input that counts the examples, see :func:`problem`.
        remembered: what was found out about runs of the model, by the shapes of the inputs:
            where the examples are (:mod:`funcprecond.autodiff.examples`), and whether a derivative
            would be lost (:mod:`funcprecond.autodiff.graph_check`).
        draws_masks: whether the model draws dropout masks, by :meth:`options`. It is filled in by
            :func:`funcprecond.draw`, and remembers the last options only.
        reminded: how often :func:`funcprecond.observe` was not given the model's buffers.
        by_points: whether the batch consists of points or samples, each with a function of its own
            (:mod:`funcprecond.residual_problems`), so that no layers and no examples are looked
            for.
    """

    by_points: ClassVar[bool] = False

    forward: Callable[[Params, Buffers, Any], tuple[Any, Buffers]]
    loss: Loss
    params: Params
    buffers: Buffers
    split: Callable[[Any], tuple[Any, Any]]
    module: nn.Module | None = None
    in_axes: Any = "auto"
    remembered: dict[tuple, Any] = dataclasses.field(default_factory=dict)
    draws_masks: dict[tuple, bool] = dataclasses.field(default_factory=dict)
    reminded: Counter[str] = dataclasses.field(default_factory=Counter)

    def __call__(self, params: Params, inputs: Any, buffers: Buffers | None = None) -> Any:
        """Run the model at ``params``, in the current mode (train or eval) of the module.

        Args:
            params: the parameters, by name.
            inputs: the inputs of the model.
            buffers: the model's buffers; by default the initial ones of the problem.

        Returns:
            The outputs of the model, or what ``outputs`` of :func:`problem` chooses of them. Costs
            one forward run.
        """
        return self.forward(params, self.buffers if buffers is None else buffers, inputs)[0]

    def write_back(self, params: Params, buffers: Buffers | None = None) -> None:
        """Write trained parameters into the module, in place.

        This is the only function that changes the module. It is for the end of the training, or for
        an evaluation by code that runs the module itself.

        Args:
            params: the values of the trainable parameters, by name. A tied weight, which has one
                name, is written once and is then changed in all its places.
            buffers: the values of the buffers, such as ``evidence.buffers`` of the last step.
                By default, the module keeps its own.

        Raises:
            TypeError: the model is a plain function, which has no parameters of its own.
            KeyError: ``params`` or ``buffers`` have other names than the module.
            ValueError: a value is not a tensor of the shape that the module has. Nothing is
                written then.

        Example:
            >>> import torch, funcprecond as fp
            >>> model = torch.nn.Linear(4, 3)
            >>> problem = fp.problem(model, fp.losses.mse)
            >>> problem.write_back({k: torch.ones_like(p) for k, p in problem.params.items()})
            >>> model.bias.data
            tensor([1., 1., 1.])
        """
        if self.module is None:
            msg = (
                "the model is a plain function, which has no parameters to write into: use the "
                "trained params themselves"
            )
            raise TypeError(msg)
        places = []
        for what, given, names, own in (
            ("params", params, self.params, dict(self.module.named_parameters())),
            ("buffers", buffers, self.buffers, dict(self.module.named_buffers())),
        ):
            if given is None:
                continue
            check_names(what, given, frozenset(names))
            if gone := sorted(names.keys() - own.keys()):
                msg = (
                    f"the module has changed since fp.problem was called: {listed(gone)} no longer "
                    "exist, so that they cannot be written back. Make a new problem of the module"
                )
                raise KeyError(msg)
            for name, x in given.items():
                if not isinstance(x, Tensor) or x.shape != own[name].shape:
                    found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                    msg = (
                        f"{what}[{name!r}] is {found}, and the module has a tensor of the shape "
                        f"{tuple(own[name].shape)}: pass one of this shape"
                    )
                    raise ValueError(msg)
                places.append((own[name], x))
        with torch.no_grad():
            for place, x in places:
                place.copy_(x)

    def options(self) -> tuple:
        """All numbers and flags in the modules' attributes, such as modes and dropout rates.

        Whatever was remembered of a run of the model holds as long as they stay the same.
        """
        modules = () if self.module is None else self.module.modules()
        return tuple(
            x for part in modules for x in part.__dict__.values() if type(x) in (bool, int, float)
        )

    def remember(self, key: tuple, value: Any) -> None:
        """Keep what was found out about runs of the model."""
        if len(self.remembered) >= REMEMBERED:
            self.remembered.clear()
        self.remembered[key] = value

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
    """Split a batch into its inputs and targets.

    Args:
        batch: a tuple or a list of length two; or a mapping, such as a dict or the
            ``BatchEncoding`` of transformers, with the key ``"labels"``.

    Returns:
        The pair (inputs, targets). Those of a mapping are a dict of everything but the labels, and
        the labels.

    Raises:
        TypeError: the batch is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and LABELS in batch:
        return {k: v for k, v in batch.items() if k != LABELS}, batch[LABELS]
    length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    msg = (
        f"the batch is a {type(batch).__name__}{length}, neither a pair (inputs, targets) nor a "
        f"dict with the key {LABELS!r}: pass fp.problem a function split= that maps your batch to "
        "such a pair"
    )
    raise TypeError(msg)


def problem(
    model: nn.Module | Callable[[Params, Any], Any],
    loss: Any,
    *,
    params: Mapping[str, Tensor] | None = None,
    split: Callable[[Any], tuple[Any, Any]] = as_pair,
    outputs: str | Callable[[Any], Any] | None = None,
    in_axes: Any = "auto",
) -> Problem:
    """Define a training problem from a model and a loss.

    Args:
        model: an ``nn.Module``, or any function ``(params, inputs) -> outputs`` in which ``params``
            is a dict of tensors. The inputs of a module may be one tensor, a tuple (its positional
            arguments) or any mapping (its keyword arguments). Its own parameters and buffers are
            never changed, except by :meth:`Problem.write_back`. Parameters with
            ``requires_grad=False`` are treated as constants, and a tied parameter appears once.
        loss: a loss of :mod:`funcprecond.losses`, a loss of torch (a function or a module), or any
            callable ``(outputs, targets) -> 0-d tensor``.
        params: the initial parameters of a plain function. For a module, the initial parameters are
            its own, and this argument must be None.
        split: a function ``batch -> (inputs, targets)``. The default takes a batch that is such a
            pair, or a mapping whose key ``"labels"`` has the targets and whose other entries are
            the inputs. A batch may have any type that ``split`` takes.
        outputs: what the loss takes of that which the model returns: a key or an attribute of it,
            such as ``"logits"``, or a function of it. By default, the loss takes all of it. The
            other parts are then not seen by anything.
        in_axes: which axis of each input counts the examples, as in ``torch.vmap``: an int, or a
            tree like the inputs of ints, and of None for an input that all examples share. By
            default, one small run of the model finds out. Only per-sample quantities need to know.
            None declares that the inputs belong to all examples together, as in a graph whose nodes
            are the examples. The per-sample gradients are then those of each example's loss in the
            whole graph, and cost one pull-back per example.

    Returns:
        A :class:`Problem`.

    Raises:
        TypeError: ``model`` or ``loss`` is not callable; ``outputs`` is neither a name nor
            callable; a plain function does not take the two arguments ``(params, inputs)``; a
            module was given together with ``params``; or the
            module hides the layers inside it (a scripted module or ``nn.DataParallel``), or
            averages gradients over processes (``DistributedDataParallel``, FSDP).
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

        A model that returns more than the loss takes, and a batch that is a dict:

        >>> def model(params, inputs):
        ...     hidden = inputs["x"] @ params["w"]
        ...     return {"logits": hidden, "hidden": hidden}
        >>> params = {"w": torch.zeros(4, 3)}
        >>> problem = fp.problem(model, fp.losses.cross_entropy, params=params, outputs="logits")
        >>> batch = {"x": torch.ones(8, 4), "labels": torch.zeros(8, dtype=torch.int64)}
        >>> fp.observe(problem, params, batch).loss
        tensor(1.0986)
    """
    loss = as_loss(loss)
    if not (outputs is None or isinstance(outputs, str) or callable(outputs)):
        msg = (
            "outputs must be the name of a key or an attribute of what the model returns, or a "
            f"function of it, not a {type(outputs).__name__}"
        )
        raise TypeError(msg)
    if isinstance(model, nn.Module):
        if params is not None:
            msg = "a module has its own parameters: pass params= only with a plain function"
            raise TypeError(msg)
        _refuse_wrappers(model)
        return _from_module(model, loss, split, outputs, in_axes)
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

    forward = _choosing(forward, outputs)
    return Problem(forward, loss, _trainable(params or {}), {}, split, in_axes=in_axes)


def _from_module(
    model: nn.Module, loss: Loss, split: Callable, outputs: Any, in_axes: Any
) -> Problem:
    forward = _choosing(FunctionalModule(model), outputs)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    buffers = {k: b.detach().clone() for k, b in model.named_buffers()}
    return Problem(forward, loss, _trainable(params), buffers, split, model, in_axes)


def _choosing(forward: Callable, outputs: str | Callable[[Any], Any] | None) -> Callable:
    """The run of a model that returns only what ``outputs`` of :func:`problem` chooses."""
    if outputs is None:
        return forward
    choose = functools.partial(_entry, name=outputs) if isinstance(outputs, str) else outputs

    def chosen(params, buffers, inputs):
        returned, buffers = forward(params, buffers, inputs)
        return choose(returned), buffers

    return chosen


def _entry(returned: Any, name: str) -> Any:
    """The entry or the attribute of a model's outputs."""
    if isinstance(returned, Mapping):
        if name in returned:
            return returned[name]
        names = [str(k) for k in returned]
    elif not isinstance(returned, Tensor) and hasattr(returned, name):
        return getattr(returned, name)
    else:
        names = [*getattr(returned, "_fields", ()), *getattr(returned, "__dict__", ())]
    has = f"has {listed(names)}" if names else "has no names in it"
    msg = (
        f"outputs={name!r} of fp.problem is not in what the model returns, a "
        f"{type(returned).__name__} that {has}: pass another name, or a function of what the model "
        "returns"
    )
    raise KeyError(msg)


def _refuse_wrappers(model: nn.Module) -> None:
    """Raise TypeError for modules whose parameters are not those of one ordinary module."""
    for name, part in model.named_modules():
        kinds = {cls.__name__ for cls in type(part).__mro__}
        if kinds & {"ScriptModule", "DataParallel"}:
            msg = (
                f"a {type(part).__name__} hides the layers of the model: pass the original "
                "nn.Module instead"
            )
        elif kinds & {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}:
            msg = (
                f"{f'module {name!r} is' if name else 'the model is'} wrapped for data "
                f"parallelism ({type(part).__name__}), whose gradients are not computed here: pass "
                "the original module, and average evidence.grads over the processes"
            )
        else:
            continue
        raise TypeError(msg)


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


def check_outputs(outputs: Any) -> None:
    """Raise an error unless the outputs have floating-point tensors, with at least one example.

    Raises:
        TypeError: no leaf of the outputs is a floating-point tensor.
        ValueError: the batch is empty.
    """
    found = tree.floating(outputs)
    if not found:
        raise TypeError(_without_tensors(outputs))
    sized = [x for x in found if x.ndim]
    if sized and sized[0].shape[0] == 0:
        shapes = [tuple(x.shape) for x in found]
        msg = (
            f"the model's outputs have the shapes {shapes}: axis 0 must count the examples of the "
            "batch, and there must be at least one"
        )
        raise ValueError(msg)


def _without_tensors(outputs: Any) -> str:
    leaves = tree.leaves(outputs)
    if not leaves or all(x is None for x in leaves):
        return (
            "the outputs of the model are None: if it computes its loss from labels in the batch, "
            "keep them among the inputs with fp.problem(..., split=lambda batch: (batch, None))"
        )
    kinds = sorted({type(x).__name__ for x in leaves})
    names = [
        name
        for x in leaves
        for name, value in getattr(x, "__dict__", {}).items()
        if tree.floating(value)
    ]
    example = names[0] if names else "logits"
    return (
        f"the outputs of the model have no floating-point tensor, but {', '.join(kinds)}: the "
        "model must return a tensor, or a tuple, list or dict of tensors. From any other object, "
        f"choose what the loss takes with fp.problem(..., outputs={example!r}), or with a function "
        "of the object"
    )


def detach(tensors: Any) -> Any:
    """Return the same tree with all tensors detached from their autograd graph."""
    if isinstance(tensors, Tensor):
        return tensors.detach()
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, tensors)
