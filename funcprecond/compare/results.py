"""What the result of a finished cell contains, so that a damaged results file is noticed."""

import math
from collections.abc import Mapping
from typing import Any

POINTS = 30  # of a training curve, about; each is the mean loss since the previous one
STATUSES = ("ok", "diverged", "failed")
TIMES = ("step_ms", "sgd_step_ms", "time_ratio")
# None stands for what the device does not report.
MEMORY = ("peak_bytes", "sgd_peak_bytes", "memory_ratio")
SPLITS = ("validation", "test")


def is_complete(config: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a result has all entries that the report needs, with values of the right types.

    Args:
        config: the configuration of the cell, see :meth:`funcprecond.compare.plan.Setting.config`.
        result: what was read from the file, see :func:`funcprecond.compare.train.train` and
            :func:`funcprecond.compare.measure.cost`.
    """
    warnings = result.get("warnings", [])
    if result.get("status") not in STATUSES or not isinstance(warnings, list):
        return False
    if not all(map(is_text, warnings)):
        return False
    if config.get("kind") == "train" and not (
        is_number(config.get("learning_rate")) and type(config.get("seed")) is int
    ):
        return False
    if result["status"] != "ok":
        return is_text(result.get("why"))
    if config.get("kind") == "cost":
        return all(is_number(result.get(name)) and result[name] > 0 for name in TIMES) and all(
            result.get(name) is None or is_number(result[name]) for name in MEMORY
        )
    if config.get("kind") == "train":
        return all(map(is_evaluation, (result.get(name) for name in SPLITS))) and is_curve(
            result.get("curve"), config.get("steps")
        )
    return True


def is_evaluation(value: Any) -> bool:
    """Whether a value has the accuracy and the loss on a split."""
    return isinstance(value, dict) and all(is_number(value.get(k)) for k in ("accuracy", "loss"))


def is_curve(value: Any, steps: Any) -> bool:
    """Whether a value is a training curve that ends with the last step."""
    if not isinstance(value, dict):
        return False
    lists: list[Any] = [value.get(name) for name in ("step", "seconds", "loss")]
    if not all(isinstance(x, list) and x and all(map(is_number, x)) for x in lists):
        return False
    if type(steps) is not int or len({len(x) for x in lists}) != 1:
        return False
    return lists[0] == points(steps)


def points(steps: int) -> list[int]:
    """The steps at which a training run of this length has a point of its curve."""
    every = max(1, steps // POINTS)
    regular = list(range(every, steps + 1, every))
    return regular if steps % every == 0 else [*regular, steps]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not a truth value."""
    return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written to a file."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
