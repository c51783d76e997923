# %% [markdown]
# # Curvature by hand
#
# A preconditioner results from three choices: which curvature matrix to use, how to represent it,
# and how to solve with it. This tutorial makes each choice separately, for a network that is so
# small that the whole matrix can be computed and drawn.

# %%
import tempfile
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_iris
from torch import nn

import funcprecond as fp
from funcprecond.linalg import treemath

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)

# %% [markdown]
# The data are four lengths for each of 150 irises of three species, which come with scikit-learn. A
# small network is first trained for 40 steps, so that the curvature below is not that of randomly
# initialized weights.

# %%
lengths, species = load_iris(return_X_y=True)
inputs = torch.tensor((lengths - lengths.mean(0)) / lengths.std(0))
batch = (inputs, torch.tensor(species))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
problem = fp.problem(model, fp.losses.cross_entropy)

opt = fp.chain(fp.adam(), fp.scale(0.03))
params, state = problem.params, opt.init(problem.params)
for _ in range(40):
    evidence = fp.observe(problem, params, batch)
    state, direction = opt.update(state, evidence.grads, evidence)
    params = fp.apply(params, direction)
gradient = fp.observe(problem, params, batch).grads
print(f"loss {float(evidence.loss):.3f}, {sum(p.numel() for p in params.values())} parameters")
assert evidence.loss < 0.6

# %% [markdown]
# ## First choice: the matrix
#
# The candidates are the Hessian, the Gauss-Newton matrix and the empirical Fisher matrix of the
# same loss. They are operators: nothing is computed until one of them is multiplied by a vector.
# The product with the Hessian is compared with central differences of the gradient, which are an
# independent computation.

# %%
hessian = fp.Hessian(problem, params, batch)
ggn = fp.GGN(problem, params, batch)
empirical = fp.Fisher(problem, params, batch, labels="empirical")


def moved(step):
    return fp.observe(problem, treemath.add(params, gradient, step), batch).grads


difference = treemath.mul(treemath.sub(moved(1e-5), moved(-1e-5)), 1 / 2e-5)
product = hessian @ gradient
error = treemath.norm(treemath.sub(product, difference)) / treemath.norm(product)
print(f"Hessian product against central differences: {float(error):.1e}")
assert error < 1e-6

for name, c in {"Hessian": hessian, "Gauss-Newton": ggn, "empirical Fisher": empirical}.items():
    values = torch.linalg.eigvalsh(c.to_dense())
    print(f"{name:17} trace {float(c.trace()):6.3f}, smallest eigenvalue {float(values[0]):9.2e}, "
          f"largest {float(values[-1]):.3f}")  # fmt: skip

# The Hessian is indefinite here. The other two are positive semi-definite.
assert torch.linalg.eigvalsh(hessian.to_dense())[0] < -1e-4
assert torch.linalg.eigvalsh(ggn.to_dense())[0] > -1e-12

# %% [markdown]
# ## Second choice: the representation
#
# There are four candidates: the whole matrix, its diagonal blocks (one per layer), one Kronecker
# product per layer, and the diagonal. Each stores fewer numbers than the previous one, and none
# approximates the matrix better than the previous one.

# %%
kfac = fp.KroneckerFactored(problem, params, batch, labels="exact")
stored = {
    "whole": ggn,
    "layers": ggn.blocks("layer"),
    "K-FAC": kfac,
    "diagonal": fp.DiagonalGGN(problem, params, batch),
}
dense = ggn.to_dense()
errors = {name: float((c.to_dense() - dense).norm() / dense.norm()) for name, c in stored.items()}
print({name: f"{error:.2f}" for name, error in errors.items()})
assert list(errors.values()) == sorted(errors.values())

figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
for ax, (name, c) in zip(axes, stored.items(), strict=True):
    fp.plots.matrix(c, axes=ax)
    ax.set_title(f"{name}: error {errors[name]:.2f}")
picture = Path(tempfile.gettempdir()) / "curvature_by_hand.png"
figure.savefig(picture, dpi=100)
print(f"The four matrices are in {picture}.")

# %% [markdown]
# ## Third choice: the solver
#
# The direction is `P g = (C + λ I)^-1 g`. The method of conjugate gradients (CG) only needs
# products with `C`, and with a preconditioner it needs fewer of them. The preconditioner here is a
# Nyström sketch, a low-rank matrix that is computed from twenty products with random vectors.

# %%
damping = 1e-3
exact = torch.linalg.solve(
    dense + damping * torch.eye(len(dense)).double(), treemath.ravel(gradient)
)
plain = ggn.solve(gradient, damping=damping, tol=1e-8)
sketch = fp.nystrom(ggn, 20, generator=torch.Generator().manual_seed(0))
helped = fp.nystrom_cg(ggn, gradient, damping=damping, tol=1e-8, sketch=sketch)
for name, solution in {"CG": plain, "CG, Nyström": helped}.items():
    error = (treemath.ravel(solution.solution) - exact).norm() / exact.norm()
    print(f"{name:14} {int(solution.iterations):3} iterations, error {float(error):.1e}")
    assert error < 1e-4
assert helped.iterations < plain.iterations

# %% [markdown]
# Finally, one step is taken along each direction, with the length that is best on this batch. The
# step with the whole matrix reaches a lower loss than the steps with the other representations and
# the step along the gradient.

# %%
steps = torch.logspace(-3, 1.5, 60, dtype=torch.float64)
directions = {"gradient": gradient}
directions |= {
    name: c.solve(gradient, damping=0.01, tol=1e-8).solution for name, c in stored.items()
}


def best(direction):
    losses = [problem.loss(problem(treemath.add(params, direction, -float(s)), inputs), batch[1])
              for s in steps]  # fmt: skip
    return float(torch.stack(losses).min())


lowest = {name: best(d) for name, d in directions.items()}
print({name: f"{loss:.4f}" for name, loss in lowest.items()})
assert lowest["whole"] == min(lowest.values())
