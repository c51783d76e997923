# %% [markdown]
# # In a training loop that exists already
#
# Every method is also a `torch.optim.Optimizer`, in `fp.optim`. It computes what the functional
# loop computes, bit for bit, and writes the result into the parameters of the module. So a loop, a
# scheduler, a gradient clip or a trainer of another library stays as it is.

# %%
import importlib.util
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import funcprecond as fp

# %% [markdown]
# The data are the handwritten digits of scikit-learn, and the model is a small network with a
# normalization layer.

# %%
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
batches = [(inputs[i], targets[i]) for i in order[:1400].split(100)]
test = order[1400:]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 10))


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(inputs[test]).argmax(1) == targets[test]).float().mean())


# %% [markdown]
# ## One line changes
#
# This is a usual loop, with a schedule of the learning rate and a clip of the gradient. The two
# runs differ in the line that makes the optimizer.


# %%
def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int = 3) -> list[float]:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=epochs * len(batches)
    )
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
    return losses


first, second = new_model(), new_model()
train(first, torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.01))
train(second, fp.optim.CASPR(second.parameters(), lr=0.1, weight_decay=0.01, momentum=0.9))
print(f"AdamW: {accuracy(first):.3f}, CASPR: {accuracy(second):.3f}")
assert accuracy(first) > 0.9
assert accuracy(second) > 0.9

# %% [markdown]
# The weight decay of all of them is decoupled, as that of AdamW. `help(fp.optim.CASPR)` explains
# the other options, which are those of `fp.caspr`. Groups of parameters may have their own:
# `fp.optim.CASPR([{"params": head, "lr": 0.03, "epsilon": 1e-4}, {"params": rest}], lr=0.1)`.
#
# ## Methods that look into the layers
#
# K-FAC needs the inputs of the layers and gradients at sampled labels. It gets the model instead of
# its parameters, and records the layers in the loop's own forward pass, inside of
# `with opt.watch():`. The loss is recognised by the function of torch that computes it, also inside
# of a model that computes its own loss. There is no second forward pass. A loss that torch does not
# have is passed as `fp.optim.KFAC(model, loss)` and called as `opt.loss(outputs, targets)`.

# %%
model = new_model()
opt = fp.optim.KFAC(model, lr=0.1, damping=0.03, momentum=0.9, weight_decay=0.01)
for _ in range(3):
    for x, y in batches:
        opt.zero_grad()
        # Two micro-batches with a step for both: their curvature is that of the whole batch.
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            with opt.watch():
                loss = F.cross_entropy(model(part_x), part_y)
            (loss / 2).backward()
        opt.step()
print(f"K-FAC: {accuracy(model):.3f}")
assert accuracy(model) > 0.9

# %% [markdown]
# ## Methods that evaluate a batch several times
#
# Hessian-free, L-BFGS, AdaHessian and some others take a closure, as torch's L-BFGS does. It
# computes the loss of one batch and returns it; a backward pass is not needed in it. The other
# methods take closures too, so that a trainer that always passes one, as Lightning does, works with
# all of them.

# %%
model = new_model()
opt = fp.optim.HessianFree(model, damping=1.0, max_iter=20)
for x, y in batches[:10]:
    loss = opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
print(f"Hessian-free, after 10 steps: {accuracy(model):.3f}")
assert accuracy(model) > 0.8

# %% [markdown]
# ## Saving and resuming
#
# A state dict consists of tensors, numbers and names, which `torch.load(weights_only=True)` reads.
# The run goes on as if it had not been interrupted, bit for bit, with the same sampled labels.


# %%
def steps(model: nn.Module, opt, count: int) -> None:
    for x, y in batches[:count]:
        opt.zero_grad()
        with opt.watch():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()


model = new_model()
opt = fp.optim.KFAC(model, lr=0.1, damping=0.03)
steps(model, opt, 3)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "run.pt"
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
again = new_model()
again.load_state_dict(saved["model"])
resumed = fp.optim.KFAC(again, lr=0.1, damping=0.03)
resumed.load_state_dict(saved["opt"])
steps(model, opt, 3)
steps(again, resumed, 3)
assert all(map(torch.equal, model.parameters(), again.parameters()))

# %% [markdown]
# ## The Trainer of transformers
#
# The script is the usual one. The optimizer is passed as `optimizers=(opt, None)`, and the
# accumulation of gradients, checkpoints and bfloat16 are those of the trainer. For K-FAC, a
# subclass wraps `compute_loss` in `with opt.watch():`.

# %%
if importlib.util.find_spec("transformers") is None:
    print("transformers is not installed, so that its Trainer is left out.")
else:
    import transformers

    starts = torch.arange(48).remainder(24).unsqueeze(1)
    tokens = (starts + 5 * torch.arange(12)) % 24  # each word is the last one plus 5
    data = [{"input_ids": x, "labels": x} for x in tokens]
    sizes = {"vocab_size": 24, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    language_model = transformers.GPT2LMHeadModel(config)
    opt = fp.optim.CASPR(language_model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            folder, max_steps=20, logging_steps=5, use_cpu=True, report_to=[], save_strategy="no"
        )
        trainer = transformers.Trainer(
            language_model, arguments, train_dataset=data, optimizers=(opt, None)
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"the loss of GPT-2: {losses[0]:.2f}, then {losses[-1]:.2f}")
    assert losses[-1] < losses[0]

# %% [markdown]
# ## Lightning
#
# `configure_optimizers` returns the optimizer. Lightning passes a closure to every step, which a
# method that measures the model watches by itself. Where gradients are accumulated over several
# batches, write `with self.optimizers().optimizer.watch():` around the forward pass in
# `training_step`, because Lightning runs the first ones outside of a step.

# %%
if importlib.util.find_spec("lightning") is None:
    print("Lightning is not installed, so that it is left out.")
else:
    import lightning

    class Digits(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = new_model()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return fp.optim.KFAC(self.net, lr=0.1, damping=0.03, momentum=0.9)

    module = Digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", **silent)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    print(f"K-FAC in Lightning: {accuracy(module.net):.3f}")
    assert accuracy(module.net) > 0.9

# %% [markdown]
# ## The functional interface of torchopt
#
# Libraries that take an object of torchopt with `init` and `update`, such as posteriors, take this
# one too. Parameters may be any nest of tensors.

# %%
opt = fp.optim.gradient_transformation(fp.chain(fp.shampoo(), fp.scale(0.02)))
params = {"layer": (torch.ones(3, 2), torch.zeros(3))}
state = opt.init(params)
grads = {"layer": (torch.ones(3, 2), torch.ones(3))}
updates, state = opt.update(grads, state, params=params, inplace=False)
params = fp.optim.apply_updates(params, updates, inplace=False)
print(params["layer"][1])
