"""Reading the values of command-line options, with sentences for what is wrong."""

import argparse
import difflib
from collections.abc import Callable, Iterable

import torch


def names(text: str) -> list[str]:
    """Comma-separated names, each kept once, in order."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        message = "the list is empty; give comma-separated names"
        raise argparse.ArgumentTypeError(message)
    return found


def numbers(low: int) -> Callable[[str], list[int]]:
    """A parser of comma-separated whole numbers of at least `low`, each kept once, in order."""

    def parse(text: str) -> list[int]:
        try:
            found = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
        except ValueError:
            found = []
        if not found or min(found) < low:
            message = f"{text!r} is not a list of whole numbers of at least {low}, as in 1,10"
            raise argparse.ArgumentTypeError(message)
        return found

    return parse


def check_names(kind: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """See that every name is known.

    Raises:
        ValueError: a sentence that lists the valid names.
    """
    valid = list(valid)
    for name in given:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            message = f"There is no {kind} {name!r}{hint}; valid are: {', '.join(valid)}."
            raise ValueError(message)


def devices() -> list[str]:
    """Names of the devices that this machine has."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.cuda.device_count():
        found.insert(1, "cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def check_device(name: str) -> None:
    """See that the device exists.

    Raises:
        ValueError: a sentence that lists the devices of this machine.
    """
    check_names("device", [name], devices())
