"""K-FAC's factors against dense Fisher matrices, where the approximation is exact."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import split_block
from funcprecond.layers.kinds.affine import with_ones
from funcprecond.representation.kronecker_io import KroneckerIO
from tests import problems, reference


def measured(problem, batch, need, seed=0):
    evidence = fp.observe(problem, problem.params, batch, (need,), generator=problems.seeded(seed))
    return evidence, evidence[need]


def accumulated(problem, batch, need, decay=None, seed=0):
    value = measured(problem, batch, need, seed)[1]
    return KroneckerIO.init(problem.params).accumulate(value, decay)


def dense_block(matrix, params, block):
    """Rows and columns of ``[W | b]``, row by row of W, from a matrix over all parameters."""
    index, start = {}, 0
    for name, p in params.items():
        index[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    weight, bias = split_block(block)
    order = index[weight].flatten(1)
    if bias is not None:
        order = torch.cat([order, index[bias].unsqueeze(1)], 1)
    return matrix[order.reshape(-1)][:, order.reshape(-1)]


def classifier(*modules, **options):
    model = problems.initialised(nn.Sequential(*modules))
    return fp.problem(model, fp.losses.CrossEntropy(**options))


def test_one_linear_layer_with_squared_error_is_exact():
    problem = fp.problem(problems.initialised(nn.Linear(4, 3)), fp.losses.mse)
    batch = (problems.normal((7, 4)), problems.normal((7, 3), 1))
    rep = accumulated(problem, batch, LayerStatistics("exact"))
    torch.testing.assert_close(
        rep.block("weight+bias"),
        dense_block(reference.ggn(problem, problem.params, batch), problem.params, "weight+bias"),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_one_datum_is_exact_for_any_net(bias):
    problem = classifier(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))
    batch = (problems.normal((1, 3)), torch.tensor([1]))
    rep = accumulated(problem, batch, LayerStatistics("exact"))
    fisher = reference.fisher(problem, problem.params, batch)
    for block in rep.left:
        expected = dense_block(fisher, problem.params, block)
        torch.testing.assert_close(rep.block(block), expected)
    assert len(rep.left) == 2


class Shared(nn.Module):
    """A deep linear net applied at each of the positions; outputs by position, or their sum."""

    def __init__(self, pooled):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.pooled = pooled

    def forward(self, x):
        out = self.second(self.first(x))
        return out.sum(1) if self.pooled else out


@pytest.mark.parametrize(("pooled", "exact"), [(False, "expand"), (True, "reduce")])
def test_each_sharing_is_exact_for_deep_linear_nets_of_its_kind(pooled, exact):
    problem = fp.problem(problems.initialised(Shared(pooled)), fp.losses.mse)
    inputs = problems.normal((5, 3, 3))
    batch = (inputs, torch.zeros_like(problem(problem.params, inputs)))
    ggn = reference.ggn(problem, problem.params, batch)
    errors = {}
    for sharing in ("expand", "reduce"):
        rep = accumulated(problem, batch, LayerStatistics("exact", sharing=sharing))
        errors[sharing] = max(
            float((rep.block(b) - dense_block(ggn, problem.params, b)).abs().max())
            for b in rep.left
        )
    other = "reduce" if exact == "expand" else "expand"
    assert errors[exact] < 1e-12
    if pooled:
        assert errors[other] > 1e-2


def test_sampled_labels_average_to_the_exact_factors():
    problem = classifier(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = (problems.normal((1, 3)), torch.tensor([0]))
    p = problem(problem.params, batch[0]).softmax(-1)[0]
    middle = p.cumsum(0) - p / 2  # a uniform number that selects each label
    need = LayerStatistics("mc")
    exact = accumulated(problem, batch, LayerStatistics("exact"))
    for block in exact.left:
        mean = 0
        for y in range(3):
            noise = fp.Noise((), {need: middle[y].reshape(1, 1)})
            evidence = fp.observe(problem, problem.params, batch, (need,), noise=noise)
            rep = KroneckerIO.init(problem.params).accumulate(evidence[need], None)
            mean = mean + p[y] * rep.left[block]
        torch.testing.assert_close(mean, exact.left[block])


@pytest.mark.parametrize("labels", ["mc", "exact"])
def test_factors_carry_the_losses_reduction(labels):
    batch = (problems.normal((5, 3)), torch.tensor([0, 1, -100, 2, 1]))
    blocks = {}
    for reduction in ("mean", "sum"):
        problem = classifier(nn.Linear(3, 3), reduction=reduction)
        rep = accumulated(problem, batch, LayerStatistics(labels))
        blocks[reduction] = rep.block("0.weight+0.bias")
    torch.testing.assert_close(4 * blocks["mean"], blocks["sum"])


def test_empirical_rows_rebuild_the_empirical_fisher_of_one_datum():
    problem = classifier(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = (problems.normal((1, 3)), torch.tensor([2]))
    evidence, value = measured(problem, batch, LayerStatistics("empirical"))
    rep = KroneckerIO.init(problem.params).accumulate(value, None)
    for block in rep.left:
        weight, bias = split_block(block)
        g = torch.cat([evidence.grads[weight], evidence.grads[bias].unsqueeze(1)], 1).reshape(-1)
        torch.testing.assert_close(rep.block(block), torch.outer(g, g))


def test_an_embedding_is_a_linear_layer_of_one_hot_inputs():
    ids, targets = torch.tensor([[0, 2, 2], [4, 1, 0]]), torch.tensor([0, 2])
    table = problems.normal((5, 3))

    onehot = F.one_hot(ids, 5).to(torch.float64)
    models = [
        (ids, lambda p, x: F.embedding(x, p["w"]).sum(1).tanh()),
        (onehot, lambda p, x: (x @ p["w"]).sum(1).tanh()),
        (onehot, lambda p, x: F.linear(x, p["w"].T).sum(1).tanh()),
    ]
    blocks = [
        accumulated(
            fp.problem(model, fp.losses.cross_entropy, params={"w": table}),
            (inputs, targets),
            LayerStatistics("exact"),
        ).block("w")
        for inputs, model in models
    ]
    torch.testing.assert_close(blocks[1], blocks[0])
    torch.testing.assert_close(blocks[2], blocks[0])


def test_padding_tokens_count_neither_in_the_frequencies_nor_in_the_gradients():
    def model(params, x, padding_idx=None):
        return F.embedding(x, params["w"], padding_idx).sum(1).tanh()

    table = problems.normal((5, 3))
    problem = fp.problem(lambda p, x: model(p, x, 0), fp.losses.cross_entropy, params={"w": table})
    rep = accumulated(
        problem, (torch.tensor([[0, 2], [3, 0]]), torch.tensor([0, 2])), LayerStatistics()
    )
    torch.testing.assert_close(
        rep.left["w"], torch.tensor([0, 0, 0.5, 0.5, 0], dtype=torch.float64)
    )


CONVS = [
    (nn.Conv1d, {"stride": 2, "padding": 1, "dilation": 2}),
    (nn.Conv1d, {"groups": 2, "bias": False}),
    (nn.Conv2d, {"padding": "same", "dilation": 2}),
    (nn.Conv2d, {"stride": (1, 2), "padding": (1, 0), "groups": 2}),
    (nn.Conv2d, {"padding": "valid"}),
    (nn.Conv3d, {"padding": 1, "stride": 2}),
]


@pytest.mark.parametrize(("layer", "options"), CONVS, ids=lambda x: str(x))
def test_convolution_rows_rebuild_the_gradient(layer, options):
    conv = layer(2, 4, 2 if layer is nn.Conv3d else 3, **options)
    dims = conv.weight.ndim - 2
    problem = classifier(conv, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    batch = (problems.normal((3, 2, *(7, 6, 5)[:dims])), torch.tensor([0, 3, 1]))
    evidence, value = measured(problem, batch, LayerStatistics("empirical"))
    ((block, (use,)),) = value.uses.items()
    a = use.call.input_rows(use.inputs).flatten(-3, -2)
    a = a if conv.bias is None else with_ones(a)
    matrix = (use.call.output_rows(use, "expand").mT @ a).reshape(4, -1)
    weight, bias = split_block(block)
    grads = evidence.grads[weight].flatten(1)
    if bias:
        grads = torch.cat([grads, evidence.grads[bias].unsqueeze(1)], 1)
    torch.testing.assert_close(matrix, grads)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_one_position_and_one_datum_is_exact(groups):
    problem = classifier(
        nn.Conv2d(2, 4, 3, groups=groups), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)
    )
    batch = (problems.normal((1, 2, 3, 3)), torch.tensor([1]))
    rep = accumulated(problem, batch, LayerStatistics("exact"))
    fisher = dense_block(
        reference.fisher(problem, problem.params, batch), problem.params, "0.weight+0.bias"
    )
    block = rep.block("0.weight+0.bias")
    # Between groups the model has zeros where the matrix does not.
    torch.testing.assert_close(block, fisher * (block != 0) if groups > 1 else fisher)
    assert int((block != 0).sum()) == block.numel() // groups


def test_a_kernel_of_one_pixel_is_a_linear_layer_on_pixels():
    conv = problems.initialised(nn.Conv2d(2, 3, 1))
    linear = nn.Linear(2, 3).to(torch.float64)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x = problems.normal((4, 2, 3, 3))
    targets = torch.arange(36).reshape(4, 9) % 3

    class Pixels(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if isinstance(self.layer, nn.Conv2d):
                return self.layer(x).flatten(2).mT
            return self.layer(x.flatten(2).mT)

    reps = [
        accumulated(fp.problem(Pixels(m), fp.losses.cross_entropy), (x, targets), LayerStatistics())
        for m in (conv, linear)
    ]
    torch.testing.assert_close(*(r.block("layer.weight+layer.bias") for r in reps))


def test_a_layer_called_twice_adds_its_positions():
    shared = problems.initialised(nn.Linear(3, 3))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = shared

        def forward(self, x):
            return self.layer(x[:, 0]) + self.layer(x[:, 1])

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = shared

        def forward(self, x):
            return self.layer(x).sum(1)

    batch = (problems.normal((4, 2, 3)), torch.tensor([0, 1, 2, 0]))
    reps = [
        accumulated(fp.problem(m, fp.losses.cross_entropy), batch, LayerStatistics("exact"))
        for m in (Twice(), Once())
    ]
    torch.testing.assert_close(*(r.block("layer.weight+layer.bias") for r in reps))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm1d(4).eval()]
)
def test_norm_layers_have_their_exact_empirical_blocks(norm):
    problem = classifier(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3))
    batch = (problems.normal((6, 3)), torch.arange(6) % 3)
    rep = accumulated(problem, batch, LayerStatistics("empirical"))
    rows = reference.per_example(problem, problem.params, batch)
    fisher = rows.T @ rows / 6
    ((block, units),) = rep.units.items()
    names = [name for name in split_block(block) if name]
    index, start = {}, 0
    for name, p in problem.params.items():
        index[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    for u in range(4):
        chosen = torch.stack([index[name][u] for name in names])
        torch.testing.assert_close(units[u], fisher[chosen][:, chosen])


def test_uncovered_parameters_have_their_exact_diagonal():
    params = {"w": problems.normal((3, 3)), "scale": problems.normal((3,), 1)}

    def model(p, x):
        return F.linear(x, p["w"]) / p["scale"]

    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = (problems.normal((4, 3)), torch.tensor([0, 1, 2, 0]))
    rep = accumulated(problem, batch, LayerStatistics("exact"))
    assert list(rep.others) == ["scale"]
    diagonal = reference.fisher(problem, params, batch).diagonal()[9:]
    torch.testing.assert_close(rep.others["scale"], diagonal)


@given(st.floats(0.0, 0.99), st.integers(1, 4))
def test_the_average_weighs_old_values_by_powers_of_the_decay(decay, steps):
    toy = problems.mlp()
    need = LayerStatistics("empirical")
    rep, values = KroneckerIO.init(toy.params), []
    for t in range(steps):
        value = measured(toy.problem, toy.at(t), need)[1]
        rep = rep.accumulate(value, decay)
        values.append(KroneckerIO.init(toy.params).accumulate(value, None).left["0.weight+0.bias"])
    weights = [decay ** (steps - 1 - t) for t in range(steps)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    torch.testing.assert_close(rep.left["0.weight+0.bias"] / rep.normalizer, expected)


def test_a_part_of_the_parameters_is_measured_alone():
    toy = problems.mlp()
    value = measured(toy.problem, toy.batch, LayerStatistics("empirical"))[1]
    part = {k: toy.params[k] for k in ("2.weight", "2.bias")}
    assert list(KroneckerIO.init(part).accumulate(value, None).left) == ["2.weight+2.bias"]
    bias = {"2.bias": toy.params["2.bias"]}
    alone = KroneckerIO.init(bias).accumulate(value, None)
    rows = reference.per_example(toy.problem, toy.params, toy.batch)[:, -3:]
    torch.testing.assert_close(alone.block("2.bias"), rows.mT @ rows / len(rows))
