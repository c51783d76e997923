"""Different methods for different parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.transform import Transform
from funcprecond.tree import Params, state, static

__all__ = ["Assignment", "Partitioned", "assign", "partition"]

Rule = tuple[str | Callable[[str, Tensor], bool], str]
Rules = Sequence[Rule] | Callable[[str, Tensor], str | None]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which label each parameter has; printing it gives a table.

    Attributes:
        labels: the label, by parameter name.
        shapes: the parameters' shapes.
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
    """Which label each parameter gets; print it before training.

    Args:
        rules: pairs ``(pattern, label)``, the first that matches a parameter wins. A pattern is a
            shell pattern of the name (``"*.bias"``) or a function ``(name, parameter) -> bool``. Or
            one function ``(name, parameter) -> label``.
        params: the parameters.
        labels: the labels that exist, to catch misspelled ones.

    Raises:
        ValueError: a parameter matches no rule, a name is written out in two rules with different
            labels, one tensor has two names with different labels, or a label does not exist.
    """
    found = {name: _label(rules, name, p) for name, p in params.items()}
    unmatched = [name for name, label in found.items() if label is None]
    if unmatched:
        msg = f"no rule matches {unmatched}: add a last rule ('*', label)"
        raise ValueError(msg)
    assigned: dict[str, str] = {k: v for k, v in found.items() if v is not None}
    if labels is not None and (extra := sorted(set(assigned.values()) - set(labels))):
        msg = f"the rules give the labels {extra}, but there are methods for {sorted(labels)} only"
        raise ValueError(msg)
    _check_claims(rules, params, assigned)
    return Assignment(assigned, {k: tuple(p.shape) for k, p in params.items()})


@state
class Partitioned:
    """The methods' states.

    Attributes:
        inner: by label.
        names: (label, its parameters), settled once: the rules have no part in a step.
    """

    inner: dict[str, Any]
    names: tuple[tuple[str, tuple[str, ...]], ...] = static()


def partition(rules: Rules, **transforms: Transform) -> Transform:
    """Route each parameter to one of several methods.

    Args:
        rules: see :func:`assign`; ``print(fp.assign(rules, params))`` shows the outcome.
        **transforms: a method for each label.

    Returns:
        A transform; its state is a :class:`Partitioned`.

    Example: Muon's usual routing is ``[(lambda name, p: p.ndim == 2 and "embed" not in name,
    "matrix"), ("*", "rest")]``.
    """

    def init(params: Params) -> Partitioned:
        labels = assign(rules, params, list(transforms)).labels
        names = tuple(
            (label, tuple(k for k in params if labels[k] == label)) for label in transforms
        )
        inner = {label: transforms[label].init({k: params[k] for k in ks}) for label, ks in names}
        return Partitioned(inner, names)

    def update(
        state: Partitioned, grads: Params, evidence: Evidence | None = None
    ) -> tuple[Partitioned, Params]:
        new, direction = {}, {}
        for label, names in state.names:
            part = {k: grads[k] for k in names}
            new[label], d = transforms[label].update(state.inner[label], part, evidence)
            direction |= d
        return Partitioned(new, state.names), {k: direction[k] for k in grads}

    def needs(t: int) -> tuple:
        return tuple(dict.fromkeys(n for x in transforms.values() for n in x.needs(t)))

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
        msg = f"{twice} are claimed by two methods: leave one rule or one name for each"
        raise ValueError(msg)
