"""Saving and resuming a run: a flat format for trees of tensors, and files in this format."""

import contextlib
import errno
import hashlib
import itertools
import os
import secrets
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from funcprecond import tree as trees
from funcprecond.tree import leaves_by_path, map_by_path

__all__ = ["from_dict", "load", "replacing", "save", "to_dict"]

T = TypeVar("T")
_SEAL = b"funcprecond sha256 "


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
    A state class can then check with a method ``check_restored()`` whether what it took fits.

    Args:
        like: a tree with the expected structure, shapes, dtypes and devices.
        flat: tensors by path, from :func:`to_dict`.

    Returns:
        A tree with the structure of ``like`` and the tensors of ``flat``, on the devices of
        ``like``. The device "meta" has no memory: where ``like`` is there, the tensors stay on the
        device that they are on.

    Raises:
        KeyError: some paths are missing from ``flat``, or do not occur in ``like``. The message
            lists both.
        ValueError: a tensor of ``flat`` differs in shape or dtype from the one in ``like``, or is
            whole where that one is distributed; or the state of a layer does not fit the parameters
            of ``like``.

    Example:
        >>> import torch, funcprecond as fp
        >>> flat = fp.to_dict({"w": torch.ones(2)})
        >>> fp.from_dict({"w": torch.zeros(2)}, flat)
        {'w': tensor([1., 1.])}
    """
    expected = to_dict(like)
    found: dict[str, dict[str, Tensor]] = {
        path: {} for path, leaf in leaves_by_path(like, _is_empty) if _is_empty(leaf)
    }
    beside = {path: _nearest(path, expected) for path in found}
    unknown = []
    for name in (k for k in flat if k not in expected):
        paths = [p for p in found if not p or name.startswith(f"{p}.")]
        if paths:
            path = max(paths, key=len)
            key = name.removeprefix(f"{path}.") if path else name
            found[path][key] = _moved(flat[name], beside[path])
        else:
            unknown.append(name)
    missing = expected.keys() - flat.keys()
    if missing or unknown:
        msg = (
            f"the saved tree does not fit the expected one: missing {_listed(missing)}, unknown "
            f"{_listed(unknown)}; pass a tree of the same model and method as like="
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
        if hasattr(tensor, "full_tensor") and not hasattr(saved, "full_tensor"):
            msg = (
                f"{path!r} is a whole tensor, but a DTensor is expected: pass whole tensors as "
                "like=, and distribute the result with torch.distributed.tensor.distribute_tensor"
            )
            raise ValueError(msg)
    restored = map_by_path(
        lambda path, leaf: found[path] if _is_empty(leaf) else _moved(flat[path], leaf),
        like,
        _is_empty,
    )
    for node in _nodes(restored):
        if hasattr(node, "check_restored"):
            node.check_restored()
    return restored


def save(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree of tensors to a file; read it with :func:`load`.

    The file appears when it is complete and on disk. Until then, and after any error, the old file
    is there. Several processes may save to one path: the last one wins. The file ends with its
    SHA-256 checksum, and ``torch.load(path, weights_only=True)`` reads it too.

    To resume a run bit for bit, save everything that it depends on, for example
    ``{"params": params, "state": state, "generator": generator.get_state()}``.

    Args:
        path: the file to write. Its folder must exist.
        tree: a tree of tensors.

    Raises:
        TypeError: a leaf is not a tensor, or is one that contains other tensors, such as a DTensor,
            of which each process has a part only.
        ValueError: a tensor is on the device "meta", or two leaves have the same path.
        OSError: the file cannot be written, for example because the disk is full.

    Example:
        >>> import pathlib, tempfile, torch, funcprecond as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.pt"
        ...     fp.save(path, {"params": {"w": torch.ones(2)}})
        ...     fp.load(path, {"params": {"w": torch.zeros(2)}})
        {'params': {'w': tensor([1., 1.])}}
    """
    flat = to_dict(tree)
    for name, x in flat.items():
        _check_whole(name, x)
    # Cloned, because torch.save writes the whole storage of a view.
    flat = {name: x.detach().as_subclass(Tensor).clone() for name, x in flat.items()}
    try:
        with replacing(path) as file:
            sealed = _Sealed(file)
            torch.save(flat, sealed)  # pyright: ignore[reportArgumentType]
            sealed.close()
    except NotImplementedError as error:
        msg = "a tensor of the tree has no memory of its own: save outside of torch.func transforms"
        raise TypeError(msg) from error
    except (OSError, RuntimeError) as error:
        # torch's writer reports the error of the file as its own.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        msg = (
            f"the tree was not saved ({cause.strerror}), and no file was changed: choose a file in "
            "an existing folder that has space and may be written"
        )
        raise OSError(cause.errno, msg, os.fspath(path)) from error


def load(path: str | os.PathLike, like: T) -> T:
    """Read a tree that :func:`save` wrote.

    The checksum of the file is verified first, so that a damaged file is refused. This reads the
    file a second time. Files of older versions of funcprecond, and dicts of tensors from
    ``torch.save``, have checksums of their tensors only.

    Args:
        path: the file to read.
        like: a tree with the expected structure, shapes, dtypes and devices, such as
            ``{"params": problem.params, "state": opt.init(problem.params)}``.

    Returns:
        The restored tree, on the devices of ``like``; see :func:`from_dict`.

    Raises:
        OSError: the file does not exist, or cannot be opened.
        ValueError: the file is empty, cut off, damaged, or not one that :func:`save` wrote.
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
    with open(path, "rb") as file:
        fault = _damage(file)
        flat: Any = None
        if not fault:
            file.seek(0)
            try:
                flat = torch.load(file, weights_only=True, map_location="cpu")
            except MemoryError:
                raise
            except Exception as error:
                fault = f"contains something that is not a tensor ({_first_line(error)})"
        if not fault and not isinstance(flat, dict):
            fault = f"contains a {type(flat).__name__}, not tensors by name"
        for name, x in flat.items() if not fault else ():
            if not isinstance(name, str) or not isinstance(x, Tensor) or x.is_meta:
                kind = "tensor without memory" if isinstance(x, Tensor) else type(x).__name__
                fault = f"contains a {kind} under the name {name!r}, not a tensor"
                break
    if fault:
        msg = f"{os.fspath(path)} {fault}: pass an intact file that fp.save wrote"
        raise ValueError(msg)
    try:
        return from_dict(like, flat)
    except (KeyError, ValueError) as error:
        msg = f"{os.fspath(path)}: {error.args[0]}"
        raise type(error)(msg) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` at the end of a ``with`` block.

    It is written under a name of its own in the same folder, and renamed when it is on disk. So
    every reader finds a complete file, whether old or new, after a crash too. A process that is
    killed while it writes leaves a hidden file that ends in ``.partial``.

    Args:
        path: the file to replace or to make. If it is a link, then the file that it points to.

    Yields:
        The file, open for writing.

    Raises:
        OSError: the file cannot be written. Nothing is left of it.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "a.txt"
        ...     with replacing(path) as file:
        ...         written = file.write(b"text")
        ...     path.read_text()
        'text'
    """
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    folder, name = os.path.split(target)
    # Opened as any file is, so that it gets the permissions of this process's new files.
    partial = os.path.join(folder, f".{name[:40]}-{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    # The new name is on disk when its folder is. Not every file system can say so.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Sealed:
    """A zip file for writing that ends with the digest of its bytes, in the comment of the file.

    The checksums that every zip file has do not cover its directory, so that damage there can give
    one tensor the values of another.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Write the comment. Its length stands in the two bytes in front of it, which were 0."""
        seal = _SEAL + self.digest.hexdigest().encode()
        self.file.seek(-2, os.SEEK_END)
        self.file.write(len(seal).to_bytes(2, "little") + seal)


def _check_whole(name: str, x: Tensor) -> None:
    """Raise unless a tensor has its numbers in memory of its own."""
    if hasattr(x, "full_tensor"):
        msg = (
            f"{name!r} is a DTensor, of which this process has a part only: save what its "
            "full_tensor() returns, which all processes must call"
        )
        raise TypeError(msg)
    if not _has_memory(x):
        msg = (
            f"{name!r} is a {type(x).__name__} that contains other tensors; only plain tensors can "
            "be saved: convert it first"
        )
        raise TypeError(msg)
    if x.is_meta:
        msg = f"{name!r} is on the device 'meta', so that it has no values to save"
        raise ValueError(msg)


def _damage(file: BinaryIO) -> str:
    """Verify a file of :func:`save`, and say what is wrong ("" for nothing)."""
    start = file.read(4)
    if not start:
        return "is empty"
    length = len(_SEAL) + 2 * hashlib.sha256().digest_size
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - length, 0))
    seal = file.read()
    if seal.startswith(_SEAL):
        digest, left = hashlib.sha256(), size - length - 2
        file.seek(0)
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        digest.update(b"\0\0")
        intact = seal == _SEAL + digest.hexdigest().encode()
        return "" if intact else "is damaged (its checksum is wrong)"
    # A file of an older version, or of torch.save, has the checksums of its parts only.
    try:
        if not zipfile.is_zipfile(file):
            if start == b"PK\x03\x04":
                return "is cut off or damaged at its end"
            return f"has another format (it begins with the bytes {start!r})"
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except Exception as error:  # whatever damage makes of the directory
        return f"is damaged ({_first_line(error)})"
    return f"is damaged (the checksum of its part {wrong!r} is wrong)" if wrong else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _listed(names: Collection[str]) -> str:
    """The first names of a list, in order."""
    if not names:
        return "none"
    ordered = sorted(names)
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return f"{ordered[:10]}{more}"


def _has_memory(x: Tensor) -> bool:
    """Whether a tensor is of torch's own kind, rather than of a class that wraps other tensors."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__  # pyright: ignore


def _moved(x: Tensor, like: Tensor | None) -> Tensor:
    return x if like is None or (like.is_meta and _has_memory(like)) else x.to(like.device)


def _nearest(path: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The tensor with the longest common path, whose device an empty dict at ``path`` shares."""

    def shared(name: str) -> int:
        pairs = zip(path.split("."), name.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    name = max(tensors, key=shared, default=None)
    return None if name is None else tensors[name]


def _nodes(tree: Any) -> list[Any]:
    """All nodes of a tree: containers, states and leaves."""
    found = []

    def visit(node: Any) -> bool:
        found.append(node)
        return False

    trees.flatten(tree, is_leaf=visit)
    return found


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x
