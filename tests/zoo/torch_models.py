"""Models that need only torch, as people write them."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import funcprecond as fp
from tests.zoo.model import (
    CLASSES,
    EXAMPLES,
    PIXELS,
    TOKENS,
    WORDS,
    Model,
    class_terms,
    classifier,
    images,
    language_model,
    square_terms,
    tokens,
    zoo,
)

POINTS = 5  # collocation points, rays, nodes


# ------------------------------------------------------------------------------------------- graphs
class GCN(nn.Module):
    """Two graph convolutions (Kipf & Welling 2017) of all nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second(F.relu(adjacency @ self.first(nodes)))


def ring(count: int) -> Tensor:
    """The normalised adjacency of a ring with self-loops."""
    return sum(torch.eye(count).roll(i, 0) for i in (-1, 0, 1)) / 3  # pyright: ignore


@zoo("GCN, nodes of one graph")
def gcn() -> Model:
    inputs = (torch.randn(POINTS, 6), ring(POINTS))
    targets = torch.arange(POINTS) % CLASSES
    return Model(
        GCN(),
        (inputs, targets),
        fp.losses.cross_entropy,
        class_terms,
        in_axes=None,
    )


# ---------------------------------------------------------------------------------------- recurrent
class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(WORDS, 12), layer
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(ids))[0])


@zoo("LSTM language model")
def lstm() -> Model:
    ids = tokens()
    layer = nn.LSTM(12, 16, num_layers=2, dropout=0.1, batch_first=True)
    return language_model(Recurrent(layer), ids, ids)


@zoo("GRU language model")
def gru() -> Model:
    ids = tokens()
    return language_model(Recurrent(nn.GRU(12, 16, batch_first=True)), ids, ids)


class Cells(nn.Module):
    """A recurrent layer written as a loop over its cell."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(WORDS, 12), nn.LSTMCell(12, 16)
        self.head = nn.Linear(16, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x, state, found = self.embedding(ids), None, []
        for t in range(ids.shape[1]):
            state = self.cell(x[:, t], state)
            found.append(self.head(state[0]))
        return torch.stack(found, 1)


@zoo("LSTM cells in a loop")
def lstm_cells() -> Model:
    ids = tokens()
    return language_model(Cells(), ids, ids)


# -------------------------------------------------------------------------------------------- U-Net
class UNet(nn.Module):
    """One step down and up, with a skip connection (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.into = self._block(3, width)
        self.down = self._block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(self._block(2 * width, width), nn.Conv2d(width, 2, 1))

    def _block(self, into: int, out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(into, out, 3, padding=1, bias=False), nn.GroupNorm(2, out), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        y = self.up(self.down(F.max_pool2d(x, 2)))
        return self.out(torch.cat([x, y], 1))


def pixel_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


@zoo("U-Net")
def unet() -> Model:
    targets = torch.randint(2, (EXAMPLES, 6, 6))
    return Model(UNet(), (torch.randn(EXAMPLES, 3, 6, 6), targets), F.cross_entropy, pixel_terms)


# ------------------------------------------------------------------------ physics-informed networks
def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def heat(u_t: Tensor, u_xx: Tensor) -> Tensor:
    """The residual of the heat equation."""
    return u_t - 0.1 * u_xx


class PINNByAutograd(nn.Module):
    """The residual at each point (x, t), with ``torch.autograd.grad`` in the model."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, 16, 16, 1)

    def forward(self, points: Tensor) -> Tensor:
        x, t = (points[:, i : i + 1].detach().requires_grad_() for i in (0, 1))
        with torch.enable_grad():
            u = self.net(torch.cat([x, t], 1))
            u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return heat(u_t, u_xx)


class PINNByFunc(nn.Module):
    """The same with ``torch.func`` in the model."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, 16, 16, 1)

    def forward(self, points: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return self.net(point)[0]

        def residual(point: Tensor) -> Tensor:
            first = torch.func.grad(u)
            u_xx = torch.func.grad(lambda p: first(p)[0])(point)[0]
            return heat(first(point)[1], u_xx)

        return torch.vmap(residual)(points).unsqueeze(1)


def _points() -> tuple[Tensor, Tensor]:
    return torch.rand(POINTS, 2), torch.zeros(POINTS, 1)


@zoo("PINN, autograd.grad in the model")
def pinn_autograd() -> Model:
    return Model(PINNByAutograd(), _points(), fp.losses.mse, square_terms, diagonal=("net.*",))


@zoo("PINN, torch.func in the model")
def pinn_func() -> Model:
    return Model(PINNByFunc(), _points(), fp.losses.mse, square_terms, diagonal=("net.*",))


class PINNInLoss(nn.Module):
    """The values and the points at which they were taken: the loss differentiates."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, 16, 16, 1)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            return self.net(points), points


def _residuals(outputs: tuple[Tensor, Tensor]) -> Tensor:
    u, points = outputs
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return heat(first[:, 1], second[:, 0])


BEYOND = "the loss depends on the parameters in another way than through the outputs"


@zoo("PINN, derivative in the loss")
def pinn_loss() -> Model:
    checks = ["per-sample gradients", "GGN"]
    methods = ["kfac", "adaptive_kfac", "ekfac", "kflr", "smw_ng", "hessian_free"]
    return Model(
        PINNInLoss(),
        _points(),
        lambda outputs, targets: _residuals(outputs).square().mean(),
        lambda outputs, targets: _residuals(outputs).square().sum(),
        refused=dict.fromkeys([*checks, *methods], BEYOND),
    )


# ----------------------------------------------------------------------------- operators and fields
class DeepONet(nn.Module):
    """A branch of the function's values, a trunk of the places (Lu et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk = mlp(10, 16, 12), mlp(1, 16, 12)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, functions: Tensor, places: Tensor) -> Tensor:
        return torch.einsum("np,qp->nq", self.branch(functions), self.trunk(places)) + self.bias


@zoo("DeepONet")
def deeponet() -> Model:
    inputs = (torch.randn(EXAMPLES, 10), torch.rand(7, 1))
    return Model(
        DeepONet(), (inputs, torch.randn(EXAMPLES, 7)), fp.losses.mse, square_terms, shared=(1,)
    )


class NeRF(nn.Module):
    """Colours of rays: density and colour at samples along each (Mildenhall et al. 2020)."""

    def __init__(self, frequencies: int = 3, samples: int = 5):
        super().__init__()
        self.frequencies, self.samples = frequencies, samples
        self.body = mlp(6 * frequencies, 24, 24)
        self.density, self.colour = nn.Linear(24, 1), nn.Sequential(nn.Linear(27, 16), nn.ReLU())
        self.rgb = nn.Linear(16, 3)

    def forward(self, origins: Tensor, directions: Tensor) -> Tensor:
        t = torch.linspace(0, 1, self.samples, dtype=origins.dtype)
        x = origins[:, None] + t[:, None] * directions[:, None]
        scaled = x[..., None] * 2.0 ** torch.arange(self.frequencies, dtype=x.dtype)
        h = self.body(torch.cat([scaled.sin(), scaled.cos()], -1).flatten(2))
        density = F.softplus(self.density(h)).squeeze(-1)
        views = directions[:, None].expand(-1, self.samples, -1)
        colour = self.rgb(self.colour(torch.cat([h, views], -1))).sigmoid()
        alpha = 1 - torch.exp(-density / self.samples)
        light = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)
        return (light[:, :-1, None] * alpha[..., None] * colour).sum(1)


@zoo("NeRF")
def nerf() -> Model:
    inputs = (torch.randn(POINTS, 3), F.normalize(torch.randn(POINTS, 3), dim=1))
    return Model(NeRF(), (inputs, torch.rand(POINTS, 3)), fp.losses.mse, square_terms)


# -------------------------------------------------------------------------------- generative models
class Flow(nn.Module):
    """Affine couplings (Dinh et al. 2017): a sample's place under the base, and its volume."""

    def __init__(self, features: int = 4, couplings: int = 2):
        super().__init__()
        self.nets = nn.ModuleList(mlp(features // 2, 8, features) for _ in range(couplings))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, volume = x * self.log_scale.exp(), self.log_scale.sum()
        for net in self.nets:
            kept, changed = x.chunk(2, 1)
            scale, shift = net(kept).chunk(2, 1)
            x = torch.cat([changed * scale.tanh().exp() + shift, kept], 1)
            volume = volume + scale.tanh().sum(1)
        return x, volume


def likelihoods(outputs: tuple[Tensor, Tensor]) -> Tensor:
    z, volume = outputs
    return 0.5 * z.square().sum(1) - volume


@zoo("normalizing flow")
def flow() -> Model:
    return Model(
        Flow(),
        (torch.randn(POINTS, 4), torch.zeros(POINTS)),
        lambda outputs, targets: likelihoods(outputs).mean(),
        lambda outputs, targets: likelihoods(outputs).sum(),
        diagonal=("log_scale",),
    )


class VAE(nn.Module):
    """With the noise of the reparametrisation drawn in ``forward`` (Kingma & Welling 2014)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(6, 8, 4), mlp(2, 8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise), mean, log_variance


def bounds(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    seen, mean, log_variance = outputs
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
    return F.binary_cross_entropy_with_logits(seen, x, reduction="none").sum(1) + divergence


@zoo("VAE")
def vae() -> Model:
    x = torch.rand(POINTS, 6).round()
    return Model(
        VAE(),
        (x, x),
        lambda outputs, x: bounds(outputs, x).mean(),
        lambda outputs, x: bounds(outputs, x).sum(),
    )


# --------------------------------------------------------------------------- reinforcement learning
def policy_terms(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    actions, advantages = targets
    chosen = outputs.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    return -(chosen * advantages).sum()


@zoo("policy gradient")
def policy_gradient() -> Model:
    targets = (torch.arange(POINTS) % 3, torch.randn(POINTS))
    return Model(
        mlp(4, 16, 3),
        (torch.randn(POINTS, 4), targets),
        lambda outputs, targets: policy_terms(outputs, targets) / POINTS,
        policy_terms,
    )


class ActorCritic(nn.Module):
    """A policy and a value on one body."""

    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = mlp(4, 8, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"policy": self.actor(h), "value": self.critic(h).squeeze(-1)}


def actor_critic_terms(
    outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    actions, returns, advantages = targets
    policy = torch.distributions.Categorical(logits=outputs["policy"], validate_args=False)
    value = F.mse_loss(outputs["value"], returns, reduction="sum")
    return value - (policy.log_prob(actions) * advantages + 0.01 * policy.entropy()).sum()


@zoo("actor-critic")
def actor_critic() -> Model:
    targets = (torch.arange(POINTS) % 3, torch.randn(POINTS), torch.randn(POINTS))
    return Model(
        ActorCritic(),
        (torch.randn(POINTS, 4), targets),
        lambda outputs, targets: actor_critic_terms(outputs, targets) / POINTS,
        actor_critic_terms,
    )


# ------------------------------------------------------------------------------- changed parameters
class LowRankAdapter(nn.Module):
    """A frozen layer and a trainable product of two thin matrices (Hu et al. 2022)."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * (x @ self.A.T @ self.B.T)


@zoo("LoRA by hand")
def lora() -> Model:
    first, second = nn.Linear(8, 16), nn.Linear(16, CLASSES)
    model = nn.Sequential(LowRankAdapter(first), nn.ReLU(), LowRankAdapter(second))
    return classifier(model, torch.randn(EXAMPLES, 8))


def _parametrized(parametrize: Any) -> Model:
    model = nn.Sequential(parametrize(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, CLASSES))
    return classifier(model, torch.randn(EXAMPLES, 8), diagonal=("0.parametrizations.*",))


@zoo("weight_norm")
def weight_norm() -> Model:
    return _parametrized(parametrizations.weight_norm)


@zoo("spectral_norm")
def spectral_norm() -> Model:
    return _parametrized(parametrizations.spectral_norm)


@zoo("orthogonal")
def orthogonal() -> Model:
    return _parametrized(parametrizations.orthogonal)


class FakeQuantized(nn.Linear):
    """A layer that trains with rounded weights, whose rounding passes gradients on."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
        x = torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)
        return F.linear(x, weight, self.bias)


@zoo("quantization-aware training")
def qat() -> Model:
    model = nn.Sequential(FakeQuantized(8, 16), nn.ReLU(), FakeQuantized(16, CLASSES))
    return classifier(model, torch.randn(EXAMPLES, 8), smooth=False, diagonal=("*.weight",))


# ------------------------------------------------------------------------------------- transformers
@zoo("nn.TransformerEncoder")
def encoder() -> Model:
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(WORDS, 16)
            self.position = nn.Parameter(torch.randn(1, TOKENS, 16))
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layers(self.embedding(ids) + self.position).mean(1))

    return classifier(Encoder(), tokens())


@zoo("a function of a dict of tensors")
def function() -> Model:
    params = {
        "w1": torch.randn(8, 16) / math.sqrt(8),
        "b1": torch.zeros(16),
        "w2": torch.randn(16, CLASSES) / 4,
    }

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]

    return classifier(model, torch.randn(EXAMPLES, 8), params=params)


@zoo("convolutions with BatchNorm")
def batch_norm() -> Model:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    return images(model, PIXELS // 4)
