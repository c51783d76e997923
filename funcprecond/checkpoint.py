"""Saving a run and going on with it: the flat format of a tree, and files that hold one."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcprecond.tree import leaves_by_path, map_by_path

__all__ = ["from_dict", "load", "save", "to_dict"]

T = TypeVar("T")


def to_dict(tree: Any) -> dict[str, Tensor]:
    """A flat dict of the tree's tensors by readable path, such as ``"factor.left.fc.weight"``.

    It is what ``torch.save(weights_only=True)``, safetensors and ``torch.distributed.checkpoint``
    take.

    Args:
        tree: a tree of tensors.

    Returns:
        The tensors by path; none is copied.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: two leaves have one path.

    Example:
        >>> import torch, funcprecond as fp
        >>> state = fp.adam().init({"w": torch.zeros(2)})
        >>> list(fp.to_dict(state))
        ['mean.w', 'second_moment.w', 'step']
    """
    flat: dict[str, Tensor] = {}
    for path, leaf in leaves_by_path(tree, _is_empty):
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

    Args:
        like: a tree with the structure, shapes, dtypes and devices that are expected.
        flat: tensors by path, from :func:`to_dict`.

    Returns:
        The restored tree.

    Raises:
        KeyError: names are missing from ``flat`` or unknown to ``like``; both are listed.
        ValueError: a tensor has another shape or dtype than in ``like``.
    """
    expected = to_dict(like)
    device = next((t.device for t in expected.values()), torch.device("cpu"))
    found: dict[str, dict[str, Tensor]] = {
        path: {} for path, leaf in leaves_by_path(like, _is_empty) if _is_empty(leaf)
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
    return map_by_path(
        lambda path, leaf: found[path] if _is_empty(leaf) else flat[path].to(leaf.device),
        like,
        _is_empty,
    )


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of tensors to a file, atomically; read it back with :func:`load`.

    Save all that a run needs to go on bit for bit, for example
    ``{"params": params, "state": state, "generator": generator.get_state()}``.

    Args:
        path: the file.
        tree: a tree of tensors.

    Raises:
        TypeError, ValueError: see :func:`to_dict`.
    """
    partial = f"{os.fspath(path)}.partial"
    # Views would drag their whole storage into the file.
    torch.save({k: v.detach().clone() for k, v in to_dict(tree).items()}, partial)
    os.replace(partial, path)


def load(path: str | os.PathLike, like: T) -> T:
    """Read a tree that :func:`save` wrote.

    Args:
        path: the file.
        like: a tree with the structure, shapes, dtypes and devices that are expected, such as
            ``{"params": problem.params, "state": opt.init(problem.params)}``.

    Returns:
        The restored tree.

    Raises:
        KeyError, ValueError: the file holds another tree, see :func:`from_dict`.
    """
    return from_dict(like, torch.load(path, weights_only=True, map_location="cpu"))


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x
