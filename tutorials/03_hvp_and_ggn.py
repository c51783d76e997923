# %% [markdown]
# # Products, spectrum and trace of a trained network
#
# A curvature matrix of a network has as many rows as it has parameters, and is never formed. Its
# products cost one to four gradients, and products are enough for eigenvalues, traces and solves.

# %%
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn

import funcprecond as fp
from funcprecond.linalg import treemath

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

# %%
pixels, digits = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
problem = fp.problem(model, fp.losses.cross_entropy)
generator = torch.Generator().manual_seed(0)

opt = fp.chain(fp.adam(), fp.scale(0.01))
params, state = problem.params, opt.init(problem.params)
for _ in range(150):
    chosen = torch.randint(len(inputs), (128,), generator=generator)
    evidence = fp.observe(problem, params, (inputs[chosen], targets[chosen]))
    state, direction = opt.update(state, evidence.grads, evidence)
    params = fp.apply(params, direction)
size = sum(p.numel() for p in params.values())
accuracy = float((problem(params, inputs).argmax(1) == targets).float().mean())
print(f"{size} parameters, accuracy {100 * accuracy:.1f} %")
assert accuracy > 0.95

# %% [markdown]
# ## One product, and many
#
# `linearize` opens a batch once and keeps its graphs. What is kept makes every further product
# cheaper.

# %%
batch = (inputs[:512], targets[:512])
v = {k: torch.randn(p.shape, generator=generator) for k, p in params.items()}
opened = fp.linearize(problem, params, batch)


def milliseconds(call, repeats=15):
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return sorted(times)[repeats // 2]


gradient = milliseconds(lambda: fp.observe(problem, params, batch))
costs = {
    "Hessian, one-shot": lambda: fp.Hessian(problem, params, batch) @ v,
    "Hessian, kept": lambda: opened.hvp(v),
    "Gauss-Newton, one-shot": lambda: fp.ggn_mv(problem, params, batch, v),
    "Gauss-Newton, kept": lambda: opened.ggn_mv(v),
}
for name, call in costs.items():
    print(f"{name:23} {milliseconds(call) / gradient:.1f} gradients")

# %% [markdown]
# ## On all of the data
#
# An iterable of batches is streamed, one pass a product. The matrix is that of the loss over all
# examples, whatever the size of the batches, also where the last one is smaller. `progress` is
# called with the batches at each pass: `tqdm.tqdm`, or anything else that goes through them.

# %%
batches = list(zip(inputs.split(500), targets.split(500), strict=True))
seen = []


def progress(batches):
    for batch in batches:
        seen.append(len(batch[0]))
        yield batch


streamed, whole = (
    fp.GGN(problem, params, batches=batches, progress=progress),
    fp.GGN(problem, params, (inputs, targets)),
)
error = treemath.norm(treemath.sub(streamed @ v, whole @ v)) / treemath.norm(whole @ v)
print(f"{seen} against one batch: {float(error):.1e}")
assert error < 1e-5
assert sum(seen) == len(inputs)

# %% [markdown]
# ## The trace, four ways
#
# Exactly, from the layers' inputs and output gradients; and estimated from 30 products each, with
# standard errors. Where few eigenvalues dominate, the newer estimators are much closer.

# %%
ggn = fp.GGN(problem, params, batch)
exact = float(ggn.trace())
print(f"exact              {exact:.3f}")
for estimator in (fp.hutchinson_trace, fp.hutchpp, fp.xtrace):
    found = estimator(ggn, 30, generator=torch.Generator().manual_seed(1))
    estimate, deviation = float(found.estimate), float(found.standard_error)
    print(f"{estimator.__name__:18} {estimate:.3f} ± {deviation:.3f}")
    assert abs(estimate - exact) < 6 * deviation + 1e-3 * exact

# %% [markdown]
# ## The largest eigenvalues
#
# Lanczos finds them, with error bounds. They are a low-rank matrix, which can be applied, inverted
# with damping and saved.

# %%
top = fp.eigsh(ggn, 10, generator=torch.Generator().manual_seed(0))
print("eigenvalues", [round(float(x), 3) for x in top.values])
assert (top.bounds <= 1e-3 * top.values[0]).all()
share = float(top.trace()) / exact
print(f"ten of {size} eigenvalues have {100 * share:.0f} % of the trace")
assert share > 0.4

path = Path(tempfile.gettempdir()) / "top_eigenvectors.pt"
fp.save(path, top)
again = fp.load(path, top)
assert torch.equal((again @ v)["0.weight"], (top @ v)["0.weight"])

# %% [markdown]
# ## The whole spectrum
#
# Stochastic Lanczos quadrature: the density of all eigenvalues from a few dozen products. Most are
# near zero; a handful stands out, and the Hessian has a negative side.

# %%
hessian = fp.Hessian(problem, params, batch)
options = {"probes": 2, "steps": 60}
densities = {
    name: fp.spectral_density(c, generator=torch.Generator().manual_seed(0), **options)
    for name, c in {"Gauss-Newton": ggn, "Hessian": hessian}.items()
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for ax, (name, density) in zip(axes, densities.items(), strict=True):
    marks = top.values if name == "Gauss-Newton" else None
    fp.plots.spectrum(density, eigenvalues=marks, axes=ax)
    ax.set_title(name)
    print(f"{name:13} eigenvalues from {float(density.nodes.min()):.3f} "
          f"to {float(density.nodes.max()):.3f}")  # fmt: skip
picture = Path(tempfile.gettempdir()) / "spectra.png"
figure.savefig(picture, dpi=120)
print(f"The spectra are in {picture}.")
assert densities["Hessian"].nodes.min() < -1e-3
assert abs(float(densities["Gauss-Newton"].nodes.max() - top.values[0])) < 1e-2 * top.values[0]

# %% [markdown]
# ## How noisy is the gradient?
#
# From the norms of the examples' gradients, none of which is formed.

# %%
noise = fp.gradient_noise_scale(problem, params, batches=batches)
print(f"the gradient's noise equals it at a batch of {float(noise.scale):.0f} examples")
assert noise.variance > 0
