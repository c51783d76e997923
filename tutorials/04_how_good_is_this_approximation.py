# %% [markdown]
# # How good is this approximation?
#
# K-FAC, EKFAC, FOOF and the diagonal stand for a matrix that nobody forms. On a network small
# enough to form it, layer by layer, they can be held against it: by the relative Frobenius error,
# and by what a preconditioner is for, the angle between its solve and the exact one.

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
# All candidates against the Gauss-Newton matrix, on 256 images.


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
# The same after training, where the model is sure of most images, so that the empirical Fisher
# matrix and the one of sampled labels see few errors.

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
# EKFAC is the best diagonal in K-FAC's basis: its error is never the larger. The diagonal leaves
# out all that K-FAC is about.

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
print(f"The bars are in {picture}.")

# %% [markdown]
# What they miss altogether is the curvature *between* layers. So as preconditioners of conjugate
# gradients on the whole matrix they need not help at all, good as each block may be; a low-rank
# sketch of the whole, which knows nothing of layers, does.

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
