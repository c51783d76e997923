"""An ``nn.Module`` as a pure function of its parameters, its buffers and its inputs.

A call runs a *replica* of the module: new module objects that share everything with the originals
except for their parameters and buffers, which are the tensors that were passed in. The module
itself is not written to, so that several threads can use it at the same time, and each call sees
the module as it is then.
"""

import functools
import types
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from funcprecond.checks import listed
from funcprecond.tree import Buffers, Params

__all__ = ["FunctionalModule", "check_names", "path_of"]

# An attribute with more items than this is not searched for modules and parameters.
SEARCHED = 256
# The attribute of a replica with its path in the outermost module.
PATH = "_path_in_the_problem"


def path_of(module: nn.Module) -> str | None:
    """The path of a replica in the outermost module, such as "layers.0"; None for other modules."""
    return module.__dict__.get(PATH)


class FunctionalModule:
    """The function ``(params, buffers, inputs) -> (outputs, new buffers)`` of a module.

    The parameters that were trainable when the object was made are arguments. All others are
    constants, with the values that the module has when it is called.

    Args:
        module: the module.

    Attributes:
        module: the module.
        params: the names of the trainable parameters. All places of a tied parameter share one.
        buffers: the names of the buffers.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        named = dict(module.named_parameters())
        self.params = frozenset(k for k, p in named.items() if p.requires_grad)
        self.buffers = frozenset(k for k, _ in module.named_buffers())
        self._frozen = {k: p.detach() for k, p in named.items() if not p.requires_grad}
        name_of = {id(x): name for name, x in (*named.items(), *module.named_buffers())}
        self._places: list[tuple[dict[str, Any], str, str]] = [
            (held, key, name_of[id(x)])
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for key, x in held.items()
            if x is not None
        ]

    def __call__(self, params: Params, buffers: Buffers, inputs: Any) -> tuple[Any, Buffers]:
        """Run the module at ``params`` and ``buffers``, changing neither them nor the module.

        Raises:
            KeyError: ``params`` or ``buffers`` have other names than the module had at first, or
                the module has changed since then.
        """
        check_names("params", params, self.params)
        check_names("buffers", buffers, self.buffers)
        # Layers write into the buffers that they receive, so they receive clones. The clones are
        # made here so that a transform around this function covers them.
        fresh = {k: b.clone() for k, b in buffers.items()}
        args, kwargs = _arguments(inputs)
        if torch.compiler.is_compiling():
            return self._in_place({**self._frozen, **params, **fresh}, fresh, args, kwargs)
        replica = _Replica(self.module, {**params, **fresh})
        self._check_names(replica)
        outputs = replica.outermost(*args, **kwargs)
        # A layer may also replace a buffer with a new tensor. If a layer removes a buffer, then the
        # next run starts from the buffer's old value.
        fresh |= replica.buffers()
        replica.hand_back()
        return outputs, fresh

    def _check_names(self, replica: "_Replica") -> None:
        missing = (self.params | self.buffers) - replica.names
        new = replica.new
        if missing or new:
            what = [f"{listed(sorted(missing))} no longer exist"] if missing else []
            what += [f"{listed(sorted(new))} are new, or were frozen then"] if new else []
            msg = (
                f"the module has changed since fp.problem was called: {' and '.join(what)}. Make a "
                "new problem of the module, and new states"
            )
            raise KeyError(msg)

    def _in_place(self, tensors, fresh, args, kwargs) -> tuple[Any, Buffers]:
        """Run the module itself, which a compiler can trace, with other tensors in its places."""
        own = [held[key] for held, key, _ in self._places]
        try:
            for held, key, name in self._places:
                held[key] = tensors[name]
            outputs = self.module(*args, **kwargs)
            found = ((name, held.get(key)) for held, key, name in self._places if name in fresh)
            fresh |= {name: x for name, x in found if x is not None}
        finally:
            for (held, key, _), tensor in zip(self._places, own, strict=True):
                held[key] = tensor
        return outputs, fresh


class _Replica:
    """Replicas of a module and of all modules in it, with other tensors in their places.

    Args:
        module: the outermost module.
        tensors: the parameters and buffers by name. Other parameters become constants.

    Attributes:
        outermost: the replica of ``module``.
        names: the names of all parameters and buffers of the module.
        new: the names of the parameters that require a gradient and were not given.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]):
        self.names: set[str] = set()
        self.new: set[str] = set()
        self._given = tensors
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        self._modules: dict[int, nn.Module] = {}
        # Each original, its replica, and the attributes of the replica before it runs.
        self._made: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        self._buffer_places: list[tuple[dict[str, Any], str, str]] = []
        self.outermost = self._replica(module, "")
        for _, replica, attributes in self._made:
            for key, value in attributes.items():
                if type(value) not in _PLAIN and key not in _INTERNAL:
                    attributes[key] = self._translated(value)
            replica.__dict__.update(attributes)

    def buffers(self) -> Buffers:
        """The buffers of the replica, as they are now."""
        found = ((name, held.get(key)) for held, key, name in self._buffer_places)
        return {name: x for name, x in found if x is not None}

    def hand_back(self) -> None:
        """Set the attributes that the run has set on the originals too, as a usual call would.

        Attributes whose names begin with an underscore are left out. They are private to a layer,
        such as the list of weights that a recurrent layer keeps.
        """
        for original, replica, before in self._made:
            now = replica.__dict__
            # The keys of both are in one order, unless an attribute was set or deleted.
            same = len(now) == len(before) and all(map(is_, now.values(), before.values()))
            if same and now.keys() == before.keys():
                continue
            for key, value in now.items():
                if not key.startswith("_") and before.get(key, self) is not value:
                    object.__setattr__(original, key, value)

    def _replica(self, module: nn.Module, prefix: str) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        replica = object.__new__(type(module))
        self._modules[id(module)] = replica
        attributes = {**module.__dict__, PATH: prefix.removesuffix(".")}
        self._made.append((module, replica, attributes))
        attributes["_parameters"] = {
            key: None if x is None else self._tensor(x, prefix + key)[1]
            for key, x in module._parameters.items()
        }
        attributes["_buffers"] = buffers = {}
        for key, x in module._buffers.items():
            buffers[key] = x
            if x is not None:
                name, buffers[key] = self._tensor(x, prefix + key)
                self._buffer_places.append((buffers, key, name))
        attributes["_modules"] = {
            key: None if part is None else self._replica(part, f"{prefix}{key}.")
            for key, part in module._modules.items()
        }
        return replica

    def _tensor(self, x: Tensor, name: str) -> tuple[str, Tensor]:
        """The name of a parameter or buffer, which is that of its first place, and its stand-in."""
        if id(x) not in self._tensors:
            self.names.add(name)
            given = self._given.get(name)
            if given is None and isinstance(x, nn.Parameter) and x.requires_grad:
                self.new.add(name)
            self._tensors[id(x)] = name, x.detach() if given is None else given
        return self._tensors[id(x)]

    def _translated(self, value: Any, depth: int = 3) -> Any:
        """An attribute that refers to the stand-ins where it referred to the originals."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, Tensor):
            return self._tensors[id(value)][1] if id(value) in self._tensors else value
        if isinstance(value, types.MethodType):
            owner = self._translated(value.__self__, 1)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = (self._translated(part, depth) for part in parts)
            unchanged = func is value.func and args is value.args and keywords is value.keywords
            return value if unchanged else functools.partial(func, *args, **keywords)
        if type(value) not in _CONTAINERS or not depth or not 0 < len(value) <= SEARCHED:
            return value
        items = list(value.values() if isinstance(value, dict) else value)
        found = [x if type(x) in _PLAIN else self._translated(x, depth - 1) for x in items]
        if all(x is y for x, y in zip(items, found, strict=True)):
            return value
        return _CONTAINERS[type(value)](value, found)


# What every module has, and no module of a user's own sets.
_INTERNAL = frozenset(nn.Module().__dict__)
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device}
_PLAIN |= {types.FunctionType, types.BuiltinFunctionType}
_CONTAINERS: dict[type, Callable[[Any, list], Any]] = {
    list: lambda _, items: items,
    tuple: lambda _, items: tuple(items),
    set: lambda _, items: set(items),
    dict: lambda old, items: dict(zip(old, items, strict=True)),
}


def check_names(what: str, given: Mapping[str, Tensor], names: frozenset[str]) -> None:
    """Raise KeyError unless ``given`` has exactly these names.

    Args:
        what: "params" or "buffers", for the message.
        given: the tensors, by name.
        names: the names that the model has.

    Raises:
        KeyError: a name is missing or unknown.
    """
    if given.keys() != names:
        missing, unknown = sorted(names - given.keys()), sorted(given.keys() - names)
        msg = (
            f"{what} do not fit the model: missing {listed(missing)}, unknown {listed(unknown)}; "
            f"pass a dict with the names of problem.{what}"
        )
        raise KeyError(msg)


def _arguments(inputs: Any) -> tuple[tuple, dict]:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
