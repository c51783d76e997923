"""Dense references of first directions: ``(problem, params, batch) -> (P, P)``.

What a method's first direction is, as a matrix times the gradient, from :mod:`tests.reference`
alone. The hyperparameters are the builders' defaults, written out.
"""

import torch
import torch.nn.functional as F

from tests import reference


def _gradients(problem, params, batch):
    return reference.gradient(lambda p: problem.loss(problem(p, batch[0]), batch[1]), params)


def _blocks(problem, params, batch, matrix, vector):
    """Block diagonal: ``matrix(G)`` for tensors of several long axes, ``vector(g)`` for others."""
    blocks = []
    for g in _gradients(problem, params, batch).values():
        g = g.squeeze()
        blocks.append(matrix(g) if g.ndim > 1 else vector(g.reshape(-1)))
    return torch.block_diag(*blocks)


def _rooted(g):
    """Diagonal AdaGrad with the ridge inside the root: ``(g^2 + eps max g^2)^(-1/2)``."""
    return torch.diag((g.square() + 1e-6 * g.square().max()) ** -0.5)


def identity(problem, params, batch):
    return torch.eye(reference.ravel(params).numel(), dtype=torch.float64)


def inverse_magnitude(problem, params, batch):
    """Adam and AdaGrad: ``g / |g|``."""
    return torch.diag(1 / reference.ravel(_gradients(problem, params, batch)).abs())


def adagrad_full(problem, params, batch):
    gradients = _gradients(problem, params, batch).values()
    return torch.block_diag(*(reference.adagrad_full([g], 1e-6) for g in gradients))


def shampoo(problem, params, batch):
    return _blocks(problem, params, batch, lambda g: reference.shampoo([g], 1e-6), _rooted)


def caspr(problem, params, batch):
    return _blocks(problem, params, batch, lambda g: reference.caspr([g], 1e-6), _rooted)


DAMPING = 1e-2


def mlp_layers(problem, params, batch):
    """(A, B, exact Fisher block in [W | b]) of both layers of :func:`tests.problems.mlp`.

    The gradient of an example in the bias is its gradient at the layer's output, so B is the bias's
    block of the exact Fisher matrix.
    """
    x = batch[0]
    hidden = torch.tanh(F.linear(x, params["0.weight"], params["0.bias"]))
    fisher, start = reference.fisher(problem, params, batch), 0
    for inputs, name in ((x, "0"), (hidden, "2")):
        rows = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        o, i = params[f"{name}.weight"].shape
        # weight first, then bias -> rows of [W | b]
        order = [
            start + (o * i + r if c == i else r * i + c) for r in range(o) for c in range(i + 1)
        ]
        bias = [start + o * i + r for r in range(o)]
        start += o * i + o
        yield rows.T @ rows / len(x), fisher[bias][:, bias], fisher[order][:, order], order


def _damped(problem, params, batch, solve):
    size = reference.ravel(params).numel()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for a, b, fisher, order in mlp_layers(problem, params, batch):
        index = torch.tensor(order)
        matrix[index.unsqueeze(1), index] = solve(a, b, fisher)
    return matrix


def kfac(problem, params, batch):
    """``(B ⊗ A + damping I)^-1`` with the factors of the exact Fisher matrix."""

    def solve(a, b, fisher):
        block = reference.kron(b, a)
        return torch.linalg.inv(block + DAMPING * reference.eye(len(block)))

    return _damped(problem, params, batch, solve)


def kfac_of_one_batch(problem, params, batch):
    """``(B + √λ/π I)^-1 ⊗ (A + √λ π I)^-1`` with the factors of the exact Fisher matrix."""

    def solve(a, b, fisher):
        pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt()
        right = a + DAMPING**0.5 * pi * reference.eye(len(a))
        left = b + DAMPING**0.5 / pi * reference.eye(len(b))
        return torch.linalg.inv(reference.kron(left, right))

    return _damped(problem, params, batch, solve)


def ekfac(problem, params, batch):
    """K-FAC's eigenbasis with the exact Fisher block's diagonal in it."""

    def solve(a, b, fisher):
        basis = reference.kron(torch.linalg.eigh(b)[1], torch.linalg.eigh(a)[1])
        moments = (basis.T @ fisher @ basis).diagonal()
        return basis @ torch.diag(1 / (moments + DAMPING)) @ basis.T

    return _damped(problem, params, batch, solve)


def foof(problem, params, batch):
    """``I ⊗ (A + damping tr(A) / dim(A) I)^-1``."""

    def solve(a, b, fisher):
        ridge = DAMPING * a.trace() / len(a) * reference.eye(len(a))
        return reference.kron(reference.eye(len(b)), torch.linalg.inv(a + ridge))

    return _damped(problem, params, batch, solve)


def eva(problem, params, batch):
    """``(0.03 I + v v^T)^-1`` with v the outer product of the layer's mean rows.

    The gradient of an example in the bias is its gradient at the layer's output, and the last
    column of A is the mean of the inputs.
    """
    size, start = reference.ravel(params).numel(), 0
    rows = reference.per_example(problem, params, batch)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for a, b, _, order in mlp_layers(problem, params, batch):
        end = start + len(order)
        v = torch.outer(rows[:, end - len(b) : end].mean(0), a[:, -1]).reshape(-1)
        index = torch.tensor(order)
        dense = 0.03 * reference.eye(len(v)) + torch.outer(v, v)
        matrix[index.unsqueeze(1), index] = torch.linalg.inv(dense)
        start = end
    return matrix


def eva_s(problem, params, batch):
    """``(0.03 I + v v^T)^-1``, v the outer product of the gradient's means along its axes."""

    def matrix(g):
        v = torch.outer(g.mean(1), g.mean(0)).reshape(-1)
        return torch.linalg.inv(0.03 * reference.eye(len(v)) + torch.outer(v, v))

    return _blocks(problem, params, batch, matrix, lambda g: reference.eye(len(g)) / 0.03)


def unit_ng(problem, params, batch):
    """The inverse of the damped diagonal blocks of the exact Fisher matrix, one for each unit."""

    def solve(a, b, fisher):
        n = len(a)
        blocks = [fisher[k : k + n, k : k + n] for k in range(0, len(fisher), n)]
        return torch.block_diag(*(torch.linalg.inv(x + DAMPING * reference.eye(n)) for x in blocks))

    return _damped(problem, params, batch, solve)


def diagonal_ng(problem, params, batch):
    """``diag(1 / (F + damping))`` with the diagonal of the exact Fisher matrix F."""
    return torch.diag(1 / (reference.fisher(problem, params, batch).diagonal() + DAMPING))


def unit_norm(problem, params, batch):
    """L-BFGS without a pair: the gradient, shrunk to a 1-norm of at most 1."""
    size = reference.ravel(_gradients(problem, params, batch)).abs().sum()
    return identity(problem, params, batch) / size.clamp_min(1.0)


def damped_ggn(problem, params, batch):
    """``(G + I)^-1``: the damping starts at 1."""
    g = reference.ggn(problem, params, batch)
    return torch.linalg.inv(g + reference.eye(len(g)))


def damped_empirical(problem, params, batch):
    """``((1/N) sum g_n g_n^T + damping I)^-1`` with the examples' own gradients."""
    rows = reference.per_example(problem, params, batch)
    matrix = rows.T @ rows / len(rows)
    return torch.linalg.inv(matrix + DAMPING * reference.eye(len(matrix)))


def _of_layers(matrix, params):
    """The blocks of the layers of a matrix, each of a weight and a bias, and zero elsewhere."""
    sizes = [p.numel() for p in params.values()]
    blocks = [torch.ones(w + b, w + b) for w, b in zip(sizes[::2], sizes[1::2], strict=True)]
    return matrix * torch.block_diag(*blocks)


def damped_empirical_layers(problem, params, batch):
    """The same with the blocks of the layers only."""
    rows = reference.per_example(problem, params, batch)
    matrix = _of_layers(rows.T @ rows / len(rows), params)
    return torch.linalg.inv(matrix + DAMPING * reference.eye(len(matrix)))


def damped_fisher(problem, params, batch):
    """``(F + damping I)^-1`` with the exact Fisher matrix, by going through all labels."""
    matrix = reference.fisher(problem, params, batch)
    return torch.linalg.inv(matrix + DAMPING * reference.eye(len(matrix)))


def damped_fisher_layers(problem, params, batch):
    """The same with the blocks of the layers only."""
    matrix = _of_layers(reference.fisher(problem, params, batch), params)
    return torch.linalg.inv(matrix + DAMPING * reference.eye(len(matrix)))


def orthogonal_factor(problem, params, batch):
    """Muon's first step with momentum 0.95 and Nesterov: ``(G G^T)^(-1/2) G`` on its own scale."""
    share = (1 - 0.95) * (1 + 0.95)

    def matrix(g):
        u, s, _ = torch.linalg.svd(g, full_matrices=False)
        scale = max(1.0, g.shape[0] / g.shape[1]) ** 0.5
        # The gradient of a softmax layer has a singular value of zero, whose factor is zero.
        inverse = torch.where(s > 1e-8 * s[0], 1 / s, 0.0)
        return scale * reference.kron(u @ torch.diag(inverse) @ u.T, reference.eye(g.shape[1]))

    return _blocks(problem, params, batch, matrix, lambda g: share * reference.eye(len(g)))
