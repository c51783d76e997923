"""``C @ v`` under ``torch.compile``, which in torch 2.13 knows no ``@`` of a class but its own.

The compiler has a table of the binary operators that a class may define, in which ``+`` and ``*``
stand and ``@`` does not. This file enters it, which changes nothing for tensors. The table is
private; if a version of torch has none, or has the entry, nothing is done, and if ``@`` then does
not compile, ``C.matvec(v)`` and ``C.matmat(v)`` do. The compiler takes a second to import, so the
entry is made when somebody imports it.
"""

import importlib.abc
import importlib.util
import operator
import sys
from typing import Any

__all__ = ["install"]

MODULE = "torch._dynamo.variables.builtin"
ENTRY = (["__matmul__", "__rmatmul__", "__imatmul__"], operator.imatmul)


def install() -> None:
    """Enter ``@`` into the compiler's table, now or when the compiler is imported."""
    if MODULE in sys.modules:
        _enter(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(module: Any) -> None:
    builtin: Any = getattr(module, "BuiltinVariable", None)
    if not hasattr(builtin, "_binops") or not hasattr(builtin, "_binop_handlers"):
        return
    # The function is cached, so that its result can be extended.
    if builtin._binops() is builtin._binops():
        builtin._binops().setdefault(operator.matmul, ENTRY)
        builtin._binop_handlers.cache_clear()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the compiler's module, and leaves when it has been imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_enter(module: Any) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = then_enter
        return spec
