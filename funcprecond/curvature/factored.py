r"""Kronecker-factored curvature as an operator: K-FAC, EKFAC, KFLR and FOOF.

A layer's block is :math:`L \otimes R`, acting on ``[W | b]`` as ``M -> L M R^T``, or in the
factors' eigenbases a diagonal: ``M -> U_L (s * (U_L^T M U_R)) U_R^T``. Powers, inverses with exact
damping and determinants are those of s. Norm layers have exact 2 x 2 blocks, and what no layer
covers its diagonal.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from funcprecond.curvature.data import (
    batch_weight,
    check_data,
    each_batch,
    is_sum,
    seed_of,
    seeded,
)
from funcprecond.curvature.fisher import check_labels
from funcprecond.curvature.layers import (
    Labels,
    Layers,
    LayerStatistics,
    LayerUse,
    Sharing,
    layer_uses,
    split_block,
)
from funcprecond.curvature.moments import second_moments
from funcprecond.curvature.operator import Operator
from funcprecond.evaluation import Evaluation
from funcprecond.problem import Buffers, Params, Problem
from funcprecond.representation.diagonal import factor_dtype, zero_weight
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky
from funcprecond.solver.eigen import eigenbases
from funcprecond.tree import state

__all__ = ["Factors", "KroneckerFactored", "Layerwise", "Rotated", "Split"]

Kind = Literal["kfac", "ekfac", "kflr", "foof"]
Split = Literal["joint", "pi", "equal"]


@state
class Factors:
    """``M -> left M right`` of (..., o, i) matrices, or (..., J, o / J, i) for J groups.

    A factor of n rows and columns may also be kept as fewer rows: (r, n) rows W stand for ``W^T
    W``, or with a ridge for ``(I - W^T W) / ridge``, which is what an inverse of the former is.

    Attributes:
        left: (o, o) or (J, o / J, o / J), symmetric; (o,) if it is diagonal; or rows.
        right: (i, i) or (J, i, i), symmetric; or rows.
        left_ridge, right_ridge: (), or (J,) for groups; None for a factor that is no inverse.
    """

    left: Tensor
    right: Tensor
    left_ridge: Tensor | None = None
    right_ridge: Tensor | None = None

    def apply(self, matrix: Tensor) -> Tensor:
        """The block times a vector."""
        m = _times(matrix, self.right, self.right_ridge)
        return _times(m.mT, self.left, self.left_ridge).mT

    def diagonal(self) -> Tensor:
        """(o, i) or (J, o / J, i)."""
        left = _diagonal(self.left, self.left_ridge)
        return left.unsqueeze(-1) * _diagonal(self.right, self.right_ridge).unsqueeze(-2)

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries."""
        left = _squared_norm(self.left, self.left_ridge)
        return (left * _squared_norm(self.right, self.right_ridge)).sum()


@state
class Rotated:
    """``M -> left (values * (left^T M right)) right^T``.

    The bases may be thin: outside of the space that they span, the block is ``rest`` times the
    identity.

    Attributes:
        left: (o, r) or (J, o / J, r), orthonormal columns, some of which may be zero, with ``rest``
            as their value; None for the identity.
        right: (i, q) or (J, i, q), likewise.
        values: (r, q) or (J, r, q), the eigenvalues.
        rest: 0-d, or None if both bases are complete.
    """

    left: Tensor | None
    right: Tensor
    values: Tensor
    rest: Tensor | None = None

    def apply(self, matrix: Tensor) -> Tensor:
        """The block times a vector."""
        m = matrix @ self.right
        if self.left is None:
            m = (self._above() * m) @ self.right.mT
        else:
            m = self.left @ (self._above() * (self.left.mT @ m)) @ self.right.mT
        return m if self.rest is None else m + self.rest * matrix

    def diagonal(self) -> Tensor:
        """(o, i) or (J, o / J, i)."""
        m = self._above() @ self.right.square().mT
        m = m if self.left is None else self.left.square() @ m
        return m if self.rest is None else m + self.rest

    def squared_norm(self) -> Tensor:
        """The sum of the squared entries."""
        inside = self.values.square().sum()
        return inside if self.rest is None else inside + self._outside() * self.rest**2

    def logdet(self) -> Tensor:
        """The sum of the eigenvalues' logarithms."""
        inside = self.values.log().sum()
        # Zero times the logarithm of a zero is zero here: complete bases have no outside.
        if self.rest is None or not self._outside():
            return inside
        return inside + self._outside() * self.rest.log()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rotated":
        """The same eigenvectors with other eigenvalues."""
        rest = None if self.rest is None else function(self.rest)
        return Rotated(self.left, self.right, function(self.values), rest)

    def _above(self) -> Tensor:
        return self.values if self.rest is None else self.values - self.rest

    def _outside(self) -> int:
        """The number of eigenvalues that are ``rest``, but for those among the values."""
        outputs = self.values.shape[-2] if self.left is None else self.left.shape[-2]
        groups = self.right.shape[0] if self.right.ndim == 3 else 1
        return groups * outputs * self.right.shape[-2] - self.values.numel()


def _as_rows(factor: Tensor) -> bool:
    return factor.ndim > 1 and factor.shape[-2] < factor.shape[-1]


def _times(x: Tensor, factor: Tensor, ridge: Tensor | None) -> Tensor:
    """``x F`` for rows x."""
    if factor.ndim == 1:
        return x * factor
    if not _as_rows(factor):
        return x @ factor
    product = (x @ factor.mT) @ factor
    return product if ridge is None else (x - product) / ridge[..., None, None]


def _diagonal(factor: Tensor, ridge: Tensor | None) -> Tensor:
    if factor.ndim == 1:
        return factor
    if not _as_rows(factor):
        return factor.diagonal(dim1=-2, dim2=-1)
    diagonal = factor.square().sum(-2)
    return diagonal if ridge is None else (1 - diagonal) / ridge.unsqueeze(-1)


def _squared_norm(factor: Tensor, ridge: Tensor | None) -> Tensor:
    if not _as_rows(factor):
        return factor.square().sum((-2, -1) if factor.ndim > 1 else -1)
    gram = factor @ factor.mT
    squares = gram.square().sum((-2, -1))
    if ridge is None:
        return squares
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (factor.shape[-1] - 2 * trace + squares) / ridge**2


def _square(factor: Tensor, ridge: Tensor | None) -> Tensor:
    """The factor itself, formed; a diagonal as it is."""
    if not _as_rows(factor):
        return factor
    product = factor.mT @ factor
    if ridge is None:
        return product
    eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return (eye - product) / ridge[..., None, None]


def _thin_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (..., r), eigenvectors (..., n, r)) of ``rows^T rows``.

    A direction whose eigenvalue is rounding beside the largest is given the zero vector and value.
    """
    wide = rows.double()
    if rows.dtype == torch.float64:
        _, s, vectors = torch.linalg.svd(wide, full_matrices=False)
        values, vectors = s**2, vectors.mT
        limit = 1e-28
    else:
        # What float32 rows lose by squaring, float64 has to spare.
        values, q = torch.linalg.eigh(wide @ wide.mT)
        values = values.clamp_min(0.0)
        vectors = wide.mT @ q
        vectors = vectors / torch.where(values > 0, values, 1.0).sqrt().unsqueeze(-2)
        limit = 1e-9
    kept = values > limit * values.amax(-1, keepdim=True)
    values = torch.where(kept, values, 0.0)
    vectors = torch.where(kept.unsqueeze(-2), vectors, 0.0)
    return values.to(rows.dtype), vectors.to(rows.dtype)


class Layerwise(Operator):
    """A block for each layer, in one of two forms.

    Attributes:
        layers: by ``"weight+bias"`` or ``"weight"``, on ``[W | b]``.
        units: (U, 2, 2) or (U, 1, 1) blocks of norm layers.
        others: the diagonal of what no layer covers.
    """

    def __init__(
        self,
        like: Params,
        layers: dict[str, Any],
        units: dict[str, Tensor],
        others: dict[str, Tensor],
    ):
        self.like, self.layers, self.units, self.others = like, layers, units, others

    def matvec(self, vector: Params) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            weight = split_block(name)[0]
            lead = tuple(vector[weight].shape[: vector[weight].ndim - self.like[weight].ndim])
            product = block.apply(_join(vector, self.like, name, block))
            found |= _split(product, self.like, name, lead)
        for name, matrices in self.units.items():
            parts = [k for k in split_block(name) if k]
            lead = vector[parts[0]].ndim - self.like[parts[0]].ndim
            stacked = torch.stack([vector[k].flatten(lead) for k in parts], -1)
            solved = torch.einsum("upq,...uq->...up", matrices, stacked.to(matrices.dtype))
            found |= {k: solved[..., j].reshape(vector[k].shape) for j, k in enumerate(parts)}
        found |= {k: vector[k] * d for k, d in self.others.items()}
        return {k: found[k].to(v.dtype) if k in found else 0 * v for k, v in vector.items()}

    def matmat(self, vectors: Params, chunk_size: int | None = None) -> Params:
        # Every product takes leading axes: all columns are one matrix product.
        return self.matvec(vectors)

    def block(self, names: Sequence[str]) -> Operator:
        chosen, like = set(names), {k: self.like[k] for k in names}

        def within(blocks):
            kept = {}
            for name, block in blocks.items():
                parts = {k for k in split_block(name) if k}
                if parts <= chosen:
                    kept[name] = block
                elif parts & chosen:
                    return None
            return kept

        blocks, units = within(self.layers), within(self.units)
        if blocks is None or units is None:
            # Part of a layer only.
            return super().block(names)
        others = {k: d for k, d in self.others.items() if k in chosen}
        return Layerwise(like, blocks, units, others)

    def diagonal(self) -> Params:
        found: Params = {}
        for name, block in self.layers.items():
            found |= _split(block.diagonal(), self.like, name)
        for name, matrices in self.units.items():
            for j, k in enumerate(k for k in split_block(name) if k):
                found[k] = matrices[:, j, j].reshape(self.like[k].shape)
        found |= self.others
        return {k: found[k] if k in found else torch.zeros_like(p) for k, p in self.like.items()}

    def frobenius_norm(self) -> Tensor:
        parts = [block.squared_norm() for block in self.layers.values()]
        parts += [x.square().sum() for x in (*self.units.values(), *self.others.values())]
        return torch.stack(parts).sum().sqrt()

    def power(self, p: float, damping: float | Tensor = 0.0) -> "Layerwise":
        """``(C + damping I)^p``, exactly, by the factors' eigendecompositions."""

        def raised(x: Tensor) -> Tensor:
            return (x.clamp_min(0.0) + damping) ** p

        def unit(x: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(x)
            return vectors @ (raised(values).unsqueeze(-1) * vectors.mT)

        return Layerwise(
            self.like,
            {k: b.map(raised) for k, b in self._rotated().items()},
            {k: unit(x) for k, x in self.units.items()},
            {k: raised(d) for k, d in self._rest().items()},
        )

    def inverse(self, damping: float | Tensor) -> "Layerwise":
        """``(C + damping I)^-1``, exactly."""
        return self.power(-1.0, damping)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """``log det (C + damping I)``, a 0-d tensor; exact."""

        def damped(x: Tensor) -> Tensor:
            return x.clamp_min(0.0) + damping

        parts = [b.map(damped).logdet() for b in self._rotated().values()]
        values = [torch.linalg.eigvalsh(x) for x in self.units.values()]
        values += list(self._rest().values())
        return torch.stack([*parts, *(damped(x).log().sum() for x in values)]).sum()

    def _rest(self) -> dict[str, Tensor]:
        """The diagonal of what has no block; zero for what the loss does not depend on."""
        covered = {k for name in (*self.layers, *self.units) for k in split_block(name) if k}
        rest = {k: p for k, p in self.like.items() if k not in covered}
        return {k: self.others.get(k, torch.zeros_like(p)) for k, p in rest.items()}

    def _rotated(self) -> dict[str, Rotated]:
        """All blocks in their eigenbases: one batched decomposition for each size."""
        found = {k: b for k, b in self.layers.items() if isinstance(b, Rotated)}
        factors = {k: b for k, b in self.layers.items() if isinstance(b, Factors)}
        sides = {
            (k, side): (getattr(b, side), getattr(b, f"{side}_ridge"))
            for k, b in factors.items()
            for side in ("left", "right")
        }
        thin = {
            k: _thin_basis(x) for k, (x, ridge) in sides.items() if _as_rows(x) and ridge is None
        }
        values, vectors = eigenbases(
            {k: _square(*x) for k, x in sides.items() if k not in thin}  # pyright: ignore
        )
        values |= {k: x for k, (x, _) in thin.items()}
        vectors |= {k: x for k, (_, x) in thin.items()}
        for k in factors:
            left, right = (k, "left"), (k, "right")
            product = values[left].unsqueeze(-1) * values[right].unsqueeze(-2)
            rest = product.new_zeros(()) if left in thin or right in thin else None
            found[k] = Rotated(vectors.get(left), vectors[right], product, rest)
        return {k: found[k] for k in self.layers}


class KroneckerFactored(Layerwise):
    """The Kronecker-factored Fisher matrix of a problem's loss on data.

    Args:
        problem, params: whose, and where.
        batch, batches: one batch, or an iterable of them that can be gone through again; the
            factors do not depend on how the data are split.
        kind: "kfac"; "ekfac", with the exact second moments in the factors' eigenbases; "kflr",
            K-FAC with exact labels; "foof", inputs only, with the identity for the outputs.
        labels, samples, sharing: see :class:`funcprecond.curvature.layers.LayerStatistics`.
        buffers: the model's buffers; the problem's own by default.
        generator: draws labels and dropout masks.

    Attributes:
        factors: the :class:`KroneckerIO`, a tree of tensors that can be saved.
    """

    def __init__(
        self,
        problem: Problem,
        params: Params,
        batch: Any = None,
        *,
        batches: Iterable[Any] | None = None,
        kind: Kind = "kfac",
        labels: Labels = "mc",
        samples: int = 1,
        sharing: Sharing = "expand",
        buffers: Buffers | None = None,
        generator: torch.Generator | None = None,
    ):
        check_data(batch, batches)
        check_labels(labels, samples)
        if kind not in ("kfac", "ekfac", "kflr", "foof"):
            msg = f"kind must be 'kfac', 'ekfac', 'kflr' or 'foof', not {kind!r}"
            raise ValueError(msg)
        labels = "exact" if kind == "kflr" else "empirical" if kind == "foof" else labels
        need = LayerStatistics(labels, samples, sharing=sharing, by_example=kind == "ekfac")
        seed = seed_of(generator)

        def measured():
            for i, b in enumerate(each_batch(batch, batches)):
                g = seeded(seed, i)
                noise = need.draw(problem, params, b, g)
                e = Evaluation(problem, params, b, buffers=buffers, generator=g, taps=True)
                layers = _inputs_only(e) if kind == "foof" else need.measure(e, noise)
                yield layers, batch_weight(e), e

        # On one batch the statistics serve both of EKFAC's passes.
        if batches is None:
            first = list(measured())
            layers = first[0][0]
            if kind == "foof":
                self.factors = _from_inputs(layers, params, sharing, keep_rows=True)
            else:
                self.factors = KroneckerIO.init(params, rows=True).accumulate(layers, None)
        else:
            first = measured()
            self.factors = _factors(first, params, sharing, forward_only=kind == "foof")
        blocks: dict[str, Any] = {
            k: Factors(x, self.factors.right[k]) for k, x in self.factors.left.items()
        }
        super().__init__(params, blocks, self.factors.units, self.factors.others)
        if kind == "ekfac":
            second = first if batches is None else measured()
            self.layers = _corrected(second, self._rotated())

    def inverse(self, damping: float | Tensor, *, split: Split = "joint") -> Layerwise:
        r"""A damped inverse.

        Args:
            damping: λ, in the loss's units.
            split: "joint" is ``(L ⊗ R + λ I)^-1``, exactly; "pi" is ``(L + √λ/π I)^-1 ⊗ (R + √λ π
                I)^-1`` with π² the ratio of the factors' mean eigenvalues, and "equal" the same
                with π = 1: both damp more strongly than "joint" by their cross terms.
        """
        if split == "joint":
            return self.power(-1.0, damping)
        if any(isinstance(b, Rotated) for b in self.layers.values()):
            msg = "EKFAC's blocks are no product of two factors: use split='joint'"
            raise ValueError(msg)
        if split not in ("pi", "equal"):
            msg = f"split must be 'joint', 'pi' or 'equal', not {split!r}"
            raise ValueError(msg)
        factor = Cholesky(damping, split).prepare(self.factors, None)  # pyright: ignore
        blocks = {
            k: Factors(x, factor.right[k], factor.left_ridge[k], factor.right_ridge[k])
            for k, x in factor.left.items()
        }
        others = {k: 1 / (d + damping) for k, d in self._rest().items()}
        return Layerwise(self.like, blocks, factor.units, others)


def _inputs_only(evaluation: Evaluation) -> Layers:
    """The layers with output gradients of zero, which take no backward pass."""
    like = next(iter(evaluation.params.values()))
    grads = [like.new_zeros(()).expand(1, *call.shape) for call in evaluation.calls]
    return Layers(layer_uses(evaluation, grads), {}, evaluation.constant)


def _factors(
    measured: Iterable[tuple[Layers, Tensor, Evaluation]],
    params: Params,
    sharing: Sharing,
    forward_only: bool,
) -> KroneckerIO:
    """The factors over all batches.

    What is made of output gradients is averaged over the batches as the loss is, the inputs' second
    moments by their number of positions.
    """
    # By block or name: a batch's value, with what it counts.
    inputs, outputs = _Mean(), _Mean()
    units, others = _Mean(), _Mean()
    inputs_left: dict[str, bool] = {}
    for layers, share, evaluation in measured:
        if forward_only:
            one = _from_inputs(layers, params, sharing)
        else:
            one = KroneckerIO.init(params).accumulate(layers, None)
        is_mean = not is_sum(evaluation)
        for name in one.left:
            uses = layers.uses[name]
            inputs_left[name] = _inputs_are_left(uses[0])
            a, g = one.left[name], one.right[name]
            a, g = (a, g) if inputs_left[name] else (g, a)
            inputs.add(name, a, share.new_tensor(sum(_positions(u, sharing) for u in uses)))
            outputs.add(name, g, share, is_mean or forward_only)
        for name, x in one.units.items():
            units.add(name, x, share, is_mean or forward_only)
        for name, x in one.others.items():
            others.add(name, x, share, is_mean or forward_only)
    if not inputs.totals and not units.totals and not others.totals:
        msg = "there are no batches, or no parameters: pass a list or a DataLoader, no iterator"
        raise ValueError(msg)
    a, g = inputs.means(), outputs.means()
    left = {k: a[k] if inputs_left[k] else g[k] for k in a}
    right = {k: g[k] if inputs_left[k] else a[k] for k in a}
    weight = torch.ones_like(zero_weight(params))
    return KroneckerIO(left, right, units.means(), others.means(), weight, tuple(params))


class _Mean:
    """Weighted means by name, or sums."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, weight: Tensor, is_mean: bool = True) -> None:
        weight = weight.to(x.dtype)
        # A batch whose every term is ignored has a mean of 0 / 0, and no share.
        x = torch.where(weight > 0, x * weight, 0.0)
        if name in self.totals:
            x = self.totals[name] + x
            weight = self.weights[name] + weight if is_mean else weight
        self.totals[name], self.weights[name] = x, weight

    def means(self) -> dict[str, Tensor]:
        return {k: x / self.weights[k] for k, x in self.totals.items()}


def _from_inputs(
    layers: Layers, params: Params, sharing: Sharing, keep_rows: bool = False
) -> KroneckerIO:
    """FOOF's factors: the inputs' second moments, and the identity everywhere else."""
    left, right, units = {}, {}, {}
    for name, uses in layers.uses.items():
        weight, bias = split_block(name)
        p = params[weight]
        eye = torch.eye(p.shape[0], dtype=factor_dtype(p), device=p.device)
        call = uses[0].call
        if call.kind == "norm":
            count = 2 if bias else 1
            units[name] = eye[:count, :count].expand(p.numel(), count, count)
            continue
        if call.kind == "embedding":
            eye = torch.eye(p.shape[1], dtype=eye.dtype, device=p.device)
            left[name], right[name] = _frequencies(uses, eye), eye
            continue
        rows = [use.input_rows().to(eye.dtype) for use in uses]
        rows = [x.mean(-2, keepdim=True) if sharing == "reduce" else x for x in rows]
        a = torch.cat([x.flatten(-3, -2) for x in rows], -2)
        if bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        moment = a * a.shape[-2] ** -0.5 if keep_rows and _as_rows(a) else a.mT @ a / a.shape[-2]
        if call.kind == "conv":
            groups = call.options[4]
            eye = torch.eye(p.shape[0] // groups, dtype=eye.dtype, device=p.device)
            moment, eye = (moment[0], eye) if groups == 1 else (moment, eye.expand(groups, -1, -1))
        if _inputs_are_left(uses[0]):
            eye = torch.eye(p.shape[1], dtype=eye.dtype, device=p.device)
            left[name], right[name] = moment, eye
        else:
            left[name], right[name] = eye, moment
    covered = {k for name in layers.uses for k in split_block(name) if k}
    others = {k: torch.ones_like(p) for k, p in params.items() if k not in covered}
    one = torch.ones((), dtype=layers.scale.dtype, device=layers.scale.device)
    return KroneckerIO(left, right, units, others, one, tuple(params))


def _frequencies(uses: Sequence[LayerUse], like: Tensor) -> Tensor:
    padding, vocabulary = uses[0].call.options
    ids = torch.cat([use.input_rows().reshape(-1) for use in uses])
    kept = torch.ones_like(ids, dtype=like.dtype)
    if padding is not None:
        kept = (ids != padding).to(like.dtype)
    counts = like.new_zeros(vocabulary).index_add(0, ids, kept)
    return counts / counts.sum()


def _corrected(
    measured: Iterable[tuple[Layers, Tensor, Evaluation]], bases: dict[str, Rotated]
) -> dict[str, Any]:
    """EKFAC: the exact second moments in the factors' eigenbases."""
    moments = _Mean()
    for layers, share, evaluation in measured:
        for name, uses in layers.uses.items():
            if name in bases:
                bias = split_block(name)[1] is not None
                found = second_moments(uses, bias, bases[name].left, bases[name].right)
                moments.add(name, found * layers.scale, share, not is_sum(evaluation))
    return {
        k: Rotated(bases[k].left, bases[k].right, x.reshape(bases[k].values.shape), bases[k].rest)
        for k, x in moments.means().items()
    }


def _inputs_are_left(use: LayerUse) -> bool:
    """Whether the inputs' factor is that of the weight's axis 0."""
    return use.call.kind == "embedding" or use.call.options == ("in_out",)


def _positions(use: LayerUse, sharing: Sharing) -> int:
    """How many rows the mean in the inputs' factor is over."""
    shape, channel = use.call.shape, 1 if use.call.kind == "conv" else -1
    if use.call.kind == "embedding":
        padding = use.call.options[0]
        return use.inputs.numel() if padding is None else int((use.inputs != padding).sum())
    if sharing == "reduce":
        return shape[0]
    count = 1
    for axis, n in enumerate(shape):
        count *= 1 if axis == channel % len(shape) else n
    return count


def _join(vector: Params, like: Params, name: str, block: Any) -> Tensor:
    """``[W | b]``: (..., o, i + 1), or (..., J, o / J, i + 1); further axes lead."""
    weight, bias = split_block(name)
    lead = vector[weight].ndim - like[weight].ndim
    matrix = vector[weight].flatten(lead + 1).to(block.right.dtype)
    if bias is not None:
        matrix = torch.cat([matrix, vector[bias].unsqueeze(-1).to(matrix.dtype)], -1)
    if block.right.ndim == 3:
        matrix = matrix.unflatten(-2, (block.right.shape[0], -1))
    return matrix


def _split(matrix: Tensor, like: Params, name: str, lead: tuple[int, ...] = ()) -> Params:
    """The inverse of :func:`_join`, with the axes that lead."""
    weight, bias = split_block(name)
    shape = like[weight].shape
    matrix = matrix.reshape(*lead, shape[0], -1)
    found = {}
    if bias is not None:
        matrix, column = matrix[..., :-1], matrix[..., -1]
        found[bias] = column
    found[weight] = matrix.reshape(*lead, *shape)
    return found
