"""Properties that are computed only once, and parameters that a compiler does not guard on."""

from collections.abc import Callable

from funcprecond.tree import Params

__all__ = ["opened_once", "renamed"]


def opened_once(method: Callable) -> property:
    """Decorate a method, which becomes a property that is computed at its first use and kept.

    It replaces ``functools.cached_property``, whose lock compilers cannot trace. ``del`` forgets
    the value.
    """
    name = f"_{method.__name__}_value"

    def get(self):
        if name not in self.__dict__:
            setattr(self, name, method(self))
        return getattr(self, name)

    def forget(self):
        self.__dict__.pop(name, None)

    return property(get, fdel=forget, doc=method.__doc__)


def renamed(params: Params) -> Params:
    """Return views of the parameters, on whose identities a compiler does not guard."""
    return {k: p.view_as(p) for k, p in params.items()}
