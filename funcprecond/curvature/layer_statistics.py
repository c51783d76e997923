"""Layer statistics: what each layer was given, and what came back to it.

An affine layer ``z = W a + b`` sees inputs ``a`` and, pulled back from cotangents at the model's
outputs, output gradients ``g``. The gradient of example n in ``[W | b]`` is ``Σ_t g_nt [a_nt, 1]^T``
over its positions t (tokens, pixels), so inputs and output gradients are all that
Kronecker-factored, unit-wise, diagonal and Gram representations of the Fisher matrix need. Layers
are found by which parameter is used, not by module class (:mod:`funcprecond.autodiff.recorder`).

Letters: V cotangents, N examples, T positions, J groups, i and o input and output dimensions.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.examples import refuse_coupling
from funcprecond.evidence import observe
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.layer_call import LayerUse, Sharing
from funcprecond.losses.base import Labels, check_labels
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["ExampleRows", "LayerStatistics", "layer_statistics", "layer_uses"]


@dataclasses.dataclass(frozen=True)
class LayerStatistics(Need):
    """Inputs and output gradients of every layer.

    Attributes:
        labels: whose cotangents are pulled back: those of labels sampled from the model's
            prediction ("mc", an unbiased Fisher matrix), of the data's own ("empirical", the
            training gradient itself, at no cost), or all that the exact Fisher matrix takes
            ("exact").
        samples: sampled labels for each term, with "mc".
        others: what to measure of parameters that no layer covers: "diagonal", "rows" or "none".
        sharing: how the positions of one example are combined in Kronecker factors. With "expand"
            every position is a row of its own, which is exact for losses with a term for each
            position. With "reduce" inputs are averaged and output gradients summed over the
            positions, which is exact where the outputs are pooled over them (Eschenhagen et al.,
            arXiv 2311.00636).
        per_sample: also leave to ``others`` the layers whose rows do not tell the examples apart.
        tied: keep a weight that is an embedding and a linear layer's too among the layers, with
            uses of both kinds; else it is left to ``others``.
    """

    labels: Labels = "mc"
    samples: int = 1
    others: Literal["diagonal", "rows", "none"] = "diagonal"
    sharing: Sharing = "expand"
    per_sample: bool = False
    tied: bool = False
    layers: ClassVar[bool] = True
    gives: ClassVar[type] = Layers

    def __post_init__(self):
        check_labels(self.labels, self.samples)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        if self.labels != "mc":
            return ()
        return problem.loss.label_noise(problem.split(batch)[1], self.samples, generator)

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        if self.labels == "empirical":
            # The gradient that is there already: its rows are c times the terms' gradients, so that
            # c^-1 is left of c^-2 c.
            grads = [g.unsqueeze(0) for g in evaluation.layer_grads]
            return self._layers(evaluation, None, grads, 1 / evaluation.constant)
        cotangents = evaluation.cotangents(self.labels, noise)
        pulled = [evaluation.pull_layers(u) for u in cotangents]
        grads = [_stack(g) for g in zip(*pulled, strict=True)]
        return self._layers(evaluation, cotangents, grads, evaluation.constant)

    def each(self, evaluation: Evaluation, noise: Any) -> Iterator[Layers]:
        """The same measurement in parts of few cotangents, of which one is in memory at a time.

        The evaluation's graph is freed by the last part, so that no gradient can be asked for
        besides.
        """
        cotangents = evaluation.cotangents(self.labels, noise)
        # So many that their gradients take no more memory than the parameters: second moments of
        # many rows at once are cheaper than their sum in parts.
        size = sum(math.prod(call.shape) for call in evaluation.calls)
        room = sum(p.numel() for p in evaluation.params.values())
        last, together = len(cotangents) - 1, max(1, room // max(1, size))
        for start in range(0, len(cotangents), together):
            some = cotangents[start : start + together]
            pulled = [evaluation.pull_layers(u, keep=i < last) for i, u in enumerate(some, start)]
            grads = [_stack(g) for g in zip(*pulled, strict=True)]
            del pulled
            yield self._layers(evaluation, some, grads, evaluation.constant)
            del grads  # so that they are gone while the next ones are made

    def _layers(
        self,
        evaluation: Evaluation,
        cotangents: Sequence[Any] | None,
        grads: Sequence[Tensor],
        scale: Tensor,
    ) -> Layers:
        uses = layer_uses(evaluation, grads, per_sample=self.per_sample, tied=self.tied)
        covered = {part for name in uses for part in split_block(name) if part}
        names = [k for k in evaluation.params if k not in covered]
        if not names or self.others == "none":
            return Layers(uses, {}, scale, self.sharing)
        if cotangents is None:
            # The layers' own rows carry the loss's gradient, c included.
            (own,) = evaluation.cotangents("empirical", ())
            cotangents = [own * evaluation.constant]
        pulled = [evaluation.pull_each(u, names, chunk_size=32) for u in cotangents]
        others = {k: torch.stack([p[k] for p in pulled]) for k in names}
        if self.others == "diagonal":
            _warn_of_diagonals(names, evaluation)
            others = {k: r.square().sum((0, 1)) for k, r in others.items()}
        return Layers(uses, others, scale, self.sharing)


@dataclasses.dataclass(frozen=True)
class ExampleRows(LayerStatistics):
    """Layer statistics that tell the examples apart, and rows for everything else.

    They are all that the Gram matrix of per-sample gradients is made of.
    """

    others: Literal["diagonal", "rows", "none"] = "rows"
    per_sample: bool = True

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        refuse_coupling(evaluation.problem)
        return super().measure(evaluation, noise)


def layer_statistics(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    labels: Labels = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Layers:
    """The layers' inputs and output gradients on one batch.

    Args:
        problem, params, batch: what is measured, and where.
        labels, samples: see :class:`LayerStatistics`.
        generator: draws the labels with "mc", and dropout masks.

    Returns:
        A :class:`funcprecond.layers.blocks.Layers`. Costs one gradient, and about a third of one for
        each pull-back: ``samples`` with "mc", one for each entry of an output with "exact".

    Raises:
        TypeError: the loss is not a likelihood that is known, and ``labels`` is not "empirical".
        ValueError: ``labels`` or ``samples`` is out of range, or random numbers are needed and
            there is no generator.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> layers = fp.layer_statistics(problem, problem.params, batch, labels="empirical")
        >>> {block: tuple(use.grads.shape) for block, (use,) in layers.uses.items()}
        {'weight+bias': (1, 8, 3)}
    """
    need = LayerStatistics(labels, samples)
    return observe(problem, params, batch, (need,), generator=generator)[need]


def layer_uses(
    evaluation: Evaluation,
    grads: Sequence[Tensor],
    *,
    per_sample: bool = False,
    tied: bool = False,
) -> dict[str, tuple[LayerUse, ...]]:
    """The uses of each block that was seen in full, with these (V, *output shape) gradients."""
    inputs, calls = evaluation.layer_inputs, evaluation.calls
    return {
        name: tuple(LayerUse(inputs[i], grads[i], calls[i]) for i in indices)
        for name, indices in evaluation.blocks(per_sample=per_sample, tied=tied).items()
    }


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _warn_of_diagonals(names: list[str], evaluation: Evaluation) -> None:
    """Warn of each matrix whose curvature is kept as a diagonal only; Python shows a text once."""
    for name in () if torch.compiler.is_compiling() else names:
        if evaluation.params[name].ndim > 1:
            used = evaluation.unrecorded.get(name, "layers of several kinds")
            msg = (
                f"parameter {name!r} is used by {used}, which is no layer whose inputs and output "
                "gradients make its gradient: only the diagonal of its curvature is kept"
            )
            warnings.warn(msg, stacklevel=2)
