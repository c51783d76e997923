import matplotlib
import pytest
import torch

import funcprecond as fp
from funcprecond.estimators import plots
from funcprecond.operators.algebra import Matrix
from tests import problems, reference
from tests.equality import assert_close
from tests.problems import normal, seeded

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_quality_is_zero_error_and_cosine_one_for_the_truth_itself():
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    dense = reference.ggn(toy.problem, toy.params, toy.batch)
    approximations = {
        "itself": Matrix(dense, toy.params),
        "twice": 2 * ggn,
        "diagonal": fp.DiagonalGGN(toy.problem, toy.params, toy.batch),
    }
    found = plots.approximation_quality(ggn, approximations, damping=0.1, generator=seeded(0))
    assert list(found) == ["0", "2"]
    assert_close(found["0"]["itself"].error, torch.zeros((), dtype=torch.float64), atol=1e-12)
    assert_close(found["0"]["itself"].cosine, torch.ones((), dtype=torch.float64), rtol=1e-12)
    assert_close(found["2"]["twice"].error, torch.ones((), dtype=torch.float64), rtol=1e-9)
    block = dense[:16, :16]
    off = (block - block.diagonal().diag()).norm() / block.norm()
    assert_close(found["0"]["diagonal"].error, off, rtol=1e-9)
    assert 0 < found["0"]["diagonal"].cosine < 1
    axes = plots.quality(found)
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == list(approximations)
    assert len(axes[1].patches) == 6


def test_the_matrix_is_drawn_in_the_order_of_its_blocks():
    like = {"a.w": normal((2,)), "b.w": normal((1,)), "a.b": normal((1,))}
    dense = torch.diag(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))
    axes = plots.matrix(Matrix(dense, like))
    image = axes.get_images()[0].get_array()
    assert [image[i, i].item() for i in range(4)] == pytest.approx([0, -1, -3, -2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b"]


def test_the_spectrum_is_drawn():
    toy = problems.mlp()
    ggn = fp.GGN(toy.problem, toy.params, toy.batch)
    density = fp.spectral_density(ggn, steps=8, generator=seeded(0))
    top = fp.eigsh(ggn, 2, generator=seeded(0))
    axes = plots.spectrum(density, eigenvalues=top.values)
    assert len(axes.lines) == 2
