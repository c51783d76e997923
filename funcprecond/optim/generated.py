"""The class of each card: its name, its signature and its docstring."""

import inspect
import re
from typing import Any

from torch import Tensor, nn

from funcprecond.methods.card import Card
from funcprecond.need import is_mark
from funcprecond.optim.model_optimizer import ModelOptimizer, is_watchable
from funcprecond.optim.optimizer import CHAINED, MethodOptimizer

__all__ = ["class_name", "optimizer_class"]


def class_name(card: Card) -> str:
    """The name of the optimizer of a method: its builder's words, spelled as its title spells them.

    Args:
        card: the card.

    Returns:
        The name.

    Example:
        >>> from funcprecond.methods.card import CARDS
        >>> [class_name(CARDS[k]) for k in ("kfac", "adaptive_kfac", "lbfgs", "hessian_free")]
        ['KFAC', 'AdaptiveKFAC', 'LBFGS', 'HessianFree']
    """
    letters = re.sub(r"[^A-Za-z]", "", card.title.partition(" (")[0])

    def spelled(word: str) -> str:
        start = letters.lower().find(word)
        found = letters[start : start + len(word)] if start >= 0 else word
        return found[:1].upper() + found[1:]

    return "".join(spelled(word) for word in card.name.split("_"))


def optimizer_class(card: Card) -> type[MethodOptimizer]:
    """Make the optimizer of a method.

    Args:
        card: the card of a method that works.

    Returns:
        A class whose constructor has the options of the builder, and whose docstring explains them.

    Example:
        >>> from funcprecond.methods.card import CARDS
        >>> optimizer_class(CARDS["caspr"]).__name__
        'CASPR'
    """
    assert card.build is not None
    options = list(inspect.signature(card.build).parameters.values())
    measures = _measures(card)
    first = _MODEL if measures else _PARAMS
    rate = inspect.Parameter("lr", _KEYWORD, default=card.learning_rate, annotation=float | Tensor)
    own = {p.name for p in options}
    chained = [
        inspect.Parameter(
            k, inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=rate.annotation
        )
        for k in CHAINED
        # A method with a running mean of its own needs no second one.
        if k not in own and not (k == "momentum" and card.carries_momentum)
    ]
    last = [_SEED] if measures else []
    signature = inspect.Signature([*first, rate, *chained, *options, *last])
    name = class_name(card)
    base: Any = ModelOptimizer if measures else MethodOptimizer

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            msg = f"{name}: {error}; its options are {', '.join(signature.parameters)}"
            raise TypeError(msg) from None
        bound.apply_defaults()
        given = dict(bound.arguments)
        before = [given.pop(p.name) for p in (*first, *last)]
        base.__init__(self, *before, given)

    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    whole = signature.replace(parameters=[me, *signature.parameters.values()])
    __init__.__signature__ = whole  # pyright: ignore[reportFunctionMemberAccess]
    __init__.__qualname__ = f"{name}.__init__"
    namespace = {
        "__module__": "funcprecond.optim",
        "__qualname__": name,
        "__doc__": _docstring(card, name, [p.name for p in chained], measures),
        "__init__": __init__,
        "card": card,
    }
    return type(name, (base,), namespace)  # pyright: ignore[reportReturnType]


_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
_PARAMS = [inspect.Parameter("params", _KEYWORD)]
_MODEL = [
    inspect.Parameter("model", _KEYWORD, annotation=nn.Module),
    inspect.Parameter("loss", _KEYWORD, default=None),
    inspect.Parameter("params", _KEYWORD, default=None),
]
_SEED = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=0, annotation=int)


def _measures(card: Card) -> bool:
    """Whether a method measures more of a batch than its gradient."""
    assert card.build is not None
    return not all(map(is_mark, card.build().needs(0)))


_CHAINED = {
    "momentum": "m of heavy-ball momentum after the method, ``u <- m u + d``; 0 for none.",
    "weight_decay": "w of decoupled weight decay, ``θ <- θ - lr (d + w θ)``, as in AdamW.",
}


_OF_THE_MODEL = """    model: the module that is trained, and not a wrapper of it.
    loss: your own loss, which is then computed by ``opt.loss(outputs, targets)``, or by calling it
        if it is a module; None for the losses of torch, which are recognised.
    params: some parameters of the model, or dicts of parameters and options, as in
        ``torch.optim``; None for all of them."""
_OF_THE_LOOP = (
    "    params: the parameters, or dicts of parameters and options, as in ``torch.optim``."
)
_SEEDED = "    seed: of the random numbers, such as sampled labels."


def _docstring(card: Card, name: str, chained: list[str], measures: bool) -> str:
    """The docstring of the builder, with the arguments of an optimizer around its own."""
    text = inspect.getdoc(card.build) or ""
    head, _, rest = text.partition("\n\nReturns:\n")
    # A builder without options has no section of arguments.
    about, _, own = head.partition("\n\nArgs:\n")
    raised = rest.partition("\nRaises:\n")[2].partition("\n\nExample:\n")[0].rstrip()
    arguments = [
        _OF_THE_MODEL if measures else _OF_THE_LOOP,
        f"    lr: the learning rate η; {card.learning_rate:g} was the best on a small task.",
        *(f"    {k}: {_CHAINED[k]}" for k in chained),
        *([own.rstrip()] if own else []),
        *([_SEEDED] if measures else []),
    ]
    raises = [
        *([raised] if raised else []),
        "    ValueError: a number is out of range, or there are no parameters.",
    ]
    assert card.build is not None
    watched = measures and all(map(is_watchable, card.build().needs(0)))
    example = _WATCHED if watched else _BY_CLOSURE if measures else _PLAIN
    return (
        "\n\n".join(
            [
                f"{card.title} as a ``torch.optim.Optimizer``.",
                f"The parameters move by ``θ <- θ - lr d`` in place, where d is the direction of\n"
                f":func:`funcprecond.{card.name}`. See :mod:`funcprecond.optim` for what all\n"
                "optimizers have in common.",
                about.strip(),
                "Args:\n" + "\n".join(arguments),
                "Raises:\n" + "\n".join(raises),
                f"Example:\n{example.format(name=name)}",
            ]
        )
        + "\n"
    )


_PLAIN = """    >>> import torch, funcprecond as fp
    >>> model = torch.nn.Linear(4, 3)
    >>> opt = fp.optim.{name}(model.parameters(), lr=0.01)
    >>> model(torch.ones(8, 4)).square().mean().backward()
    >>> opt.step()
    >>> opt.zero_grad()"""
_WATCHED = """    >>> import torch, funcprecond as fp
    >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    >>> opt = fp.optim.{name}(model, lr=0.01)
    >>> inputs, targets = torch.ones(8, 4), torch.arange(8) % 3
    >>> with opt.watch():
    ...     loss = criterion(model(inputs), targets)
    >>> loss.backward()
    >>> opt.step()
    >>> opt.zero_grad()"""
_BY_CLOSURE = """    >>> import torch, funcprecond as fp
    >>> model, criterion = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    >>> opt = fp.optim.{name}(model, lr=0.01)
    >>> inputs, targets = torch.ones(8, 4), torch.arange(8) % 3
    >>> loss = opt.step(lambda: criterion(model(inputs), targets))"""
