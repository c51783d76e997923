"""Different methods for different parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.evidence import Evidence
from funcprecond.need import Need, Owned, is_mark
from funcprecond.transform import Transform, check_fit, check_present, shapes_of
from funcprecond.tree import Params, state, static

__all__ = ["Assignment", "Partitioned", "assign", "partition"]

Rule = tuple[str | Callable[[str, Tensor], bool], str]
Rules = Sequence[Rule] | Callable[[str, Tensor], str | None]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The label of each parameter; printing it shows a table.

    Attributes:
        labels: the label, by parameter name.
        shapes: the shapes of the parameters, by name.
    """

    labels: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "method")]
        rows += [(k, str(self.shapes[k]), label) for k, label in self.labels.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def assign(rules: Rules, params: Params, labels: Sequence[str] | None = None) -> Assignment:
    """Find the label of each parameter, for inspection before training.

    Args:
        rules: pairs ``(pattern, label)``, of which the first that matches a parameter counts. A
            pattern is a shell pattern of the name (``"*.bias"``) or a function
            ``(name, parameter) -> bool``. Instead of pairs it can be a single function
            ``(name, parameter) -> label``.
        params: the parameters.
        labels: the labels that exist, to find misspelled ones; None skips this check.

    Returns:
        An :class:`funcprecond.transforms.partition.Assignment`.

    Raises:
        ValueError: a parameter matches no rule, a name is written out in two rules with different
            labels, one tensor has two names with different labels, or a label does not exist.

    Example:
        >>> import torch, funcprecond as fp
        >>> params = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}
        >>> print(fp.assign([("*bias", "adam"), ("*", "muon")], params))
        parameter  shape   method
        weight     (4, 3)  muon
        bias       (4,)    adam
    """
    found = {name: _label(rules, name, p) for name, p in params.items()}
    unmatched = [name for name, label in found.items() if label is None]
    if unmatched:
        msg = f"no rule matches {unmatched}: add ('*', label) as the last rule"
        raise ValueError(msg)
    assigned: dict[str, str] = {k: v for k, v in found.items() if v is not None}
    if labels is not None and (extra := sorted(set(assigned.values()) - set(labels))):
        msg = (
            f"the rules assign the labels {extra}, but the methods have the labels "
            f"{sorted(labels)}: correct the rules, or pass a method for each label"
        )
        raise ValueError(msg)
    _check_claims(rules, params, assigned)
    return Assignment(assigned, {k: tuple(p.shape) for k, p in params.items()})


class _Labels:
    """The label of each parameter by some rules, for the last names and shapes of parameters."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self._last: tuple[Any, dict[str, str | None]] = {}, {}

    def of(self, params: Params) -> dict[str, str | None]:
        """The labels of parameters, by name."""
        last = self._last
        if torch.compiler.is_compiling() and list(last[1]) == list(params):
            # A compiler cannot trace the rules; ``init`` has applied them.
            return last[1]
        shapes = shapes_of(params)
        if last[0] != shapes:
            last = shapes, {k: _label(self.rules, k, p) for k, p in params.items()}
            self._last = last
        return last[1]


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The names of the parameters with certain labels, as a function of all parameters."""

    assigned: _Labels
    labels: tuple[str, ...]

    def __call__(self, params: Params) -> tuple[str, ...]:
        return tuple(k for k, label in self.assigned.of(params).items() if label in self.labels)


@state
class Partitioned:
    """The state of :func:`partition`.

    Attributes:
        inner: the state of each method, by label.
        names: for each label the names of its parameters. They are found once by ``init``, and the
            rules are not used in a step.
    """

    inner: dict[str, Any]
    names: tuple[tuple[str, tuple[str, ...]], ...] = static()


def partition(rules: Rules, **transforms: Transform) -> Transform:
    """Route each parameter to one of several methods.

    Args:
        rules: see :func:`funcprecond.assign`; ``print(fp.assign(rules, params))`` shows the result.
        **transforms: one method for each label.

    Returns:
        A transform with the needs of all methods; its state is a :class:`Partitioned`. What a
        method needs is measured for its own parameters, as if the others were constants. ``init``
        raises the errors of :func:`funcprecond.assign`.

    Example:
        >>> import torch, funcprecond as fp
        >>> rules = [(lambda name, p: p.ndim == 2, "matrix"), ("*", "rest")]
        >>> opt = fp.partition(rules, matrix=fp.muon(), rest=fp.adam())
        >>> opt.init({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}).names
        (('matrix', ('weight',)), ('rest', ('bias',)))
    """

    def init(params: Params) -> Partitioned:
        labels = assign(rules, params, list(transforms)).labels
        assigned.of(params)
        names = tuple(
            (label, tuple(k for k in params if labels[k] == label)) for label in transforms
        )
        inner = {label: transforms[label].init({k: params[k] for k in ks}) for label, ks in names}
        return Partitioned(inner, names)

    def update(
        state: Partitioned, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Partitioned, Params]:
        check_present(grads)
        covered = [k for _, names in state.names for k in names]
        # The methods compare the shapes.
        check_fit({k: grads[k].shape if k in grads else () for k in covered}, grads)
        new, direction = {}, {}
        for label, names in state.names:
            part = {k: grads[k] for k in names}
            own = None if evidence is None else evidence.part(measured_for(label, state, evidence))
            new[label], d = transforms[label].update(state.inner[label], part, own)
            direction |= d
        return Partitioned(new, state.names), {k: direction[k] for k in grads}

    def measured_for(label: str, state: Partitioned, evidence: Evidence) -> dict[Need, Any]:
        found = dict(evidence.measured)
        for need, value in evidence.measured.items():
            if not isinstance(need, Owned) or getattr(need.owner, "assigned", None) is not assigned:
                continue
            del found[need]
            if label in need.owner.labels:  # pyright: ignore[reportFunctionMemberAccess]
                names, measured = dict(state.names)[label], need.owner(evidence.params)
                if not {*names} <= {*measured}:
                    msg = (
                        f"the rules gave {listed(names)} to {label!r} when opt.init was called, "
                        f"and give it {listed(measured)} now: a rule may depend on the name and "
                        "the shape of a parameter only"
                    )
                    raise ValueError(msg)
                found[need.need] = value
        return found

    def needs(t: int) -> tuple:
        wanted: dict[Need, dict[str, None]] = {}
        for label, transform in transforms.items():
            for need in transform.needs(t):
                wanted.setdefault(need, {})[label] = None
        return tuple(
            need
            if is_mark(need) or len(labels) == len(transforms)
            else Owned(need, _Owner(assigned, tuple(labels)))
            for need, labels in wanted.items()
        )

    assigned = _Labels(rules)
    return Transform(init, update, needs)


def _label(rules: Rules, name: str, p: Tensor) -> str | None:
    if callable(rules):
        return rules(name, p)
    for pattern, label in rules:
        if fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern(name, p):
            return label
    return None


def _check_claims(rules: Rules, params: Params, assigned: dict[str, str]) -> None:
    claims: dict[str, set[str]] = {}
    for pattern, label in () if callable(rules) else rules:
        if isinstance(pattern, str) and pattern in params:
            claims.setdefault(pattern, set()).add(label)
    owners: dict[int, set[str]] = {}
    for name, p in params.items():
        owners.setdefault(id(p), set()).add(assigned[name])
    twice = [k for k, labels in claims.items() if len(labels) > 1]
    twice += [k for k, p in params.items() if len(owners[id(p)]) > 1]
    if twice:
        msg = f"{twice} are claimed by two methods: keep one rule, or one label, for each of them"
        raise ValueError(msg)
