"""A method of the table as a ``torch.optim.Optimizer``."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcprecond.checks import RANGES
from funcprecond.evidence import Evidence
from funcprecond.linalg import treemath
from funcprecond.methods.card import Card
from funcprecond.need import Need, is_mark
from funcprecond.optim.pieces import (
    Piece,
    cloned_where_shared,
    packed,
    part_of_state,
    restored,
)
from funcprecond.representation.average import RisingDecay
from funcprecond.transform import Transform
from funcprecond.transforms.momentum import momentum
from funcprecond.transforms.weight_decay import weight_decay
from funcprecond.tree import Params

__all__ = ["MethodOptimizer"]

# What is chained around a method, unless its builder has an option of this name.
CHAINED = ("momentum", "weight_decay")
_RISING = "rising decay, up to"


class MethodOptimizer(torch.optim.Optimizer):
    """One method of the table behind the interface of ``torch.optim``.

    The classes of :mod:`funcprecond.optim` derive from it, one for each card. A step is the one of
    the functional loop with ``fp.chain(method, fp.momentum(m), fp.weight_decay(w), fp.scale(lr))``,
    and it is written into the parameters.

    Attributes:
        card: the card of the method.
    """

    card: ClassVar[Card]

    def __init__(self, params: Any, options: dict[str, Any]):
        self._built: dict[int, tuple[list[Any], Transform]] = {}
        super().__init__(params, options)

    # ----------------------------------------------------------------------------- parameter groups
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Args:
            param_group: ``{"params": parameters}``, and the options that differ from those that the
                optimizer was made with. Their states begin at their first step.

        Raises:
            TypeError: the group is not a dict, or what is to be optimized is not a tensor.
            ValueError: an option is out of range, or a parameter is in a group already, is not a
                leaf, or is not a floating-point tensor.
        """
        if not isinstance(param_group, dict):
            msg = f"a group must be a dict with 'params', not a {type(param_group).__name__}"
            raise TypeError(msg)
        group = {**self.defaults, **param_group}
        self._check(group)
        self._build(group)
        super().add_param_group(param_group)
        for i, p in enumerate(param_group["params"]):
            if not p.is_floating_point():
                self.param_groups.pop()
                msg = (
                    f"parameter {i} of the group is a tensor of {p.dtype}: pass floating-point "
                    "tensors, and a complex one as torch.view_as_real of it"
                )
                raise ValueError(msg)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an option of a group is out of range."""
        for name in ("lr", *CHAINED):
            value = group.get(name)
            allowed = RANGES["rate" if name == "lr" else name]
            if isinstance(value, (int, float)) and value not in allowed:
                msg = f"{name} must be {allowed}, not {value!r}"
                raise ValueError(msg)

    @classmethod
    def _options(cls) -> tuple[str, ...]:
        """The names of the options of the builder."""
        assert cls.card.build is not None
        return tuple(inspect.signature(cls.card.build).parameters)

    def _build(self, group: dict[str, Any]) -> Transform:
        assert self.card.build is not None
        return self.card.build(**{k: group[k] for k in self._options()})

    def _transform(self, group: dict[str, Any]) -> Transform:
        """The method with the options that the group has now, which schedulers may have changed."""
        values = [group[k] for k in self._options()]
        found = self._built.get(id(group))
        if found is None or not all(map(_same, found[0], values)):
            found = self._built[id(group)] = values, self._build(group)
        return found[1]

    # ---------------------------------------------------------------------------------------- steps
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and write it into the parameters.

        A parameter whose ``.grad`` is None sits out this step: neither it nor its state changes,
        and the intervals of its method do not count the step.

        Args:
            closure: a function that computes the loss and its gradient, and returns the loss.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: an option in a group is out of range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        active = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for group, params in zip(self.param_groups, active, strict=True):
            self._check_gradients(params)
            self._check(group)
        for group, params in zip(self.param_groups, active, strict=True):
            transform = self._transform(group)
            for piece in self._pieces(params, group, transform):
                self._advance(piece, group, transform)

    def _check_gradients(self, params: Sequence[Tensor]) -> None:
        for p in params:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                msg = (
                    f"the gradient of {self._names()[id(p)]!r}, of the shape {tuple(p.shape)}, is "
                    f"sparse ({p.grad.layout}), and {type(self).__name__} needs dense gradients: "
                    "make the embedding with sparse=False"
                )
                raise RuntimeError(msg)

    def _advance(self, piece: Piece, group: dict[str, Any], transform: Transform) -> None:
        """Take one step with the parameters of a piece, all of which have a gradient."""
        params = {k: p.detach() for k, p in piece.params.items()}
        grads = {k: _without_graph(p.grad) for k, p in piece.params.items() if p.grad is not None}
        evidence = self._evidence(transform.needs(piece.step), params, grads)
        new = dict(piece.state)
        new["method"], direction = transform.update(new["method"], grads, evidence)
        if "momentum" not in self._options() and "momentum" in group:
            heavy_ball = momentum(group["momentum"])
            if not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
                new.pop("momentum", None)
            else:
                old = new["momentum"] if "momentum" in new else heavy_ball.init(params)
                new["momentum"], direction = heavy_ball.update(old, direction)
        if "weight_decay" not in self._options() and self._decays(group):
            decay = weight_decay(group["weight_decay"])
            _, direction = decay.update((), direction, evidence)
        direction = treemath.cast(treemath.mul(direction, group["lr"]), params)
        written = [*params.values(), *grads.values()]
        piece.state, piece.step = cloned_where_shared(new, written), piece.step + 1
        treemath.sub_(params, direction)

    @staticmethod
    def _decays(group: dict[str, Any]) -> bool:
        return isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0

    def _evidence(self, needs: tuple[Need, ...], params: Params, grads: Params) -> Evidence:
        """The evidence for one piece: the parameters, the gradient, and which intervals are due."""
        if real := [n for n in needs if not is_mark(n)]:
            raise self._unmeasured(real)
        loss = next(iter(params.values())).new_zeros(())
        return Evidence(params, loss, None, grads, {}, dict.fromkeys(needs, ()))

    def _unmeasured(self, needs: Sequence[Need]) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} needs {needs[0]}, which the gradient alone does not give: "
            "train with fp.observe and fp.make_step"
        )

    # --------------------------------------------------------------------------------------- pieces
    def _names(self) -> dict[int, str]:
        """The names of the parameters in the states, by their identity: here their positions."""
        return {k: str(i) for k, i in self._positions().items()}

    def _pieces(
        self, params: Sequence[Tensor], group: dict[str, Any], transform: Transform
    ) -> Iterator[Piece]:
        """The pieces of exactly these parameters; those with other parameters are split."""
        mine: dict[int, list[Tensor]] = {}
        pieces: dict[int, Piece | None] = {}
        for p in params:
            piece = self.state[p].get("piece") if p in self.state else None
            mine.setdefault(id(piece), []).append(p)
            pieces[id(piece)] = piece
        for key, own in mine.items():
            piece = pieces[key]
            if piece is None:
                names = self._names()
                named = {names[id(p)]: p for p in own}
                piece = self._enter(Piece(named, self._init(transform, named, ("method",))))
            elif len(own) < len(piece.params):
                piece = self._split(piece, own, group, transform)
            piece.follow(functools.partial(self._init, transform))
            yield piece

    def _enter(self, piece: Piece) -> Piece:
        for p in piece.params.values():
            self.state[p] = {"piece": piece}
        return piece

    def _split(
        self, piece: Piece, own: Sequence[Tensor], group: dict[str, Any], transform: Transform
    ) -> Piece:
        """Split a piece in two, and return that of ``own``."""
        chosen = {id(p) for p in own}
        halves = []
        for inside in (True, False):
            part = {k: p for k, p in piece.params.items() if (id(p) in chosen) is inside}
            try:
                like = self._init(transform, part, piece.state)
                state = part_of_state(piece.state, like, part, piece.params)
            except ValueError as error:
                msg = (
                    f"the parameters {_some(part)} have other gradients than None than at the last "
                    f"step, and the state of {type(self).__name__} belongs to all parameters "
                    "together: give every parameter a gradient at every step, or make a new "
                    "optimizer of those that still have one"
                )
                raise ValueError(msg) from error
            halves.append(Piece(part, state, piece.step))
        for half in halves:
            self._enter(half)
        return halves[0]

    @staticmethod
    def _init(transform: Transform, params: Params, roles: Collection[str]) -> dict[str, Any]:
        own = {k: p.detach() for k, p in params.items()}
        inits = {"method": transform.init, "momentum": momentum(0.0).init}
        return {role: inits[role](own) for role in roles}

    # ---------------------------------------------------------------------------- saving and copies
    def state_dict(self) -> dict[str, Any]:
        """The states and options as plain numbers, lists and tensors.

        Returns:
            The dict, which ``torch.load(weights_only=True)`` reads. The tensors are those of the
            optimizer, which never writes into them.
        """
        position = self._positions()
        pieces = {id(v["piece"]): v["piece"] for v in self.state.values() if "piece" in v}
        live = self.state
        plain: dict[Any, Any] = {}
        for piece in pieces.values():
            saved = packed(piece, position)
            plain[next(iter(piece.params.values()))] = saved
        try:
            # Torch's own function, with its hooks, gets states that are plain already.
            self.state = plain  # pyright: ignore[reportAttributeAccessIssue]
            found = super().state_dict()
        finally:
            self.state = live
        groups = [{k: _plain(v) for k, v in g.items()} for g in found["param_groups"]]
        return {**found, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, bit for bit.

        Args:
            state_dict: the dict. It is not changed, and the optimizer keeps no tensor of it.

        Raises:
            ValueError, KeyError: it belongs to other parameters, or to another method.
        """

        def keep(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            # Under keys that are no parameters, torch does not cast the tensors to their dtype.
            groups = [{k: _rich(v) for k, v in g.items()} for g in given["param_groups"]]
            states = {("piece", k): v for k, v in given["state"].items()}
            return {**given, "state": states, "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = {k: self.__dict__.get(k) for k in ("state", "param_groups")}
        super().__setstate__(state)
        self._built = {}
        saved = [self.state.pop(k) for k in list(self.state) if isinstance(k, tuple)]
        if not saved:
            return
        try:
            self._restore(saved)
        except BaseException:
            self.__dict__.update(before)
            raise

    def _restore(self, saved: Sequence[dict[str, Any]]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        for one in saved:
            if not isinstance(one, dict) or "roles" not in one:
                msg = (
                    f"the saved state is not one of {type(self).__name__}, but has the entries "
                    f"{list(one) if isinstance(one, dict) else type(one).__name__}: load it into "
                    "an optimizer of the class that saved it"
                )
                raise ValueError(msg)
            transform = self._transform(group_of[id(params[one["params"][0]])])
            self._enter(restored(one, params, functools.partial(self._init, transform)))

    def _positions(self) -> dict[int, int]:
        everything = (p for group in self.param_groups for p in group["params"])
        return {id(p): i for i, p in enumerate(everything)}


def _without_graph(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    with contextlib.suppress(RuntimeError):
        return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
    return False


def _plain(value: Any) -> Any:
    """An option as plain numbers and strings."""
    return {_RISING: value.limit} if isinstance(value, RisingDecay) else value


def _rich(value: Any) -> Any:
    """The option of :func:`_plain`."""
    return RisingDecay(value[_RISING]) if isinstance(value, dict) and _RISING in value else value


def _some(names: Collection[str]) -> str:
    listed = ", ".join(repr(k) for k in list(names)[:3])
    return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"
