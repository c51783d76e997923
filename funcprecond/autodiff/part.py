"""The evaluation of a batch as it is for some of the parameters, with the others as constants."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.layers.blocks import parts
from funcprecond.layers.layer_call import LayerCall
from funcprecond.tree import Params

__all__ = ["Part"]


class Part:
    """An :class:`funcprecond.Evaluation` of a problem in which only some parameters are variable.

    It shares the run of the whole evaluation, and computes derivatives for its own parameters.

    Args:
        whole: the evaluation, or a part of one.
        names: the names of the parameters.
    """

    def __init__(self, whole: Any, names: Sequence[str]):
        self._whole = whole
        self.params: Params = {k: whole.params[k] for k in names}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    @property
    def grads(self) -> Params:
        """The gradient of the loss in the own parameters."""
        return self._of(self._whole.grads)

    def blocks(self, **options: bool) -> dict[str, list[tuple[int, LayerCall]]]:
        """The blocks of the own parameters, see :meth:`funcprecond.Evaluation.blocks`."""
        found: dict[str, list[tuple[int, LayerCall]]] = {}
        for block, members in self._whole.blocks(**options).items():
            call = members[0][1]
            own = [k in self.params for k in (call.weight, call.bias) if k]
            if all(own):
                found[block] = members
            elif any(own):
                place = own.index(True)
                alone = [(i, parts(call)[place]) for i, call in members]
                found[alone[0][1].block] = alone
        return found

    def pull(
        self, cotangents: Any, keep: bool = True, names: Sequence[str] | None = None
    ) -> Params:
        """See :meth:`funcprecond.Evaluation.pull`."""
        return self._whole.pull(cotangents, keep, list(self.params) if names is None else names)

    @property
    def is_last(self) -> bool:
        """See :class:`funcprecond.Evaluation`."""
        return self._whole.is_last

    def pull_layers(
        self, cotangents: Any, keep: bool = True, chosen: Sequence[int] | None = None
    ) -> Sequence[Tensor]:
        """See :meth:`funcprecond.Evaluation.pull_layers`; zeros for other layers."""
        if chosen is None:
            calls = enumerate(self._whole.calls)
            chosen = [i for i, c in calls if c.weight in self.params or c.bias in self.params]
        return self._whole.pull_layers(cotangents, keep, chosen)

    def hvp(self, vector: Params, keep: bool = True) -> Params:
        """See :meth:`funcprecond.Evaluation.hvp`."""
        return self._of(self._whole.hvp(self._padded(vector), keep))

    def jvp(self, vector: Params, keep: bool = True) -> Any:
        """See :meth:`funcprecond.Evaluation.jvp`."""
        return self._whole.jvp(self._padded(vector), keep)

    def ggn_mv(self, vector: Params, keep: bool = True) -> Params:
        """See :meth:`funcprecond.Evaluation.ggn_mv`."""
        return self.pull(self._whole.output_hessian_mv(self.jvp(vector, keep)), keep)

    def ggn_form(self, vector: Params) -> Tensor:
        """See :meth:`funcprecond.Evaluation.ggn_form`."""
        return self._whole.ggn_form(self._padded(vector))

    def value(self, params: Params) -> Tensor:
        """See :meth:`funcprecond.Evaluation.value`."""
        return self._whole.value({**self._whole.params, **params})

    def objective(self, params: Params) -> tuple[Tensor, Params]:
        """See :meth:`funcprecond.Evaluation.objective`."""
        value, grads = self._whole.objective({**self._whole.params, **params})
        return value, self._of(grads)

    def _of(self, values: Params) -> Params:
        return {k: values[k] for k in self.params}

    def _padded(self, vector: Params) -> Params:
        """A vector with zeros for the other parameters."""
        return {
            k: vector[k] if k in vector else torch.zeros_like(p)
            for k, p in self._whole.params.items()
        }
