"""Trees of tensors: immutable states, maps over them, and their one format on disk.

A *tree* is a nest of dicts, tuples, lists and classes made by :func:`state`, with tensors as
leaves. Everything funcprecond passes around is one, so ``torch.func.vmap``, ``torch.compile`` and
``torch.utils.data`` collate functions treat a K-FAC state like any other argument. This is the
only file that touches torch's pytree registry.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
Vector = dict[str, Tensor]

__all__ = [
    "add",
    "dot",
    "fill",
    "flatten",
    "from_dict",
    "in_transform",
    "leaves",
    "load",
    "map",
    "mul",
    "multi_tensor",
    "norm",
    "ravel",
    "save",
    "state",
    "static",
    "sub",
    "to_dict",
    "unflatten",
    "unravel",
    "write_over",
]


def static(**kwargs: Any) -> Any:
    """A field of a :func:`state` class that belongs to the structure and is not a leaf.

    Its value must be hashable: names, flags, shapes, frozen configurations.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def state(cls: type[T]) -> type[T]:
    """Make ``cls`` an immutable dataclass that is a tree: fields are children, static ones are not.

    Do not validate in ``__post_init__``: transforms rebuild the class with placeholders as leaves.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(node):
        return [getattr(node, n) for n in children], tuple(getattr(node, n) for n in statics)

    def flatten_with_keys(node):
        values, context = flatten(node)
        keys = [(pytree.GetAttrKey(n), v) for n, v in zip(children, values, strict=True)]
        return keys, context

    def unflatten(values, context):
        return cls(**dict(zip(children, values)), **dict(zip(statics, context)))  # noqa: B905

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,  # pyright: ignore[reportArgumentType]
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls


map = pytree.tree_map
leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten


def in_transform() -> bool:
    """Whether a ``torch.func`` transform is running the code that asks."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def multi_tensor(*values: Iterable[Any]) -> bool:
    """Whether torch's multi-tensor operations can take ``values``, and change results in place.

    Not in a ``torch.func`` transform, which has no rules for them; not where autograd records,
    which may keep a result for its backward pass; and not if there is no tensor.
    """
    if in_transform():
        return False
    tensors = [x for row in values for x in row if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return len(tensors) > 0 and not recorded


def write_over(old: T, new: T) -> T:
    """Copy the values of ``new`` into the tensors of ``old``, and return those.

    The one function here that changes a tensor it was given. It leaves 0-d tensors alone and
    returns the new ones: in torch 2.13 a compiled function loses what is written over a 0-d float64
    argument. If the two trees have not the same structure, shapes and dtypes, it changes nothing
    and returns ``new``.
    """
    ours, structure = flatten(old)
    theirs, other = flatten(new)
    alike = structure == other and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True)
    )
    if not alike:
        return new
    # All are copied before any is written over: one may be a view of another.
    pairs = [(a, b if a is b else b.clone()) for a, b in zip(ours, theirs, strict=True)]
    return unflatten([a.copy_(b) if a.ndim and a is not b else b for a, b in pairs], structure)


# --------------------------------------------------------------------- vectors shaped like params
def add(x: Vector, y: Vector, alpha: float | Tensor = 1.0) -> Vector:
    """``x + alpha * y`` over two dicts with the same keys."""
    if isinstance(alpha, Tensor):
        return {k: v + alpha * y[k] for k, v in x.items()}
    return _foreach("add", x, [y[k] for k in x], alpha=alpha)


def sub(x: Vector, y: Vector) -> Vector:
    """``x - y`` over two dicts with the same keys."""
    return _foreach("sub", x, [y[k] for k in x])


def mul(x: Vector, factor: float | Tensor) -> Vector:
    """``factor * x``; the factor is a float or a 0-d tensor."""
    return _foreach("mul", x, factor)


def _foreach(name: str, x: Vector, other: Any, **kwargs: Any) -> Vector:
    if not x:
        return {}
    tensors = list(x.values())
    if in_transform():
        # vmap has no rule for the multi-tensor operations.
        others = other if isinstance(other, list) else [other] * len(tensors)
        single = getattr(torch, name)
        values = [single(v, o, **kwargs) for v, o in zip(tensors, others, strict=True)]
    else:
        values = getattr(torch, f"_foreach_{name}")(tensors, other, **kwargs)
    return dict(zip(x, values, strict=True))


def cast(x: Vector, like: Vector) -> Vector:
    """``x`` in the keys, their order and the dtypes of ``like``; it may have more entries."""
    # Not ``to`` alone: in a small step even the calls that return their input would be felt.
    return {k: x[k] if x[k].dtype == v.dtype else x[k].to(v.dtype) for k, v in like.items()}


def fill(x: Vector, like: Vector) -> Vector:
    """``x`` with the keys and dtypes of ``like``, zero where it has no entry."""
    return {k: x[k].to(v.dtype) if k in x else torch.zeros_like(v) for k, v in like.items()}


def dot(x: Vector, y: Vector) -> Tensor:
    """The inner product over all entries, a 0-d tensor, accumulated in float32 or wider."""
    parts = [_lift(x[k]).reshape(-1).dot(_lift(y[k]).reshape(-1)) for k in x]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def norm(x: Vector) -> Tensor:
    """The Euclidean norm over all entries, a 0-d tensor."""
    return dot(x, x).sqrt()


def ravel(x: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector, in the order of the keys."""
    return torch.cat([v.reshape(-1) for v in x.values()]) if x else torch.zeros(0)


def unravel(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`ravel`: a dict of tensors shaped as in ``like``."""
    parts = vector.split([v.numel() for v in like.values()])
    return {k: p.reshape(v.shape) for (k, v), p in zip(like.items(), parts, strict=True)}


def _lift(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ------------------------------------------------------------------------------------- flat format
def to_dict(tree: Any) -> dict[str, Tensor]:
    """A flat dict of the tree's tensors by readable path, such as ``"factor.left.fc.weight"``.

    It is what ``torch.save(weights_only=True)``, safetensors and ``torch.distributed.checkpoint``
    take.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: two leaves have one path.
    """
    flat: dict[str, Tensor] = {}
    for path, leaf in _named(tree):
        if _is_empty(leaf):
            continue
        if not isinstance(leaf, Tensor):
            msg = f"{path!r} is a {type(leaf).__name__}; only tensors are saved: wrap it in one"
            raise TypeError(msg)
        if path in flat:
            msg = f"two leaves have the path {path!r}: rename one of the keys"
            raise ValueError(msg)
        flat[path] = leaf
    return flat


def from_dict(like: T, flat: Mapping[str, Tensor]) -> T:
    """The tree with the structure of ``like`` and the tensors of ``flat``, on ``like``'s devices.

    An empty dict in ``like`` takes whatever ``flat`` has under its path: the state of a method that
    learns its layers from the first batch is restored into its initial, empty one.

    Raises:
        KeyError: names are missing from ``flat`` or unknown to ``like``; both are listed.
        ValueError: a tensor has another shape or dtype than in ``like``.
    """
    expected = to_dict(like)
    device = next((t.device for t in expected.values()), torch.device("cpu"))
    found: dict[str, dict[str, Tensor]] = {
        path: {} for path, leaf in _named(like) if _is_empty(leaf)
    }
    unknown = []
    for name in (k for k in flat if k not in expected):
        path = next((p for p in found if name.startswith(f"{p}.")), None)
        if path is None:
            unknown.append(name)
        else:
            found[path][name.removeprefix(f"{path}.")] = flat[name].to(device)
    missing = sorted(expected.keys() - flat.keys())
    if missing or unknown:
        msg = (
            f"the saved tree does not fit: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )
        raise KeyError(msg)
    for path, tensor in expected.items():
        saved = flat[path]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            msg = (
                f"{path!r} was saved as {tuple(saved.shape)} {saved.dtype}, "
                f"but {tuple(tensor.shape)} {tensor.dtype} is expected here"
            )
            raise ValueError(msg)
    return pytree.tree_map_with_path(
        lambda keys, leaf: (
            found[_path(keys)] if _is_empty(leaf) else flat[_path(keys)].to(leaf.device)
        ),
        like,
        is_leaf=_is_empty,
    )


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of tensors to ``path``, atomically; read it back with :func:`load`.

    Save all that a run needs to go on bit for bit, for example
    ``{"params": params, "state": state, "generator": generator.get_state()}``.
    """
    partial = f"{os.fspath(path)}.partial"
    # Views would drag their whole storage into the file.
    torch.save({k: v.detach().clone() for k, v in to_dict(tree).items()}, partial)
    os.replace(partial, path)


def load(path: str | os.PathLike, like: T) -> T:
    """Read a tree that :func:`save` wrote; ``like`` gives the structure, shapes and devices.

    Raises:
        KeyError, ValueError: the file holds another tree, see :func:`from_dict`.
    """
    return from_dict(like, torch.load(path, weights_only=True, map_location="cpu"))


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves by path; an empty dict counts as one."""
    leaves_, _ = pytree.tree_flatten_with_path(tree, is_leaf=_is_empty)
    return [(_path(keys), leaf) for keys, leaf in leaves_]


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x


def _path(keys: Any) -> str:
    return ".".join(_key_name(k) for k in keys)


def _key_name(key: Any) -> str:
    if isinstance(key, pytree.GetAttrKey):
        return key.name
    return str(key.key if isinstance(key, pytree.MappingKey) else key.idx)
