# %% [markdown]
# # One loop, five methods
#
# A training step is `θ ← θ − η P g`, with a learning rate `η`, a preconditioner `P` and a gradient
# `g`. The methods only differ in `P`. One loop therefore serves all of them, and changing the
# method changes one line.

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
# The data are 1797 handwritten digits of 8 × 8 pixels, which come with scikit-learn. The models are
# trained on 1400 of them and tested on the remaining 397.

# %%
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

# %% [markdown]
# A problem consists of a model and a loss. The model is an ordinary `nn.Module`. The problem copies
# its parameters, as a dict of tensors, and never changes the module.

# %%
torch.manual_seed(0)  # for the initial weights, which torch draws from its global generator
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
problem = fp.problem(model, fp.losses.cross_entropy)
print({name: tuple(p.shape) for name, p in problem.params.items()})


# %% [markdown]
# This is the training loop. `opt.needs(t)` lists what the method needs from this batch in addition
# to the gradient: nothing for Adam, layer statistics for K-FAC. `observe` runs the model once and
# measures the gradient and exactly these quantities. `update` computes a direction from them, and
# `apply` subtracts the direction from the parameters. Buffers are what a model keeps besides its
# parameters, such as the running averages of BatchNorm. This model has none, and the loop would not
# change if it had. One generator provides all random numbers: those for the batches, and those for
# the labels that K-FAC samples.


# %%
def train_with(opt: fp.Transform, steps: int = 120, batch_size: int = 128):
    generator = torch.Generator().manual_seed(1)
    params, buffers = problem.params, problem.buffers
    state = opt.init(params)
    losses = []
    for t in range(steps):
        batch = train[torch.randint(len(train), (batch_size,), generator=generator)]
        data = (inputs[batch], targets[batch])
        evidence = fp.observe(
            problem, params, data, opt.needs(t), buffers=buffers, generator=generator
        )
        state, direction = opt.update(state, evidence.grads, evidence)
        params, buffers = fp.apply(params, direction), evidence.buffers
        losses.append(float(evidence.loss))
    return params, buffers, losses


# %% [markdown]
# Here are five methods. In each chain the preconditioner comes first, then the momentum (if any),
# then the learning rate. CASPR is grafted to Adam: its direction is rescaled to the length of
# Adam's direction, so that Adam's learning rate is suitable for both.

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
    params, buffers, curves[name] = train_with(opt)
    guesses = problem(params, inputs[test], buffers).argmax(1)
    accuracy[name] = float((guesses == targets[test]).float().mean())
    print(f"{name:8} loss {curves[name][0]:.2f} → {sum(curves[name][-10:]) / 10:.4f}, "
          f"test accuracy {100 * accuracy[name]:.1f} %")  # fmt: skip

# %% [markdown]
# All methods start from the same loss and reach a test accuracy above 93 %, and the parameters of
# the module have not changed.

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
print(f"The plot of the losses is in {picture}.")
