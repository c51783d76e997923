"""Each loss against torch's own value, and its closed forms against autodiff and enumeration."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad

import funcprecond as fp
from funcprecond.losses import (
    MSE,
    NLL,
    BCEWithLogits,
    CrossEntropy,
    Custom,
    GaussianNLL,
    Huber,
    as_loss,
)
from tests import reference
from tests.equality import assert_close
from tests.problems import normal, seeded

N, C = 4, 3
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
POSITIVE = torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)


def labels(*shape, ignore=None):
    y = torch.randint(0, C, shape, generator=seeded(1))
    if ignore is not None:
        y.view(-1)[1] = ignore
    return y


def probabilities(*shape):
    return normal((*shape, C), 2).softmax(-1)


def moments(*shape):
    return torch.cat([normal((*shape, C), 3), normal((*shape, C), 4).exp()], -1)


X, SEQUENCE = normal((N, C), 0), normal((N, 2, C), 0)
CASES = {
    "cross entropy": (CrossEntropy(), X, labels(N)),
    "cross entropy, sum": (CrossEntropy(reduction="sum"), X, labels(N)),
    "cross entropy, ignored": (CrossEntropy(ignore_index=-1), X, labels(N, ignore=-1)),
    "cross entropy, smoothed": (CrossEntropy(label_smoothing=0.2), X, labels(N)),
    "cross entropy, weighted": (CrossEntropy(weight=WEIGHT), X, labels(N)),
    "cross entropy, weighted sum": (CrossEntropy(weight=WEIGHT, reduction="sum"), X, labels(N)),
    "cross entropy, all options": (
        CrossEntropy(ignore_index=-1, label_smoothing=0.2, weight=WEIGHT),
        X,
        labels(N, ignore=-1),
    ),
    "cross entropy, sequences": (CrossEntropy(), SEQUENCE, labels(N, 2)),
    "cross entropy, ignored in sequences": (
        CrossEntropy(ignore_index=-1),
        SEQUENCE,
        labels(N, 2, ignore=-1),
    ),
    "cross entropy, classes on axis 1": (
        CrossEntropy(class_dim=1),
        SEQUENCE.movedim(-1, 1),
        labels(N, 2),
    ),
    "cross entropy, probabilities": (CrossEntropy(), X, probabilities(N)),
    "cross entropy, probabilities, all options": (
        CrossEntropy(label_smoothing=0.2, weight=WEIGHT),
        X,
        probabilities(N),
    ),
    "cross entropy, probabilities that sum to two": (
        CrossEntropy(label_smoothing=0.2),
        X,
        2 * probabilities(N),
    ),
    "mse": (MSE(), X, normal((N, C), 3)),
    "mse, sum": (MSE("sum"), X, normal((N, C), 3)),
    "mse, sequences": (MSE(), SEQUENCE, normal((N, 2, C), 3)),
    "bce": (BCEWithLogits(), X, labels(N, C).clamp_max(1).double()),
    "bce, soft": (BCEWithLogits(), X, normal((N, C), 3).sigmoid()),
    "bce, weighted sum": (
        BCEWithLogits(POSITIVE, "sum"),
        X,
        labels(N, C).clamp_max(1).double(),
    ),
    "bce, weights of entries": (
        BCEWithLogits(POSITIVE, weight=WEIGHT),
        X,
        labels(N, C).clamp_max(1).double(),
    ),
    "huber": (Huber(), X, normal((N, C), 3)),
    "huber, narrow sum": (Huber(0.5, "sum"), X, normal((N, C), 3)),
    "huber, sequences": (Huber(), SEQUENCE, normal((N, 2, C), 3)),
    "gaussian nll": (GaussianNLL(), moments(N), normal((N, C), 5)),
    "gaussian nll, full sum": (GaussianNLL(True, reduction="sum"), moments(N), X),
    "gaussian nll, sequences": (GaussianNLL(), moments(N, 2), SEQUENCE),
}
every_loss = pytest.mark.parametrize(("loss", "f", "y"), CASES.values(), ids=CASES.keys())


dense_hessian = reference.output_hessian


def outer(rows):
    rows = rows.reshape(rows.shape[0], -1)
    return rows.T @ rows


@every_loss
def test_the_closed_form_product_is_the_autodiff_hessians(loss, f, y):
    v = normal(f.shape, 9)
    expected = dense_hessian(loss, f, y) @ v.reshape(-1)
    assert_close(loss.hessian_product(f, y, v).reshape(-1), expected, rtol=1e-10)


@every_loss
def test_the_exact_cotangents_square_to_the_hessian(loss, f, y):
    """``c U^T U`` is block diagonal in the examples; their pull-backs are summed an example."""
    total = 0.0
    for u in loss.exact(f, y):
        for n in range(N):
            row = torch.zeros_like(f)
            row[n] = u[n]
            total = total + torch.outer(row.reshape(-1), row.reshape(-1))
    assert_close(loss.constant(f, y) * total, dense_hessian(loss, f, y), rtol=1e-10)


@every_loss
def test_sampled_cotangents_square_to_the_hessian_in_the_mean(loss, f, y):
    noise = loss.label_noise(y, 30_000, seeded(5))
    u = loss.sampled(f, y, noise)
    assert u.shape == (30_000, *f.shape)
    total = torch.einsum("sna,snb->nab", *(2 * [u.reshape(30_000, N, -1)]))
    total = loss.constant(f, y) * torch.block_diag(*total)
    expected = dense_hessian(loss, f, y)
    assert_close(total, expected, atol=0.05 * expected.abs().max())


@every_loss
def test_the_empirical_cotangent_times_the_constant_is_the_gradient(loss, f, y):
    expected = grad(lambda v: loss(v, y))(f)
    assert_close(loss.constant(f, y) * loss.empirical(f, y), expected, rtol=1e-12)


@every_loss
def test_the_empirical_cotangent_is_the_same_within_a_graph_and_a_transform(loss, f, y):
    expected = loss.empirical(f, y)
    assert not expected.requires_grad
    leaf = f.clone().requires_grad_()
    within = loss.empirical(leaf, y)
    assert_close(within.detach(), expected, rtol=1e-12)
    # Its derivative is the loss's Hessian over c.
    v = torch.randn_like(f)
    (product,) = torch.autograd.grad(loss.constant(f, y) * within, leaf, v, allow_unused=True)
    hessian = torch.func.vjp(grad(lambda x: loss(x, y)), f)[1](v)[0]
    assert_close(torch.zeros_like(f) if product is None else product, hessian, rtol=1e-9)
    mapped = torch.vmap(lambda x: loss.empirical(x, y))(f.unsqueeze(0))
    assert_close(mapped[0], expected, rtol=1e-12)


def test_a_loss_that_does_not_look_at_all_outputs_has_cotangents_of_zero():
    outputs = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    one = fp.losses.Custom(lambda f, y: f["b"].sum())
    assert_close(one.empirical(outputs, None), {"a": torch.zeros(2, 3), "b": 2 * torch.ones(2)})
    none = fp.losses.Custom(lambda f, y: torch.ones(()))
    assert_close(none.empirical(outputs, None)["b"], torch.zeros(2))


@every_loss
def test_sampling_is_scaled_by_the_number_of_samples(loss, f, y):
    noise = loss.label_noise(y, 1, seeded(5))
    once, thrice = loss.sampled(f, y, noise), loss.sampled(f, y, noise.expand(3, *noise.shape[1:]))
    assert_close(thrice[0], once[0] / math.sqrt(3), rtol=1e-12)


# ------------------------------------------------------------------------------ log-probabilities
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_the_nll_of_log_probabilities_is_cross_entropy(reduction, weight, class_dim):
    """Value, constant, and the matrices of all labels, pulled back through the log-softmax."""
    x, y = SEQUENCE, labels(N, 2, ignore=-1)
    x = x.movedim(-1, class_dim)
    nll = NLL(-1, weight, reduction, class_dim)
    other = CrossEntropy(-1, 0.0, weight, reduction, class_dim)
    logs, pull = torch.func.vjp(lambda z: z.log_softmax(class_dim), x)
    torchs = nn.NLLLoss(weight, ignore_index=-1, reduction=reduction)
    assert_close(nll(logs, y), torchs(logs.movedim(class_dim, 1), y), rtol=1e-13)
    assert_close(nll(logs, y), other(x, y), rtol=1e-12)
    assert_close(nll.constant(logs, y), other.constant(x, y), rtol=1e-12)
    v = normal(x.shape, 5)
    pushed = torch.func.jvp(lambda z: z.log_softmax(class_dim), (x,), (v,))[1]
    product = pull(nll.hessian_product(logs, y, pushed))[0]
    assert_close(product, other.hessian_product(x, y, v), rtol=1e-11)
    assert_close(pull(nll.empirical(logs, y))[0], other.empirical(x, y), rtol=1e-12)
    noise = nll.label_noise(y, 5, seeded(3))
    ours = torch.stack([pull(u)[0] for u in nll.sampled(logs, y, noise)])
    assert_close(ours, other.sampled(x, y, noise), atol=1e-12)
    total = sum(outer(pull(u)[0]) for u in nll.exact(logs, y))
    assert_close(total, sum(outer(u) for u in other.exact(x, y)), atol=1e-12)


def test_the_divisor_of_a_custom_loss_is_its_mean():
    def masked(f, y):
        kept = y != 0
        return ((f - y).square() * kept).sum() / (2 * kept.sum())

    y = normal((N, C), 1)
    y[0], y[1, 1] = 0, 0
    loss = Custom(masked, divisor=lambda f, y: (y != 0).sum())
    assert_close(loss.constant(X, y), torch.tensor(1 / 8, dtype=torch.float64))
    assert_close(loss.empirical(X, y), (X - y) * (y != 0), rtol=1e-12)
    with pytest.raises(ValueError, match="a sum divides by nothing"):
        Custom(masked, "sum", loss.divisor)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'none'"):
        Custom(masked, "none")  # pyright: ignore[reportArgumentType]


ENTRYWISE = [
    (nn.L1Loss(), F.l1_loss),
    (nn.SmoothL1Loss(beta=0.5), F.smooth_l1_loss),
    (nn.BCELoss(), F.binary_cross_entropy),
    (nn.PoissonNLLLoss(), F.poisson_nll_loss),
    (nn.SoftMarginLoss(), F.soft_margin_loss),
    (nn.HingeEmbeddingLoss(), F.hinge_embedding_loss),
    (nn.MultiLabelSoftMarginLoss(), F.multilabel_soft_margin_loss),
]


@pytest.mark.parametrize(("module", "function"), ENTRYWISE)
def test_torchs_means_over_entries_divide_by_their_number(module, function):
    f, y = X.sigmoid(), (X > 0).double()
    for loss in (as_loss(module), as_loss(function)):
        one = loss.constant(f, y)
        assert_close(one, torch.tensor(1 / f.numel(), dtype=torch.float64))
        # So the mean over all data is the mean over batches with the weights 1 / c.
        parts = [(f[:1], y[:1]), (f[1:], y[1:])]
        mean = sum(loss(*p) / loss.constant(*p) for p in parts) * one
        assert_close(mean, loss(f, y), rtol=1e-12)


def test_probabilities_have_the_empirical_fisher_matrix_of_their_logits():
    module, y = nn.Linear(2, C).double(), labels(N, C).clamp_max(1).double()
    batch = normal((N, 2), 4), y
    found = []
    for model, loss in (
        (module, nn.BCEWithLogitsLoss()),
        (nn.Sequential(module, nn.Sigmoid()), nn.BCELoss()),
    ):
        problem = fp.problem(model, loss)
        found.append(fp.Fisher(problem, problem.params, batch, labels="empirical").trace())
    assert_close(found[1], found[0], rtol=1e-10)


class Focal(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(reduction="none")

    def forward(self, input, target):
        value = super().forward(input, target)
        return ((1 - (-value).exp()) ** 2 * value).mean()


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base():
    y, loss = labels(N), as_loss(Focal())
    assert isinstance(loss, Custom)
    assert_close(loss(X, y), Focal()(X, y))
    named = type("Named", (nn.CrossEntropyLoss,), {})
    assert isinstance(as_loss(named()), CrossEntropy)


# ------------------------------------------------------------------------------ against torch's own
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": WEIGHT}])
def test_cross_entropy_is_torchs(reduction, options):
    x, y = SEQUENCE.movedim(-1, 1), labels(N, 2)
    torchs = nn.CrossEntropyLoss(reduction=reduction, **options)
    assert_close(as_loss(torchs)(x, y), torchs(x, y), rtol=1e-13)
    assert_close(
        CrossEntropy(reduction=reduction, **options)(SEQUENCE, y), torchs(x, y), rtol=1e-13
    )


def test_cross_entropy_ignores_what_torch_ignores():
    y = labels(N, ignore=-100)
    assert_close(fp.losses.cross_entropy(X, y), F.cross_entropy(X, y), rtol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_and_bce_are_torchs(reduction):
    y = labels(N, C).clamp_max(1).double()
    for torchs in (
        nn.MSELoss(reduction=reduction),
        nn.BCEWithLogitsLoss(reduction=reduction),
        nn.BCEWithLogitsLoss(pos_weight=POSITIVE, reduction=reduction),
        nn.BCEWithLogitsLoss(weight=POSITIVE, reduction=reduction),
        nn.BCEWithLogitsLoss(WEIGHT, pos_weight=POSITIVE, reduction=reduction),
    ):
        assert not isinstance(as_loss(torchs), Custom)
        assert_close(as_loss(torchs)(X, y), torchs(X, y), rtol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_huber_and_the_gaussian_are_torchs(reduction):
    y, f = normal((N, C), 9), moments(N)
    f[0, -1] = 1e-9
    for torchs in (
        nn.HuberLoss(reduction, 0.7),
        nn.SmoothL1Loss(reduction=reduction),
    ):
        assert isinstance(as_loss(torchs), Huber)
        assert_close(as_loss(torchs)(X, y), torchs(X, y), rtol=1e-13)
    for full in (False, True):
        torchs = nn.GaussianNLLLoss(full=full, reduction=reduction, eps=1e-3)
        value = lambda f, t=torchs: t(f[:, :C], y, f[:, C:])  # noqa: E731
        assert_close(as_loss(torchs)(f, y), value(f), rtol=1e-13)
        found, expected = grad(lambda f, t=torchs: as_loss(t)(f, y))(f), grad(value)(f)
        assert_close(found, expected, rtol=1e-12)


def test_an_outlier_has_a_gradient_and_no_curvature():
    f, y = torch.tensor([[0.1, 5.0]]), torch.zeros(1, 2)
    loss = Huber(reduction="sum")
    assert loss.empirical(f, y).tolist() == [[pytest.approx(0.1), 1.0]]
    assert loss.hessian_product(f, y, torch.ones(1, 2)).tolist() == [[1.0, 0.0]]


def test_torchs_other_losses_keep_their_reduction():
    weighted = nn.BCEWithLogitsLoss(weight=POSITIVE, reduction="sum")
    assert as_loss(weighted).reduction == "sum"
    assert as_loss(nn.NLLLoss(reduction="sum")).reduction == "sum"
    y = labels(N, C).clamp_max(1).double()
    assert_close(as_loss(weighted).constant(X, y), torch.ones((), dtype=torch.float64))
    assert as_loss(nn.KLDivLoss(reduction="batchmean")).reduction == "mean"
    assert as_loss(nn.SmoothL1Loss(beta=0.5)).reduction == "mean"


def test_torchs_functions_become_our_losses():
    assert isinstance(as_loss(F.huber_loss), Huber)
    assert isinstance(as_loss(F.gaussian_nll_loss), GaussianNLL)
    assert as_loss(F.cross_entropy).class_dim == 1
    assert isinstance(as_loss(F.nll_loss), NLL)
    assert as_loss(F.nll_loss).class_dim == 1
    assert isinstance(as_loss(F.mse_loss), MSE)
    assert isinstance(as_loss(F.binary_cross_entropy_with_logits), BCEWithLogits)


def test_a_loss_of_ours_stays_itself():
    assert as_loss(fp.losses.mse) is fp.losses.mse


# ------------------------------------------------------------------------------------------ custom
def test_a_callable_has_gradient_hessian_product_and_empirical_cotangents():
    loss, y, v = as_loss(lambda f, y: (f - y).cosh().sum() / len(f)), normal((N, C), 1), X
    assert isinstance(loss, Custom)
    expected = dense_hessian(loss, X, y) @ v.reshape(-1)
    assert_close(loss.hessian_product(X, y, v).reshape(-1), expected, rtol=1e-12)
    assert_close(loss.empirical(X, y), (X - y).sinh(), rtol=1e-12)


def test_a_callable_says_that_it_has_no_likelihood():
    loss = as_loss(lambda f, y: (f - y).square().sum())
    for ask in (
        lambda: loss.label_noise(X, 1, seeded(0)),
        lambda: loss.sampled(X, X, X),
        lambda: loss.exact(X, X),
    ):
        with pytest.raises(TypeError, match="likelihood.*labels='empirical'"):
            ask()


@pytest.mark.parametrize("bad", [lambda f, y: (f - y).square(), lambda f, y: 1.0])
def test_a_loss_that_is_no_scalar_is_explained(bad):
    with pytest.raises(ValueError, match="must return a 0-d tensor, not .*take its mean or sum"):
        as_loss(bad)(X, X)


# ------------------------------------------------------------------------------------------ errors
def test_what_is_not_callable_is_no_loss():
    with pytest.raises(TypeError, match="callable as loss"):
        as_loss("cross_entropy")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.HuberLoss, nn.NLLLoss])
def test_a_torch_loss_without_reduction_is_refused(loss):
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        as_loss(loss(reduction="none"))


def test_targets_of_the_wrong_shape_are_explained():
    with pytest.raises(ValueError, match=r"expect targets \(4, 2\), not \(4,\).*class_dim=1"):
        fp.losses.cross_entropy(SEQUENCE, labels(N))
    with pytest.raises(ValueError, match="must agree"):
        fp.losses.mse(X, X[:, :1])
    with pytest.raises(ValueError, match="must agree"):
        fp.losses.bce_with_logits(X, X[0])
    with pytest.raises(ValueError, match="must agree"):
        fp.losses.huber(X, X[0])
    with pytest.raises(ValueError, match="means and the variances along the last axis"):
        fp.losses.gaussian_nll((X, X), X)


def test_sampling_reaches_the_last_class_and_the_first():
    """A uniform number next to 1 must not fall off the end of the cumulative sum."""
    f = torch.zeros(1, 3)
    u = fp.losses.cross_entropy.sampled(f, labels(1), torch.tensor([[0.0], [0.9999999]]))
    drawn = (f.softmax(-1) - u * math.sqrt(2)).argmax(-1)
    assert drawn.flatten().tolist() == [0, 2]


@pytest.mark.parametrize("loss", [fp.losses.cross_entropy, fp.losses.nll])
def test_what_is_no_class_index_is_explained(loss):
    with pytest.raises(TypeError, match=r"class indices of an integer dtype.*targets.long\(\)"):
        loss(X, labels(N).double())
    with pytest.raises(TypeError, match="targets must be one tensor, not a list"):
        loss(X, [0, 1, 2, 0])
    with pytest.raises(TypeError, match="outputs must be one tensor, not a tuple"):
        loss((X, X), labels(N))
    with pytest.raises(ValueError, match="axis 0 must count the examples"):
        loss(X[0], torch.tensor(1))
    with pytest.raises(ValueError, match=r"expect targets \(4,\), not \(4, 1\)"):
        loss(X, labels(N, 1))


def test_one_column_never_broadcasts_against_a_row():
    """(N,) against (N, 1) would be an (N, N) table of errors."""
    for loss in (fp.losses.mse, fp.losses.huber, fp.losses.bce_with_logits):
        for f, y in ((X[:, :1], X[:, 0]), (X[:, 0], X[:, :1])):
            with pytest.raises(ValueError, match="must agree"):
                loss(f, y)
    with pytest.raises(ValueError, match="must agree"):
        fp.losses.gaussian_nll(moments(N)[:, [0, 3]], X[:, 0])


# ------------------------------------------------------------------------------------------ dtypes
REAL = {"mse": MSE(), "huber": Huber(2.0), "bce": BCEWithLogits(), "gaussian nll": GaussianNLL()}
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("output", [torch.float32, torch.float64])
def test_targets_may_have_any_real_dtype(name, target, output):
    loss, y = REAL[name], torch.tensor([[0, 1], [1, 0], [1, 1]])
    f = normal((3, 4), 1) if name == "gaussian nll" else normal((3, 2), 1)
    f = f.abs() if name == "gaussian nll" else f
    expected = loss(f, y.double())
    f, y = f.to(output), y.to(target)
    assert_close(loss(f, y).double(), expected, rtol=1e-5)
    found = [loss.empirical(f, y), loss.hessian_product(f, y, f), *loss.exact(f, y)]
    found += list(loss.sampled(f, y, loss.label_noise(y, 2, seeded(0))))
    assert {u.dtype for u in found} == {output}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_class_indices_may_have_any_integer_dtype(dtype):
    # As one byte, 156 would equal the index that is ignored, -100.
    f, y = normal((3, 160), 1), torch.tensor([0, 156 if dtype is torch.uint8 else 9, 2])
    for loss in (CrossEntropy(label_smoothing=0.1), NLL()):
        assert_close(loss(f, y.to(dtype)), loss(f, y))
        assert_close(loss.constant(f, y.to(dtype)), torch.tensor(1 / 3, dtype=torch.float64))
        assert_close(loss.hessian_product(f, y.to(dtype), f), loss.hessian_product(f, y, f))
    flags = torch.tensor([True, False, True])
    assert_close(fp.losses.cross_entropy(f, flags), fp.losses.cross_entropy(f, flags.long()))


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_constants_of_many_terms_are_exact_in_every_dtype(dtype):
    f, y = torch.zeros(70_001, 2, dtype=dtype), torch.zeros(70_001, dtype=torch.int64)
    for loss, targets, terms in (
        (CrossEntropy(), y, 70_001),
        (NLL(), y, 70_001),
        (BCEWithLogits(), f, 140_002),
        (Custom(lambda f, y: f.sum()), y, 70_001),
    ):
        assert float(loss.constant(f, targets)) == pytest.approx(1 / terms, rel=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_labels_of_half_precision_logits_have_their_exact_probabilities(dtype):
    """A chi-squared test over the classes of a wide softmax, which half precision cannot sum."""
    classes, samples = 500, 40_000
    logits = normal((1, classes), 3).to(dtype)
    logits[0, ::7] = -torch.inf
    for f, loss in ((logits, CrossEntropy()), (logits.double().log_softmax(-1), NLL())):
        p = logits.double().softmax(-1)[0]
        y = torch.zeros(1, dtype=torch.int64)
        counts = torch.zeros(classes, dtype=torch.float64)
        for seed in range(4):
            u = loss.sampled(f, y, loss.label_noise(y, samples // 4, seeded(seed)))[:, 0]
            drawn = (u * (samples // 4) ** 0.5).argmin(-1)
            counts += drawn.bincount(minlength=classes)
        assert not counts[p == 0].any()
        seen = p > 0
        chi = ((counts - samples * p).square() / (samples * p))[seen].sum()
        freedom = int(seen.sum()) - 1
        assert abs(float(chi) - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("logit", [-9.0, -3.0, 0.1, 3.0, 9.0])
def test_bernoulli_labels_of_half_precision_logits_have_the_right_moments(dtype, logit):
    f, y = torch.full((1, 1), logit, dtype=dtype), torch.zeros(1, 1)
    q, samples = f.double().sigmoid(), 400_000
    loss = BCEWithLogits()
    u = loss.sampled(f, y, loss.label_noise(y, samples, seeded(1))).double() * samples**0.5
    variance = q * (1 - q)
    assert_close(u.square().mean(), variance.squeeze(), atol=5 * float(variance / samples) ** 0.5)
    assert_close(loss.hessian_product(f, y, torch.ones(1, 1)).double(), variance, rtol=1e-2)


def test_a_class_of_probability_zero_is_never_drawn():
    """Neither first, between others, nor last, where rounding leaves a part uncovered."""
    f = torch.tensor([[-torch.inf, 0.1, -torch.inf, 0.7, -0.3, -torch.inf]])
    edges = torch.tensor([[0.0], [1 - 2**-24], [0.5]])
    for loss, outputs in ((CrossEntropy(), f), (NLL(), f.log_softmax(-1))):
        u = loss.sampled(outputs, labels(1), edges)
        drawn = u.argmin(-1).flatten()
        assert set(drawn.tolist()) <= {1, 3, 4}
        assert drawn[:2].tolist() == [1, 4]
