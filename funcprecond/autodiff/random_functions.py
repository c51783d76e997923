"""The functions of torch that draw random numbers, and draws with given random numbers.

A run of a model takes its random numbers from the caller's generator, or from tensors that were
drawn beforehand, and never from the global generator. There are three groups of functions:

* those whose draws are replaced: dropouts (:data:`DROPOUTS`) and plain draws (:data:`REPLACED`);
* those that are refused by name (:data:`DRAWS`);
* what cannot be intercepted, such as a scripted function. :class:`GlobalState` notices that the
  global generator has been used, and refuses the run.
"""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcprecond.linalg import random
from funcprecond.tracing import in_transform

__all__ = [
    "DRAWS",
    "DROPOUTS",
    "RECURRENT",
    "REPLACED",
    "GlobalState",
    "dropout",
    "recurrent_options",
    "refuse",
    "replaced_draw",
]

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
# The number of axes of a single example without an axis of examples.
UNBATCHED = {F.dropout1d: 2, F.dropout3d: 4}


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


def _without_start(args, kwargs) -> bool:
    return (args[3] if len(args) > 3 else kwargs.get("X")) is None


# By the name of the operator, which functions and methods share.
_FILLS = ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random")
_SAMPLES = ("binomial", "multinomial", "poisson", "_sample_dirichlet", "_standard_gamma")
_NEW = ("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm")
_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_BY_NAME = {
    **dict.fromkeys([*_FILLS, *_SAMPLES, *_NEW, "uniform", "_fused_dropout"], _always),
    **dict.fromkeys([f"{name}_" for name in (*_FILLS, "uniform")], _always),
    **dict.fromkeys([*_DROPOUTS, "native_dropout"], _in_training(2, "train")),
    **dict.fromkeys([f"{name}_" for name in _DROPOUTS], _in_training(2, "train")),
    **dict.fromkeys(["rrelu", "rrelu_"], _in_training(3, "training")),
    **dict.fromkeys(["rrelu_with_noise", "rrelu_with_noise_"], _in_training(4, "training")),
}
# Functions written in Python, inside which the recorder does not intercept draws.
_IN_PYTHON = {
    F.rrelu: _in_training(3, "training"),
    torch.lobpcg: _without_start,
    **dict.fromkeys(
        [
            F.gumbel_softmax,
            F.fractional_max_pool2d,
            F.fractional_max_pool2d_with_indices,
            F.fractional_max_pool3d,
            F.fractional_max_pool3d_with_indices,
            torch.svd_lowrank,
            torch.pca_lowrank,
            nn.init.uniform_,
            nn.init.normal_,
            nn.init.trunc_normal_,
            nn.init.xavier_uniform_,
            nn.init.xavier_normal_,
            nn.init.kaiming_uniform_,
            nn.init.kaiming_normal_,
            nn.init.orthogonal_,
            nn.init.sparse_,
        ],
        _always,
    ),
}


_PLACES: tuple[Any, ...] = (torch, torch.Tensor, torch._C._nn)  # pyright: ignore


def _spellings(name: str) -> list[Callable]:
    """The functions and methods of torch with a name."""
    found = [getattr(place, name, None) for place in _PLACES]
    return [f for f in found if callable(f) and f not in DROPOUTS]


DRAWS = {
    **{f: draws for name, draws in _BY_NAME.items() for f in _spellings(name)},
    **_IN_PYTHON,
    **dict.fromkeys(RECURRENT, _between_layers),
}
"""For each function that draws from the global generator, whether it does for given arguments."""

# The draws that take their numbers from the caller's generator instead, and what they draw.
REPLACED = {
    torch.rand: "uniform",
    torch.rand_like: "uniform",
    torch.Tensor.uniform_: "uniform",
    torch.randn: "normal",
    torch.randn_like: "normal",
    torch.Tensor.normal_: "normal",
    torch.bernoulli: "bernoulli",
    torch.Tensor.bernoulli: "bernoulli",
    torch.Tensor.bernoulli_: "bernoulli",
}
# The further arguments of those that write in place, and of those that take probabilities.
_IN_PLACE = {
    torch.Tensor.uniform_: {"from": 0.0, "to": 1.0},
    torch.Tensor.normal_: {"mean": 0.0, "std": 1.0},
    torch.Tensor.bernoulli_: {"p": 0.5},
}
_FURTHER = {**_IN_PLACE, torch.bernoulli: {"p": None}, torch.Tensor.bernoulli: {"p": None}}
# Arguments of these functions that change nothing about the numbers.
_PLAIN = (None, False, torch.strided, torch.preserve_format)


def refuse(function: Callable) -> NoReturn:
    """Raise the error for a function that draws from torch's global generator.

    Raises:
        RuntimeError: in every case.
    """
    name = getattr(function, "__name__", str(function))
    msg = (
        f"the model draws random numbers with {name}, which no generator controls here: use "
        "dropout, torch.rand, torch.randn, bernoulli_, normal_ or uniform_ and pass "
        "generator=torch.Generator().manual_seed(0), or make the random numbers part of the batch"
    )
    raise RuntimeError(msg)


def replaced_draw(
    function: Callable, take: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, bool]:
    """Compute one of the functions in :data:`REPLACED` from given random numbers.

    Args:
        function: one of them.
        take: a function ``(shape, draw) -> tensor``. It returns random numbers of this shape that
            were drawn beforehand, or those of ``draw(generator)``.
        args, kwargs: the arguments of the function.

    Returns:
        The result, and whether the function would write it into its first argument.

    Raises:
        RuntimeError: the function has an argument that is not supported, such as a generator.
    """
    kind, rest = REPLACED[function], dict(kwargs)
    dtype, device = rest.pop("dtype", None), rest.pop("device", None)
    further: list[Any] = []
    if function in (torch.rand, torch.randn):
        size = args if args else (rest.pop("size"),)
        shape = tuple(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = torch.get_default_device() if device is None else device
    else:
        like, *given = args if args else (rest.pop("input"),)
        shape = tuple(like.shape)
        dtype, device = (dtype or like.dtype), (like.device if device is None else device)
        defaults = _FURTHER.get(function, {})
        further = [rest.pop(name, default) for name, default in defaults.items()]
        further[: len(given)] = given
    if any(value not in _PLAIN for value in rest.values()):
        refuse(function)
    in_place = function in _IN_PLACE
    if kind == "bernoulli":
        p = like if further[0] is None else further[0]  # pyright: ignore

        def kept(generator: torch.Generator | None) -> Tensor:
            return random.uniform(shape, generator, dtype=torch.float32, device=device) < p

        return take(shape, kept).to(dtype), in_place
    draw = random.uniform if kind == "uniform" else random.normal
    value = take(shape, lambda g: draw(shape, g, dtype=dtype, device=device))
    if not in_place:
        return value, False
    first, second = further
    return first + (second - first if kind == "uniform" else second) * value, True


def dropout(
    function: Callable,
    mask: Callable[[tuple[int, ...], float, Tensor], Tensor],
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    """Compute ``function(input, p, training)`` with a given mask.

    Args:
        function: one of :data:`DROPOUTS`.
        mask: a function ``(shape, p, like) -> booleans`` that returns a mask, True where an entry
            is kept.
        input, p, training, inplace: the arguments of ``function``. The result is a new tensor also
            if ``inplace`` is true; the caller writes it into the input.

    Returns:
        The input after dropout.
    """
    if not training or p == 0.0:
        return input
    if p == 1.0:
        return input * 0.0
    shape = tuple(input.shape)
    if "channel" in DROPOUTS[function]:
        channels = 1 if input.ndim == UNBATCHED.get(function) else 2
        shape = shape[:channels] + (1,) * (input.ndim - channels)
    kept = mask(shape, p, input).to(input.dtype)
    if "alpha" not in DROPOUTS[function]:
        return input * kept / (1 - p)
    # Dropped entries take the negative saturation value of SELU. The factor and the shift restore
    # the mean and the variance.
    saturation = -1.7580993408473766
    a = ((1 - p) * (1 + p * saturation**2)) ** -0.5
    return a * (input * kept + saturation * (1 - kept)) - a * saturation * p


def _equal(x: Tensor, y: Tensor) -> bool:
    if in_transform():
        return torch.equal(x, y)
    # Bytes are compared faster than tensors, and every draw changes the position at the beginning,
    # or else the first words of the state itself.
    return x.numpy()[:64].tobytes() == y.numpy()[:64].tobytes()


class GlobalState:
    """The state of the global generators, to see whether a run has drawn from them.

    All threads share these generators. While other threads run, a change may be theirs, and nothing
    is concluded from it. Daemon threads do not count, because those of notebooks, progress bars and
    torch's compiler run all the time and do not draw.
    """

    def __init__(self):
        self._generators = [torch.default_generator]
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            self._generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        self._states = [g.get_state() for g in self._generators]

    def check(self) -> None:
        """Raise an error if there was a draw, and undo it.

        Raises:
            RuntimeError: a global generator was used.
        """
        for generator, state in zip(self._generators, self._states, strict=True):
            changed = not _equal(generator.get_state(), state)
            if changed and sum(not thread.daemon for thread in threading.enumerate()) == 1:
                generator.set_state(state)
                msg = (
                    "the model draws random numbers from torch's global generator in a part that "
                    "cannot be intercepted, such as a scripted function or an operator of "
                    "torch.ops, and that no generator controls here: use dropout or torch.rand, or "
                    "make the random numbers part of the batch"
                )
                raise RuntimeError(msg)
