"""The networks of the comparison: an MLP, a small convnet and a GLU decoder."""

import itertools
import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Module:
    """Linear layers with a ReLU between each two of them.

    Args:
        widths: the sizes, from the input to the logits.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(classes: int) -> nn.Module:
    """Three convolutions with GroupNorm, then a linear layer, for (B, 1, 8, 8) images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, classes),
    )


class GLUBlock(nn.Module):
    """Causal attention and a gated linear unit, each after a LayerNorm and with a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_glu = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention, without a fused kernel."""
        # The second derivatives of fused kernels depend on torch's build.
        query, key, value = rearrange(
            self.query_key_value(x), "b t (three h d) -> three b h t d", three=3, h=self.heads
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~past, float("-inf")).softmax(-1)
        return self.project(rearrange(weights @ value, "b h t d -> b t (h d)"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to (B, T, width)."""
        x = x + self.attend(self.norm_attention(x))
        y = self.norm_glu(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class GLUDecoder(nn.Module):
    """A decoder-only Transformer with gated linear units.

    It maps (B, T) tokens to (B, T, classes) logits.
    """

    def __init__(self, classes: int, *, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(classes, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GLUBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the next token at each position."""
        # Each example has its own position indices, so that its per-sample gradient in the table
        # of positions is defined.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.logits(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


def build(make: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """Make a module whose weights only depend on a seed, not on torch's global generator.

    Args:
        make: constructs the module.
        seed: the seed of the weights, which are the same on every device.
        device: the device of the module.

    Returns:
        The module, in eval mode.

    Raises:
        TypeError: the module has a layer with parameters that `initialize` does not support.
    """
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    initialize(module, torch.Generator().manual_seed(seed))
    # All layers behave alike in both modes, but eval mode saves a search for dropout masks.
    return module.to(device).eval()


@torch.no_grad()
def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter in place, from torch's default distributions.

    The exception are embeddings, which are normal with standard deviation 0.02, as is usual for
    language models.

    Args:
        module: the module.
        generator: draws the parameters.

    Raises:
        TypeError: a layer with parameters is of another type than those below.
    """
    for layer in module.modules():
        match layer:
            case nn.Linear() | nn.Conv2d():
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                if layer.bias is not None:
                    bound = 1 / math.sqrt(layer.weight[0].numel())
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            case nn.Embedding():
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
            case nn.LayerNorm() | nn.GroupNorm():
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
            case _ if next(layer.parameters(recurse=False), None) is not None:
                message = (
                    f"initialize does not know the layer {type(layer).__name__}; add a case for it "
                    "in funcprecond/compare/models.py."
                )
                raise TypeError(message)
