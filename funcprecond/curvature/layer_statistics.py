"""Layer statistics: what each layer was given, and what came back to it.

An affine layer ``z = W a + b`` sees inputs ``a`` and, pulled back from cotangents at the model's
outputs, output gradients ``g``. The gradient of example n in ``[W | b]`` is ``sum_t g_nt [a_nt,
1]^T`` over its positions t (tokens, pixels), so inputs and output gradients are all that
Kronecker-factored, unit-wise, diagonal and Gram representations of the Fisher matrix need. Layers
are found by which parameter is used, not by module class (:mod:`funcprecond.autodiff.recorder`).

Letters: V cotangents, N examples, T positions, J groups, i and o input and output dimensions.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.recorder import Call
from funcprecond.evidence import Need, observe
from funcprecond.layers.patches import transposed_patches, unfold
from funcprecond.problems import Params, Problem
from funcprecond.tree import state, static

__all__ = [
    "Labels",
    "LayerStatistics",
    "LayerUse",
    "Layers",
    "Sharing",
    "check_labels",
    "layer_statistics",
    "layer_uses",
    "split_block",
]

Labels = Literal["mc", "empirical", "exact"]
Sharing = Literal["expand", "reduce"]


@state
class LayerUse:
    """One use of a layer.

    Attributes:
        inputs: the layer's input as it came; token ids for an embedding, the normalised input for a
            norm layer.
        grads: (V, *output shape), the cotangents pulled back to the layer's output.
        call: which layer, and its options.
        count: N, the number of examples.
    """

    inputs: Tensor
    grads: Tensor
    call: Call = static()
    count: int = static()

    def input_rows(self) -> Tensor:
        """(N, T, i) inputs, (J, N, T, i / J * kernel) patches of a convolution, (N, T) ids."""
        x, call = self.inputs, self.call
        if call.kind == "conv":
            *geometry, groups = self.geometry
            return rearrange(unfold(x, *geometry), "n (j c) t -> j n t c", j=groups)
        if call.kind == "conv_transpose":
            return rearrange(x.flatten(2), "n (j c) t -> j n t c", j=call.options[4])
        if call.kind == "embedding":
            return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)
        if call.kind == "norm":
            return self._norm_rows(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def grad_rows(self) -> Tensor:
        """(V, N, T, o) output gradients, (J, V, N, T, o / J) for a convolution.

        A transposed convolution's are patches, o / J * kernel, at the input's positions.
        """
        g, call = self.grads, self.call
        if call.kind == "conv":
            return rearrange(g.flatten(3), "v n (j o) t -> j v n t o", j=call.options[4])
        if call.kind == "conv_transpose":
            _, stride, padding, dilation, groups, added, kernel = call.options
            patches = transposed_patches(
                g.flatten(0, 1), kernel, stride, padding, dilation, added
            ).unflatten(0, g.shape[:2])
            return rearrange(patches, "v n (j o) t -> j v n t o", j=groups)
        if call.kind == "norm":
            return self._norm_rows(g)
        return g.reshape(g.shape[0], g.shape[1], -1, g.shape[-1])

    def positions(self, sharing: Sharing) -> int:
        """How many rows there are: of every position with "expand", of every example else."""
        shape, call = self.call.shape, self.call
        if call.kind == "embedding":
            padding = call.options[0]
            return self.inputs.numel() if padding is None else int((self.inputs != padding).sum())
        if sharing == "reduce":
            return shape[0]
        if call.kind == "conv_transpose":
            return self.inputs.numel() // self.inputs.shape[1]
        return math.prod(shape) // shape[1 if call.kind == "conv" else -1]

    @property
    def geometry(self) -> tuple:
        """A convolution's kernel, stride, padding, dilation and groups."""
        _, stride, padding, dilation, groups, kernel = self.call.options
        return kernel, stride, padding, dilation, groups

    def _norm_rows(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - len(self.call.shape) + 1]
        if self.call.options[0] == "trailing":
            units = x.shape[x.ndim - self.call.options[1] :].numel()
            return x.reshape(*lead, -1, units)
        return x.movedim(len(lead), -1).reshape(*lead, -1, self.call.shape[1])


@state
class Layers:
    """What :class:`LayerStatistics` measures: ``U^T U`` is the curvature matrix, row by row.

    Attributes:
        uses: for each block ``"weight+bias"`` (or ``"weight"``), the layer's uses; several if the
            weight is shared.
        others: parameters that no layer covers, by what was asked for: the diagonal of their
            curvature, or their rows (V, N, *shape), both without ``scale``.
        scale: what the sum of outer products is multiplied by, a 0-d tensor.
        sharing: as asked for.
    """

    uses: dict[str, tuple[LayerUse, ...]]
    others: dict[str, Tensor]
    scale: Tensor
    sharing: Sharing = static(default="expand")

    def restrict(self, names: Iterable[str]) -> "Layers":
        """Only what concerns the named parameters; a block without its bias is its weight's."""
        chosen = set(names)
        uses = {}
        for block, of_block in self.uses.items():
            weight, bias = split_block(block)
            if weight in chosen:
                uses[block if bias in chosen else weight] = of_block
            elif bias in chosen:
                msg = (
                    f"{bias!r} is preconditioned together with {weight!r}: give both to one method"
                )
                raise ValueError(msg)
        others = {k: v for k, v in self.others.items() if k in chosen}
        return Layers(uses, others, self.scale, self.sharing)


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
        sharing: how the positions of one example are to be combined, "expand" or "reduce", see
            :func:`funcprecond.representation.kronecker_io.layer_rows`.
        by_example: also leave to ``others`` the layers whose rows do not tell the examples apart.
        tied: keep a weight that is an embedding and a linear layer's too among the layers, with
            uses of both kinds; else it is left to ``others``.
    """

    labels: Labels = "mc"
    samples: int = 1
    others: Literal["diagonal", "rows", "none"] = "diagonal"
    sharing: Sharing = "expand"
    by_example: bool = False
    tied: bool = False
    taps: ClassVar[bool] = True

    def __post_init__(self):
        check_labels(self.labels, self.samples)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        if self.labels != "mc":
            return ()
        return problem.loss.draw(problem.split(batch)[1], self.samples, generator)

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        cotangents, scale = self._cotangents(evaluation, noise)
        if cotangents is None:
            grads = [g.unsqueeze(0) for g in evaluation.layer_grads]
        else:
            pulled = [evaluation.pull_layers(u) for u in cotangents]
            grads = [_stack(g) for g in zip(*pulled, strict=True)]
        return self._layers(evaluation, cotangents, grads, scale)

    def each(self, evaluation: Evaluation, noise: Any) -> Iterator[Layers]:
        """The same measurement in parts of few cotangents, of which one is in memory at a time.

        The evaluation's graph is gone after the last one, so that no gradient comes of it besides.
        """
        cotangents, scale = self._cotangents(evaluation, noise)
        if cotangents is None:
            loss, scale = evaluation.problem.loss, evaluation.constant
            cotangents = [loss.empirical(evaluation.outputs, evaluation.targets)]
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
            yield self._layers(evaluation, some, grads, scale)
            del grads  # so that they are gone while the next ones are made

    def _layers(
        self,
        evaluation: Evaluation,
        cotangents: list[Tensor] | None,
        grads: Sequence[Tensor],
        scale: Tensor,
    ) -> Layers:
        uses = layer_uses(evaluation, grads, self.by_example, self.tied)
        covered = {part for name in uses for part in split_block(name) if part}
        names = [k for k in evaluation.params if k not in covered]
        others = {}
        if names and self.others != "none":
            if cotangents is None:
                cotangents = [
                    evaluation.problem.loss.empirical(evaluation.outputs, evaluation.targets)
                ]
                # The layers' own rows carry the loss's gradient, c included.
                cotangents = [u * evaluation.constant for u in cotangents]
            pulled = [evaluation.pull_each(u, names, chunk_size=32) for u in cotangents]
            rows = {k: torch.stack([p[k] for p in pulled]) for k in names}
            if self.others == "diagonal":
                _tell_of_fallbacks(names, evaluation)
                others = {k: r.square().sum((0, 1)) for k, r in rows.items()}
            else:
                others = rows
        return Layers(uses, others, scale, self.sharing)

    def _cotangents(self, evaluation: Evaluation, noise: Any) -> tuple[list[Tensor] | None, Tensor]:
        loss, constant = evaluation.problem.loss, evaluation.constant
        outputs, targets = evaluation.outputs, evaluation.targets
        if self.labels == "empirical":
            # The rows are c times the terms' gradients, so c^-1 is left of c^-2 c.
            return None, 1 / constant
        if self.labels == "mc":
            return list(loss.sampled(outputs, targets, noise)), constant
        return list(loss.exact(outputs, targets)), constant


def layer_statistics(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    labels: Labels = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Layers:
    """The layers' inputs and output gradients on one batch; see :class:`LayerStatistics`."""
    need = LayerStatistics(labels, samples)
    return observe(problem, params, batch, (need,), generator=generator)[need]


def layer_uses(
    evaluation: Evaluation,
    grads: Sequence[Tensor],
    by_example: bool = False,
    tied: bool = False,
) -> dict[str, tuple[LayerUse, ...]]:
    """The uses of each block that was seen in full, with these (V, *output shape) gradients."""
    return {
        name: tuple(
            LayerUse(
                evaluation.layer_inputs[i],
                grads[i],
                _with_shape(evaluation.calls[i], evaluation.params),
                evaluation.count,
            )
            for i in indices
        )
        for name, indices in _blocks(evaluation, by_example, tied).items()
    }


def split_block(name: str) -> tuple[str, str | None]:
    """``"weight+bias"`` or ``"weight"`` to (weight, bias or None)."""
    weight, _, bias = name.partition("+")
    return weight, bias or None


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _with_shape(call: Call, params: Params) -> Call:
    """The call with what its formulas need of the weight's shape: the kernel, or the vocabulary."""
    shape = tuple(params[call.weight].shape)
    if call.kind in ("conv", "conv_transpose"):
        return dataclasses.replace(call, options=(*call.options, shape[2:]))
    if call.kind == "embedding":
        (padding,) = call.options
        padding = None if padding is None else padding % shape[0]
        return dataclasses.replace(call, options=(padding, shape[0]))
    return call


def _blocks(evaluation: Evaluation, by_example: bool, tied: bool) -> dict[str, list[int]]:
    """The calls of each block whose every use was recorded, in one kind and with one bias."""
    blocks: dict[str, list[int]] = {}
    owners: dict[str, set[str]] = {}
    for i, call in enumerate(evaluation.calls):
        name = call.weight if call.bias is None else f"{call.weight}+{call.bias}"
        blocks.setdefault(name, []).append(i)
        for part in split_block(name):
            if part:
                owners.setdefault(part, set()).add(name)

    leading = evaluation.examples_lead() if by_example else [True] * len(evaluation.calls)

    def usable(name, indices):
        calls = [evaluation.calls[i] for i in indices]
        parts = [part for part in split_block(name) if part]
        return (
            not any(part in evaluation.unrecorded or len(owners[part]) > 1 for part in parts)
            and (len({(c.kind, c.options) for c in calls}) == 1 or (tied and _are_tied(calls)))
            and calls[0].kind != "add"
            and all(leading[i] for i in indices)
        )

    return {name: indices for name, indices in blocks.items() if usable(name, indices)}


def _tell_of_fallbacks(names: list[str], evaluation: Evaluation) -> None:
    """Warn of matrices of which only a diagonal is kept; Python shows one text once."""
    for name in () if torch.compiler.is_compiling() else names:
        if evaluation.params[name].ndim > 1:
            used = evaluation.unrecorded.get(name, "layers of several kinds")
            msg = (
                f"parameter {name!r} is used by {used}, which is no layer whose inputs and output "
                "gradients make its gradient: only the diagonal of its curvature is kept"
            )
            warnings.warn(msg, stacklevel=2)


def _are_tied(calls: list[Call]) -> bool:
    """Whether all apply one (V, d) table: they look up its rows, or give V outputs."""
    kinds = {c.kind for c in calls}
    return kinds == {"embedding", "linear"} and all(
        c.kind == "embedding" or c.options == ("out_in",) for c in calls
    )


def check_labels(labels: Labels, samples: int) -> None:
    """Raise ValueError unless both are known."""
    if labels not in ("mc", "empirical", "exact") or samples < 1:
        msg = (
            "labels must be 'mc', 'empirical' or 'exact' and samples at least 1, "
            f"not {labels!r}, {samples}"
        )
        raise ValueError(msg)
