# %% [markdown]
# # How good is this approximation?
#
# K-FAC, EKFAC and the diagonal approximate a curvature matrix that is usually too large to compute.
# For a small network it can be computed layer by layer, and the approximations can be compared with
# it. The first measure is the relative Frobenius error. The second is closer to the purpose of a
# preconditioner: the cosine of the angle between the solve with the approximation and the exact
# solve.

# %%
import tempfile
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn

import funcprecond as fp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

# %%
pixels, digits = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
targets = torch.tensor(digits)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Tanh(),
    nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh(),
    nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
problem = fp.problem(model, fp.losses.cross_entropy)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# All candidates are compared with the Gauss-Newton matrix on 256 images.


# %%
def candidates(params, batch):
    def factored(**options):
        options = {"labels": "exact"} | options
        seeded = torch.Generator().manual_seed(1)
        return fp.KroneckerFactored(problem, params, batch, generator=seeded, **options)

    return {
        "K-FAC": factored(),
        "K-FAC, one label": factored(labels="mc"),
        "EKFAC": factored(kind="ekfac"),
        "empirical K-FAC": factored(labels="empirical"),
        "diagonal": fp.DiagonalGGN(problem, params, batch),
    }


def quality(params, damping=1e-2):
    batch = (images[:256], targets[:256])
    exact = fp.GGN(problem, params, batch)
    seeded = torch.Generator().manual_seed(2)
    return fp.plots.approximation_quality(
        exact, candidates(params, batch), damping=damping, generator=seeded
    )


def show(found):
    names = list(next(iter(found.values())))
    print(f"{'error / cosine':18}" + "".join(f"layer {label:8}" for label in found))
    for name in names:
        cells = [
            f"{float(q[name].error):.2f} / {float(q[name].cosine):.2f}  " for q in found.values()
        ]
        print(f"{name:18}" + "".join(cells))


at_start = quality(problem.params)
show(at_start)

# %% [markdown]
# The same comparison follows after training. The model is then certain of most images, so that the
# gradients at the sampled labels, and at the labels of the data, are small for most of them.

# %%
opt = fp.chain(fp.adam(), fp.scale(0.01))
params, state = problem.params, opt.init(problem.params)
for _ in range(200):
    chosen = torch.randint(len(images), (128,), generator=generator)
    evidence = fp.observe(problem, params, (images[chosen], targets[chosen]))
    state, direction = opt.update(state, evidence.grads, evidence)
    params = fp.apply(params, direction)
accuracy = float((problem(params, images).argmax(1) == targets).float().mean())
print(f"accuracy {100 * accuracy:.1f} %")
assert accuracy > 0.9

trained = quality(params)
show(trained)

# %% [markdown]
# EKFAC uses the best diagonal in the eigenbases of K-FAC's factors, so its error is never larger
# than that of K-FAC. The diagonal of the matrix itself has a larger error than EKFAC here, in every
# layer.

# %%
for found in (at_start, trained):
    for label, by_name in found.items():
        assert by_name["EKFAC"].error <= by_name["K-FAC"].error * 1.001, label
        assert by_name["EKFAC"].error < by_name["diagonal"].error, label
        assert all(0 < q.cosine <= 1 for q in by_name.values())

# %%
figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
for row, (title, found) in zip(
    axes, {"at the start": at_start, "trained": trained}.items(), strict=True
):
    fp.plots.quality(found, axes=row)
    row[0].set_ylabel(title)
picture = Path(tempfile.gettempdir()) / "approximations.png"
figure.savefig(picture, dpi=110)
print(f"The bar charts are in {picture}.")

# %% [markdown]
# All of these approximations omit the curvature *between* layers. Even if each block is accurate,
# they may therefore be poor preconditioners for conjugate gradients with the whole matrix: here
# they increase the number of iterations. A low-rank sketch of the whole matrix, which does not use
# the layers, reduces it.

# %%
batch = (images[:256], targets[:256])
ggn, damping = fp.GGN(problem, params, batch), 1e-3
gradient = ggn.gradient()
sketch = fp.nystrom(ggn, 60, generator=torch.Generator().manual_seed(3))
preconditioners = {name: c.inverse(damping) for name, c in candidates(params, batch).items()}
preconditioners["Nyström"] = sketch.preconditioner(damping)
options = {"damping": damping, "tol": 1e-4, "max_iter": 1000}
iterations = {"none": int(ggn.solve(gradient, **options).iterations)}
for name, p in preconditioners.items():
    iterations[name] = int(ggn.solve(gradient, precondition=p, **options).iterations)
print(iterations)
assert iterations["Nyström"] < 0.5 * iterations["none"]
assert iterations["EKFAC"] < iterations["K-FAC"]
