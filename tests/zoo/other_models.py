"""Models of peft and torch_geometric."""

import torch
from torch import nn

import funcprecond as fp
from tests.zoo.model import CLASSES, Model, class_terms, language_model, tokens, zoo
from tests.zoo.torch_models import POINTS
from tests.zoo.transformers_models import CAUSAL, NO_TOKENS, _made


@zoo("peft LoRA of Llama", "peft")
def lora() -> Model:
    import peft

    name, config, sizes = CAUSAL["Llama"]
    adapted = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        _made(name, config, **sizes, **NO_TOKENS),
        peft.LoraConfig(r=2, target_modules=adapted, task_type="CAUSAL_LM"),
    )
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return language_model(model, inputs, ids, outputs="logits", tolerance=1e-5)


def _graph(layer: str, diagonal: tuple[str, ...] = ()) -> Model:
    """Classes of the nodes of one ring, given by its edges."""
    import torch_geometric.nn as layers

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = getattr(layers, layer)(6, 16)
            self.second = getattr(layers, layer)(16, CLASSES)

        def forward(self, nodes, edges):
            return self.second(self.first(nodes, edges).relu(), edges)

    around = torch.arange(POINTS)
    edges = torch.stack([around, around.roll(1)])
    edges = torch.cat([edges, edges.flip(0)], 1)
    return Model(
        Network(),
        ((torch.randn(POINTS, 6), edges), around % CLASSES),
        fp.losses.cross_entropy,
        class_terms,
        in_axes=None,
        diagonal=diagonal,
    )


@zoo("PyG GCN", "torch_geometric")
def gcn() -> Model:
    return _graph("GCNConv")


@zoo("PyG GAT", "torch_geometric")
def gat() -> Model:
    return _graph("GATConv", ("*.att_*",))


@zoo("PyG GraphSAGE", "torch_geometric")
def sage() -> Model:
    return _graph("SAGEConv")
