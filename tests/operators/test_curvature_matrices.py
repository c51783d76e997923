import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funcprecond as fp
from funcprecond.linalg import treemath
from funcprecond.losses import Loss
from funcprecond.operators.vector_stacks import by_layer
from tests import problems, reference
from tests.curvature.test_ggn import TOYS
from tests.equality import assert_close, assert_same, copy
from tests.problems import Toy, initialised, normal, seeded


def differences(toy) -> torch.Tensor:
    """The Hessian by central differences of the gradient."""
    x, y = toy.batch
    gradient = torch.func.grad(lambda p: toy.problem.loss(toy.problem(p, x), y))
    basis = reference.eye(reference.ravel(toy.params).numel())
    columns = [
        reference.ravel(
            reference.difference(gradient, toy.params, reference.unravel(e, toy.params))
        )
        for e in basis
    ]
    return torch.stack(columns)


def rows(toy, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, P) gradients of the examples' terms, and c, from the loss's value alone."""
    x, y = batch
    loss = toy.problem.loss
    c = loss.constant(toy.problem(toy.params, x), y)
    weights = torch.ones(len(x), dtype=torch.float64)

    def f(p, n):
        # Example n's terms: the loss minus that with its outputs held fixed.
        outputs = toy.problem(p, x)
        keep = torch.arange(len(x)).reshape(-1, *[1] * (outputs.ndim - 1)) == n
        return loss(torch.where(keep, outputs, outputs.detach()), y)

    found = [
        reference.ravel(torch.func.grad(lambda p, n=n: f(p, n))(toy.params)) for n in range(len(x))
    ]
    return torch.stack(found) / c, c * weights[0]


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_the_hessian_is_that_of_differences(make):
    toy = make()
    dense = fp.Hessian(toy.problem, toy.params, toy.batch).to_dense()
    assert_close(dense, differences(toy), rtol=1e-6)
    assert_close(dense, dense.T, rtol=1e-11)


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_the_gauss_newton_matrix_is_the_dense_one(make):
    toy = make()
    dense = fp.GGN(toy.problem, toy.params, toy.batch).to_dense()
    assert_close(dense, reference.ggn(toy.problem, toy.params, toy.batch), rtol=1e-9)
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_the_empirical_fisher_matrix_is_that_of_the_examples_gradients(make):
    toy = make()
    g, c = rows(toy, toy.batch)
    operator = fp.Fisher(toy.problem, toy.params, toy.batch, labels="empirical")
    assert_close(operator.to_dense(), c * g.T @ g, rtol=1e-9)
    v = reference.unravel(normal((g.shape[1],), 2), toy.params)
    once = fp.fisher_mv(toy.problem, toy.params, toy.batch, v, labels="empirical")
    assert_close(operator @ v, once, rtol=1e-10)


@pytest.mark.parametrize("make", [problems.mlp, problems.regression, TOYS["bce"]])
def test_sampled_labels_are_the_exact_fisher_matrix_in_the_mean(make):
    toy = make()
    exact = fp.Fisher(toy.problem, toy.params, toy.batch).to_dense()
    assert_close(exact, reference.ggn(toy.problem, toy.params, toy.batch), rtol=1e-9)
    draws = torch.stack(
        [
            fp.Fisher(
                toy.problem, toy.params, toy.batch, labels="mc", samples=20, generator=seeded(i)
            ).to_dense()
            for i in range(40)
        ]
    )
    deviation = draws.std(0) / 40**0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * deviation + 1e-9).all()


def test_sampled_labels_are_those_of_the_generator_and_stay():
    toy = problems.mlp()
    make = lambda seed: fp.Fisher(  # noqa: E731
        toy.problem, toy.params, toy.batch, labels="mc", generator=seeded(seed)
    )
    v = reference.unravel(normal((31,), 2), toy.params)
    operator = make(0)
    assert_same(operator @ v, operator @ v)
    assert_same(operator @ v, make(0) @ v)
    assert not torch.equal((operator @ v)["0.weight"], (make(1) @ v)["0.weight"])


def test_fisher_mv_takes_its_noise_from_outside_so_that_it_can_be_mapped():
    toy = problems.mlp()
    v = reference.unravel(normal((31,), 2), toy.params)
    noise = torch.stack(
        [toy.problem.loss.label_noise(toy.batch[1], 2, seeded(i)) for i in range(3)]
    )
    one = lambda n: fp.fisher_mv(  # noqa: E731
        toy.problem, toy.params, toy.batch, v, labels="mc", noise=n
    )
    mapped = torch.vmap(one)(noise)
    for i in range(3):
        assert_close({k: x[i] for k, x in mapped.items()}, one(noise[i]), rtol=1e-11)


LOSSES = {
    "cross entropy": lambda r: fp.losses.CrossEntropy(reduction=r),
    "smoothed": lambda r: fp.losses.CrossEntropy(label_smoothing=0.2, reduction=r),
    "weighted": lambda r: fp.losses.CrossEntropy(
        weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction=r
    ),
    "soft targets": lambda r: fp.losses.CrossEntropy(reduction=r),
    "nll": lambda r: fp.losses.NLL(reduction=r),
    "weighted nll": lambda r: fp.losses.NLL(
        weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), reduction=r
    ),
    "mse": fp.losses.MSE,
    "bce": lambda r: fp.losses.BCEWithLogits(reduction=r),
    "weighted bce": lambda r: fp.losses.BCEWithLogits(
        torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64),
        r,
        torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64),
    ),
    "huber": lambda r: fp.losses.Huber(0.8, r),
    "gaussian nll": lambda r: fp.losses.GaussianNLL(reduction=r),
}


class Moments(torch.nn.Module):
    """A mean and a positive variance from the first two of three outputs."""

    def forward(self, x):
        return torch.cat([x[..., :1], torch.nn.functional.softplus(x[..., 1:2])], -1)


def with_loss(name, reduction, rank):
    loss = LOSSES[name](reduction)
    module, shape = problems.mlp_module(), {2: (), 3: (2,), 4: (2, 2)}[rank]
    x, real = normal((7, *shape, 3), 1), normal((7, *shape, 3), 2)
    drawn = torch.randint(0, 3, (7, *shape), generator=seeded(2))
    ignored = torch.rand(drawn.shape, generator=seeded(3)) < 0.2
    labels = drawn if rank == 2 else torch.where(ignored, -100, drawn)
    targets = {
        "mse": real,
        "huber": real,
        "bce": (real > 0).double(),
        "weighted bce": real > 0,
        "soft targets": real.softmax(-1),
        "gaussian nll": real[..., :1],
    }
    if name == "gaussian nll":
        module = torch.nn.Sequential(*module, Moments())
    if "nll" in name and "gaussian" not in name:
        module = torch.nn.Sequential(*module, torch.nn.LogSoftmax(-1))
    return Toy(fp.problem(module, loss), ((x, targets.get(name, labels)),))


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_matrix_has_the_losss_scale_and_no_trace_of_the_split(name, reduction, rank):
    toy = with_loss(name, reduction, rank)
    x, y = toy.batch
    pieces = [slice(0, 1), slice(1, 4), slice(4, 7)]
    batches = [(x[s], y[s]) for s in pieces]
    v = reference.unravel(normal((31,), 2), toy.params)
    dense = {
        fp.Hessian: differences(toy),
        fp.GGN: reference.ggn(toy.problem, toy.params, toy.batch),
    }
    for cls in (fp.Hessian, fp.GGN, fp.Fisher):
        whole = cls(toy.problem, toy.params, toy.batch)
        split = cls(toy.problem, toy.params, batches=batches)
        assert_close(split @ v, whole @ v, rtol=1e-10)
        if cls in dense:
            product = dense[cls] @ reference.ravel(v)
            assert_close(reference.ravel(whole @ v), product, rtol=1e-6)
    options = {"labels": "empirical"}
    whole = fp.Fisher(toy.problem, toy.params, toy.batch, **options)
    split = fp.Fisher(toy.problem, toy.params, batches=batches, **options)
    assert_close(split @ v, whole @ v, rtol=1e-10)
    assert_close(split.gradient(), whole.gradient(), rtol=1e-10)
    assert_close(split.loss(), whole.loss(), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pixels_with_classes_on_axis_1_have_the_same_scale(reduction):
    """Torch's layout, as F.cross_entropy has it, and some pixels ignored."""
    module = initialised(torch.nn.Conv2d(2, 3, 2))
    x, y = normal((5, 2, 3, 3)), torch.randint(0, 3, (5, 2, 2), generator=seeded(1))
    y[0, 0] = -100
    problem = fp.problem(module, torch.nn.CrossEntropyLoss(reduction=reduction))
    toy = Toy(problem, ((x, y),))
    pieces = [(x[s], y[s]) for s in (slice(0, 1), slice(1, 5))]
    g = reference.ggn(problem, toy.params, toy.batch)
    for cls, dense in {
        fp.Hessian: differences(toy),
        fp.GGN: g,
        fp.Fisher: g,
        fp.DiagonalGGN: g.diagonal().diag(),
    }.items():
        for data in ({"batch": toy.batch}, {"batches": pieces}):
            assert_close(cls(problem, toy.params, **data).to_dense(), dense, rtol=1e-6)


@pytest.mark.parametrize("cls", [fp.Hessian, fp.GGN, fp.Fisher])
def test_stacks_of_vectors_on_one_batch_and_on_many(cls):
    toy = problems.mlp()
    columns = {k: normal((3, *p.shape), i) for i, (k, p) in enumerate(toy.params.items())}
    for data in ({"batch": toy.batch}, {"batches": toy.batches}):
        operator = cls(toy.problem, toy.params, **data)
        product = operator @ columns
        for i in range(3):
            one = operator @ {k: c[i] for k, c in columns.items()}
            assert_close({k: p[i] for k, p in product.items()}, one, rtol=1e-11)
        assert_close(operator.matmat(columns, 2), product, rtol=1e-11)
        assert_close(cls(toy.problem, toy.params, chunk_size=3, **data) @ columns, product, 1e-11)


KINDS = {
    "hessian": fp.Hessian,
    "ggn": fp.GGN,
    "exact": fp.Fisher,
    "mc": functools.partial(fp.Fisher, labels="mc"),
    "empirical": functools.partial(fp.Fisher, labels="empirical"),
}


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_quadratic_forms_are_those_of_the_dense_matrix(make, kind):
    toy = make()
    if kind in ("exact", "mc") and type(toy.problem.loss).exact is Loss.exact:
        pytest.skip("the loss is no likelihood")
    operator = KINDS[kind](toy.problem, toy.params, toy.batch, generator=seeded(0))
    dense = operator.to_dense()
    vectors = {k: normal((3, *p.shape), i) for i, (k, p) in enumerate(toy.params.items())}
    rows = torch.cat([v.flatten(1) for v in vectors.values()], 1)
    forms = (rows @ dense * rows).sum(1)
    for chunk_size in (None, 2):
        assert_close(operator.quadratic_forms(vectors, chunk_size), forms, rtol=1e-9)
    first, *rest = by_layer(list(toy.params)).values()
    size = sum(toy.params[k].numel() for k in first)
    inside = rows[:, :size]
    block = operator.block(first)
    forms = (inside @ dense[:size, :size] * inside).sum(1)
    assert_close(block.quadratic_forms({k: vectors[k] for k in first}), forms, rtol=1e-9)
    if rest:
        apart = operator.blocks()
        products = apart @ vectors
        forms = sum((vectors[k] * products[k]).flatten(1).sum(1) for k in vectors)
        assert_close(apart.quadratic_forms(vectors), forms, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_quadratic_forms_over_many_batches_are_those_of_all_the_data(kind):
    toy = problems.mlp()
    vectors = {k: normal((3, *p.shape), i) for i, (k, p) in enumerate(toy.params.items())}
    operator = KINDS[kind](toy.problem, toy.params, batches=toy.batches, generator=seeded(0))
    products = operator @ vectors
    forms = sum((vectors[k] * products[k]).flatten(1).sum(1) for k in vectors)
    for chunk_size in (None, 2):
        assert_close(operator.quadratic_forms(vectors, chunk_size), forms, rtol=1e-10)


@pytest.mark.parametrize("kind", ["ggn", "exact", "mc", "empirical"])
def test_a_quadratic_form_takes_no_pull_back(kind):
    toy = problems.mlp()
    operator = KINDS[kind](toy.problem, toy.params, toy.batch, generator=seeded(0))
    vectors = {k: normal((8, *p.shape), i) for i, (k, p) in enumerate(toy.params.items())}
    operator @ vectors  # opens it
    counts = []
    for call in (operator.quadratic_forms, operator.matmat):
        with FlopCounterMode(display=False) as counter:
            call(vectors)
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1] / 2


def test_dropout_masks_are_drawn_once_and_shared_by_all_products():
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    )
    problem = fp.problem(initialised(module), fp.losses.cross_entropy)
    batches = problems.mlp().batches
    v = {k: normal(p.shape, i) for i, (k, p) in enumerate(problem.params.items())}
    for cls in (fp.Hessian, fp.GGN):
        for data in ({"batch": batches[0]}, {"batches": batches}):
            operator = cls(problem, problem.params, **data, generator=seeded(0))
            assert_same(operator @ v, operator @ v)
            dense = operator.to_dense()
            assert_close(dense, dense.T, rtol=1e-10)
            other = cls(problem, problem.params, **data, generator=seeded(1))
            assert not torch.equal((operator @ v)["0.weight"], (other @ v)["0.weight"])


def test_nothing_is_changed_and_the_operator_cannot_be():
    toy = problems.mlp()
    before = copy((toy.params, toy.batch, dict(toy.problem.module.state_dict())))
    operator = fp.Hessian(toy.problem, toy.params, toy.batch)
    product = operator @ toy.params
    assert not any(p.requires_grad for p in product.values())
    assert_same((toy.params, toy.batch, dict(toy.problem.module.state_dict())), before)
    with pytest.raises(AttributeError):
        operator.params = {}


def test_products_inside_of_transforms_are_those_outside():
    toy = problems.mlp()
    outside = fp.Hessian(toy.problem, toy.params, toy.batch)
    v = reference.unravel(normal((31,), 2), toy.params)
    expected = outside @ v
    stacked = {k: torch.stack([x, 2 * x]) for k, x in v.items()}
    mapped = torch.vmap(lambda u: outside @ u)(stacked)
    assert_close({k: x[0] for k, x in mapped.items()}, expected, rtol=1e-11)
    inside = torch.vmap(lambda u: fp.Hessian(toy.problem, toy.params, toy.batch) @ u)(stacked)
    assert_close(inside, mapped, rtol=1e-11)
    assert_close(outside @ v, expected, rtol=0)

    def squared(params):
        return treemath.dot(v, fp.GGN(toy.problem, params, toy.batch) @ v)

    slope = torch.func.grad(squared)(toy.params)
    expected = reference.difference(squared, toy.params, v, 1e-5)
    assert treemath.dot(slope, v).item() == pytest.approx(expected.item(), rel=1e-6)


def test_data_must_be_one_batch_or_an_iterable_that_lasts():
    toy = problems.mlp()
    with pytest.raises(ValueError, match="either"):
        fp.GGN(toy.problem, toy.params)
    with pytest.raises(ValueError, match="either"):
        fp.GGN(toy.problem, toy.params, toy.batch, batches=[toy.batch])
    with pytest.raises(TypeError, match="not an iterator"):
        fp.GGN(toy.problem, toy.params, batches=iter([toy.batch]))
    with pytest.raises(ValueError, match="no batches"):
        fp.GGN(toy.problem, toy.params, batches=[]) @ toy.params


def test_progress_sees_every_batch_of_every_pass():
    toy, passes = problems.mlp(), []

    def progress(batches):
        passes.append(0)
        for batch in batches:
            passes[-1] += 1
            yield batch

    seen, plain = (
        fp.GGN(toy.problem, toy.params, batches=toy.batches, **options)
        for options in ({"progress": progress}, {})
    )
    assert_same(seen @ toy.params, plain @ toy.params)
    fp.eigsh(seen, 2, max_steps=3, generator=seeded(0), throw=False)
    assert_same(seen.diagonal(), plain.diagonal())
    assert passes == [4] * 5


def test_an_unknown_likelihood_is_refused_in_words():
    toy = TOYS["custom"]()
    for labels in ("exact", "mc"):
        with pytest.raises(TypeError, match="likelihood of .* is not known"):
            fp.fisher_mv(
                toy.problem, toy.params, toy.batch, toy.params, labels=labels, generator=seeded(0)
            )
    with pytest.raises(ValueError, match="labels must be"):
        fp.Fisher(toy.problem, toy.params, toy.batch, labels="all")


def test_half_precision_parameters_take_wide_vectors():
    toy = problems.mlp(torch.float32)
    params = {k: p.bfloat16() for k, p in toy.params.items()}
    problem = fp.problem(toy.problem.module.bfloat16(), fp.losses.cross_entropy)
    x, y = toy.batch
    v = {k: normal(p.shape, i, torch.float32) for i, (k, p) in enumerate(params.items())}
    product = fp.GGN(problem, params, (x.bfloat16(), y)) @ v
    assert {p.dtype for p in product.values()} == {torch.float32}
    exact = reference.ggn(problems.mlp().problem, problems.mlp().params, problems.mlp().batch)
    expected = exact @ reference.ravel(v).double()
    error = reference.ravel(product).double() - expected
    assert error.norm() < 0.05 * expected.norm()
