"""Which calls are seen, what is not recorded, and where random numbers come from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.autodiff.recorder import Recorder
from tests.equality import assert_close
from tests.problems import initialised, normal, seeded


def watch(module_or_function, inputs, params=None):
    """The recorder of one run on named parameters, every call recorded."""
    if isinstance(module_or_function, nn.Module):
        params = {k: p.detach() for k, p in module_or_function.named_parameters()}

        def run(p, x):
            return torch.func.functional_call(module_or_function, p, x)
    else:
        run = module_or_function
    recorder = Recorder(params, tap=lambda z: z)
    with recorder:
        run(params, inputs)
    return recorder


def kinds(recorder):
    return [(type(c).__name__, c.weight, c.bias) for c in recorder.calls]


# --------------------------------------------------------------------------------------- calls seen
def test_linear_layers_are_seen_with_their_inputs():
    x = normal((5, 3))
    module = initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    recorder = watch(module, x)
    assert kinds(recorder) == [("Linear", "0.weight", "0.bias"), ("Linear", "2.weight", None)]
    assert_close(recorder.inputs[0], x)
    assert_close(recorder.inputs[1], torch.tanh(module[0](x)).detach())
    assert recorder.unrecorded == {}


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9), ("Convolution", "weight", "bias")),
        (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5), ("Convolution", "weight", "bias")),
        (
            nn.Conv3d(2, 3, 2, dilation=2, bias=False),
            (2, 2, 4, 4, 4),
            ("Convolution", "weight", None),
        ),
        (nn.LayerNorm(3), (2, 3), ("Scale", "weight", "bias")),
        (nn.LayerNorm((2, 3), bias=False), (2, 2, 3), ("Scale", "weight", None)),
        (nn.RMSNorm(3), (2, 3), ("Scale", "weight", None)),
        (nn.GroupNorm(2, 4), (2, 4, 3), ("Scale", "weight", "bias")),
        (nn.InstanceNorm1d(4, affine=True), (2, 4, 3), ("Scale", "weight", "bias")),
        (nn.BatchNorm1d(4).eval(), (2, 4), ("Scale", "weight", "bias")),
    ],
)
def test_a_layer_is_seen_by_its_parameter(module, inputs, expected):
    recorder = watch(initialised(module), normal(inputs))
    assert kinds(recorder) == [expected]
    assert recorder.unrecorded == {}


def test_an_embedding_is_seen_with_its_tokens():
    tokens = torch.tensor([[0, 2], [1, 1]])
    recorder = watch(initialised(nn.Embedding(3, 4, padding_idx=1)), tokens)
    assert kinds(recorder) == [("Embedding", "weight", None)]
    assert (recorder.calls[0].padding, recorder.calls[0].vocabulary) == (1, 3)
    assert torch.equal(recorder.inputs[0], tokens)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4).eval(),
    ],
)
def test_a_norm_layers_input_is_the_normalised_one_even_where_its_scale_is_zero(norm):
    norm, x = initialised(norm), normal((5, 4))
    with torch.no_grad():
        norm.weight[1] = 0.0
    (normalised,) = watch(norm, x).inputs
    bias = norm.bias if getattr(norm, "bias", None) is not None else 0.0
    assert_close((normalised * norm.weight + bias).detach(), norm(x).detach(), rtol=1e-9)


def test_attention_is_seen_into():
    module = initialised(nn.MultiheadAttention(4, 2, batch_first=True))
    x = normal((2, 3, 4))

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    recorder = watch(Self(), x)
    assert "attention.out_proj.weight" in {c.weight for c in recorder.calls}
    assert set(recorder.unrecorded) <= {"attention.in_proj_weight", "attention.in_proj_bias"}


@pytest.mark.parametrize(
    ("call", "inputs_first"),
    [
        (lambda p, x: x @ p["w"].T, False),
        (lambda p, x: torch.matmul(x, p["w"].t()), False),
        (lambda p, x: x.matmul(p["w"].mT), False),
        (lambda p, x: F.linear(input=x, weight=p["w"]), False),
        (lambda p, x: x @ p["v"], True),
        (lambda p, x: F.linear(x, p["v"].T), True),
    ],
)
def test_a_product_with_a_weight_is_a_linear_layer(call, inputs_first):
    recorder = watch(call, normal((5, 3)), {"w": normal((4, 3)), "v": normal((3, 4))})
    assert [c.stored_inputs_first for c in recorder.calls] == [inputs_first]
    assert recorder.unrecorded == {}


def test_every_use_of_a_shared_weight_is_seen():
    def tied(p, tokens):
        h = torch.tanh(F.embedding(tokens, p["e"]))
        return F.linear(F.linear(h, p["w"]), p["e"])

    recorder = watch(tied, torch.tensor([[0, 1]]), {"e": normal((5, 3)), "w": normal((3, 3))})
    assert [(type(c).__name__, c.weight) for c in recorder.calls] == [
        ("Embedding", "e"),
        ("Linear", "w"),
        ("Linear", "e"),
    ]


# ------------------------------------------------------------------------------------- unrecorded
W, V = {"w": normal((3, 3))}, {"w": normal((3, 3)), "v": normal((3, 3))}


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x: torch.einsum("ni,oi,oo->no", x, p["w"], p["w"]),
        lambda p, x: torch.einsum("ni,oi->no", x, p["w"].exp()),
        lambda p, x: p["w"].tril() @ x.T,
        lambda p, x: F.linear(x, p["w"] * p["w"]),
        lambda p, x: F.linear(x, p["w"][:, :2].repeat(1, 2)[:, :3]),
        lambda p, x: F.linear(x, p["w"]) + p["w"].sum(),
        lambda p, x: x * p["w"].view(-1)[::4],
        lambda p, x: F.linear(x, p["w"].view(3, 3, 1).expand(3, 3, 2).mean(-1)),
        lambda p, x: x / p["w"][0],
        lambda p, x: x - p["w"][0],
        lambda p, x: torch.stack([p["w"], p["w"]]).sum(0) @ x.T,
        lambda p, x: x * p["w"].diagonal(),
    ],
)
def test_a_use_that_is_no_recorded_call_is_reported(call):
    assert "w" in watch(call, normal((5, 3)), W).unrecorded


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x: F.linear(p["w"], p["v"]),
        lambda p, x: p["w"] @ p["v"],
        lambda p, x: p["w"].T @ p["v"],
        lambda p, x: F.layer_norm(p["w"], (3,), p["v"][0].clone()),
        lambda p, x: F.linear(x, p["v"]) + F.linear(p["w"], p["v"]).sum(),
    ],
)
def test_a_parameter_that_is_the_input_of_a_layer_is_reported(call):
    """Its gradient does not come from its own layer's pairs alone."""
    assert "w" in watch(call, normal((5, 3)), V).unrecorded


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(3, 4, proj_size=2, batch_first=True), nn.EmbeddingBag(3, 4), nn.PReLU()],
)
def test_layers_without_a_formula_are_reported(module):
    module = initialised(module)
    inputs = torch.tensor([[0, 2]]) if isinstance(module, nn.EmbeddingBag) else normal((2, 3, 3))
    recorder = watch(module, inputs)
    assert set(recorder.unrecorded) == {k for k, _ in module.named_parameters()}


def test_looking_at_a_parameters_shape_is_no_use():
    def model(p, x):
        assert p["w"].shape[0] == p["w"].size(0) == len(p["w"])
        assert p["w"].dtype.is_floating_point
        return F.linear(x, p["w"])

    assert watch(model, normal((5, 3)), W).unrecorded == {}


def test_a_mode_records_nothing_without_a_tap():
    recorder, x = Recorder(W), normal((5, 3))
    with recorder:
        F.linear(x, W["w"])
    assert recorder.calls == []


# ------------------------------------------------------------------------------------------ noise
DROPOUTS = [
    (F.dropout, (200, 50), 1),
    (F.dropout1d, (200, 50, 4), 4),
    (F.dropout2d, (200, 50, 2, 2), 4),
    (F.dropout3d, (200, 50, 1, 2, 2), 4),
]


def run(function, x, **options):
    recorder = Recorder({}, generator=seeded(0), **options)
    with recorder:
        return function(x), recorder


@pytest.mark.parametrize(("dropout", "shape", "shared"), DROPOUTS)
def test_dropout_keeps_the_mean_and_drops_whole_channels(dropout, shape, shared):
    out, recorder = run(lambda x: dropout(x, 0.3, True), torch.ones(shape, dtype=torch.float64))
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    flat = out.reshape(shape[0], shape[1], -1)
    assert (flat == flat[..., :1]).all()
    assert recorder.masks[0].numel() == out.numel() // shared


@pytest.mark.parametrize("dropout", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout_keeps_mean_and_variance(dropout):
    x = normal((400, 400))
    out, _ = run(lambda x: dropout(x, 0.3, True), x)
    assert out.mean().item() == pytest.approx(0.0, abs=0.01)
    assert out.var().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dropout", [F.dropout, F.dropout2d, F.alpha_dropout])
def test_dropping_everything_gives_zeros_as_torchs_does(dropout):
    x = normal((2, 3, 4, 4))
    out, _ = run(lambda x: dropout(x, 1.0, True), x)
    assert_close(out, dropout(x, 1.0, True), rtol=1e-12)


@pytest.mark.parametrize("dropout", [F.dropout, F.alpha_dropout])
def test_no_dropout_outside_of_training(dropout):
    x = normal((4, 5))
    out, recorder = run(lambda x: dropout(x, 0.5, False), x)
    assert torch.equal(out, x)
    assert recorder.masks == []


def test_given_masks_are_used_in_order():
    x = torch.ones(3, 4, dtype=torch.float64)
    _, first = run(lambda x: F.dropout(F.dropout(x, 0.5), 0.2), x)
    again = Recorder({}, masks=tuple(first.masks))
    with again:
        out = F.dropout(F.dropout(x, 0.5), 0.2)
    a, b = first.masks
    assert_close(out, x * a / 0.5 * b / 0.8, rtol=1e-14)


def test_without_masks_or_generator_dropout_says_what_to_pass():
    with pytest.raises(ValueError, match="pass generator="), Recorder({}):
        F.dropout(torch.ones(3), 0.5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand_like(x),
        lambda x: x + torch.randn(3),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: x.clone().normal_(),
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.rrelu(x, training=True),
        lambda x: torch.dropout(x, 0.5, True),
        lambda x: torch.poisson(x.abs()),
        lambda x: x.clone().exponential_(),
        lambda x: F.fractional_max_pool2d(x.expand(1, 3, 3), 2, output_size=1),
    ],
)
def test_randomness_that_no_generator_controls_is_refused(draw):
    x = normal((3,))
    with pytest.raises(RuntimeError, match="no generator controls"), Recorder({}):
        draw(x)


def test_dropout_inside_a_recurrent_layer_is_drawn_from_the_generator_or_refused():
    x = normal((2, 5, 3))
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True).double()
    out, recorder = run(lambda x: lstm(x)[0], x)
    assert [mask.shape for mask in recorder.masks] == [(2, 5, 4)]
    (mask,) = recorder.masks
    first, second = nn.LSTM(3, 4, batch_first=True).double(), nn.LSTM(4, 4, batch_first=True)
    weights = lstm.state_dict()
    first.load_state_dict({k: w for k, w in weights.items() if k.endswith("l0")})
    second = second.double()
    second.load_state_dict({k.replace("l1", "l0"): w for k, w in weights.items() if "l1" in k})
    assert_close(out, second(first(x)[0] * mask / 0.5)[0], rtol=1e-12)
    with pytest.raises(ValueError, match="no generator was given"), Recorder({}):
        lstm(x)
    with Recorder({}):
        lstm.eval()(x)
    packed = nn.utils.rnn.pack_sequence([x[0], x[1, :3]])
    with pytest.raises(RuntimeError, match="no generator controls"), Recorder({}):
        lstm.train()(packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
def test_a_recurrent_layer_that_is_written_out_equals_torchs(kind, options, dtype):
    module = initialised(kind(3, 4, **options), dtype=dtype)
    params, x = dict(module.named_parameters()), normal((2, 5, 3), dtype=dtype)
    recorder = Recorder(params, tap=lambda z: z)
    with recorder:
        out, last = module(x)
    expected, expected_last = module(x)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5}
    assert_close(out, expected, **tolerance)
    assert_close(last, expected_last, **tolerance)
    assert not recorder.unrecorded
    used = {k for call in recorder.calls for k in (call.weight, call.bias) if k}
    assert used == {*params}


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_the_cell_of_a_recurrent_layer_is_two_linear_layers(cell):
    module = initialised(cell(3, 4))
    params = dict(module.named_parameters())
    recorder = Recorder(params, tap=lambda z: z)
    x, state = normal((2, 3)), normal((2, 4), 1)
    state = (state, normal((2, 4), 2)) if cell is nn.LSTMCell else state
    with recorder:
        out = module(x, state)
    assert_close(out, module(x, state), rtol=1e-12)
    assert [call.block for call in recorder.calls] == [
        "weight_ih+bias_ih",
        "weight_hh+bias_hh",
    ]


def test_rrelu_in_eval_mode_draws_nothing():
    x = normal((3,))
    with Recorder({}):
        out = nn.RReLU().eval()(x)
    assert_close(out, F.rrelu(x, training=False))


# -------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize(
    ("mask", "causal"), [(None, False), (None, True), ("bool", False), ("float", False)]
)
def test_attention_with_dropout_masks_that_keep_all_is_attention(causal, mask):
    q, k, v = (normal((2, 2, 4, 3), i) for i in range(3))
    masks = {"bool": normal((4, 4), 5) > -0.5, "float": normal((4, 4), 5), None: None}
    attend = masks[mask]
    if mask == "bool":
        attend = attend | torch.eye(4, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, attend, 0.0, causal)
    kept = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    with Recorder({}, masks=(kept,)):
        out = F.scaled_dot_product_attention(q, k, v, attend, 0.25, causal)
    assert_close(out, expected / 0.75, rtol=1e-10)


def test_grouped_queries_share_keys_under_dropout():
    q, k, v = normal((2, 4, 5, 3)), normal((2, 2, 5, 3), 1), normal((2, 2, 5, 3), 2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with Recorder({}, masks=(torch.ones(2, 4, 5, 5, dtype=torch.bool),)):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
    assert_close(out, 2 * expected, rtol=1e-10)


# --------------------------------------------------------------------------- the rebuilt gradient
def test_inputs_and_output_gradients_rebuild_the_gradient():
    """The guard of facts/recorder.md, for a weight used twice, a bias and a transposed product."""

    def model(p, x):
        h = torch.tanh(F.linear(x, p["w"], p["b"]))
        h = torch.tanh(F.linear(h, p["w"], p["b"]))
        return h @ p["v"].T

    params = {"w": normal((3, 3)), "b": normal((3,), 1), "v": normal((2, 3), 2)}
    problem = fp.problem(model, fp.losses.mse, params=params)
    evaluation = Evaluation(problem, params, (normal((5, 3)), normal((5, 2), 1)), layers=True)
    rebuilt = {k: torch.zeros_like(p) for k, p in params.items()}
    for call, a, g in zip(
        evaluation.calls, evaluation.layer_inputs, evaluation.layer_grads, strict=True
    ):
        rebuilt[call.weight] = rebuilt[call.weight] + g.T @ a
        if call.bias:
            rebuilt[call.bias] = rebuilt[call.bias] + g.sum(0)
    assert_close(rebuilt, evaluation.grads, rtol=1e-12)
