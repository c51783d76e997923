"""The file of finished cells, which survives crashes and is used by one process at a time."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from funcprecond.checkpoint import replacing
from funcprecond.compare.results import is_complete

SCHEMA = 1


class StoreError(RuntimeError):
    """The results file cannot be used; the message says why, and what to do about it."""


def key(config: Mapping[str, Any]) -> str:
    """The key of a cell: a digest of its configuration, independent of the order of the entries."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def finite(value: Any) -> Any:
    """The value with each NaN and infinity replaced by None, because JSON cannot store them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


class Store:
    """The cells in `results.json`, by configuration; each `put` writes a complete file.

    A damaged file is renamed to `results.damaged-<n>.json`, and its readable cells are kept.

    Args:
        folder: the folder of `results.json`, which is created if it does not exist.
        say: a function that receives a message if the file is damaged.

    Raises:
        StoreError: the folder cannot be created, or the file cannot be read.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / "results.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        self.cells = self._read(say)

    def get(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of the cell with exactly this configuration, or None."""
        cell = self.cells.get(key(config))
        return None if cell is None else cell["result"]

    def variants(self, config: Mapping[str, Any], *names: str) -> dict[tuple, dict[str, Any]]:
        """The results of all cells that have a common configuration and differ in some entries.

        Args:
            config: the common configuration.
            names: the names of the entries that the cells have in addition to it.

        Returns:
            The results by the values of these entries.
        """
        found = {}
        for cell in self.cells.values():
            rest = {name: value for name, value in cell["config"].items() if name not in names}
            if rest == config and len(rest) + len(names) == len(cell["config"]):
                found[tuple(cell["config"][name] for name in names)] = cell["result"]
        return found

    def put(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Store a finished cell; when this method returns, it is on disk.

        Args:
            config: the configuration of the cell.
            result: its result.

        Returns:
            The result as it is stored.

        Raises:
            StoreError: the file cannot be written, for example because the disk is full.
        """
        kept = finite(result)
        self.cells[key(config)] = {
            "config": dict(config),
            "result": kept,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            replace_file(self.path, json.dumps({"schema": SCHEMA, "cells": self.cells}, indent=1))
        except OSError as error:
            raise unwritable(self.path, error) from error
        return kept

    def _read(self, say: Callable[[str], None]) -> dict[str, Any]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            message = f"Cannot read {self.path}: {error.strerror}; choose another --out."
            raise StoreError(message) from error
        cells, fault = parse(content)
        if fault:
            try:
                aside = set_aside(self.path)
            except OSError as error:
                raise unwritable(self.path, error) from error
            kept = (
                f"{len(cells)} of its cells can be read and are kept"
                if cells
                else "none of its cells can be read"
            )
            say(f"{self.path} is damaged ({fault}). It was renamed to {aside.name}; {kept}.")
        return cells


def parse(content: bytes) -> tuple[dict[str, Any], str]:
    """The readable cells of a results file, and a description of its damage ("" for none)."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        return {}, f"it is not JSON: {error}"
    if not isinstance(document, dict) or not isinstance(document.get("cells"), dict):
        return {}, 'it has no object "cells"'
    if document.get("schema") != SCHEMA:
        return {}, f"it has schema {document.get('schema')!r}, but this version reads {SCHEMA}"
    cells = {
        name: cell
        for name, cell in document["cells"].items()
        if isinstance(cell, dict)
        and isinstance(cell.get("config"), dict)
        and isinstance(cell.get("result"), dict)
        and is_complete(cell["config"], cell["result"])
        and key(cell["config"]) == name
    }
    broken = len(document["cells"]) - len(cells)
    return cells, f"{broken} cells are incomplete or changed" if broken else ""


def unwritable(path: Path, error: OSError) -> StoreError:
    """The error for a file or folder of the comparison that cannot be written."""
    return StoreError(
        f"Cannot write to {path}: {error.strerror or error}. Make room there or choose another "
        "--out; the same command continues from the finished cells that are stored."
    )


def set_aside(path: Path) -> Path:
    """Rename `results.json` to the first unused `results.damaged-<n>.json`; return that path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash, either the old or the new file is complete."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; the system releases the lock when the process ends.

    Raises:
        StoreError: another comparison holds the lock, or the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = (
                f"Another comparison is writing to {folder}; wait until it has finished, or choose "
                "another --out."
            )
            raise StoreError(message) from error
        for orphan in folder.glob(".results.json-*"):  # left by a process killed while writing
            orphan.unlink(missing_ok=True)
        yield
