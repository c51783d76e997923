"""Every method as a ``torch.optim.Optimizer``, for a training loop or a trainer that has one.

One line changes in a loop of torch, Lightning, Accelerate or the ``Trainer`` of transformers::

    opt = fp.optim.CASPR(model.parameters(), lr=0.02, weight_decay=0.01)

The classes are generated from the table of methods: ``CASPR``, ``KFAC``, ``SOAP``, ``LBFGS``,
``HessianFree``, and so on; ``fp.optim.CLASSES`` has them by the names of their builders. They take
the options of the builders, and their steps are those of the functional loop, bit for bit::

    fp.chain(method, fp.momentum(momentum), fp.weight_decay(weight_decay), fp.scale(lr))

*Options.* Weight decay is decoupled: it is added to the direction, and not to the gradient.
Momentum and weight decay are off by default, except where they are a part of the method, as in
AdamW and Muon; a method with a running mean of its own takes no further momentum. Groups of
parameters may have any option of their own, schedulers may change each of them, and the learning
rate may be a tensor.

*Parameters without a gradient.* Where ``.grad`` is None, a parameter sits out the step, as in
torch: neither it nor its state changes, and its intervals do not count the step. This holds for all
methods; the history of L-BFGS is one of all parameters together, so that it refuses such a step. A
parameter that was frozen, or is added by ``add_param_group``, begins at its first gradient.

*Methods that need more than the gradient* get the model instead of its parameters. K-FAC, EKFAC,
KFLR and TNT measure the layers in the forward pass of a loop (``with opt.watch(): loss = ...``),
and the others evaluate a closure (``opt.step(closure)``), which every optimizer takes. They draw
from a generator of their own, with the argument ``seed``. What no layer covers gets an estimate of
its diagonal in a watch, instead of the exact diagonal of :func:`funcprecond.observe`.

*Saving.* ``state_dict()`` has plain tensors, numbers and names, and a run that loads it goes on bit
for bit. Copies and pickles do too. The statistics of a method are kept in float32 or wider, and
momentum in the dtype of the parameters.

*Processes.* Gradients that are averaged over processes may be used by all methods that need nothing
else. The others are refused where several processes train, because each would measure its own
examples.
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

__all__ = ["MethodOptimizer", "ModelOptimizer", "class_name"]
__all__ += ["GradientTransformation", "apply_updates", "gradient_transformation"]
__all__ += [cls.__name__ for cls in CLASSES.values()]


def __getattr__(name: str) -> type[MethodOptimizer]:
    alike = [cls.__name__ for cls in CLASSES.values() if cls.__name__.lower() == name.lower()]
    meant = f", but {alike[0]}" if alike else f"; it has {', '.join(sorted(__all__))}"
    msg = f"funcprecond.optim has no {name}{meant}"
    raise AttributeError(msg)
