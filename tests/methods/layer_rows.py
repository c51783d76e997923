"""The rows of layers by module hooks and plain autograd, for dense references of methods."""

import torch
import torch.nn.functional as F
from torch import nn


def with_ones(rows):
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def patches(conv, x):
    """The rows of a convolution's input, (J, N, T, i / J)."""
    cut = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return cut.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2)


def layer_rows(toy):
    """By module: inputs (J, N, T, i), output gradients of the sum of the terms (J, N, T, o / J).

    For linear layers and convolutions with a bias, whose column of ones is the last; for norm
    layers the normalized inputs, without a column. The labels are those of the data, and the loss
    is a mean over the examples.
    """
    module, kept, handles = toy.problem.module, {}, []
    inputs, targets = toy.batch
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.LayerNorm)):

            def keep(part, args, out, name=name):
                out.retain_grad()
                kept[name] = (part, args[0].detach(), out)

            handles.append(part.register_forward_hook(keep))
    loss = toy.problem.loss(module(inputs), targets) * len(inputs)
    loss.backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, (part, x, out) in kept.items():
        g = out.grad
        if isinstance(part, nn.Conv2d):
            a = with_ones(patches(part, x))
            g = g.flatten(2).unflatten(1, (part.groups, -1)).permute(1, 0, 3, 2)
        elif isinstance(part, nn.Linear):
            a, g = (r.reshape(1, len(r), -1, r.shape[-1]) for r in (with_ones(x), g))
        else:
            x = F.layer_norm(x, part.normalized_shape, eps=part.eps)
            a, g = (r.reshape(1, len(r), -1, r.shape[-1]) for r in (x, g))
        found[name] = (a, g.detach())
    module.zero_grad(set_to_none=True)
    return found


def matrix(tree, name, groups=1):
    """``[W | b]`` of a module's parameters in a dict, (J, o / J, i + 1)."""
    weight, bias = tree[f"{name}.weight"].flatten(1), tree[f"{name}.bias"].unsqueeze(1)
    return torch.cat([weight, bias], 1).unflatten(0, (groups, -1))
