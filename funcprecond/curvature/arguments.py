"""The arguments of all products, for a function of the parameters or for a problem on a batch."""

from typing import Any

from funcprecond.problems import Problem

__all__ = ["batch_and_vector"]


def batch_and_vector(name: str, f: Any, rest: tuple[Any, ...]) -> tuple[Any, Any]:
    """Split the arguments after ``(f, params)`` of a product into the batch and the vector.

    They are ``vector`` for a function, and ``batch, vector`` for a problem.

    Args:
        name: the name of the product's function, for the error message.
        f: a :class:`funcprecond.Problem` or a function.
        rest: the positional arguments after ``params``.

    Returns:
        The batch, which is None for a function, and the vector.

    Raises:
        TypeError: there are too few or too many arguments.
    """
    of_problem = isinstance(f, Problem)
    if len(rest) != (2 if of_problem else 1):
        form = "problem, params, batch, vector" if of_problem else "f, params, vector"
        msg = (
            f"{name} was called with {2 + len(rest)} positional arguments: call it as "
            f"{name}({form})"
        )
        raise TypeError(msg)
    return (rest[0], rest[1]) if of_problem else (None, rest[0])
