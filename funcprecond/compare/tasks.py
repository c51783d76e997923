"""The tasks: each has a data set, a network, a metric and a number of steps.

A new entry in `TASKS` adds a task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from funcprecond.compare import models
from funcprecond.compare.data import Data, digits, python_topics


@dataclass(frozen=True)
class Task:
    """A training problem on which the methods are compared. The loss is the cross-entropy.

    Attributes:
        name: the name on the command line.
        title: the name in the report.
        load: a function from a device to the data.
        network: a function from the number of classes to a module. It is called on the meta device,
            and the weights are drawn from a seed.
        metric: "accuracy" (higher is better) or "loss" (lower is better, in nats).
        steps: the default number of steps of a training run.
        batch_size: the default number of examples per batch.
        ends: patterns of the names of the parameters in the first and last layers, if
            :func:`funcprecond.muon_rules` does not recognize them by their names.
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
        """Whether a higher value of the metric is better."""
        return self.metric == "accuracy"

    def model(self, data: Data, seed: int, device: torch.device) -> nn.Module:
        """The network, with weights that only depend on the seed."""
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
