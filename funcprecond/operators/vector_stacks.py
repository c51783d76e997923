"""Stacks of vectors that are shaped like the parameters, and partitions of their names.

A vector is a dict of tensors with the names and shapes of the parameters. A stack of K vectors has
the same names, and each of its tensors has an additional first axis of length K.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.checks import listed
from funcprecond.tracing import multi_tensor
from funcprecond.tree import Params

__all__ = [
    "Partition",
    "by_layer",
    "count_of",
    "in_chunks",
    "is_stack",
    "partition_of",
    "stack",
    "unstack",
]

Partition = Literal["layer", "tensor"] | Mapping[str, Sequence[str]]


def is_stack(vector: Any, like: Params) -> bool:
    """Whether ``vector`` is a stack of vectors shaped as in ``like``, rather than one such vector.

    Raises:
        ValueError: it is neither, by its names or its shapes.
    """
    expected = {k: tuple(p.shape) for k, p in like.items()}
    if not isinstance(vector, Mapping) or vector.keys() != expected.keys():
        given = listed(sorted(vector)) if isinstance(vector, Mapping) else type(vector).__name__
        msg = (
            f"a vector must be a dict of tensors with the keys {listed(sorted(expected))}, which "
            f"are the names of the parameters, not {given}"
        )
        raise ValueError(msg)
    shapes = {k: tuple(vector[k].shape) for k in expected}
    if shapes == expected:
        return False
    counts = {s[:1] for s in shapes.values()}
    if len(counts) == 1 and all(shapes[k][1:] == s and shapes[k] for k, s in expected.items()):
        return True
    wrong = {k: s for k, s in shapes.items() if s != expected[k]}
    msg = (
        f"the shapes {wrong} fit neither a vector, which has the shapes {expected}, nor a stack of "
        "K vectors, in which each shape has an additional first axis of length K"
    )
    raise ValueError(msg)


def unstack(vectors: Params) -> Iterator[Params]:
    """Iterate over the vectors of a stack."""
    count = count_of(vectors)
    return ({k: v[i] for k, v in vectors.items()} for i in range(count))


def stack(vectors: Iterable[Params], count: int | None = None) -> Params:
    """Stack K vectors.

    Args:
        vectors: the vectors, of equal names and shapes.
        count: K, which is needed if ``vectors`` is a generator whose vectors should not all be in
            memory at once.

    Returns:
        (K, *shape) for each parameter.
    """
    if count is None:
        vectors = list(vectors)
        count = len(vectors)
    rest = iter(vectors)
    vector = next(rest)
    if torch.compiler.is_compiling() or not multi_tensor(vector.values()):
        vectors = [vector, *rest]
        return {k: torch.stack([v[k] for v in vectors]) for k in vector}
    found = {k: x.new_empty(count, *x.shape) for k, x in vector.items()}

    def put(i: int, vector: Params) -> None:
        for k, x in found.items():
            x[i] = vector[k]

    # Each vector is copied and released before the next one is computed.
    put(0, vector)
    del vector
    for i in range(1, count):
        put(i, next(rest))
    return found


def from_rows(rows: Tensor, like: Params) -> Params:
    """The inverse of :func:`to_rows`: a stack of n vectors in the dtypes of ``like``."""
    parts = rows.split([p.numel() for p in like.values()], 1)
    return {
        k: x.reshape(len(rows), *p.shape).to(p.dtype)
        for (k, p), x in zip(like.items(), parts, strict=True)
    }


def to_rows(vectors: Params, like: Params) -> Tensor:
    """The (n, P) matrix whose rows are the vectors of a stack, with columns ordered as ``like``."""
    count = count_of(vectors)
    return torch.cat([vectors[k].reshape(count, -1) for k in like], 1)


def count_of(vectors: Params) -> int:
    """K, the number of vectors in a stack."""
    return next(iter(vectors.values())).shape[0]


def in_chunks(function: Callable[[Params], Params], vectors: Params, chunk_size: int) -> Params:
    """Apply a function to every vector of a stack, with ``vmap`` over a few vectors at a time.

    Args:
        function: maps one vector to a dict of tensors.
        vectors: (K, *shape) for each parameter.
        chunk_size: the number of vectors per call of ``vmap``.

    Returns:
        The results, with an additional first axis of length K.

    Raises:
        ValueError: ``chunk_size`` is not a positive int.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        msg = f"chunk_size must be a positive int or None, not {chunk_size!r}"
        raise ValueError(msg)
    # All vectors share the random numbers that a product draws (dropout masks, sampled labels). The
    # stack is split here because vmap's own chunks do not compile with shared random numbers.
    mapped = torch.vmap(function, randomness="same")
    names = list(vectors)
    cut = zip(*(vectors[k].split(chunk_size) for k in names), strict=True)
    parts = [mapped(dict(zip(names, columns, strict=True))) for columns in cut]
    # The pieces of each parameter are released before those of the next one are joined.
    return {k: torch.cat([part.pop(k) for part in parts]) for k in list(parts[0])}


def by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Group parameter names by the module that the parameters belong to.

    Returns:
        For example ``{"0": ["0.weight", "0.bias"], "scale": ["scale"]}``: a parameter of the root
        module is in a group of its own. The names keep their order.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return groups


def partition_of(params: Params, by: Partition) -> dict[str, list[str]]:
    """The parameter names of each block.

    Args:
        params: the parameters.
        by: see :meth:`Operator.blocks`.

    Returns:
        The names by label.

    Raises:
        ValueError: ``by`` is unknown, or its mapping omits, repeats or adds a parameter.
    """
    if by == "layer":
        return by_layer(list(params))
    if by == "tensor":
        return {k: [k] for k in params}
    if not isinstance(by, Mapping):
        msg = (
            "by must be 'layer', 'tensor' or a mapping from labels to lists of parameter names, "
            f"not {by!r}"
        )
        raise ValueError(msg)
    names = [k for group in by.values() for k in group]
    if sorted(names) != sorted(params):
        missing = sorted(params.keys() - set(names))
        twice = sorted({k for k in names if names.count(k) > 1} | (set(names) - params.keys()))
        msg = (
            f"the blocks must contain every parameter exactly once (missing: {listed(missing)}; "
            f"repeated or unknown: {listed(twice)})"
        )
        raise ValueError(msg)
    return {label: list(group) for label, group in by.items()}
