"""Every method as a ``torch.optim.Optimizer``, for a training loop or a trainer that has one.

One line changes in a loop of torch, Lightning, Accelerate or the ``Trainer`` of transformers::

    opt = fp.optim.CASPR(model.parameters(), lr=0.02, weight_decay=0.01)

The classes are generated from the table of methods: ``CASPR``, ``KFAC``, ``SOAP``, ``LBFGS``,
``HessianFree``, and so on; ``fp.optim.CLASSES`` has them by the names of their builders. They
compute what the functional loop computes, bit for bit.
"""

import importlib
import pkgutil

from funcprecond import methods
from funcprecond.methods.card import CARDS
from funcprecond.optim.generated import class_name, optimizer_class
from funcprecond.optim.model_optimizer import ModelOptimizer
from funcprecond.optim.optimizer import MethodOptimizer
from funcprecond.optim.torchopt import (
    GradientTransformation,
    apply_updates,
    gradient_transformation,
)

# A method has a card as soon as its module is imported.
for _module in pkgutil.iter_modules(methods.__path__):
    importlib.import_module(f"{methods.__name__}.{_module.name}")

CLASSES: dict[str, type[MethodOptimizer]] = {k: optimizer_class(c) for k, c in CARDS.items()}
"""The optimizers by the names of the builders, such as "kfac"."""

globals().update({cls.__name__: cls for cls in CLASSES.values()})

__all__ = ["CLASSES", "MethodOptimizer", "ModelOptimizer", "class_name"]
__all__ += ["GradientTransformation", "apply_updates", "gradient_transformation"]
__all__ += [cls.__name__ for cls in CLASSES.values()]


def __getattr__(name: str) -> type[MethodOptimizer]:
    alike = [cls.__name__ for cls in CLASSES.values() if cls.__name__.lower() == name.lower()]
    meant = f", but {alike[0]}" if alike else f"; it has {', '.join(sorted(__all__))}"
    msg = f"funcprecond.optim has no {name}{meant}"
    raise AttributeError(msg)
