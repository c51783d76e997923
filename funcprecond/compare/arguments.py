"""The conversion and the checks of command-line options."""

import argparse
import difflib
from collections.abc import Callable, Iterable

import torch


def names(text: str) -> list[str]:
    """Convert comma-separated names to a list of distinct names, in the given order."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        message = "the list is empty; pass comma-separated names"
        raise argparse.ArgumentTypeError(message)
    return found


def numbers(low: int) -> Callable[[str], list[int]]:
    """A function that converts comma-separated integers to a list of distinct integers.

    Args:
        low: the smallest valid integer. The largest one is that of torch's seeds and sizes.
    """

    def parse(text: str) -> list[int]:
        try:
            found = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
        except ValueError:
            found = []
        if not found or min(found) < low or max(found) >= 2**63:
            message = (
                f"{text!r} is not a comma-separated list of integers of at least {low} and below "
                "2**63, such as 1,10"
            )
            raise argparse.ArgumentTypeError(message)
        return found

    return parse


def check_names(kind: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Check that every name is valid.

    Raises:
        ValueError: a name is not valid; the message lists the valid names.
    """
    valid = list(valid)
    for name in given:
        if name not in valid:
            close = difflib.get_close_matches(name, valid, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            message = f"There is no {kind} {name!r}{hint}; choose from: {', '.join(valid)}."
            raise ValueError(message)


def devices() -> list[str]:
    """The names of the devices of this machine."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.cuda.device_count():
        found.insert(1, "cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def check_device(name: str) -> None:
    """Check that the device exists.

    Raises:
        ValueError: it does not exist; the message lists the devices of this machine.
    """
    check_names("device", [name], devices())
