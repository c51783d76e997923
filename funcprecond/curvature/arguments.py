"""The one form of all products: of a function of the parameters, or of a problem on a batch."""

from typing import Any

from funcprecond.problems import Problem

__all__ = ["batch_and_vector"]


def batch_and_vector(name: str, f: Any, rest: tuple[Any, ...]) -> tuple[Any, Any]:
    """What follows ``(f, params, ...)``: ``vector`` for a function, ``batch, vector`` for a problem.

    Args:
        name: the function's, for the error.
        f: a :class:`funcprecond.Problem` or a function.
        rest: the arguments after ``params``.

    Returns:
        The batch, None for a function, and the vector.

    Raises:
        TypeError: there are too few or too many arguments.
    """
    of_problem = isinstance(f, Problem)
    if len(rest) != (2 if of_problem else 1):
        form = "problem, params, batch, vector" if of_problem else "f, params, vector"
        msg = f"the form is {name}({form}); {2 + len(rest)} arguments were given"
        raise TypeError(msg)
    return (rest[0], rest[1]) if of_problem else (None, rest[0])
