"""Finished cells, in one file that a crash cannot damage and another process cannot share."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 1


class StoreError(RuntimeError):
    """The results file cannot be used; the message says why and what to do."""


def key(config: Mapping[str, Any]) -> str:
    """A cell's name: a digest of its full configuration, whatever the order of its entries."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None, since JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


class Store:
    """Cells keyed by configuration in `results.json`; each `put` leaves a complete file behind.

    A damaged file is renamed to `results.damaged-<n>.json` and reported through `say`; cells of it
    that can still be read are kept.

    Args:
        folder: where `results.json` lies or will lie; made if missing.
        say: receives a sentence about anything unusual that was found.

    Raises:
        StoreError: the folder or the file cannot be read or written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / "results.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"Cannot make the folder {folder}: {error.strerror}; choose another --out."
            raise StoreError(message) from error
        self.cells = self._read(say)

    def get(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """Result of the cell with exactly this configuration, or None."""
        cell = self.cells.get(key(config))
        return None if cell is None else cell["result"]

    def variants(self, config: Mapping[str, Any], *names: str) -> dict[tuple, dict[str, Any]]:
        """Results of the cells whose configuration has these further entries beside `config`.

        Args:
            config: what the cells have in common.
            names: the further entries.

        Returns:
            The results by the values of the further entries.
        """
        found = {}
        for cell in self.cells.values():
            rest = {name: value for name, value in cell["config"].items() if name not in names}
            if rest == config and len(rest) + len(names) == len(cell["config"]):
                found[tuple(cell["config"][name] for name in names)] = cell["result"]
        return found

    def put(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a finished cell, and return its result as it is kept.

        On return it is on disk, whatever happens next.
        """
        kept = finite(result)
        self.cells[key(config)] = {
            "config": dict(config),
            "result": kept,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        replace_file(self.path, json.dumps({"schema": SCHEMA, "cells": self.cells}, indent=1))
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
            aside = set_aside(self.path)
            kept = (
                f"{len(cells)} of its cells can be read and are kept"
                if cells
                else "starting afresh"
            )
            say(f"{self.path} is damaged ({fault}). It was set aside as {aside.name}; {kept}.")
        return cells


def parse(content: bytes) -> tuple[dict[str, Any], str]:
    """Readable cells of a results file, and what is wrong with it ("" if nothing is)."""
    try:
        document = json.loads(content)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    if not isinstance(document, dict) or not isinstance(document.get("cells"), dict):
        return {}, 'no object "cells" in it'
    if document.get("schema") != SCHEMA:
        return {}, f"schema {document.get('schema')!r}, and this version reads {SCHEMA}"
    cells = {
        name: cell
        for name, cell in document["cells"].items()
        if isinstance(cell, dict)
        and isinstance(cell.get("config"), dict)
        and isinstance(cell.get("result"), dict)
        and "status" in cell["result"]
        and key(cell["config"]) == name
    }
    broken = len(document["cells"]) - len(cells)
    return cells, f"{broken} cells do not match their configuration" if broken else ""


def set_aside(path: Path) -> Path:
    """Rename `results.json` to the first free `results.damaged-<n>.json`, and return that path."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    return aside


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader or a crash ever sees the old or the new one whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends.

    Raises:
        StoreError: another comparison is writing there, or the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        message = f"Cannot write to the folder {folder}: {error.strerror}; choose another --out."
        raise StoreError(message) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = (
                f"Another comparison is writing to {folder}; wait for it or choose another --out."
            )
            raise StoreError(message) from error
        for orphan in folder.glob(".results.json-*"):  # left by a process killed while writing
            orphan.unlink(missing_ok=True)
        yield
