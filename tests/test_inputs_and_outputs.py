"""Inputs and outputs as people have them: mappings, dataclasses, a loss inside of the model."""

import collections
import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcprecond as fp
from funcprecond import tree
from tests import problems
from tests.equality import assert_close, assert_same, copy
from tests.problems import initialised, normal, seeded


class Cache:
    """An object that torch cannot see inside."""

    def __init__(self, keys):
        self.keys = keys


@dataclasses.dataclass
class Output:
    logits: Tensor
    best: Tensor
    loss: Tensor | None = None
    cache: Any = None


class Named(NamedTuple):
    cache: Any
    logits: Tensor
    best: Tensor


class Mapped(collections.UserDict):
    """A mapping that is no dict, whose entries are also attributes, as of transformers."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class AttributeDict(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


PACKED = {
    "a dataclass": lambda z: Output(z, z.argmax(-1), cache=Cache(z)),
    "a NamedTuple": lambda z: Named(Cache(z), z, z.argmax(-1)),
    "a dict": lambda z: {"cache": (Cache(z), None), "logits": z, "best": z.argmax(-1)},
    "a UserDict": lambda z: Mapped(cache=None, logits=z, best=z.argmax(-1)),
    "a dict with attributes": lambda z: AttributeDict(best=z.argmax(-1), logits=z),
    "an object": lambda z: SimpleNamespace(logits=z, cache=Cache(z)),
}


class Net(nn.Module):
    """A classifier of (N, 3) inputs that packs its logits into something."""

    def __init__(self, pack):
        super().__init__()
        self.pack, self.a, self.b = pack, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x, scale=None, flag=None):
        h = torch.tanh(self.a(x if scale is None else x * scale))
        return self.pack(self.b(h))


BATCH = problems.labelled(5, 3, 3, 0)


def plain():
    return fp.problem(initialised(Net(lambda z: z)), fp.losses.cross_entropy)


def picked(outputs):
    return (outputs["logits"] if isinstance(outputs, dict) else outputs.logits).clone()


def measured(problem, batch=BATCH):
    """Everything that is measured of a problem, as plain tensors."""
    args, v = (problem, problem.params, batch), problem.params
    methods = (fp.kfac, fp.ekfac, fp.smw_ng, fp.hessian_free, fp.adahessian, fp.adam)
    directions = {}
    for method in methods:
        opt = method()
        e = fp.observe(*args, opt.needs(0), generator=seeded(0))
        directions[method.__name__] = opt.update(opt.init(v), e.grads, e)[1]
    return {
        "hessian": fp.Hessian(*args) @ v,
        "ggn": fp.GGN(*args).to_dense(),
        "fisher": fp.Fisher(*args).to_dense(),
        "empirical": fp.Fisher(*args, labels="empirical").to_dense(),
        "each": fp.per_sample_grads(*args),
        "diagonal": fp.DiagonalGGN(*args).diagonal(),
        "ntk": fp.ntk(*args),
        **directions,
    }


# --------------------------------------------------------------------------------- choosing outputs
@pytest.mark.parametrize("outputs", ["logits", picked], ids=["name", "function"])
@pytest.mark.parametrize("kind", PACKED)
def test_chosen_outputs_give_what_plain_outputs_give(kind, outputs):
    module = initialised(Net(PACKED[kind]))
    problem = fp.problem(module, fp.losses.cross_entropy, outputs=outputs)
    assert_close(measured(problem), measured(plain()), rtol=1e-12)
    assert isinstance(problem(problem.params, BATCH[0]), Tensor)


def test_a_plain_function_may_return_more_than_the_loss_takes():
    net = plain()
    problem = fp.problem(
        lambda p, x: {"logits": net(p, x), "hidden": x},
        fp.losses.cross_entropy,
        params=net.params,
        outputs="logits",
    )
    assert_close(measured(problem), measured(net), rtol=1e-12)


@pytest.mark.parametrize("kind", [k for k in PACKED if k != "an object"])
def test_a_loss_that_takes_all_outputs_gives_the_same(kind):
    def loss(outputs, targets):
        return F.cross_entropy(picked(outputs), targets)

    problem = fp.problem(initialised(Net(PACKED[kind])), loss)
    args, known = (problem, problem.params, BATCH), plain()
    expected = (known, known.params, BATCH)
    v = problem.params
    assert_close(fp.observe(*args).grads, fp.observe(*expected).grads, rtol=1e-12)
    assert_close(fp.Hessian(*args) @ v, fp.Hessian(*expected) @ v, rtol=1e-12)
    assert_close(fp.GGN(*args).to_dense(), fp.GGN(*expected).to_dense(), rtol=1e-12)
    assert_close(fp.GGN(*args).trace(), fp.GGN(*expected).to_dense().trace(), rtol=1e-12)
    assert_close(fp.per_sample_grads(*args), fp.per_sample_grads(*expected), rtol=1e-12)
    fishers = [fp.Fisher(*a, labels="empirical").to_dense() for a in (args, expected)]
    assert_close(*fishers, rtol=1e-12)
    opt = fp.kfac(labels="empirical")
    es = [fp.observe(*a, opt.needs(0)) for a in (args, expected)]
    assert_close(*[opt.update(opt.init(v), e.grads, e)[1] for e in es], rtol=1e-10)


@pytest.mark.parametrize("kind", PACKED)
def test_a_vmapped_step_takes_all_kinds_of_outputs(kind):
    module = initialised(Net(PACKED[kind]))
    problem = fp.problem(module, fp.losses.cross_entropy, outputs="logits")
    if kind != "an object":
        problem = fp.problem(module, lambda o, y: F.cross_entropy(picked(o), y))
    opt = fp.chain(fp.adam(), fp.scale(0.1))
    step = fp.make_step(problem, opt)
    p, state = problem.params, opt.init(problem.params)
    step(p, state, BATCH, 0)
    stacked = tree.map(lambda x: torch.stack([x, x]), (p, state))
    several = torch.vmap(lambda p, s: step(p, s, BATCH, 0))(*stacked)
    alone = step(p, state, BATCH, 0)
    assert_close({k: x[1] for k, x in several[0].items()}, alone[0], rtol=1e-12)
    assert_close(several[2].loss[0], alone[2].loss)


@pytest.mark.compile
def test_a_compiled_step_takes_chosen_outputs():
    module = initialised(Net(PACKED["a dataclass"]))
    problem = fp.problem(module, fp.losses.cross_entropy, outputs="logits")
    opt = fp.kfac(labels="exact")
    found = [
        fp.make_step(problem, opt, compile=compiled)(
            problem.params, opt.init(problem.params), BATCH, 0
        )[0]
        for compiled in (False, True)
    ]
    assert_close(*found, rtol=1e-9)


def test_a_name_that_the_outputs_lack_is_refused_with_those_that_they_have():
    for kind, has in {"a dict": "'cache', 'logits', 'best'", "a dataclass": "logits"}.items():
        problem = fp.problem(initialised(Net(PACKED[kind])), fp.losses.mse, outputs="values")
        with pytest.raises(KeyError, match=f"outputs='values'.*{has}.*another name"):
            fp.observe(problem, problem.params, BATCH)
    problem = fp.problem(initialised(Net(lambda z: z)), fp.losses.mse, outputs="values")
    with pytest.raises(KeyError, match="a Tensor that has no names"):
        fp.observe(problem, problem.params, BATCH)
    with pytest.raises(TypeError, match="outputs must be the name .* not a int"):
        fp.problem(nn.Linear(2, 2), fp.losses.mse, outputs=0)  # pyright: ignore


def test_an_object_that_torch_cannot_see_inside_names_what_to_choose():
    problem = fp.problem(initialised(Net(PACKED["an object"])), fp.losses.cross_entropy)
    with pytest.raises(TypeError, match="SimpleNamespace.*outputs='logits'"):
        fp.observe(problem, problem.params, BATCH)


def log_likelihood(outputs, targets):
    return -torch.distributions.Normal(*outputs[1:]).log_prob(targets).mean() + outputs[0].mean()


def test_tensors_in_an_object_among_the_outputs_are_missed_by_no_matrix():
    """An actor-critic that returns a value and a distribution."""

    def pack(z):
        return {"value": z[:, 0].square(), "policy": torch.distributions.Normal(z, z.exp())}

    def chosen(outputs):
        return outputs["value"], outputs["policy"].loc, outputs["policy"].scale

    def loss(outputs, targets):
        return log_likelihood(chosen(outputs), targets)

    module, batch = initialised(Net(pack)), (BATCH[0], normal((5, 3), 4))
    hidden = fp.problem(module, loss)
    seen = fp.problem(module, log_likelihood, outputs=chosen)
    args = (hidden, hidden.params, batch), (seen, seen.params, batch)
    v = hidden.params
    assert_close(*[fp.observe(*a).grads for a in args], rtol=1e-12)
    assert_close(*[fp.Hessian(*a) @ v for a in args], rtol=1e-12)
    assert all(bool(x.any()) for x in (fp.GGN(*args[1]) @ v).values())
    for measure in (lambda *a: fp.GGN(*a) @ v, fp.per_sample_grads, fp.DiagonalGGN):
        with pytest.raises(TypeError, match="such as a distribution.*outputs=|likelihood"):
            measure(*args[0])


def test_one_output_of_several_is_asked_for_by_a_loss_of_one_tensor():
    problem = fp.problem(initialised(Net(PACKED["a dataclass"])), fp.losses.cross_entropy)
    with pytest.raises(TypeError, match="not a Output.*outputs="):
        fp.observe(problem, problem.params, BATCH)


# ------------------------------------------------------------------------------------------- inputs
@dataclasses.dataclass
class Inputs:
    x: Tensor
    flag: str = "unused"


@pytest.mark.parametrize("mapping", [dict, Mapped, AttributeDict, collections.OrderedDict])
def test_any_mapping_is_keyword_arguments(mapping):
    x, y = BATCH
    scale = normal((5, 1), 3)
    problem, module = plain(), initialised(Net(lambda z: z))
    batch = mapping({"x": x, "scale": scale, "flag": None, "labels": y})
    assert_close(measured(problem, batch), measured(problem, (x * scale, y)), rtol=1e-12)
    got = fp.per_sample_grads(problem, problem.params, (mapping(x=x, scale=scale), y))
    for n in range(5):
        module.zero_grad()
        F.cross_entropy(module(x[n : n + 1], scale[n : n + 1]), y[n : n + 1]).backward()
        assert_close(
            {k: g[n] for k, g in got.items()}, {k: p.grad for k, p in module.named_parameters()}
        )


@pytest.mark.parametrize("kind", [Mapped, AttributeDict, Inputs])
def test_a_plain_function_gets_its_own_kind_of_inputs(kind):
    net, (x, y) = plain(), BATCH

    def model(p, inputs):
        assert type(inputs) is kind
        return net(p, inputs.x)

    problem = fp.problem(model, fp.losses.cross_entropy, params=net.params)
    assert_close(measured(problem, (kind(x=x), y)), measured(net), rtol=1e-12)


def test_a_mapping_without_labels_names_split():
    problem = plain()
    with pytest.raises(TypeError, match="Mapped.*'labels'.*split="):
        fp.observe(problem, problem.params, Mapped(x=BATCH[0]))


def test_inputs_and_batches_are_not_changed():
    x, y = BATCH
    batch = Mapped(x=x, labels=y)
    before = copy(dict(batch))
    problem = plain()
    fp.per_sample_grads(problem, problem.params, batch)
    assert list(batch) == ["x", "labels"]
    assert_same(dict(batch), before)


# ------------------------------------------------------------------- a loss inside of the model
class OwnLoss(Net):
    """Computes its loss from labels, as the models of transformers do."""

    def __init__(self):
        super().__init__(lambda z: z)

    def forward(self, x, labels=None):  # pyright: ignore
        logits = super().forward(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(logits, logits.argmax(-1), loss)


BOTH = {"x": BATCH[0], "labels": BATCH[1]}
INSIDE = {
    "chosen by outputs": {"loss": lambda loss, _: loss, "outputs": "loss"},
    "chosen by the loss": {"loss": lambda outputs, _: outputs.loss},
}


def own_loss(kind):
    options = dict(INSIDE[kind])
    return fp.problem(
        initialised(OwnLoss()), options.pop("loss"), split=lambda b: (b, None), **options
    )


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("method", [fp.adam, fp.caspr, fp.shampoo, fp.adahessian, fp.lbfgs])
def test_methods_of_the_gradient_and_the_hessian_take_a_loss_inside(kind, method):
    found = []
    for problem, batch in ((own_loss(kind), BOTH), (plain(), BATCH)):
        opt = method()
        e = fp.observe(problem, problem.params, batch, opt.needs(0), generator=seeded(0))
        found.append((e.loss, opt.update(opt.init(problem.params), e.grads, e)[1]))
    assert_close(*found, rtol=1e-11)


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize(
    "need",
    [
        lambda *a: fp.GGN(*a) @ a[1],
        lambda *a: fp.GGN(*a).trace(),
        lambda *a: fp.Fisher(*a) @ a[1],
        lambda *a: fp.DiagonalGGN(*a),
        lambda *a: fp.observe(*a, fp.kfac().needs(0), generator=seeded(0)),
        lambda *a: one_step(fp.hessian_free(), *a),
    ],
)
def test_what_needs_predictions_says_what_to_choose(kind, need):
    problem = own_loss(kind)
    with pytest.raises((TypeError, ValueError), match="outputs=.logits.|no axis of examples"):
        need(problem, problem.params, BOTH)


def test_per_sample_gradients_of_a_loss_inside_are_right_or_refused():
    chosen, whole = own_loss("chosen by outputs"), own_loss("chosen by the loss")
    with pytest.raises(TypeError, match="outputs='logits'"):
        fp.per_sample_grads(chosen, chosen.params, BOTH)
    problem = plain()
    expected = fp.per_sample_grads(problem, problem.params, BATCH)
    assert_close(fp.per_sample_grads(whole, whole.params, BOTH), expected, rtol=1e-12)


def one_step(opt, problem, params, batch):
    e = fp.observe(problem, params, batch, opt.needs(0), generator=seeded(0))
    return opt.update(opt.init(params), e.grads, e)


def test_labels_that_the_default_split_takes_away_are_explained():
    problem = fp.problem(initialised(OwnLoss()), lambda loss, _: loss, outputs="loss")
    with pytest.raises(TypeError, match=r"are None.*split=lambda batch: \(batch, None\)"):
        fp.observe(problem, problem.params, BOTH)


def surrogate(outputs, advantages):
    """The loss of policy gradients, which is linear in the log-probabilities."""
    return -(outputs * advantages[:, None]).mean()


def test_a_loss_that_is_linear_in_the_outputs_warns_once_for_each_problem():
    problem = fp.problem(initialised(Net(lambda z: z.log_softmax(-1))), surrogate)
    args = problem, problem.params, (BATCH[0], normal((5,), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.Fisher(*args, labels="empirical").to_dense()
        fp.observe(*args, fp.kfac(labels="empirical").needs(0))
        fp.Hessian(*args) @ problem.params
    with pytest.warns(UserWarning, match="linear in the outputs"):
        product = fp.GGN(*args) @ problem.params
    assert not any(x.any() for x in product.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.GGN(*args) @ problem.params


def test_a_loss_with_curvature_does_not_warn():
    problem = fp.problem(initialised(Net(lambda z: z)), lambda f, y: F.cross_entropy(f, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zero = {k: torch.zeros_like(p) for k, p in problem.params.items()}
        fp.GGN(problem, problem.params, BATCH) @ zero
        fp.GGN(problem, problem.params, BATCH) @ problem.params


# --------------------------------------------------------------------------------- language models
def by_hand(logits, ids, mask):
    """The mean negative log-likelihood of each token that has one before it, token by token."""
    terms = [
        -logits[n, t].log_softmax(-1)[ids[n, t + 1]]
        for n in range(len(ids))
        for t in range(ids.shape[1] - 1)
        if mask[n, t + 1]
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_next_tokens_are_the_targets_of_logits_at_the_same_positions(kind):
    ids = torch.randint(7, (3, 6), generator=seeded(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] + [1] * 5])
    logits = normal((3, 6, 7))
    targets = fp.losses.next_tokens(ids, mask.to(kind))
    assert_close(fp.losses.cross_entropy(logits, targets), by_hand(logits, ids, mask))
    whole = fp.losses.next_tokens(ids)
    assert_close(fp.losses.cross_entropy(logits, whole), by_hand(logits, ids, torch.ones(3, 6)))
    labels = ids.masked_fill(mask == 0, -100)
    assert torch.equal(fp.losses.next_tokens(labels), targets)
    other = fp.losses.next_tokens(ids, mask, ignore_index=0)
    assert torch.equal(other == 0, (targets == -100) | (targets == 0))


def test_next_tokens_refuses_what_are_no_tokens():
    with pytest.raises(TypeError, match=r"integers, not torch.float64"):
        fp.losses.next_tokens(normal((2, 3)))
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 3\), not \(2, 1\)"):
        fp.losses.next_tokens(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 1))
    with pytest.raises(ValueError, match="axis of positions"):
        fp.losses.next_tokens(torch.ones((), dtype=torch.int64))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.h = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.h(self.e(input_ids))


def test_labels_that_are_the_tokens_themselves_are_pointed_out():
    ids = torch.randint(7, (3, 6), generator=seeded(0))
    padded = ids.masked_fill(ids == 0, -100)
    shifted = fp.losses.next_tokens(ids)
    for labels, said in ((ids, True), (padded, True), (shifted, False), (ids * 0 - 100, False)):
        problem = fp.problem(initialised(Tokens()), fp.losses.cross_entropy)
        batch = {"input_ids": ids, "labels": labels}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            fp.observe(problem, problem.params, batch)
            fp.observe(problem, problem.params, batch)
        assert [str(w.message) for w in found if "next_tokens" in str(w.message)] == [
            str(w.message) for w in found
        ]
        assert len(found) == said


# -------------------------------------------------------------------------------------- write_back
class TiedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.n = nn.Embedding(7, 4), nn.BatchNorm1d(4)
        self.h = nn.Linear(4, 7)
        self.h.weight = self.e.weight

    def forward(self, ids):
        return self.h(self.n(self.e(ids)))


def test_trained_parameters_and_buffers_are_written_back():
    module = initialised(TiedNorm())
    module.h.bias.requires_grad_(False)
    problem, frozen = fp.problem(module, fp.losses.cross_entropy), module.h.bias.clone()
    identities = [id(x) for x in (*module.parameters(), *module.buffers())]
    opt = fp.chain(fp.adam(), fp.scale(0.1))
    p, state, buffers = problem.params, opt.init(problem.params), problem.buffers
    ids = torch.randint(7, (9,), generator=seeded(1))
    for t in range(3):
        e = fp.observe(problem, p, (ids, ids), opt.needs(t), buffers=buffers)
        state, d = opt.update(state, e.grads, e)
        p, buffers = fp.apply(p, d), e.buffers
    problem.write_back(p, buffers)
    assert [id(x) for x in (*module.parameters(), *module.buffers())] == identities
    assert module.h.weight is module.e.weight
    assert torch.equal(module.h.bias, frozen)
    assert_same({k: x.detach() for k, x in module.named_parameters() if k != "h.bias"}, p)
    assert_same(dict(module.named_buffers()), buffers)
    module.eval()
    assert_close(module(ids).detach(), problem(p, ids, buffers), rtol=1e-12)


def test_buffers_are_kept_without_new_ones():
    module = initialised(TiedNorm())
    problem, before = (
        fp.problem(module, fp.losses.cross_entropy),
        copy(dict(module.named_buffers())),
    )
    problem.write_back({k: p + 1 for k, p in problem.params.items()})
    assert_same(dict(module.named_buffers()), before)
    assert_close(module.h.weight.detach(), problem.params["e.weight"] + 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda p: {"e.weight": p["e.weight"]}, KeyError, "missing.*h.bias"),
        (lambda p: {**p, "more": p["h.bias"]}, KeyError, "unknown.*more"),
        (lambda p: {**p, "h.bias": p["h.bias"][:3]}, ValueError, r"h.bias.*\(3,\).*\(7,\)"),
        (lambda p: {**p, "h.bias": 1.0}, ValueError, r"h.bias.*float.*\(7,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_not_written(change, error, match):
    module = initialised(TiedNorm())
    problem, before = fp.problem(module, fp.losses.cross_entropy), copy(module.state_dict())
    doubled = {k: 2 * p for k, p in problem.params.items()}
    with pytest.raises(error, match=match):
        problem.write_back(change(doubled))
    assert_same(dict(module.state_dict()), dict(before))
    with pytest.raises(KeyError, match="buffers do not fit"):
        problem.write_back(doubled, {"n.running_mean": torch.ones(4)})
    assert_same(dict(module.state_dict()), dict(before))


def test_a_plain_function_has_nothing_to_write_into():
    toy = problems.mlp_function()
    with pytest.raises(TypeError, match="plain function"):
        toy.problem.write_back(toy.params)


def test_a_module_that_has_changed_is_not_written():
    module = initialised(TiedNorm())
    problem = fp.problem(module, fp.losses.cross_entropy)
    module.e = nn.Embedding(7, 4)
    del module.h
    with pytest.raises(KeyError, match="has changed"):
        problem.write_back(problem.params)
