"""The data sets of the comparison, with fixed splits. None of them needs a download."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_SEED = 0  # the split is part of the task, so it is the same for all seeds of the runs


@dataclass(frozen=True)
class Split:
    """One part of a data set, with the examples along the first axis.

    Attributes:
        inputs: (N, ...), the inputs of the model.
        targets: (N, ...), integer classes, one per term of the loss.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """The number of examples."""
        return self.inputs.shape[0]


@dataclass(frozen=True)
class Data:
    """A data set in three splits.

    Attributes:
        train: the examples on which the methods are trained.
        validation: the examples by which the learning rate is chosen.
        test: the examples of the reported results, which are evaluated once per run.
        classes: the number of classes.
        description: the name and the sizes, as text for the report.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    description: str


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless sequence of batches of one size.

    Each epoch has a new order, and leaves out the last examples if they do not fill a batch.

    Args:
        split: the examples.
        size: the number of examples per batch, at most `len(split)`.
        generator: a CPU generator for the order.

    Yields:
        `(inputs, targets)`, each with `size` entries along the first axis.

    Raises:
        ValueError: the split has fewer than `size` examples.
    """
    if size > len(split):
        message = (
            f"The batch size is {size}, but the training split has only {len(split)} examples; "
            f"choose --batch-sizes of at most {len(split)}."
        )
        raise ValueError(message)
    while True:
        order = torch.randperm(len(split), generator=generator).to(split.inputs.device)
        for chosen in order[: len(split) // size * size].split(size):
            yield split.inputs[chosen], split.targets[chosen]


def digits(device: torch.device, *, images: bool = False) -> Data:
    """The handwritten digits of scikit-learn: 1,257 training, 180 validation and 360 test images.

    The pixels are scaled to [-1, 1].

    Args:
        device: the device of the tensors.
        images: whether the inputs have the shape (N, 1, 8, 8) instead of (N, 64).
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    inputs = torch.as_tensor(pixels, dtype=torch.float32) / 8 - 1
    targets = torch.as_tensor(classes, dtype=torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    if images:
        inputs = inputs.reshape(-1, 1, 8, 8)
    train, validation, test = (
        Split(inputs[part].to(device), targets[part].to(device))
        for part in order.split([len(order) - 540, 180, 360])
    )
    return Data(
        train,
        validation,
        test,
        classes=10,
        description=(
            "digits of scikit-learn (UCI Optical Recognition of Handwritten Digits), 8×8 pixels, "
            f"10 classes: {len(train):,} training, {len(validation)} validation, "
            f"{len(test)} test images"
        ),
    )


def python_topics(device: torch.device, *, context: int = 64) -> Data:
    """The characters of the help texts that come with Python; the target is the next character.

    The training windows start at every character. The validation and test windows do not overlap.

    Args:
        device: the device of the tensors.
        context: the number of characters per window.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    alphabet = sorted(set(text))
    code = {character: index for index, character in enumerate(alphabet)}
    tokens = torch.tensor([code[character] for character in text], device=device)
    # The parts are contiguous, so that no sentence belongs to two of them.
    held_out = len(tokens) // 20
    parts = tokens.split([len(tokens) - 2 * held_out, held_out, held_out])

    def windows(part: Tensor, stride: int) -> Split:
        return Split(part[:-1].unfold(0, context, stride), part[1:].unfold(0, context, stride))

    return Data(
        windows(parts[0], 1),
        windows(parts[1], context),
        windows(parts[2], context),
        classes=len(alphabet),
        description=(
            f"pydoc_data.topics of Python {platform.python_version()}, {len(text):,} characters of "
            f"{len(alphabet)} kinds, in windows of {context}: {len(parts[0]):,} training, "
            f"{len(parts[1]):,} validation, {len(parts[2]):,} test characters"
        ),
    )
