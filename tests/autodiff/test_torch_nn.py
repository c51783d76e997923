"""Every layer, activation and loss of ``torch.nn``: Hessian products are right or refused.

The classes are enumerated from ``torch.nn`` itself, so that a new one cannot be missed: it fails
the first test until it has a line here.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.func import functional_call

import funcprecond as fp
from tests.equality import assert_close
from tests.problems import initialised, normal

N, STEP = 2, 1e-5
ROW, LINE, PLANE, SPACE = (N, 6), (N, 4, 6), (N, 4, 4, 4), (N, 4, 2, 2, 2)
CLASSES = torch.tensor([1, 0])
TARGET = normal(ROW, 1)
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)


def first(layer, x):
    return layer(x)[0]


def unpooled(pool, unpool):
    """Unpooling takes the indices of a pooling."""

    def call(layer, x):
        pooled, indices = pool(x, return_indices=True)
        return layer(pooled, indices)

    return lambda: unpool(2), call


F = nn.functional
UNPOOL1 = unpooled(lambda x, **k: F.max_pool1d(x, 2, **k), nn.MaxUnpool1d)
UNPOOL2 = unpooled(lambda x, **k: F.max_pool2d(x, 2, **k), nn.MaxUnpool2d)
UNPOOL3 = unpooled(lambda x, **k: F.max_pool3d(x, 2, **k), nn.MaxUnpool3d)
IDS = torch.tensor([[0, 2, 1], [3, 3, 0]])


def plain(layer, x):
    return layer(x)


# The layer, the shape of its input, and how it is called.
SPECIAL = {
    "Threshold": (lambda: nn.Threshold(0.1, 0.2), ROW, plain),
    "Softmax": (lambda: nn.Softmax(-1), ROW, plain),
    "Softmin": (lambda: nn.Softmin(-1), ROW, plain),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), ROW, plain),
    "Softmax2d": (nn.Softmax2d, PLANE, plain),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        LINE,
        lambda layer, x: layer(x, x, x)[0],
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 8, [3]),
        ROW,
        lambda layer, x: layer(x, torch.tensor([1, 5])).output,
    ),
    "Transformer": (
        lambda: nn.Transformer(6, 2, 1, 1, 8, 0.0, batch_first=True),
        LINE,
        lambda layer, x: layer(x, x.flip(1)),
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 1
        ),
        LINE,
        plain,
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
        LINE,
        plain,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True), 1
        ),
        LINE,
        lambda layer, x: layer(x, x.flip(1)),
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True),
        LINE,
        lambda layer, x: layer(x, x.flip(1)),
    ),
    "Linear": (lambda: nn.Linear(6, 3), ROW, plain),
    "Bilinear": (lambda: nn.Bilinear(6, 6, 3), ROW, lambda layer, x: layer(x, x.flip(1))),
    "Identity": (nn.Identity, ROW, plain),
    "Flatten": (nn.Flatten, LINE, plain),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), ROW, plain),
    "Sequential": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh()), ROW, plain),
    "Embedding": (
        lambda: nn.Embedding(4, 6),
        ROW,
        lambda layer, x: layer(IDS) * x.unsqueeze(1),
    ),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(4, 6, mode="sum"),
        ROW,
        lambda layer, x: layer(IDS) * x,
    ),
    "RNN": (lambda: nn.RNN(6, 3, batch_first=True), LINE, first),
    "LSTM": (lambda: nn.LSTM(6, 3, batch_first=True), LINE, first),
    "GRU": (lambda: nn.GRU(6, 3, batch_first=True), LINE, first),
    "RNNCell": (lambda: nn.RNNCell(6, 3), ROW, plain),
    "LSTMCell": (lambda: nn.LSTMCell(6, 3), ROW, first),
    "GRUCell": (lambda: nn.GRUCell(6, 3), ROW, plain),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3), LINE, plain),
    "Conv2d": (lambda: nn.Conv2d(4, 3, 3), PLANE, plain),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 2), SPACE, plain),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), LINE, plain),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3), PLANE, plain),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 3, 2), SPACE, plain),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), ROW, plain),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), PLANE, plain),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), SPACE, plain),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), LINE, plain),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), LINE, plain),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), PLANE, plain),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), SPACE, plain),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), LINE, plain),
    "LayerNorm": (lambda: nn.LayerNorm(6), LINE, plain),
    "RMSNorm": (lambda: nn.RMSNorm(6), LINE, plain),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), LINE, plain),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), PLANE, plain),
    "Fold": (lambda: nn.Fold((3, 3), 2), (N, 4, 4), plain),
    "Unfold": (lambda: nn.Unfold(2), PLANE, plain),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), PLANE, plain),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), PLANE, plain),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), PLANE, plain),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), PLANE, plain),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), PLANE, plain),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), PLANE, plain),
    "MaxUnpool1d": (UNPOOL1[0], LINE, UNPOOL1[1]),
    "MaxUnpool2d": (UNPOOL2[0], PLANE, UNPOOL2[1]),
    "MaxUnpool3d": (UNPOOL3[0], SPACE, UNPOOL3[1]),
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(2, 2, _random_samples=torch.full((N, 4, 2), 0.3).double()),
        PLANE,
        plain,
    ),
    "FractionalMaxPool3d": (
        lambda: nn.FractionalMaxPool3d(2, 2, _random_samples=torch.full((N, 4, 3), 0.3).double()),
        (N, 4, 4, 4, 4),
        plain,
    ),
    "CosineSimilarity": (nn.CosineSimilarity, ROW, lambda layer, x: layer(x, x.flip(1) ** 2)),
    "PairwiseDistance": (nn.PairwiseDistance, ROW, lambda layer, x: layer(x, x.flip(1) ** 2)),
    # The losses.
    "BCELoss": (nn.BCELoss, ROW, lambda loss, x: loss(x.sigmoid(), TARGET.sigmoid())),
    "CTCLoss": (
        nn.CTCLoss,
        (5, N, 6),
        lambda loss, x: loss(
            x.log_softmax(-1),
            torch.tensor([[1, 2], [3, 1]]),
            torch.tensor([5, 5]),
            torch.tensor([2, 2]),
        ),
    ),
    "CosineEmbeddingLoss": (
        nn.CosineEmbeddingLoss,
        ROW,
        lambda loss, x: loss(x, x.flip(1) ** 2, SIGNS),
    ),
    "LinearCrossEntropyLoss": (
        lambda: nn.LinearCrossEntropyLoss(6, 3),
        ROW,
        lambda loss, x: loss(x, CLASSES),
    ),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, ROW, lambda loss, x: loss(x, CLASSES)),
    "NLLLoss": (nn.NLLLoss, ROW, lambda loss, x: loss(x.log_softmax(-1), CLASSES)),
    "GaussianNLLLoss": (
        nn.GaussianNLLLoss,
        ROW,
        lambda loss, x: loss(x, TARGET, x.flip(1).exp()),
    ),
    "HingeEmbeddingLoss": (
        nn.HingeEmbeddingLoss,
        ROW,
        lambda loss, x: loss(x**2, TARGET.sign()),
    ),
    "KLDivLoss": (
        lambda: nn.KLDivLoss(reduction="batchmean"),
        ROW,
        lambda loss, x: loss(x.log_softmax(-1), TARGET.softmax(-1)),
    ),
    "MarginRankingLoss": (
        lambda: nn.MarginRankingLoss(1.0),
        ROW,
        lambda loss, x: loss(x.sin(), x.flip(1), TARGET.sign()),
    ),
    "MultiLabelMarginLoss": (
        nn.MultiLabelMarginLoss,
        ROW,
        lambda loss, x: loss(x.sin(), torch.tensor([[1, 3, -1, 0, 0, 0]] * N)),
    ),
    "MultiLabelSoftMarginLoss": (
        nn.MultiLabelSoftMarginLoss,
        ROW,
        lambda loss, x: loss(x, TARGET.sigmoid().round()),
    ),
    "MultiMarginLoss": (nn.MultiMarginLoss, ROW, lambda loss, x: loss(x.sin(), CLASSES)),
    "SoftMarginLoss": (nn.SoftMarginLoss, ROW, lambda loss, x: loss(x, TARGET.sign())),
    "TripletMarginLoss": (
        nn.TripletMarginLoss,
        ROW,
        lambda loss, x: loss(x, x.flip(1), x.sin()),
    ),
    "TripletMarginWithDistanceLoss": (
        nn.TripletMarginWithDistanceLoss,
        ROW,
        lambda loss, x: loss(x, x.flip(1), x.sin()),
    ),
}


def one(constructor, shape):
    return constructor, shape, plain


for size, shape in (("1d", LINE), ("2d", PLANE), ("3d", SPACE)):
    for kind, given in {
        "AvgPool": (2,),
        "MaxPool": (2,),
        "LPPool": (2, 2),
        "AdaptiveAvgPool": (2,),
        "AdaptiveMaxPool": (2,),
        "ReflectionPad": (1,),
        "ReplicationPad": (1,),
        "ConstantPad": (1, 0.5),
        "ZeroPad": (1,),
        "CircularPad": (1,),
    }.items():
        name = kind + size
        SPECIAL[name] = one(lambda n=name, g=given: getattr(nn, n)(*g), shape)
    for kind in ("Dropout", "FeatureAlphaDropout"):
        SPECIAL[kind + size] = one(lambda n=kind + size: getattr(nn, n)(0.5), shape)
for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout"):
    SPECIAL[name] = one(lambda n=name: getattr(nn, n)(0.5), LINE)
for name in nn.modules.activation.__all__:
    SPECIAL.setdefault(name, one(getattr(nn, name), ROW))
for name in (
    "MSELoss",
    "L1Loss",
    "SmoothL1Loss",
    "HuberLoss",
    "PoissonNLLLoss",
    "BCEWithLogitsLoss",
):
    target = TARGET.sigmoid()
    SPECIAL[name] = (getattr(nn, name), ROW, lambda loss, x, y=target: loss(x, y))

# Not layers of their own, or without a shape before the first batch.
NO_LAYERS = {"Module", "Container", "ModuleList", "ModuleDict", "ParameterList", "ParameterDict"}
NO_LAYERS |= {"DataParallel", "NLLLoss2d", "RNNBase", "RNNCellBase"}
CASES = {k: c for k, c in SPECIAL.items() if hasattr(nn, k)}
# What is refused, with the words of the sentence.
REFUSED = {
    "CrossMapLRN2d": "don't support automatic differentiation",
    "FractionalMaxPool2d": "draws random numbers with fractional_max_pool2d",
    "FractionalMaxPool3d": "draws random numbers with fractional_max_pool3d",
    "EmbeddingBag": "cannot be differentiated twice: use an Embedding",
    "CTCLoss": "cannot be differentiated twice: write the loss out",
    "MultiLabelMarginLoss": "cannot be differentiated twice: write it out",
    "MultiMarginLoss": "cannot be differentiated twice: write it out",
}


def test_every_class_of_torch_nn_has_a_line():
    names = {
        k for k, x in vars(nn).items() if inspect.isclass(x) and issubclass(x, nn.Module)
    } - NO_LAYERS
    lazy = {k for k in names if k.startswith("Lazy")}
    assert {k.removeprefix("Lazy") for k in lazy} <= CASES.keys()
    assert names - lazy == CASES.keys()


class Net(nn.Module):
    """A linear map of each position before the layer, and a smooth function behind it."""

    def __init__(self, layer, shape, call):
        super().__init__()
        self.before, self.layer, self.call = nn.Linear(shape[-1], shape[-1]), layer, call

    def forward(self, x):
        out = self.call(self.layer, self.before(x))
        return (out + out.sin()).reshape(-1, 1)


def check_products(module, x, refused=None):
    """Both products against central differences of torch's gradient, which no fault can share."""
    problem = fp.problem(module, lambda outputs, _: outputs.square().mean())
    params = problem.params

    def f(p):
        return functional_call(module, p, (x,)).square().mean()

    def gradient(p):
        if refused and "automatic" in refused:
            return p
        own = {k: v.clone().requires_grad_() for k, v in p.items()}
        found = torch.autograd.grad(
            f(own), list(own.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(own, found, strict=True))

    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(params.items())}
    up, down = (gradient({k: p + s * v[k] for k, p in params.items()}) for s in (STEP, -STEP))
    central = {k: (up[k] - down[k]) / (2 * STEP) for k in params}
    size = max(1.0, *(float(c.abs().max()) for c in central.values()))
    products = {
        "fp.Hessian": lambda: fp.Hessian(problem, params, (x, None)) @ v,
        "fp.hvp": lambda: fp.hvp(f, params, v),
    }
    for name, product in products.items():
        try:
            found = product()
        except RuntimeError as error:
            assert refused is not None
            assert refused in str(error)
        else:
            assert refused is None or name == "fp.hvp"
            assert_close(found, central, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_central_differences_or_refused(name, training):
    build, shape, call = CASES[name]
    random = "Dropout" in name or name == "RReLU"
    if training and (random or name == "SyncBatchNorm"):
        pytest.skip("its numbers are random, or it needs a GPU")
    module = initialised(Net(build(), shape, call)).train(training)
    check_products(module, normal(shape), REFUSED.get(name))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(4, 4).tril()}]
)
def test_attention_in_a_function_has_products_under_vmap_too(options):
    q, k, u = normal((2, 4, 3)), normal((2, 4, 3), 1), normal((2, 4, 3), 2)
    if "attn_mask" in options:
        options = {"attn_mask": options["attn_mask"].bool()}

    def f(p):
        out = F.scaled_dot_product_attention(q * p["w"], k * p["w"], u, **options)
        return out.square().sum()

    def gradient(w):
        w = w.clone().requires_grad_()
        return torch.autograd.grad(f({"w": w}), w)[0]

    w, vs = normal((3,), 3), normal((2, 3), 4)
    found = torch.vmap(lambda v: fp.hvp(f, {"w": w}, {"w": v})["w"])(vs)
    for v, product in zip(vs, found, strict=True):
        central = (gradient(w + STEP * v) - gradient(w - STEP * v)) / (2 * STEP)
        assert_close(product, central, rtol=1e-6)
        assert_close(fp.hvp(f, {"w": w}, {"w": v})["w"], product, rtol=1e-11)
