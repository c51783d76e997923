"""Each way in which models write a layer is recognized, and is what its plain spelling is.

A case is a function of a dict of parameters. Where there is a plain spelling, its parameters are a
rearrangement of those of the case, and all curvature must be the same rearrangement.
"""

import dataclasses
import warnings
from collections.abc import Callable

import einops
import pytest
import torch
import torch.nn.functional as F

import funcprecond as fp
from funcprecond.linalg import treemath
from tests import reference
from tests.equality import assert_close
from tests.problems import normal

N, T, I, O = 3, 2, 4, 3
LABELS, HEAD = torch.tensor([0, 2, 1]), normal((20, 3), 9)


@dataclasses.dataclass(frozen=True)
class Case:
    """A spelling, ``(params, x) -> (N, ..., 3)``.

    Attributes:
        apply: the function.
        shapes: the shapes of its parameters.
        like: the plain spelling.
        rearranged: the parameters of the plain spelling.
        shape: the shape of an example.
        rows: whether the rows of the layers belong to single examples.
        rtol: the relative error of the kernel that it uses.
    """

    apply: Callable
    shapes: dict
    like: Callable | None = None
    rearranged: Callable = lambda p: p
    shape: tuple = (T, I)
    rows: bool = True
    rtol: float = 1e-8


def linear(p, x):
    return F.linear(x, p["w"], p.get("b"))


def heads(p, x):
    """Two linear layers beside each other."""
    return torch.cat([F.linear(x, p["0"]), F.linear(x, p["1"])], -1)


def mixed(z):
    """A nonlinear map from any features to three logits."""
    return torch.tanh(z) @ HEAD[: z.shape[-1]].to(z.dtype)


def routed(p, x, apply):
    """Each token goes to the expert that its sign selects."""
    flat = x.reshape(-1, I)
    chosen = (flat[:, 0] > 0).long()
    out = 0
    for e in range(2):
        own = (chosen == e).nonzero().flatten()
        if len(own):
            found = apply(flat[own], p, e)
            out = out + torch.zeros(len(flat), found.shape[-1]).to(x).index_add(0, own, found)
    return out.reshape(*x.shape[:-1], -1)


def split_experts(p):
    return {"0": p["w"][0], "1": p["w"][1]}


def split_experts_transposed(p):
    return {"0": p["w"][0].mT, "1": p["w"][1].mT}


def grouped(p, x):
    flat = x.reshape(-1, I)
    order = (flat[:, 0] > 0).long().argsort(stable=True)
    counts = torch.bincount((flat[:, 0] > 0).long(), minlength=2)
    # The kernel takes float32 only.
    rows, weight = flat[order].float(), p["w"].float()
    sorted_out = F.grouped_mm(rows, weight, offs=counts.cumsum(0).int()).double()
    return sorted_out[order.argsort()].reshape(*x.shape[:-1], -1)


def plain_experts(p, x):
    return routed(p, x, lambda rows, p, e: F.linear(rows, p[str(e)]))


def transposed(p):
    return {"w": p["w"].mT}


def flat_last(p):
    return {"w": p["w"].reshape(O, I)}


W, WT, B = (O, I), (I, O), (O,)
CASES = {
    # ------------------------------------------------------------------- matrices and their views
    "x @ W.T": Case(lambda p, x: x @ p["w"].T, {"w": W}, linear),
    "permute": Case(lambda p, x: x @ p["w"].permute(1, 0), {"w": W}, linear),
    "transpose": Case(lambda p, x: torch.matmul(x, p["w"].transpose(0, -1)), {"w": W}, linear),
    "movedim": Case(lambda p, x: x @ p["w"].movedim(0, 1), {"w": W}, linear),
    "rearrange": Case(lambda p, x: x @ einops.rearrange(p["w"], "o i -> i o"), {"w": W}, linear),
    "view of a kernel": Case(
        lambda p, x: F.linear(x, p["w"].view(O, I)), {"w": (O, I, 1)}, linear, flat_last
    ),
    "squeezed kernel": Case(
        lambda p, x: F.linear(x, p["w"].squeeze(-1), p["b"]),
        {"w": (O, I, 1), "b": B},
        linear,
        lambda p: flat_last(p) | {"b": p["b"]},
    ),
    "three axes as two": Case(
        lambda p, x: F.linear(x, p["w"].flatten(1)), {"w": (O, 2, 2)}, linear, flat_last
    ),
    "three axes, outputs merged": Case(
        lambda p, x: F.linear(x, p["w"].flatten(0, 1)),
        {"w": (2, 2, I)},
        linear,
        lambda p: {"w": p["w"].reshape(4, I)},
    ),
    "contiguous transpose": Case(
        lambda p, x: F.linear(x, p["w"].t().contiguous()), {"w": WT}, linear, transposed
    ),
    "conv1d of GPT-2": Case(
        lambda p, x: torch.addmm(p["b"], x.view(-1, I), p["w"]).view(N_of(x), T, O),
        {"w": WT, "b": B},
        linear,
        lambda p: transposed(p) | {"b": p["b"]},
    ),
    "W @ x": Case(lambda p, x: (p["w"] @ x.mT).mT, {"w": W}, linear),
    "W.T @ x": Case(lambda p, x: (p["w"].T @ x.mT).mT, {"w": WT}, linear, transposed),
    "W @ x plus a column": Case(
        lambda p, x: (p["w"] @ x.mT + p["b"][:, None]).mT, {"w": W, "b": B}
    ),
    "a constant multiple": Case(
        lambda p, x: F.linear(x, p["w"] * 0.5, p["b"]),
        {"w": W, "b": B},
        lambda p, x: F.linear(0.5 * x, p["w"], p["b"]),
    ),
    "a tensor multiple": Case(
        lambda p, x: x @ (-p["w"] / torch.tensor(2.0, dtype=torch.float64)).T,
        {"w": W},
        lambda p, x: F.linear(-x / 2, p["w"]),
    ),
    "addmm, alpha": Case(
        lambda p, x: torch.addmm(p["b"], x.reshape(-1, I), p["w"], alpha=0.5).view(N_of(x), T, O),
        {"w": WT, "b": B},
        lambda p, x: F.linear(0.5 * x, p["w"], p["b"]),
        lambda p: transposed(p) | {"b": p["b"]},
    ),
    "a vector": Case(
        lambda p, x: (x @ p["w"]).unsqueeze(-1),
        {"w": (I,)},
        linear,
        lambda p: {"w": p["w"].unsqueeze(0)},
    ),
    "a vector by linear": Case(
        lambda p, x: F.linear(x, p["w"]).unsqueeze(-1),
        {"w": (I,)},
        linear,
        lambda p: {"w": p["w"].unsqueeze(0)},
    ),
    # --------------------------------------------------------------------------------- einsum
    "einsum": Case(lambda p, x: torch.einsum("bti,oi->bto", x, p["w"]), {"w": W}, linear),
    "einsum, inputs first": Case(
        lambda p, x: torch.einsum("bti,io->bto", [x, p["w"]]), {"w": WT}, linear, transposed
    ),
    "einsum, weight first": Case(
        lambda p, x: torch.einsum("oi, ...i -> ...o", p["w"], x), {"w": W}, linear
    ),
    "einsum, outputs first": Case(
        lambda p, x: torch.einsum("bti,io->bot", x, p["w"]).mT, {"w": WT}, linear, transposed
    ),
    "einsum to heads": Case(
        lambda p, x: torch.einsum("btd,hdk->bthk", x, p["w"]).flatten(2),
        {"w": (2, I, O)},
        heads,
        split_experts_transposed,
    ),
    "einsum from heads": Case(
        lambda p, x: torch.einsum("bthk,hkd->btd", x.unflatten(-1, (2, 2)), p["w"]),
        {"w": (2, 2, O)},
        linear,
        lambda p: {"w": p["w"].reshape(I, O).mT},
    ),
    "einops.einsum": Case(
        lambda p, x: einops.einsum(x, p["w"], "b t i, o i -> b t o"), {"w": W}, linear
    ),
    "implicit einsum": Case(
        lambda p, x: torch.einsum("bti,ix", x, p["w"]), {"w": WT}, linear, transposed
    ),
    # -------------------------------------------------------------------------------- experts
    "bmm": Case(
        lambda p, x: torch.bmm(x.transpose(0, 1), p["w"]).transpose(0, 1),
        {"w": (T, I, O)},
        lambda p, x: torch.stack([F.linear(x[:, t], p[str(t)]) for t in range(T)], 1),
        split_experts_transposed,
    ),
    "baddbmm": Case(
        lambda p, x: torch.baddbmm(p["b"], x.transpose(0, 1), p["w"]).transpose(0, 1),
        {"w": (T, I, O), "b": (T, 1, O)},
    ),
    "matmul with all experts": Case(
        lambda p, x: (x.unsqueeze(1) @ p["w"]).mean(1),
        {"w": (2, I, O)},
        lambda p, x: (F.linear(x, p["0"]) + F.linear(x, p["1"])) / 2,
        split_experts_transposed,
    ),
    "einsum of experts": Case(
        lambda p, x: torch.einsum("nti,toi->nto", x, p["w"]),
        {"w": (T, O, I)},
        lambda p, x: torch.stack([F.linear(x[:, t], p[str(t)]) for t in range(T)], 1),
        split_experts,
    ),
    "an expert at a time": Case(
        lambda p, x: routed(p, x, lambda rows, p, e: F.linear(rows, p["w"][e])),
        {"w": (2, O, I)},
        plain_experts,
        split_experts,
        rows=False,
    ),
    "an expert at a time, by a tensor": Case(
        lambda p, x: routed(p, x, lambda rows, p, e: rows @ p["w"][torch.tensor(e)]),
        {"w": (2, I, O)},
        plain_experts,
        split_experts_transposed,
        rows=False,
    ),
    "unbound experts": Case(
        lambda p, x: routed(p, x, lambda rows, p, e: rows @ p["w"].unbind(0)[e].T),
        {"w": (2, O, I)},
        plain_experts,
        split_experts,
        rows=False,
    ),
    "grouped_mm": Case(
        grouped,
        {"w": (2, I, 4)},
        plain_experts,
        split_experts_transposed,
        rows=False,
        rtol=1e-4,
    ),
    # ---------------------------------------------------------------------------- parts of a weight
    "chunks": Case(
        lambda p, x: sum(
            torch.tanh(F.linear(x, w, b))
            for w, b in zip(p["w"].chunk(3), p["b"].split(1), strict=True)
        ).expand(-1, -1, O),
        {"w": W, "b": B},
    ),
    "rows of a weight": Case(
        lambda p, x: torch.cat([F.linear(x, p["w"][:2]), x @ p["w"][2:].T], -1), {"w": W}
    ),
    # --------------------------------------------------------------------------- scales and gains
    "gain": Case(lambda p, x: p["g"] * x, {"g": (I,)}),
    "gain, second": Case(lambda p, x: x * p["g"].to(torch.float64), {"g": (I,)}),
    "one plus a gain": Case(lambda p, x: x * (1.0 + p["g"]), {"g": (I,)}),
    "gain of positions": Case(lambda p, x: x * p["g"], {"g": (T, I)}),
    "gain of channels": Case(lambda p, x: x * p["g"], {"g": (T, 1)}),
    "gain (1, T, 1)": Case(lambda p, x: x * p["g"], {"g": (1, T, 1)}),
    "one number": Case(lambda p, x: x * p["g"], {"g": ()}),
    "one number (1,)": Case(lambda p, x: p["g"] * x, {"g": (1,)}),
    "gain and bias": Case(lambda p, x: p["g"] * x + p["b"], {"g": (I,), "b": (I,)}),
    "gain of a gain": Case(
        lambda p, x: p["g"] * (x * p["b"].view(1, 1, -1)), {"g": (I,), "b": (I,)}
    ),
    # --------------------------------------------------------------- positions, tokens and tables
    "positions (1, T, d)": Case(lambda p, x: x + p["e"], {"e": (1, T, I)}),
    "positions (T, d)": Case(lambda p, x: p["e"] + x, {"e": (T, I)}),
    "first positions": Case(lambda p, x: x + p["e"][:, :T], {"e": (1, T + 2, I)}),
    "first positions of two axes": Case(lambda p, x: x + p["e"][1 : T + 1], {"e": (T + 2, I)}),
    "table by a slice": Case(lambda p, x: x + p["e"][:T, :], {"e": (T + 2, I)}),
    "positions by embedding": Case(
        lambda p, x: x + F.embedding(torch.arange(T)[None], p["e"]), {"e": (T + 1, I)}
    ),
    "positions by embedding (T,)": Case(
        lambda p, x: x + F.embedding(torch.arange(T), p["e"]), {"e": (T + 1, I)}
    ),
    "positions by index": Case(lambda p, x: x + p["e"][torch.arange(T)], {"e": (T + 1, I)}),
    "positions by index_select": Case(
        lambda p, x: x + p["e"].index_select(0, torch.arange(T)), {"e": (T + 1, I)}
    ),
    "embedding, expanded": Case(
        lambda p, x: x + F.embedding(torch.arange(T), p["e"]).unsqueeze(0).expand(N_of(x), -1, -1),
        {"e": (T + 1, I)},
    ),
    "class token": Case(
        lambda p, x: torch.cat([p["c"].expand(N_of(x), -1, -1), x], 1), {"c": (1, 1, I)}
    ),
    "class token, a vector": Case(
        lambda p, x: torch.cat([p["c"].expand(N_of(x), 1, -1), x], 1), {"c": (I,)}
    ),
    "class token, repeated": Case(
        lambda p, x: torch.cat([x, p["c"].repeat(N_of(x), 1, 1)], 1), {"c": (1, 1, I)}
    ),
    "class token, two axes": Case(
        lambda p, x: torch.cat([p["c"].unsqueeze(0).expand(len(x), 1, I), x], 1), {"c": (1, I)}
    ),
    "class token and positions": Case(
        lambda p, x: torch.cat([p["c"].expand(N_of(x), -1, -1), x], 1) + p["e"],
        {"c": (1, 1, I), "e": (1, T + 1, I)},
    ),
    "queries": Case(
        lambda p, x: torch.tanh(p["q"].unsqueeze(0).expand(len(x), -1, -1)) * x.mean(1, True),
        {"q": (5, I)},
    ),
    "one row": Case(lambda p, x: x + p["e"][1], {"e": (3, I)}),
    "bias of channels": Case(lambda p, x: x + p["b"], {"b": (T, 1)}),
    "bias (1, 1, d)": Case(lambda p, x: x + p["b"], {"b": (1, 1, I)}),
    "one number added": Case(lambda p, x: x + p["b"], {"b": ()}),
    "positions of images": Case(
        lambda p, x: (x.unsqueeze(-1) + p["e"]).flatten(2), {"e": (1, T, I, 1)}
    ),
}


def N_of(x):
    return x.shape[0]


def work(case, apply=None, rearranged=None):
    drawn = enumerate(case.shapes.items())
    like = {k: 0.5 * normal(shape, seed) for seed, (k, shape) in drawn}
    before = {"before": normal((I, I), 11)}
    params = before | (like if rearranged is None else rearranged(like))

    def model(p, x):
        z = (apply or case.apply)(p, torch.tanh(x @ p["before"].T))
        return mixed(z).mean(1)

    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    return problem, params, (normal((N, *case.shape), 5), LABELS)


def rows_of(problem, params, batch):
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    found = []
    for x, y in zip(*batch, strict=True):
        loss = F.cross_entropy(problem(leaves, x[None]), y[None])
        found.append(torch.autograd.grad(loss, [*leaves.values()]))
    return {k: torch.stack(parts) for k, *parts in zip(leaves, *found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_it_is_recognized(name):
    data = work(CASES[name])
    layers = fp.layer_statistics(*data, labels="exact")
    assert not layers.others


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_single_examples(name):
    data = work(CASES[name])
    assert_close(fp.per_sample_grads(*data), rows_of(*data), rtol=CASES[name].rtol)


@pytest.mark.parametrize("name", CASES)
def test_diagonals_and_products_are_the_dense_matrixs(name):
    data = work(CASES[name])
    dense = reference.ggn(*data)
    found = treemath.ravel(fp.DiagonalGGN(*data).diagonal())
    assert_close(found, dense.diagonal(), rtol=CASES[name].rtol)
    vector = {k: normal(p.shape, 3) for k, p in data[1].items()}
    fisher = fp.Fisher(*data, labels="exact") @ vector
    assert_close(treemath.ravel(fisher), dense @ treemath.ravel(vector), rtol=CASES[name].rtol)


@pytest.mark.parametrize("name", [k for k, case in CASES.items() if case.like])
@pytest.mark.parametrize("method", [fp.kflr, fp.ekfac])
def test_the_direction_is_that_of_the_plain_spelling(name, method):
    case = CASES[name]
    if method is fp.ekfac and not case.rows:
        pytest.skip(
            "moments need rows of single examples, and of experts only the diagonal is kept"
        )
    options = {"labels": "exact"} if method is fp.ekfac else {}
    opt, found = method(damping=0.1, **options), []
    for data in (work(case), work(case, case.like, case.rearranged)):
        evidence = fp.observe(*data, opt.needs(0))
        found.append(opt.update(opt.init(data[1]), evidence.grads, evidence)[1])
    ours, theirs = found
    before = {"before": ours["before"]}
    assert_close(before | case.rearranged(ours), theirs, rtol=CASES[name].rtol)


@pytest.mark.parametrize("labels", ["exact", "empirical", "mc"])
def test_a_table_that_all_examples_share_is_a_layer_for_sampled_labels_only(labels):
    """The bias of attention scores: what is looked up is permuted before it meets the examples."""

    def model(p, x):
        bias = p["e"][torch.arange(T * T).reshape(T, T) % 3].permute(2, 0, 1)
        scores = torch.einsum("nti,nsi->nts", x, x).unsqueeze(1) + bias
        return (scores.softmax(-1) @ x.unsqueeze(1)).tanh().mean((1, 2)) @ HEAD[:I]

    params = {"e": normal((3, 2))}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = (normal((N, T, I), 5), LABELS)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = fp.layer_statistics(problem, params, batch, labels=labels, generator=generator)
    assert list(layers.uses) == (["e"] if labels == "mc" else [])
    assert list(layers.others) == ([] if labels == "mc" else ["e"])
    assert_close(fp.per_sample_grads(problem, params, batch), rows_of(problem, params, batch))


def test_the_rows_of_a_batch_of_two_towers_are_its_examples():
    """The texts come first in the inputs, and are the classes of the images."""

    def model(p, inputs):
        texts, images = inputs
        return F.normalize(images @ p["a"], dim=1) @ F.normalize(texts @ p["b"], dim=1).T

    params = {"a": normal((3, 4)), "b": normal((2, 4), 1)}
    problem = fp.problem(model, fp.losses.cross_entropy, params=params)
    batch = ((normal((5, 2), 2), normal((5, 3), 3)), torch.arange(5))
    dense = reference.ggn(problem, params, batch)
    found = treemath.ravel(fp.DiagonalGGN(problem, params, batch).diagonal())
    assert_close(found, dense.diagonal(), rtol=1e-9)
    assert_close(fp.GGN(problem, params, batch).trace(), dense.trace(), rtol=1e-9)
