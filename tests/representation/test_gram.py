"""The Gram form by layers against rows made of one gradient an example."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.representation.gram import Gram
from tests import reference
from tests.problems import Toy, convnet, initialised, mlp, normal, seeded, tree
from tests.strategies import seeds


def labels(shape, classes=3, seed=0):
    return torch.randint(0, classes, shape, generator=seeded(seed))


def toy(module, inputs, targets, loss=fp.losses.cross_entropy):
    return Toy(fp.problem(initialised(module), loss), ((inputs, targets),))


class Sequence(nn.Module):
    """Tokens, a norm layer, attention and a head at each position."""

    def __init__(self, padding=None):
        super().__init__()
        self.embed = nn.Embedding(5, 4, padding_idx=padding)
        self.norm = nn.LayerNorm(4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.norm(self.embed(x))
        return self.head(h + self.attend(h, h, h, need_weights=False)[0])


class Twice(nn.Module):
    """One layer used twice, and one weight as embedding and head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.inner(torch.tanh(self.inner(self.embed(x)))))
        return F.linear(h.mean(1), self.embed.weight)


class Plain(nn.Module):
    """``x @ W``, a bias of its own and a scale that no layer covers."""

    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(4))
        self.out, self.unused = nn.Linear(4, 3, bias=False), nn.Linear(2, 2)

    def forward(self, x):
        return self.out(torch.tanh(x @ self.w) * self.scale)


def conv(module, *shape, classes=3):
    features = module(torch.zeros(1, *shape)).numel()
    model = nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(features, classes))
    return toy(model, normal((4, *shape)), labels((4,)))


def batch_norm():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


CASES = {
    "mlp": mlp,
    "convnet": convnet,
    "no bias": lambda: toy(nn.Linear(3, 3, bias=False), normal((4, 3)), labels((4,))),
    "conv1d": lambda: conv(nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), 2, 9),
    "conv2d groups": lambda: conv(nn.Conv2d(4, 6, (1, 3), groups=2, padding="same"), 4, 3, 4),
    "conv2d depthwise": lambda: conv(nn.Conv2d(3, 6, 2, groups=3, bias=False), 3, 4, 3),
    "conv3d": lambda: conv(nn.Conv3d(1, 2, 2), 1, 3, 3, 2),
    "batch norm": lambda: toy(batch_norm().eval(), normal((4, 3)), labels((4,))),
    "sequence": lambda: toy(Sequence(), labels((4, 3), 5), labels((4, 3))),
    "long sequence": lambda: toy(Sequence(), labels((2, 40), 5), labels((2, 40))),
    "padding": lambda: toy(Sequence(padding=2), labels((4, 3), 5), labels((4, 3))),
    "negative padding": lambda: toy(Sequence(padding=-1), labels((4, 3), 5), labels((4, 3))),
    "used twice": lambda: toy(Twice(), labels((4, 3), 5), labels((4,), 5)),
    "matmul": lambda: toy(Plain(), normal((4, 3)), labels((4,))),
    "any shapes": tree,
}  # fmt: skip


def measured(case, labels="empirical", **options):
    need = LayerStatistics(labels, others="rows", per_sample=True, **options)
    evidence = fp.observe(case.problem, case.params, case.batch, (need,), generator=seeded(3))
    return Gram.from_layers(evidence[need], case.params), evidence


def dense(case):
    """(N, P): each example's share of the loss's gradient, divided by the root of c."""
    inputs, targets = case.batch
    n = len(inputs)
    rows = reference.per_example(case.problem, case.params, case.batch)
    loss = case.problem.loss
    c = loss.constant(case.problem(case.params, inputs), targets)
    one = loss.constant(case.problem(case.params, inputs[:1]), targets[:1])
    assert n * c <= one + 1e-12
    return c.sqrt() * rows / one


@pytest.mark.parametrize("name", CASES)
def test_equals_the_rows_of_single_examples(name):
    case = CASES[name]()
    gram, evidence = measured(case)
    u = dense(case)
    p = u.shape[1]
    v = normal((p,), 1)
    w = normal((len(u),), 2)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(gram.rows(), u, **close)
    torch.testing.assert_close(gram.gram(), u @ u.T, **close)
    torch.testing.assert_close(gram.matvec(reference.unravel(v, case.params)), u @ v, **close)
    torch.testing.assert_close(reference.ravel(gram.rmatvec(w)), u.T @ w, **close)
    diagonal = gram.diagonal()
    assert {k: x.shape for k, x in diagonal.items()} == {k: x.shape for k, x in case.params.items()}
    torch.testing.assert_close(reference.ravel(diagonal), u.square().sum(0), **close)
    torch.testing.assert_close(gram.trace(), u.square().sum(), **close)
    torch.testing.assert_close(gram.to_dense(), u.T @ u, **close)
    assert gram.count == len(u)
    # The rows sum to the gradient.
    total = gram.rmatvec(gram.scale.rsqrt().expand(gram.count))
    torch.testing.assert_close(reference.ravel(total), reference.ravel(evidence.grads), **close)


@pytest.mark.parametrize("name", ["mlp", "convnet", "sequence", "used twice", "matmul"])
def test_exact_labels_give_the_fisher_matrix(name):
    case = CASES[name]()
    gram, _ = measured(case, "exact")
    assert gram.count == case.problem(case.params, case.batch[0]).numel()
    torch.testing.assert_close(
        gram.to_dense(),
        reference.fisher(case.problem, case.params, case.batch),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("name", ["convnet", "sequence", "matmul"])
def test_sampled_labels_have_a_row_for_each_sample_and_example(name):
    case = CASES[name]()
    gram, _ = measured(case, "mc", samples=3)
    u = gram.rows()
    assert len(u) == gram.count == 3 * len(case.batch[0])
    v, w = normal((u.shape[1],), 1), normal((len(u),), 2)
    torch.testing.assert_close(gram.gram(), u @ u.T)
    torch.testing.assert_close(gram.matvec(reference.unravel(v, case.params)), u @ v)
    torch.testing.assert_close(reference.ravel(gram.rmatvec(w)), u.T @ w)
    torch.testing.assert_close(reference.ravel(gram.diagonal()), u.square().sum(0))


@given(
    st.tuples(*[st.integers(1, 3)] * 4), st.integers(1, 6), st.integers(1, 4), st.booleans(), seeds
)
def test_both_ways_to_the_gram_matrix_agree(leading, i, o, ids, seed):
    j, v, n, t = leading
    j = 1 if ids else j
    inputs = labels((1, n, t), i, seed) if ids else normal((j, n, t, i), seed)
    shape = (i, o) if ids else (j * o, i)
    pairs = ExampleGradients(inputs, normal((j, v, n, t, o), seed + 1), "w", None, shape, False)
    rows = pairs.matrices().flatten(2).flatten(0, 1)
    torch.testing.assert_close(pairs.gram(), rows @ rows.T)


def test_a_block_of_the_parameters_has_their_columns_only():
    case = convnet()
    whole, evidence = measured(case)
    layers = next(iter(evidence.measured.values()))
    columns = dict(
        zip(
            case.params,
            whole.rows().split([p.numel() for p in case.params.values()], 1),
            strict=True,
        )
    )
    for names in (["0.weight"], ["0.bias", "4.weight"], ["1.bias"], ["1.weight", "4.bias"]):
        part = Gram.from_layers(layers, {k: case.params[k] for k in names})
        torch.testing.assert_close(part.rows(), torch.cat([columns[k] for k in names], 1))
        torch.testing.assert_close(part.gram(), sum(columns[k] @ columns[k].T for k in names))


def test_low_precision_is_lifted_before_any_product():
    case = mlp()
    need = LayerStatistics("empirical", others="rows", per_sample=True)
    params = {k: p.bfloat16() for k, p in case.params.items()}
    x, y = case.batch
    evidence = fp.observe(case.problem, params, (x.bfloat16(), y), (need,))
    gram = Gram.from_layers(evidence[need], params)
    assert gram.gram().dtype == torch.float32


def test_it_is_a_tree():
    gram, _ = measured(convnet())
    doubled = fp.tree.map(lambda x: x, gram)
    assert dataclasses.is_dataclass(doubled)
    torch.testing.assert_close(doubled.gram(), gram.gram())
