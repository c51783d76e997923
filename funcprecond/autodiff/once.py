"""Properties that are computed once, and parameters that a compiler does not guard on."""

from collections.abc import Callable

from funcprecond.tree import Params

__all__ = ["opened_once", "renamed"]


def opened_once(method: Callable) -> property:
    """A property computed at its first use; functools' has a lock, which compilers cannot trace."""
    name = f"_{method.__name__}_value"

    def get(self):
        if name not in self.__dict__:
            setattr(self, name, method(self))
        return getattr(self, name)

    def forget(self):
        self.__dict__.pop(name, None)

    return property(get, fdel=forget, doc=method.__doc__)


def renamed(params: Params) -> Params:
    """The same values as tensors made here, whose identities a compiler does not guard on."""
    return {k: p.view_as(p) for k, p in params.items()}
