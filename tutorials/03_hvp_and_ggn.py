# %% [markdown]
# # Products, trace and spectrum of a trained network
#
# A curvature matrix of a network has as many rows as the network has parameters, so it is not
# formed. A product with a vector costs as much as one to four gradients, and products suffice for
# traces, eigenvalues and linear solves.

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
# `linearize` runs the model on a batch once and keeps the graph of that run, so that each further
# product is cheaper than a single product, which includes the run.

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
# With an iterable of batches, each product makes one pass over them. The matrix is that of the loss
# over all examples, whatever the sizes of the batches are; here the last batch is smaller. The
# function `progress` wraps the batches in each pass. It may be `tqdm.tqdm`, or any other function
# that yields them.

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
# ## The trace in four ways
#
# The exact trace is computed from the layers' inputs and output gradients. Three estimators with 30
# products each also give a standard error. If a few eigenvalues dominate, as they do here, Hutch++
# and XTrace are more accurate than Hutchinson's estimator.

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
# The Lanczos method computes them with error bounds. The result is a low-rank matrix, which can be
# multiplied by vectors, inverted with damping, and saved.

# %%
top = fp.eigsh(ggn, 10, generator=torch.Generator().manual_seed(0))
print("eigenvalues", [round(float(x), 3) for x in top.values])
assert (top.bounds <= 1e-3 * top.values[0]).all()
share = float(top.trace()) / exact
print(f"the ten largest of {size} eigenvalues make up {100 * share:.0f} % of the trace")
assert share > 0.4

path = Path(tempfile.gettempdir()) / "top_eigenvectors.pt"
fp.save(path, top)
again = fp.load(path, top)
assert torch.equal((again @ v)["0.weight"], (top @ v)["0.weight"])

# %% [markdown]
# ## The whole spectrum
#
# Stochastic Lanczos quadrature estimates the density of all eigenvalues, here from 60 products with
# each of two random vectors. Most eigenvalues are close to zero, and a few are much larger. The
# Hessian also has negative eigenvalues.

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
# ## The noise of the gradient
#
# The gradient noise scale is the batch size at which the noise of the gradient is as large as the
# gradient itself. It is computed from the norms of the per-sample gradients, without forming these
# gradients.

# %%
noise = fp.gradient_noise_scale(problem, params, batches=batches)
print(f"gradient noise scale: {float(noise.scale):.0f} examples")
assert noise.variance > 0
