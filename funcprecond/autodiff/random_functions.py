"""The functions of torch that draw random numbers, and dropout with given masks."""

from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DRAWS", "DROPOUTS", "RECURRENT", "dropout", "recurrent_options", "refuse"]

RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# The kind of each dropout. The masks of an "entry" dropout have an entry for each entry of the
# input, those of a "channel" dropout an entry for each channel. "alpha" is alpha dropout.
DROPOUTS = {
    F.dropout: "entry",
    F.dropout1d: "channel",
    F.dropout2d: "channel",
    F.dropout3d: "channel",
    F.alpha_dropout: "alpha",
    F.feature_alpha_dropout: "channel alpha",
}


def _always(args, kwargs) -> bool:
    return True


def _in_training(index: int, name: str) -> Callable:
    def draws(args, kwargs) -> bool:
        return bool(args[index] if len(args) > index else kwargs.get(name, False))

    return draws


def recurrent_options(args) -> tuple[int, float, bool]:
    """Return the arguments (layers, dropout, training), which follow the first bool argument."""
    bias = next(i for i, a in enumerate(args) if isinstance(a, bool))
    return args[bias + 1 : bias + 4]


def _between_layers(args, kwargs) -> bool:
    layers, p, training = recurrent_options(args)
    return layers > 1 and p > 0 and training


# Functions written in Python are listed too, because the recorder does not intercept their draws.
_ALWAYS_DRAW = {
    torch.rand_like,
    torch.randn_like,
    torch.randint_like,
    torch.bernoulli,
    torch.Tensor.bernoulli_,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.multinomial,
    torch.poisson,
    torch.Tensor.random_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
    torch.Tensor.cauchy_,
    F.gumbel_softmax,
    F.fractional_max_pool2d,
    F.fractional_max_pool2d_with_indices,
    F.fractional_max_pool3d,
    F.fractional_max_pool3d_with_indices,
}
DRAWS = dict.fromkeys(_ALWAYS_DRAW, _always) | {
    F.rrelu: _in_training(3, "training"),
    torch.dropout: _in_training(2, "train"),
    torch.alpha_dropout: _in_training(2, "train"),
    torch.feature_dropout: _in_training(2, "train"),
    torch.feature_alpha_dropout: _in_training(2, "train"),
    **dict.fromkeys(RECURRENT, _between_layers),
}


def refuse(function: Callable) -> NoReturn:
    """Raise the error for a function that draws from torch's global generator.

    Raises:
        RuntimeError: in every case.
    """
    msg = (
        f"the model draws random numbers with {function.__name__}, which no generator controls "
        "here: use dropout, or make the random numbers part of the batch"
    )
    raise RuntimeError(msg)


def dropout(
    function: Callable,
    mask: Callable[[tuple[int, ...], float, Tensor], Tensor],
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Compute ``function(input, p, training)`` with a given mask, and never in place.

    Args:
        function: one of :data:`DROPOUTS`.
        mask: a function ``(shape, p, like) -> booleans`` that returns a mask, True where an entry
            is kept.
        input, p, training, inplace: the arguments of ``function``. ``inplace`` is ignored.

    Returns:
        The input after dropout.
    """
    if not training or p == 0.0:
        return input
    if p == 1.0:
        return input * 0.0
    shape = tuple(input.shape)
    if "channel" in DROPOUTS[function]:
        shape = shape[:2] + (1,) * (input.ndim - 2)
    kept = mask(shape, p, input).to(input.dtype)
    if "alpha" not in DROPOUTS[function]:
        return input * kept / (1 - p)
    # Dropped entries take the negative saturation value of SELU. The factor and the shift restore
    # the mean and the variance.
    saturation = -1.7580993408473766
    a = ((1 - p) * (1 + p * saturation**2)) ** -0.5
    return a * (input * kept + saturation * (1 - kept)) - a * saturation * p
