"""Where torch has no derivative, or none that is true: a sentence, or the same by other means."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

import funcprecond as fp
from funcprecond.linalg import treemath
from tests.autodiff.test_op_table import TOKENS, Body, build
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, normal

LABELS = torch.tensor([0, 2, 1])


def looking_up(**options):
    module = Body(nn.Embedding(3, 4, **options), nn.Linear(4, 2), 6)
    return fp.problem(initialised(module), fp.losses.cross_entropy)


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_is_no_function_of_its_weight_is_refused_untouched(options):
    problem = looking_up(**options)
    before = copy(problem.params)
    with pytest.raises(RuntimeError, match=f"embedding with {next(iter(options))}"):
        fp.observe(problem, problem.params, (TOKENS, LABELS))
    assert_same(problem.params, before)


def test_an_embedding_with_sparse_gradients_has_dense_ones():
    batch = (TOKENS, LABELS)
    sparse, dense = looking_up(sparse=True), looking_up()
    for of in (
        lambda p: fp.observe(p, p.params, batch).grads,
        lambda p: fp.Hessian(p, p.params, batch) @ p.params,
        lambda p: fp.GGN(p, p.params, batch) @ p.params,
    ):
        assert_same(of(sparse), of(dense))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("inside", [False, True])
def test_activation_checkpointing_is_refused_because_it_recomputes_elsewhere(inside):
    problem = fp.problem(initialised(Checkpointed()), fp.losses.cross_entropy)
    batch = (normal((3, 4)), LABELS)
    gradient = lambda p: fp.observe(problem, p, batch).grads  # noqa: E731
    if inside:
        stacked = {k: p.unsqueeze(0) for k, p in problem.params.items()}
        gradient = lambda p: torch.vmap(lambda q: fp.observe(problem, q, batch).grads)(stacked)  # noqa: E731
    # Under vmap, older versions of torch refuse by themselves.
    own = "|vmap over _NoopSaveInputs" if inside else ""
    with pytest.raises(RuntimeError, match=f"checkpointing recomputes a layer{own}"):
        gradient(problem.params)


class CuDNN(TorchFunctionMode):
    """Whether cuDNN was allowed in each call of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.lstm:
            self.allowed.append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("twice", "training"), [(False, True), (True, True), (False, False)])
def test_recurrent_layers_take_cudnn_only_where_it_has_the_derivatives(twice, training):
    problem, batch = build("lstm")
    problem.module.train(training)
    before = torch.backends.cudnn.enabled
    with CuDNN() as seen:
        fp.Evaluation(problem, problem.params, batch, twice=twice).loss  # noqa: B018
    assert seen.allowed == [before and not twice and training]
    assert torch.backends.cudnn.enabled == before


# --------------------------------------------------------------------------- derivatives that lack
class CudnnRnn(torch.autograd.Function):
    """What cuDNN's layers do: a backward, and torch's documented message instead of a second."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return Once.apply(g, *ctx.saved_tensors)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        return g * (1 - x.tanh() ** 2)

    @staticmethod
    def backward(ctx, *_):
        msg = (
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not "
            "supported for CuDNN RNNs due to limitations in the CuDNN API."
        )
        raise RuntimeError(msg)


class Layer(nn.Module):
    """A function of one tensor as a layer; the two before and behind are innocent."""

    def __init__(self, function):
        super().__init__()
        self.function, self.inner = function, nn.Tanh()

    def forward(self, x):
        return self.inner(self.function(self.inner(x)))


class Flex(nn.Module):
    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        q = x.reshape(len(x), 1, 3, 2)
        return flex_attention(q, q, q).flatten(1)


CENTRES = normal((6, 6), 9)


def distances(x):
    return torch.cdist(x, CENTRES)


def distances_written_out(x):
    return (x.unsqueeze(-2) - CENTRES.unsqueeze(-3)).square().sum(-1).sqrt()


def differentiates_twice(function, x):
    """Whether this torch has the second derivative of a function."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), x)
    except RuntimeError:
        return False
    return True


LAYERS = {
    "cudnn": (Layer(CudnnRnn.apply), r"'body' \(Layer\).*twice: run it within.*cudnn"),
    "cdist": (Layer(distances), r"'body' \(Layer\).*twice: write the dist"),
    "bag": (nn.EmbeddingBag(3, 6), r"'before' \(EmbeddingBag\).*twice: use an Embedding"),
    "flex": (Flex(), r"'body' \(Flex\) cannot be differentiated here: use F.scaled_dot_product"),
}


def with_layer(name):
    layer, sentence = LAYERS[name]
    if name == "bag":
        return Body(layer, nn.Identity(), 6), TOKENS, sentence
    return Body(nn.Linear(4, 6), layer, 6), normal((3, 4)), sentence


# Newer versions of torch have more derivatives.
COMPLETE = {"cdist"} if differentiates_twice(distances, normal((3, 6))) else set()


@pytest.mark.filterwarnings("ignore:flex_attention")
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in COMPLETE])
@pytest.mark.parametrize("cls", [fp.Hessian, fp.GGN])
def test_a_layer_that_torch_cannot_differentiate_is_named_with_the_way_out(cls, name):
    module, x, sentence = with_layer(name)
    problem = fp.problem(initialised(module), fp.losses.cross_entropy)
    batch = (x, LABELS)
    for data in ({"batch": batch}, {"batches": [batch]}):
        with pytest.raises(NotImplementedError, match=sentence) as caught:
            cls(problem, problem.params, **data) @ problem.params
        assert caught.value.__cause__.__cause__ is None
    if name != "flex":
        # The way out that the sentence names.
        c = fp.KroneckerFactored(problem, problem.params, batch, labels="empirical")
        assert treemath.norm(c @ problem.params) > 0


@pytest.mark.parametrize("cls", [fp.Hessian, fp.GGN])
def test_distances_have_the_products_of_the_way_out_or_are_refused(cls):
    batch = (normal((3, 4)), LABELS)

    def product(function):
        module = Body(nn.Linear(4, 6), Layer(function), 6)
        problem = fp.problem(initialised(module), fp.losses.cross_entropy)
        return cls(problem, problem.params, batch) @ problem.params

    expected = product(distances_written_out)
    if "cdist" in COMPLETE:
        assert_close(product(distances), expected)
    else:
        with pytest.raises(NotImplementedError, match="write the distances out"):
            product(distances)


def recognising(lengths):
    """A small CTC problem whose lengths are made by ``lengths``, and its batch."""

    def ctc(outputs, targets):
        steps, words = (lengths([n] * len(outputs)) for n in (outputs.shape[1], 2))
        logs = outputs.log_softmax(-1).transpose(0, 1)
        return nn.functional.ctc_loss(logs, targets, steps, words)

    problem = fp.problem(initialised(nn.Linear(3, 4)), ctc)
    return problem, (normal((3, 5, 3)), torch.tensor([[1, 2], [3, 1], [2, 2]]))


@pytest.mark.parametrize("lengths", [tuple, torch.tensor])
def test_a_loss_that_torch_cannot_differentiate_is_named_with_the_way_out(lengths):
    problem, batch = recognising(lengths)
    for cls in (fp.Hessian, fp.GGN):
        with pytest.raises(NotImplementedError, match="the loss ctc .*twice: write the loss out"):
            cls(problem, problem.params, batch) @ problem.params
    for cls in (fp.KroneckerFactored, fp.DiagonalGGN, fp.Fisher):
        c = cls(problem, problem.params, batch, labels="empirical")
        assert treemath.norm(c @ problem.params) > 0


@pytest.mark.parametrize("lengths", [tuple, torch.tensor])
def test_the_empirical_fisher_of_ctc_is_that_of_its_central_differences(lengths):
    problem, (x, y) = recognising(lengths)
    point, step = treemath.ravel(problem.params), 1e-5

    def loss(vector, n):
        params = treemath.unravel(vector, problem.params)
        outputs, _ = problem.forward(params, {}, x[n : n + 1])
        return problem.loss(outputs, y[n : n + 1])

    steps = step * torch.eye(len(point), dtype=point.dtype)
    rows = torch.stack(
        [
            torch.stack([(loss(point + s, n) - loss(point - s, n)) / (2 * step) for s in steps])
            for n in range(len(x))
        ]
    )
    fisher = fp.Fisher(problem, problem.params, (x, y), labels="empirical").to_dense()
    assert_close(fisher, rows.mT @ rows / len(x), rtol=1e-7)
    grads = fp.per_sample_grads(problem, problem.params, (x, y))
    found = torch.cat([g.flatten(1) for g in grads.values()], 1)
    assert_close(found, rows, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_loss_without_a_rule_under_a_transform_is_named_there_with_the_way_out():
    def gradient(problem, batch):
        stacked = {k: p.unsqueeze(0) for k, p in problem.params.items()}
        return torch.vmap(lambda p: fp.observe(problem, p, batch).grads)(stacked)

    problem, batch = recognising(tuple)
    for asked in (gradient, empirical_under_vmap):
        with pytest.raises(NotImplementedError, match="loss.* differentiated here: .*as tensors"):
            asked(problem, batch)
    problem, batch = recognising(torch.tensor)
    for asked in (gradient, empirical_under_vmap):
        assert treemath.norm(asked(problem, batch)) > 0


def empirical_under_vmap(problem, batch):
    def cotangent(params):
        return fp.Evaluation(problem, params, batch).cotangents("empirical", ())[0]

    stacked = {k: p.unsqueeze(0) for k, p in problem.params.items()}
    return {"u": torch.vmap(cotangent)(stacked)}


def test_functions_given_to_hvp_are_explained_too():
    x = {"x": normal((3, 1, 2))}
    with pytest.raises(NotImplementedError, match="the function .*twice: write the distances out"):
        fp.hvp(lambda p: torch.cdist(p["x"], p["x"] + 1).sum(), x, x)
    layer = Layer(CudnnRnn.apply)
    with pytest.raises(NotImplementedError, match=r"a layer \(Layer\) cannot .* twice"):
        fp.hvp(lambda p: layer(p["x"]).sum(), {"x": normal((3, 6))}, {"x": normal((3, 6))})


def test_errors_of_another_kind_are_the_models_own():
    problem = fp.problem(lambda p, x: x @ p["w"], fp.losses.mse, params={"w": normal((3, 2))})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fp.observe(problem, problem.params, (normal((4, 5)), normal((4, 2))))
    assert caught.value.__cause__ is None
