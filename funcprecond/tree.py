"""Trees of tensors: immutable states, and maps over them.

A *tree* is a nest of dicts, tuples, lists and classes made by :func:`state`, with tensors as
leaves. All data in funcprecond are trees, so ``torch.func.vmap``, ``torch.compile`` and the collate
functions of ``torch.utils.data`` treat a K-FAC state like any other argument. This is the only file
that uses torch's pytree registry.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = [
    "Buffers",
    "Params",
    "broadcast_prefix",
    "flatten",
    "floating",
    "leaves",
    "leaves_by_path",
    "map",
    "map_by_path",
    "see_inside",
    "state",
    "static",
    "unflatten",
    "with_floating",
    "write_over",
]

T = TypeVar("T")
Params = dict[str, Tensor]
Buffers = dict[str, Tensor]


def static(**kwargs: Any) -> Any:
    """Declare a field of a :func:`state` class that belongs to the structure and is not a leaf.

    Its value must be hashable, such as a name, a flag, a shape or a frozen configuration.

    Args:
        **kwargs: the arguments of :func:`dataclasses.field`, such as ``default``.

    Returns:
        The field, for the body of the class.

    Example:
        >>> import torch, funcprecond as fp
        >>> @fp.tree.state
        ... class Named:
        ...     value: torch.Tensor
        ...     name: str = fp.tree.static(default="x")
        >>> fp.tree.leaves(Named(torch.ones(2)))
        [tensor([1., 1.])]
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def state(cls: type[T]) -> type[T]:
    """Turn a class into an immutable dataclass that is a tree.

    Its fields are the children of the tree, except for the :func:`static` fields, which belong to
    the structure. The class must not validate its fields in ``__post_init__``, because transforms
    rebuild it with placeholders as leaves.

    Args:
        cls: a class with annotated fields.

    Returns:
        The dataclass, registered with torch.

    Example:
        >>> import torch, funcprecond as fp
        >>> @fp.tree.state
        ... class Mean:
        ...     total: torch.Tensor
        ...     count: torch.Tensor
        >>> stacked = Mean(torch.ones(3, 2), torch.ones(3))
        >>> torch.vmap(lambda mean: mean.total / mean.count)(stacked).shape
        torch.Size([3, 2])
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


def see_inside(tree: Any) -> None:
    """Let torch see the tensors inside the dataclasses and the dicts of other types in a tree.

    Torch takes an object of an unknown class for a leaf, so that nothing would find the tensors in
    it. Here such a class is made known to torch, as those of :func:`state` are, if it is a
    dataclass, or a subclass of ``dict`` or ``collections.UserDict`` (as the ``BatchEncoding`` of
    transformers is). A class becomes known at the first object that has tensors, and stays so.

    Args:
        tree: the inputs or the outputs of a model.

    Example:
        >>> import dataclasses, torch, funcprecond as fp
        >>> @dataclasses.dataclass
        ... class Output:
        ...     logits: torch.Tensor
        ...     cache: object = None
        >>> output = Output(torch.zeros(2))
        >>> fp.tree.see_inside(output)
        >>> fp.tree.floating(output)
        [tensor([0., 0.])]
    """
    # The plain cases first, because this is called for each run of a model.
    if isinstance(tree, Tensor) or torch.compiler.is_compiling():
        return
    for leaf in leaves(tree):
        if not isinstance(leaf, Tensor) and (parts := _parts(leaf)) is not None:
            values = [value for part in parts for value in part.values()]
            see_inside(values)
            if any(isinstance(x, Tensor) for x in leaves(values)):
                _make_known(type(leaf))


def _parts(x: Any) -> tuple[dict, dict] | None:
    """The items and the attributes of an object whose inside can be seen; None for any other."""
    if isinstance(x, (type, torch.nn.Module)):
        return None
    attributes = getattr(x, "__dict__", {})
    if isinstance(x, collections.UserDict):
        return dict(x.data), {k: v for k, v in attributes.items() if k != "data"}
    if isinstance(x, dict):
        # The attributes of some dicts are their items.
        return dict(x), {} if attributes is x else dict(attributes)
    if not dataclasses.is_dataclass(x):
        return None
    fields = [f.name for f in dataclasses.fields(x) if hasattr(x, f.name)]
    return {}, {**{k: getattr(x, k) for k in fields}, **attributes}


def _make_known(cls: type) -> None:
    """Register a class whose objects have :func:`_parts`; they are rebuilt without ``__init__``."""

    def flatten(node):
        items, attributes = _parts(node)  # pyright: ignore[reportGeneralTypeIssues]
        own = getattr(node, "__dict__", None) is node
        return [*items.values(), *attributes.values()], (tuple(items), tuple(attributes), own)

    def unflatten(values, context):
        keys, names, own = context
        values = list(values)
        node: Any = cls.__new__(cls) if issubclass(cls, dict) else object.__new__(cls)
        items = dict(zip(keys, values[: len(keys)], strict=True))
        if isinstance(node, collections.UserDict):
            node.data = items
        elif isinstance(node, dict):
            dict.update(node, items)
        if own:
            node.__dict__ = node  # pyright: ignore[reportAttributeAccessIssue]
        for name, value in zip(names, values[len(keys) :], strict=True):
            object.__setattr__(node, name, value)
        return node

    def flatten_with_keys(node):
        values, context = flatten(node)
        keys = [pytree.MappingKey(k) for k in context[0]]
        keys += [pytree.GetAttrKey(k) for k in context[1]]
        return list(zip(keys, values, strict=True)), context

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,  # pyright: ignore[reportArgumentType]
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def floating(tree: Any) -> list[Tensor]:
    """The leaves of a tree that are floating-point (or complex) tensors, which have derivatives.

    Args:
        tree: any tree, such as the outputs of a model, which may also contain counts or None.

    Returns:
        These leaves, in the order of the tree.

    Example:
        >>> import torch, funcprecond as fp
        >>> len(fp.tree.floating({"logits": torch.ones(2), "best": torch.tensor(1), "cache": None}))
        1
    """
    if isinstance(tree, Tensor):
        return [tree] if _has_derivative(tree) else []
    return [x for x in leaves(tree) if _has_derivative(x)]


def with_floating(tree: Any, tensors: Iterable[Any]) -> Any:
    """A tree with other values in the place of its :func:`floating` leaves.

    Args:
        tree: the tree.
        tensors: the values, in the order of the leaves.

    Returns:
        The new tree. Its other leaves are those of ``tree``.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.tree.with_floating({"logits": torch.ones(2), "cache": None}, [torch.zeros(1)])
        {'logits': tensor([0.]), 'cache': None}
    """
    rest = iter(tensors)
    if isinstance(tree, Tensor):
        return next(rest) if _has_derivative(tree) else tree
    return map(lambda x: next(rest) if _has_derivative(x) else x, tree)


def _has_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


map = pytree.tree_map
leaves = pytree.tree_leaves
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten


def broadcast_prefix(prefix: Any, tree: Any) -> list[Any] | None:
    """The leaves of a tree whose structure is a prefix of another's, one for each leaf of that.

    Args:
        prefix: the smaller tree. Each of its leaves stands for all leaves below it.
        tree: the larger tree.

    Returns:
        The leaves, or None if the structures do not fit.

    Example:
        >>> import funcprecond as fp
        >>> fp.tree.broadcast_prefix((0, None), ({"a": 1, "b": 2}, 3))
        [0, 0, None]
    """
    return pytree._broadcast_to_and_flatten(prefix, flatten(tree)[1])


def leaves_by_path(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    """List the leaves with their readable paths, such as ``"factor.left.fc.weight"``.

    Args:
        tree: any tree.
        is_leaf: a function ``node -> bool`` that selects nodes to be leaves besides the usual ones.

    Returns:
        Pairs of a path and a leaf, in the order of :data:`leaves`.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.tree.leaves_by_path({"w": torch.zeros(1), "layers": (torch.ones(1),)})
        [('w', tensor([0.])), ('layers.0', tensor([1.]))]
    """
    found, _ = pytree.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(_path(keys), leaf) for keys, leaf in found]


def map_by_path(function: Any, tree: Any, is_leaf: Any = None) -> Any:
    """Replace each leaf of a tree with ``function(path, leaf)``.

    Args:
        function: a function of a path, as in :func:`leaves_by_path`, and a leaf.
        tree: any tree.
        is_leaf: see :func:`leaves_by_path`.

    Returns:
        A tree with the same structure.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.tree.map_by_path(lambda path, x: path, {"a": (torch.ones(1), torch.ones(1))})
        {'a': ('a.0', 'a.1')}
    """
    return pytree.tree_map_with_path(
        lambda keys, leaf: function(_path(keys), leaf), tree, is_leaf=is_leaf
    )


def write_over(old: T, new: T) -> T:
    """Copy the values of ``new`` into the tensors of ``old``, and return these tensors.

    This is the only function of this module that changes its arguments. A 0-d tensor is not
    changed, and the new one is returned in its place, because a function compiled by torch 2.13
    loses what is written into a 0-d float64 argument.

    Args:
        old: the tree to write into.
        new: the tree of values.

    Returns:
        The tree of the tensors of ``old``. If the two trees differ in structure, shapes or dtypes,
        then nothing is changed and ``new`` is returned.

    Example:
        >>> import torch, funcprecond as fp
        >>> old = {"w": torch.zeros(2)}
        >>> kept = fp.tree.write_over(old, {"w": torch.ones(2)})
        >>> kept["w"] is old["w"], old["w"]
        (True, tensor([1., 1.]))
    """
    ours, structure = flatten(old)
    theirs, other = flatten(new)
    alike = structure == other and all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True)
    )
    if not alike:
        return new
    # All values are copied before any tensor is written into, because one may be a view of another.
    pairs = [(a, b if a is b else _copied(b)) for a, b in zip(ours, theirs, strict=True)]
    return unflatten([a.copy_(b) if a.ndim and a is not b else b for a, b in pairs], structure)


def _copied(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # Torch's compiler drops a clone, and reads the argument after something was written there.
        return torch.where(x.new_ones((), dtype=torch.bool), x, 0)
    return x.clone()


def _path(keys: Any) -> str:
    return ".".join(_key_name(k) for k in keys)


def _key_name(key: Any) -> str:
    if isinstance(key, pytree.GetAttrKey):
        return key.name
    return str(key.key if isinstance(key, pytree.MappingKey) else key.idx)
