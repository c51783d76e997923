"""Vectors shaped like the parameters: stacks of them, and their names cut into blocks.

A vector is a dict of tensors shaped like the parameters; a stack of K has one more axis, in front.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.linalg.precision import wide_dtype
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
    "wide_dot",
]

Partition = Literal["layer", "tensor"] | Mapping[str, Sequence[str]]


def is_stack(vector: Any, like: Params) -> bool:
    """Whether this is a stack of vectors with the names and shapes of ``like``, or one of them.

    Raises:
        ValueError: the names or shapes are neither's.
    """
    expected = {k: tuple(p.shape) for k, p in like.items()}
    if not isinstance(vector, Mapping) or vector.keys() != expected.keys():
        given = sorted(vector) if isinstance(vector, Mapping) else type(vector).__name__
        msg = f"a vector is a dict with the keys {sorted(expected)}, not {given}"
        raise ValueError(msg)
    shapes = {k: tuple(vector[k].shape) for k in expected}
    if shapes == expected:
        return False
    counts = {s[:1] for s in shapes.values()}
    if len(counts) == 1 and all(shapes[k][1:] == s and shapes[k] for k, s in expected.items()):
        return True
    wrong = {k: s for k, s in shapes.items() if s != expected[k]}
    msg = f"shapes {wrong} fit neither a vector {expected} nor a stack with one axis in front"
    raise ValueError(msg)


def unstack(vectors: Params) -> Iterator[Params]:
    """The vectors of a stack, one by one."""
    count = count_of(vectors)
    return ({k: v[i] for k, v in vectors.items()} for i in range(count))


def stack(vectors: Iterable[Params], count: int | None = None) -> Params:
    """(K, *shape) for each parameter, of K vectors; ``count`` if they are made one by one."""
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

    # Each is written where it belongs, and gone before the next is made.
    put(0, vector)
    del vector
    for i in range(1, count):
        put(i, next(rest))
    return found


def from_rows(rows: Tensor, like: Params) -> Params:
    """(n, P) rows as a stack of n vectors, in the dtypes of ``like``."""
    parts = rows.split([p.numel() for p in like.values()], 1)
    return {
        k: x.reshape(len(rows), *p.shape).to(p.dtype)
        for (k, p), x in zip(like.items(), parts, strict=True)
    }


def to_rows(vectors: Params, like: Params) -> Tensor:
    """A stack of n vectors as (n, P) rows, in the order of ``like``."""
    count = count_of(vectors)
    return torch.cat([vectors[k].reshape(count, -1) for k in like], 1)


def count_of(vectors: Params) -> int:
    """K of a stack."""
    return next(iter(vectors.values())).shape[0]


def in_chunks(function: Callable[[Params], Params], vectors: Params, chunk_size: int) -> Params:
    """A function of one vector of each of a stack, ``chunk_size`` of them at a time under ``vmap``.

    Raises:
        ValueError: ``chunk_size`` is not a positive int.
    """
    if not isinstance(chunk_size, int) or chunk_size < 1:
        msg = f"chunk_size must be a positive int or None, not {chunk_size!r}"
        raise ValueError(msg)
    # What a product draws, all columns share: dropout masks and sampled labels. Cut here, because
    # what vmap itself does to share it between chunks does not compile.
    mapped = torch.vmap(function, randomness="same")
    names = list(vectors)
    cut = zip(*(vectors[k].split(chunk_size) for k in names), strict=True)
    parts = [mapped(dict(zip(names, columns, strict=True))) for columns in cut]
    # Each name's pieces are let go before the next one's are joined.
    return {k: torch.cat([part.pop(k) for part in parts]) for k in list(parts[0])}


def wide_dot(x: Params, y: Params) -> Tensor:
    """The inner product of two vectors, a 0-d tensor, summed :func:`wide`."""
    return torch.stack([(x[k] * y[k]).sum(dtype=wide_dtype(x[k])) for k in x]).sum()


def by_layer(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameter names by the module they belong to, in order; a parameter of the root stands alone.

    ``{"0": ["0.weight", "0.bias"], ...}``.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return groups


def partition_of(params: Params, by: Partition) -> dict[str, list[str]]:
    """Parameter names by label; see :meth:`Operator.blocks`.

    Raises:
        ValueError: a parameter is missing, unknown or in two blocks.
    """
    if by == "layer":
        return by_layer(list(params))
    if by == "tensor":
        return {k: [k] for k in params}
    if not isinstance(by, Mapping):
        msg = f"by must be 'layer', 'tensor' or a mapping from labels to names, not {by!r}"
        raise ValueError(msg)
    names = [k for group in by.values() for k in group]
    if sorted(names) != sorted(params):
        missing = sorted(params.keys() - set(names))
        twice = sorted({k for k in names if names.count(k) > 1} | (set(names) - params.keys()))
        msg = f"the blocks leave out {missing or 'none'}, repeat or do not know {twice or 'none'}"
        raise ValueError(msg)
    return {label: list(group) for label, group in by.items()}
