"""Saving and resuming a run: a flat format for trees of tensors, and files in this format."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcprecond.tree import leaves_by_path, map_by_path

__all__ = ["from_dict", "load", "save", "to_dict"]

T = TypeVar("T")


def to_dict(tree: Any) -> dict[str, Tensor]:
    """Flatten a tree into a dict of its tensors by readable path.

    A path is a name such as ``"factor.left.fc.weight"``. The dict is in the format that
    ``torch.load(weights_only=True)``, safetensors and ``torch.distributed.checkpoint`` accept.

    Args:
        tree: a tree of tensors.

    Returns:
        The tensors by path. They are not copied.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: two leaves have the same path.

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
            msg = (
                f"{path!r} is a {type(leaf).__name__}; only tensors can be saved: wrap it in a "
                "tensor"
            )
            raise TypeError(msg)
        if path in flat:
            msg = f"two leaves have the same path {path!r}: rename one of the keys"
            raise ValueError(msg)
        flat[path] = leaf
    return flat


def from_dict(like: T, flat: Mapping[str, Tensor]) -> T:
    """Rebuild a tree from a flat dict of its tensors.

    An empty dict in ``like`` takes all tensors of ``flat`` under its path. So the state of a method
    that finds its layers on the first batch can be restored from its initial state, which is empty.

    Args:
        like: a tree with the expected structure, shapes, dtypes and devices.
        flat: tensors by path, from :func:`to_dict`.

    Returns:
        A tree with the structure of ``like`` and the tensors of ``flat``, on the devices of
        ``like``.

    Raises:
        KeyError: some paths are missing from ``flat``, or do not occur in ``like``. The message
            lists both.
        ValueError: a tensor of ``flat`` differs in shape or dtype from the one in ``like``.

    Example:
        >>> import torch, funcprecond as fp
        >>> flat = fp.to_dict({"w": torch.ones(2)})
        >>> fp.from_dict({"w": torch.zeros(2)}, flat)
        {'w': tensor([1., 1.])}
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
            f"the saved tree does not fit the expected one: missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}; pass a tree of the same model and method as like="
        )
        raise KeyError(msg)
    for path, tensor in expected.items():
        saved = flat[path]
        if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            msg = (
                f"{path!r} was saved with shape {tuple(saved.shape)} and dtype {saved.dtype}, but "
                f"shape {tuple(tensor.shape)} and dtype {tensor.dtype} are expected: pass a tree "
                "of the same model and method as like="
            )
            raise ValueError(msg)
    return map_by_path(
        lambda path, leaf: found[path] if _is_empty(leaf) else flat[path].to(leaf.device),
        like,
        _is_empty,
    )


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of tensors to a file, atomically; read it with :func:`load`.

    To resume a run bit for bit, save everything that it depends on, for example
    ``{"params": params, "state": state, "generator": generator.get_state()}``.

    Args:
        path: the file to write.
        tree: a tree of tensors.

    Raises:
        TypeError, ValueError: see :func:`to_dict`.

    Example:
        >>> import pathlib, tempfile, torch, funcprecond as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.pt"
        ...     fp.save(path, {"params": {"w": torch.ones(2)}})
        ...     fp.load(path, {"params": {"w": torch.zeros(2)}})
        {'params': {'w': tensor([1., 1.])}}
    """
    partial = f"{os.fspath(path)}.partial"
    # Cloned, because torch.save writes the whole storage of a view.
    torch.save({k: v.detach().clone() for k, v in to_dict(tree).items()}, partial)
    os.replace(partial, path)


def load(path: str | os.PathLike, like: T) -> T:
    """Read a tree that :func:`save` wrote.

    Args:
        path: the file to read.
        like: a tree with the expected structure, shapes, dtypes and devices, such as
            ``{"params": problem.params, "state": opt.init(problem.params)}``.

    Returns:
        The restored tree, on the devices of ``like``.

    Raises:
        KeyError, ValueError: the file contains a different tree, see :func:`from_dict`.

    Example:
        >>> import pathlib, tempfile, torch, funcprecond as fp
        >>> opt, params = fp.adam(), {"w": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.pt"
        ...     fp.save(path, opt.init(params))
        ...     state = fp.load(path, opt.init(params))
        >>> state.mean
        {'w': tensor([0., 0.])}
    """
    return from_dict(like, torch.load(path, weights_only=True, map_location="cpu"))


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x
