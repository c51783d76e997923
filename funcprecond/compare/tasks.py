"""The tasks: a data set, a network, a number to judge by, and a budget. One entry adds a task."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from funcprecond.compare import models
from funcprecond.compare.data import Data, digits, python_topics


@dataclass(frozen=True)
class Task:
    """What a method is compared on. The loss is the cross-entropy of every task so far.

    Attributes:
        name: what the command line calls it.
        title: what the report calls it.
        load: device to data.
        network: number of classes to a module; built on the meta device, filled from a seed.
        metric: "accuracy" (higher is better) or "loss" (lower is better, in nats).
        steps: steps of one training run.
        batch_size: examples in a batch where the command line names none.
        ends: patterns of the parameters that the network starts and ends with, where their names do
            not tell (:func:`funcprecond.muon_rules`).
    """

    name: str
    title: str
    load: Callable[[torch.device], Data]
    network: Callable[[int], nn.Module]
    metric: str
    steps: int
    batch_size: int
    ends: tuple[str, ...]

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return self.metric == "accuracy"

    def model(self, data: Data, seed: int, device: torch.device) -> nn.Module:
        """The network, with weights that depend on the seed alone."""
        return models.build(partial(self.network, data.classes), seed, device)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits-mlp",
            title="MLP 64-128-128-10 on digits",
            load=digits,
            network=partial(models.mlp, 64, 128, 128),
            metric="accuracy",
            steps=150,
            batch_size=128,
            ends=("4.*",),
        ),
        Task(
            name="digits-convnet",
            title="convnet with GroupNorm on digits",
            load=partial(digits, images=True),
            network=models.convnet,
            metric="accuracy",
            steps=150,
            batch_size=128,
            ends=("10.*",),
        ),
        Task(
            name="char-lm",
            title="GLU decoder, character language model on Python's help texts",
            load=partial(python_topics, context=64),
            network=partial(models.GLUDecoder, context=64, width=48, heads=4, depth=2),
            metric="loss",
            steps=300,
            batch_size=16,
            ends=("token.*", "position.*"),
        ),
    )
}
