"""The data sets of the comparison, split once and for all, none of them downloaded."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_SEED = 0  # the split belongs to the task: every run of every seed sees the same one


@dataclass(frozen=True)
class Split:
    """Examples along the first axis.

    Attributes:
        inputs: (N, ...) model inputs.
        targets: (N, ...) integer classes, one for each term of the loss.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return self.inputs.shape[0]


@dataclass(frozen=True)
class Data:
    """A data set in three splits.

    Attributes:
        train: what the methods see.
        validation: what chooses the learning rate.
        test: what is reported, read once for each run.
        classes: number of classes.
        description: name and sizes, in a sentence for the report.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    description: str


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of one size: epoch after epoch, reshuffled, the short rest left out.

    Args:
        split: examples to draw from.
        size: examples in a batch, at most `len(split)`.
        generator: CPU generator that shuffles.

    Yields:
        `(inputs, targets)`, each with first dimension `size`.

    Raises:
        ValueError: the split has fewer examples than one batch.
    """
    if size > len(split):
        message = (
            f"A batch of {size} was asked for, but the training split has {len(split)} examples; "
            f"choose --batch-sizes of at most {len(split)}."
        )
        raise ValueError(message)
    while True:
        order = torch.randperm(len(split), generator=generator).to(split.inputs.device)
        for chosen in order[: len(split) // size * size].split(size):
            yield split.inputs[chosen], split.targets[chosen]


def digits(device: torch.device, *, images: bool = False) -> Data:
    """Handwritten digits, 8×8, that scikit-learn bundles: 1,257 train, 180 validation, 360 test.

    Args:
        device: where the tensors go.
        images: inputs as (N, 1, 8, 8) instead of (N, 64). Pixels are scaled to [-1, 1].
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
    """Characters of the help texts that every Python ships; the task is to predict the next one.

    Training windows start at every character; validation and test windows do not overlap.

    Args:
        device: where the tensors go.
        context: characters in a window.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    alphabet = sorted(set(text))
    code = {character: index for index, character in enumerate(alphabet)}
    tokens = torch.tensor([code[character] for character in text], device=device)
    # Contiguous parts: the same sentence must not be on both sides of a split.
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
            f"pydoc_data.topics of Python {platform.python_version()}, {len(text):,} characters, "
            f"alphabet of {len(alphabet)}, windows of {context}: {len(parts[0]):,} training, "
            f"{len(parts[1]):,} validation, {len(parts[2]):,} test characters"
        ),
    )
