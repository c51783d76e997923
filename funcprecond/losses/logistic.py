"""Binary cross-entropy with logits."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond.linalg import random
from funcprecond.linalg.precision import factor_dtype
from funcprecond.losses.base import Loss, Reduction, check_reduction, entries, matched, one_term

__all__ = ["BCEWithLogits"]


@dataclasses.dataclass(frozen=True, eq=False)
class BCEWithLogits(Loss):
    """Binary cross-entropy of logits, as in ``torch.nn.BCEWithLogitsLoss``.

    Outputs are logits, and targets are labels 0 and 1 (of any dtype) or probabilities, shaped like
    the outputs. As a likelihood, it is a Bernoulli distribution for each entry. The constant ``c``
    is 1 / numel for the mean and 1 for the sum.

    Attributes:
        pos_weight: the weight of the positive class, broadcast against the outputs, or None.
        reduction: "mean" or "sum", over all entries. The mean divides by their number, also with
            weights, as in torch.
        weight: the weights of the entries, broadcast against the outputs, or None.

    Example:
        >>> import torch, funcprecond as fp
        >>> loss = fp.losses.BCEWithLogits(reduction="sum")
        >>> value = loss(torch.zeros(2, 3), torch.ones(2, 3))
        >>> torch.allclose(value, 6 * torch.tensor(2.0).log())
        True
    """

    pos_weight: Tensor | None = None
    reduction: Reduction = "mean"
    weight: Tensor | None = None

    def __post_init__(self):
        check_reduction(self.reduction)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs, targets = matched("bce_with_logits", outputs, targets)
        return F.binary_cross_entropy_with_logits(
            outputs,
            targets,
            weight=None if self.weight is None else self.weight.to(outputs),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(outputs),
            reduction=self.reduction,
        )

    def constant(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return entries(outputs, targets, self.reduction)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vector: Tensor) -> Tensor:
        curvature = self._curvature(outputs, targets)
        return (self.constant(outputs, targets) * curvature * vector).to(vector.dtype)

    def label_noise(
        self, targets: Tensor, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        shape = (samples, *targets.shape)
        return random.uniform(shape, generator, dtype=torch.float32, device=targets.device)

    def sampled(self, outputs: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        q = outputs.to(factor_dtype(outputs)).sigmoid()
        scale = (self._weights(q, targets) / noise.shape[0]).sqrt()
        return (scale * (q - (noise < q).to(q.dtype))).to(outputs.dtype)

    def exact(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        root = self._curvature(outputs, targets).sqrt().to(outputs.dtype)
        for term in one_term(outputs.shape[1:], outputs):
            yield root * term

    def _weights(self, q: Tensor, targets: Tensor) -> Tensor:
        """The weight of each term's Hessian ``q (1 - q)``, in the dtype of q."""
        weights = torch.ones_like(q) if self.weight is None else self.weight.to(q).expand_as(q)
        if self.pos_weight is None:
            return weights
        return weights * (1 + (self.pos_weight.to(q) - 1) * targets.to(q.dtype))

    def _curvature(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f = outputs.to(factor_dtype(outputs))
        # 1 - sigmoid(f) would be 0 for a large f.
        q = f.sigmoid()
        return self._weights(q, targets) * q * (-f).sigmoid()
