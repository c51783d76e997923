# %% [markdown]
# # One loop, five methods
#
# A training step is `θ ← θ − η P g`: a learning rate, a preconditioner and a gradient. Methods
# differ in `P` alone, so one loop serves them all, and one line changes.

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

# %% [markdown]
# Real data that comes with scikit-learn: 1797 handwritten digits of 8 × 8 pixels. 1400 to learn
# from, the rest to be tested on.

# %%
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

# %% [markdown]
# A problem is a model and a loss. The model is an ordinary `nn.Module`; the problem reads its
# parameters and never changes them. Parameters are a dict of tensors.

# %%
torch.manual_seed(0)  # for the initial weights, which torch draws from its global generator
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
problem = fp.problem(model, fp.losses.cross_entropy)
print({name: tuple(p.shape) for name, p in problem.params.items()})


# %% [markdown]
# The loop. `opt.needs(t)` is what the method wants to know of this batch: nothing for Adam, layer
# statistics for K-FAC. `observe` measures exactly that, with the gradient, from one forward run.
# `update` is tensor algebra on the result, and `apply` is the subtraction. All randomness, the
# batches and the labels that K-FAC samples, comes from one generator.


# %%
def train_with(opt: fp.Transform, steps: int = 120, batch_size: int = 128):
    generator = torch.Generator().manual_seed(1)
    params = problem.params
    state = opt.init(params)
    losses = []
    for t in range(steps):
        batch = train[torch.randint(len(train), (batch_size,), generator=generator)]
        data = (inputs[batch], targets[batch])
        evidence = fp.observe(problem, params, data, opt.needs(t), generator=generator)
        state, direction = opt.update(state, evidence.grads, evidence)
        params = fp.apply(params, direction)
        losses.append(float(evidence.loss))
    return params, losses


# %% [markdown]
# Five methods. The preconditioner comes first, then momentum, then the learning rate. CASPR is
# grafted to Adam here: its direction with the length of Adam's step, so that Adam's learning rate
# serves both.

# %%
methods = {
    "sgd": fp.chain(fp.sgd(), fp.momentum(0.9), fp.scale(0.1)),
    "adam": fp.chain(fp.adam(), fp.scale(0.01)),
    "kfac": fp.chain(fp.kfac(damping=0.1), fp.momentum(0.9), fp.scale(0.03)),
    "shampoo": fp.chain(fp.shampoo(refresh_every=10, start=10), fp.momentum(0.9), fp.scale(0.02)),
    "caspr": fp.chain(fp.graft(fp.caspr(refresh_every=10, start=10), fp.adam()), fp.scale(0.01)),
}

curves, accuracy = {}, {}
for name, opt in methods.items():
    params, curves[name] = train_with(opt)
    guesses = problem(params, inputs[test]).argmax(1)
    accuracy[name] = float((guesses == targets[test]).float().mean())
    print(f"{name:8} loss {curves[name][0]:.2f} → {sum(curves[name][-10:]) / 10:.4f}, "
          f"test accuracy {100 * accuracy[name]:.1f} %")  # fmt: skip

# %% [markdown]
# Every method has learned, each from the same first loss, and the model itself is as it was.

# %%
assert len({losses[0] for losses in curves.values()}) == 1
assert all(sum(losses[-10:]) / 10 < 0.15 for losses in curves.values())
assert all(a > 0.93 for a in accuracy.values())
assert all(torch.equal(p, problem.params[k]) for k, p in model.named_parameters())

# %%
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1)
    axes.semilogy(smooth, label=name)
axes.set(xlabel="step", ylabel="training loss", title="One loop, five methods")
axes.legend()
picture = Path(tempfile.gettempdir()) / "one_loop.png"
figure.savefig(picture, dpi=120)
print(f"The curves are in {picture}.")
