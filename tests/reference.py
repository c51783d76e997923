"""Dense answers at small sizes, by routes that share nothing with the library.

Derivatives by central differences, matrices from whole Jacobians, Fisher matrices by going through
all labels. All in float64; parameters are dicts, matrices are in the order of their keys.
"""

import itertools

import torch
from torch import Tensor
from torch.func import grad, jacrev

from funcprecond.losses import NLL, CrossEntropy, GaussianNLL


def ravel(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tree.values()])


def unravel(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([x.numel() for x in like.values()])
    return {k: p.reshape(x.shape) for (k, x), p in zip(like.items(), parts, strict=True)}


# ---------------------------------------------------------------------------------- derivatives
def difference(f, params: dict[str, Tensor], vector: dict[str, Tensor], step: float = 1e-5):
    """The derivative of ``f`` (to tensors, or dicts) along ``vector``, by central differences."""
    plus = f({k: p + step * vector[k] for k, p in params.items()})
    minus = f({k: p - step * vector[k] for k, p in params.items()})
    if isinstance(plus, dict):
        return {k: (plus[k] - minus[k]) / (2 * step) for k in plus}
    return (plus - minus) / (2 * step)


def gradient(f, params: dict[str, Tensor], step: float = 1e-6) -> dict[str, Tensor]:
    """The gradient of a scalar function, one central difference an entry."""
    basis = torch.eye(ravel(params).numel(), dtype=torch.float64)
    slopes = [difference(f, params, unravel(e, params), step) for e in basis]
    return unravel(torch.stack(slopes), params)


def hessian(f, params: dict[str, Tensor]) -> Tensor:
    """(P, P), ``jacrev`` of ``grad`` (``torch.func.hessian`` is wrong for normalisation layers)."""
    flat = ravel(params)
    return jacrev(grad(lambda v: f(unravel(v, params))))(flat)


def jacobian(model, params: dict[str, Tensor]) -> Tensor:
    """(outputs, P) of a function of the parameters."""
    return jacrev(lambda v: model(unravel(v, params)).reshape(-1))(ravel(params))


# ------------------------------------------------------------------------------------- curvature
def ggn(problem, params: dict[str, Tensor], batch) -> Tensor:
    """(P, P): ``J^T H J`` with :func:`output_hessian`."""
    inputs, targets = batch
    outputs = problem(params, inputs)
    j = jacobian(lambda p: problem(p, inputs), params)
    return j.T @ output_hessian(problem.loss, outputs, targets) @ j


def output_hessian(loss, outputs: Tensor, targets) -> Tensor:
    """The loss's Hessian in its outputs, by autodiff of its value.

    Of a Gaussian with a predicted variance the mean over the labels: it is quadratic in each, so
    that the mean over the two at one standard deviation is the expectation. Of log-probabilities
    that of the cross-entropy, which is the same once it is pulled back through a log-softmax.
    """
    if isinstance(loss, NLL):
        weight, reduction, axis = loss.weight, loss.reduction, loss.class_dim
        loss = CrossEntropy(loss.ignore_index, 0.0, weight, reduction, axis)
    if isinstance(loss, GaussianNLL):
        mean, variance = outputs.chunk(2, -1)
        labels = [mean + variance.sqrt(), mean - variance.sqrt()]
    else:
        labels = [targets]
    flat = outputs.reshape(-1)
    hessians = [
        jacrev(grad(lambda f, y=y: loss(f.reshape(outputs.shape), y)))(flat) for y in labels
    ]
    return sum(hessians) / len(hessians)


def fisher(problem, params: dict[str, Tensor], batch, weights: Tensor | None = None) -> Tensor:
    """(P, P): the exact Fisher matrix of a softmax over the last axis, label by label.

    The mean over the terms of ``sum_y p(y) g_y g_y^T``, ``g_y`` the gradient of ``-log p(y)``.
    ``weights``, one for each term, replace ``1 / terms``.
    """
    inputs, _ = batch
    logits = problem(params, inputs)
    classes = logits.shape[-1]
    terms = logits.numel() // classes

    def log_p(p):
        return problem(p, inputs).log_softmax(-1).reshape(-1)

    rows = jacobian(log_p, params).reshape(terms, classes, -1)
    p = logits.softmax(-1).reshape(terms, classes)
    weights = torch.full((terms,), 1 / terms, dtype=torch.float64) if weights is None else weights
    total = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    for n, y in itertools.product(range(terms), range(classes)):
        total += weights[n] * p[n, y] * torch.outer(rows[n, y], rows[n, y])
    return total


def per_example(problem, params: dict[str, Tensor], batch) -> Tensor:
    """(N, P): the gradient of each example's loss, one call an example."""
    inputs, targets = batch
    rows = [
        ravel(
            grad(lambda p, n=n: problem.loss(problem(p, inputs[n : n + 1]), targets[n : n + 1]))(
                params
            )
        )
        for n in range(len(inputs))
    ]
    return torch.stack(rows)


# --------------------------------------------------------------------------------------- matrices
def power(matrix: Tensor, exponent: float) -> Tensor:
    """A symmetric positive definite matrix to a real power."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def kron(*matrices: Tensor) -> Tensor:
    """The Kronecker product of any number of matrices."""
    result = matrices[0]
    for m in matrices[1:]:
        result = torch.kron(result.contiguous(), m.contiguous())
    return result


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def mode_grams(gradients: list[Tensor]) -> list[Tensor]:
    """For each axis i the sum of ``C_i(G)``, entry by entry from the definition with einsum."""
    letters = "abcdefgh"[: gradients[0].ndim]
    grams = []
    for axis in range(len(letters)):
        other = letters[:axis] + "z" + letters[axis + 1 :]
        pattern = f"{letters},{other}->{letters[axis]}z"
        grams.append(sum(torch.einsum(pattern, g, g) for g in gradients))
    return grams


def ridge(matrix: Tensor, epsilon: float) -> Tensor:
    """``A + epsilon lambda_max I``."""
    return matrix + epsilon * torch.linalg.eigvalsh(matrix)[-1] * eye(matrix.shape[0])


def shampoo(gradients: list[Tensor], epsilon: float, exponent: float | None = None) -> Tensor:
    """(N, N): Shampoo's preconditioner after these gradients, row-major."""
    grams = mode_grams(gradients)
    e = 1 / (2 * len(grams)) if exponent is None else exponent
    return kron(*(power(ridge(s, epsilon), -e) for s in grams))


def caspr(gradients: list[Tensor], epsilon: float, p: int | None = None) -> Tensor:
    """(N, N): CASPR's preconditioner, the p-th power of the mean of the one-sided terms."""
    grams = mode_grams(gradients)
    p = len(grams) if p is None else p
    terms = []
    for axis, s in enumerate(grams):
        sides = [eye(g.shape[0]) for g in grams]
        sides[axis] = power(ridge(s, epsilon), -1 / (2 * p))
        terms.append(kron(*sides))
    return torch.linalg.matrix_power(sum(terms) / len(terms), p)


def adagrad_full(gradients: list[Tensor], epsilon: float) -> Tensor:
    """(N, N): ``(sum g g^T + epsilon lambda_max I)^(-1/2)``."""
    return power(
        ridge(sum(torch.outer(g.reshape(-1), g.reshape(-1)) for g in gradients), epsilon), -0.5
    )
