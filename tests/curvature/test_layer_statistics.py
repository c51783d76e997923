"""Layer statistics against dense Fisher matrices: ``scale U^T U`` from pairs, row by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics, layer_statistics
from funcprecond.layers.blocks import split_block
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.patches import unfold
from funcprecond.operators.diagonal import diagonal_of
from funcprecond.representation.kronecker_io import KroneckerIO
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import Toy, initialised, normal, seeded

N = 4


def toy_of(module, inputs, loss=fp.losses.cross_entropy, targets=None):
    x = inputs if isinstance(inputs, torch.Tensor) else normal(inputs)
    y = torch.arange(N) % 3 if targets is None else targets
    return Toy(fp.problem(initialised(module), loss), ((x, y),))


def flat(*layers):
    return nn.Sequential(*layers)


TOKENS = torch.tensor([[0, 1, 1], [2, 2, 0], [1, 0, 2], [0, 0, 0]])
SEQUENCE_LABELS = torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])
TOYS = {
    "mlp": lambda: problems.mlp(examples=N),
    "function": problems.mlp_function,
    "mse": problems.regression,
    "bce": lambda: toy_of(
        nn.Linear(3, 2), (N, 3), fp.losses.bce_with_logits, (normal((N, 2)) > 0).double()
    ),
    "sum": lambda: toy_of(nn.Linear(3, 3), (N, 3), fp.losses.CrossEntropy(reduction="sum")),
    "sequences with ignored labels": lambda: toy_of(
        flat(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (N, 2, 3), targets=SEQUENCE_LABELS
    ),
    "conv": lambda: toy_of(
        flat(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (N, 2, 4, 4)
    ),
    "conv, grouped, dilated, padded": lambda: toy_of(
        flat(nn.Conv2d(2, 4, 2, padding=1, dilation=2, groups=2), nn.Flatten(), nn.Linear(64, 3)),
        (N, 2, 4, 4),
    ),
    "conv1d, same": lambda: toy_of(
        flat(nn.Conv1d(2, 3, 3, padding="same", bias=False), nn.Flatten(), nn.Linear(15, 3)),
        (N, 2, 5),
    ),
    "embedding": lambda: toy_of(
        flat(nn.Embedding(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)), TOKENS
    ),
    "embedding with padding": lambda: toy_of(
        flat(nn.Embedding(3, 2, padding_idx=1), nn.Flatten(), nn.Linear(6, 3)), TOKENS
    ),
    "layer norm": lambda: toy_of(flat(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (N, 3)),
    "rms norm": lambda: toy_of(flat(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 3)), (N, 3)),
    "group norm": lambda: toy_of(
        flat(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)), (N, 2, 3)
    ),
    "batch norm, eval": lambda: toy_of(
        flat(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)), (N, 3)
    ),
}
every_toy = pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())


def gradients(use, block):
    """(V N, P_block): each example's gradient from its rows, written out by kind."""
    call, bias = use.call, split_block(block)[1] is not None
    if isinstance(call, Scale):
        a, g = call.rows(use.inputs, 1), call.rows(use.grads, 2)
        weight, extra = (g * a).sum(2), [g.sum(2)]
    elif isinstance(call, Embedding):
        one_hot = F.one_hot(call.input_rows(use.inputs), call.vocabulary).double()
        g = call.grad_rows(use.grads, use.inputs)
        if call.padding is not None:
            one_hot[..., call.padding] = 0.0
        weight, extra = torch.einsum("vntd,ntw->vnwd", g, one_hot).flatten(2), []
    else:
        a, g = call.input_rows(use.inputs), call.grad_rows(use.grads, use.inputs)
        if call.groups == 1:
            a, g = a.unsqueeze(0), g.unsqueeze(0)
        weight = torch.einsum("jvnto,jnti->vnjoi", g, a).flatten(2)
        extra = [torch.einsum("jvnto->vnjo", g).flatten(2)]
    return torch.cat([weight, *(extra if bias else [])], -1).flatten(0, 1)


def blocks_of(toy, need, generator=None):
    """{names of a block: its dense matrix} from the pairs, and the diagonals of the others."""
    layers = fp.observe(toy.problem, toy.params, toy.batch, (need,), generator=generator)[need]
    found = {}
    for block, uses in layers.uses.items():
        rows = sum(gradients(use, block) for use in uses)
        found[tuple(p for p in split_block(block) if p)] = layers.scale * rows.T @ rows
    return found, {k: layers.scale * d for k, d in layers.others.items()}


def part(matrix, params, names):
    """The rows and columns of a dense matrix that belong to some parameters."""
    start, index = 0, []
    places = {}
    for k, p in params.items():
        places[k] = list(range(start, start + p.numel()))
        start += p.numel()
    for name in names:
        index += places[name]
    return matrix[index][:, index]


@every_toy
def test_exact_labels_give_the_gauss_newton_blocks(make):
    toy = make()
    dense = reference.ggn(toy.problem, toy.params, toy.batch)
    found, others = blocks_of(toy, LayerStatistics("exact"))
    assert {n for names in found for n in names} | others.keys() == toy.params.keys()
    for names, matrix in found.items():
        assert_close(matrix, part(dense, toy.params, names), rtol=1e-8)


@every_toy
def test_empirical_labels_give_the_empirical_fisher_blocks(make):
    """``c sum_n g_n g_n^T``, with g_n the gradient of the sum of the example's terms."""
    toy = make()
    e = fp.Evaluation(toy.problem, toy.params, toy.batch)
    u = toy.problem.loss.empirical(e.outputs, e.targets)
    rows = []
    for n in range(len(u)):
        alone = torch.zeros_like(u)
        alone[n] = u[n]
        rows.append(reference.ravel(e.pull(alone)))
    rows = torch.stack(rows)
    dense = toy.problem.loss.constant(e.outputs, e.targets) * rows.T @ rows
    found, _ = blocks_of(toy, LayerStatistics("empirical"))
    for names, matrix in found.items():
        assert_close(matrix, part(dense, toy.params, names), rtol=1e-8)


@every_toy
@pytest.mark.parametrize("labels", ["empirical", "exact"])
def test_in_parts_of_few_cotangents_the_sum_of_the_squares_is_the_same(make, labels):
    toy, need = make(), LayerStatistics(labels, per_sample=True)

    def opened():
        return fp.Evaluation(toy.problem, toy.params, toy.batch, layers=True)

    whole = diagonal_of(need.measure(opened(), ()), toy.params)
    parts = [diagonal_of(part, toy.params) for part in need.each(opened(), ())]
    total = {k: torch.stack([part[k] for part in parts]).sum(0) for k in whole}
    assert_close(total, whole, rtol=1e-9)


@every_toy
def test_sampled_labels_give_the_gauss_newton_blocks_in_the_mean(make):
    toy = make()
    dense = reference.ggn(toy.problem, toy.params, toy.batch)
    found, _ = blocks_of(toy, LayerStatistics("mc", 3000), seeded(0))
    for names, matrix in found.items():
        expected = part(dense, toy.params, names)
        assert (matrix - expected).norm() < 0.1 * expected.norm()


def test_pairs_of_empirical_labels_rebuild_the_gradient():
    toy = problems.convnet()
    need = LayerStatistics("empirical")
    evidence = fp.observe(toy.problem, toy.params, toy.batch, (need,))
    for block, uses in evidence[need].uses.items():
        rows = sum(gradients(use, block) for use in uses).sum(0)
        names = [p for p in split_block(block) if p]
        assert_close(rows, torch.cat([evidence.grads[k].reshape(-1) for k in names]), rtol=1e-9)


# --------------------------------------------------------------------------------------- fallbacks
def scaled(p, x):
    return F.linear(x / p["scale"], p["w"], p["b"]) * p["factor"].exp()


def fallback() -> Toy:
    params = {
        "scale": normal((3,)),
        "w": normal((3, 3), 1),
        "b": normal((3,), 2),
        "factor": normal((), 3),
    }
    x, y = problems.labelled(N, 3, 3, 0)
    return Toy(fp.problem(scaled, fp.losses.cross_entropy, params=params), ((x, y),))


@pytest.mark.parametrize("labels", ["exact", "empirical"])
def test_parameters_outside_of_layers_have_their_diagonal_or_their_rows(labels):
    toy = fallback()
    if labels == "exact":
        dense = reference.ggn(toy.problem, toy.params, toy.batch)
    else:
        rows = reference.per_example(toy.problem, toy.params, toy.batch)
        dense = rows.T @ rows / N
    found, diagonals = blocks_of(toy, LayerStatistics(labels, others="diagonal"))
    assert set(found) == {("w", "b")}
    assert diagonals.keys() == {"scale", "factor"}
    need = LayerStatistics(labels, others="rows")
    layers = fp.observe(toy.problem, toy.params, toy.batch, (need,))[need]
    for name, d in diagonals.items():
        expected = part(dense, toy.params, [name])
        assert_close(d.reshape(-1), expected.diagonal(), rtol=1e-9)
        rows = layers.others[name].flatten(0, 1).reshape(-1, expected.shape[0])
        assert_close(layers.scale * rows.T @ rows, expected, rtol=1e-9)


def test_nothing_is_measured_of_the_others_if_so_asked():
    toy, need = fallback(), LayerStatistics("exact", others="none")
    assert fp.observe(toy.problem, toy.params, toy.batch, (need,))[need].others == {}


def test_a_weight_with_a_use_that_is_no_layer_falls_back():
    def model(p, x):
        return F.linear(x, p["w"]) + p["w"].sum()

    problem = fp.problem(model, fp.losses.cross_entropy, params={"w": normal((3, 3))})
    layers = layer_statistics(
        problem, problem.params, problems.labelled(N, 3, 3, 0), labels="exact"
    )
    assert layers.uses == {}
    assert layers.others.keys() == {"w"}


def test_a_weight_used_with_two_biases_keeps_its_block_and_each_bias_has_its_own():
    def model(p, x):
        return F.linear(F.linear(x, p["w"], p["a"]).tanh(), p["w"], p["b"])

    params = {"w": normal((3, 3)), "a": normal((3,), 1), "b": normal((3,), 2)}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = problems.labelled(N, 3, 3, 0)
    layers = layer_statistics(problem, params, batch, labels="exact")
    assert layers.uses.keys() == {"w", "a", "b"}
    assert len(layers.uses["w"]) == 2
    kept = KroneckerIO.init(params).accumulate(layers, None)
    dense = reference.ggn(problem, params, batch)
    for bias in ("a", "b"):
        assert_close(kept.block(bias), part(dense, params, [bias]))


def test_a_bias_used_elsewhere_leaves_its_layer_the_weight():
    def model(p, x):
        return F.linear(x, p["w"], p["b"]) + p["b"].square()

    params = {"w": normal((3, 3)), "b": normal((3,), 1)}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = problems.labelled(N, 3, 3, 0)
    layers = layer_statistics(problem, params, batch, labels="exact")
    assert layers.uses.keys() == {"w"}
    diagonal = part(reference.ggn(problem, params, batch), params, ["b"]).diagonal()
    assert_close(layers.scale * layers.others["b"], diagonal)


def test_a_deep_product_of_parameters_is_not_taken_for_layers():
    """``x (B A)^T``: A is the input of the layer of B; its own pairs would lie."""

    def model(p, x):
        return F.linear(x, F.linear(p["a"].T, p["b"]).T)

    params = {"a": normal((3, 3)), "b": normal((3, 3), 1)}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = problems.labelled(N, 3, 3, 0)
    layers = layer_statistics(problem, params, batch, labels="exact")
    dense = reference.ggn(problem, params, batch)
    assert "a" in layers.others
    expected = part(dense, params, ["a"]).diagonal()
    assert_close((layers.scale * layers.others["a"]).reshape(-1), expected, rtol=1e-9)


def test_a_shared_weight_has_all_of_its_uses():
    def model(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"])), p["w"])

    params = {"w": normal((3, 3))}
    toy = Toy(
        fp.problem(model, fp.losses.cross_entropy, params=params), (problems.labelled(N, 3, 3, 0),)
    )
    found, _ = blocks_of(toy, LayerStatistics("exact"))
    assert_close(found["w",], reference.ggn(toy.problem, params, toy.batch), rtol=1e-9)


def test_one_weight_in_two_kinds_of_layers_falls_back():
    def model(p, tokens):
        return F.linear(torch.tanh(F.embedding(tokens, p["e"])).mean(1), p["e"])

    problem = fp.problem(model, fp.losses.cross_entropy, params={"e": normal((3, 4))})
    batch = (TOKENS, torch.arange(N) % 3)
    layers = layer_statistics(problem, problem.params, batch, labels="exact")
    dense = reference.ggn(problem, problem.params, batch)
    diagonal = (layers.scale * layers.others["e"]).reshape(-1)
    assert_close(diagonal, dense.diagonal(), rtol=1e-9)


# ------------------------------------------------------------------------------------- small parts
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        (2, 1, 0, 1),
        (3, 2, 1, 1),
        (2, 1, 1, 2),
        (3, 1, "same", 1),
        (3, 1, "same", 2),
        (2, 2, "valid", 1),
    ],
)
def test_patches_times_the_flat_weight_are_the_convolution(dims, kernel, stride, padding, dilation):
    x, w = normal((2, 3) + (5,) * dims), normal((4, 3) + (kernel,) * dims, 1)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    expected = conv(x, w, None, stride, padding, dilation)
    pads = padding if isinstance(padding, str) else (padding,) * dims
    patches = unfold(x, (kernel,) * dims, (stride,) * dims, pads, (dilation,) * dims)
    assert_close(w.flatten(1) @ patches, expected.flatten(2), rtol=1e-10)


def test_patches_are_torchs_in_two_dimensions():
    x = normal((2, 3, 5, 6))
    expected = F.unfold(x, (2, 3), dilation=(2, 1), padding=(1, 0), stride=(1, 2))
    assert_close(unfold(x, (2, 3), (1, 2), (1, 0), (2, 1)), expected)


def test_a_block_is_named_by_its_weight_and_bias():
    assert split_block("fc.weight+fc.bias") == ("fc.weight", "fc.bias")
    assert split_block("fc.weight") == ("fc.weight", None)


@pytest.mark.parametrize("options", [{"labels": "true"}, {"samples": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        LayerStatistics(**options)


def test_sampling_from_a_loss_without_likelihood_says_so():
    problem = fp.problem(nn.Linear(3, 2), lambda f, y: (f - y).square().mean())
    with pytest.raises(TypeError, match="labels='empirical'"):
        layer_statistics(problem, problem.params, (normal((4, 3)).float(), normal((4, 2)).float()))


def test_a_matrix_outside_of_every_layer_is_said_and_a_vector_is_not():
    params = {"w": problems.normal((3, 3)), "shift": problems.normal((3,))}
    problem = fp.problem(
        lambda p, x: x @ p["w"].tril() + p["shift"],
        fp.losses.cross_entropy,
        params=params,
    )
    batch = (problems.normal((4, 3)), torch.tensor([0, 1, 2, 0]))
    with pytest.warns(UserWarning, match="'w' is used by tril.*only the diagonal") as said:
        fp.layer_statistics(problem, params, batch, labels="exact")
    assert len(said) == 1
