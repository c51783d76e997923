"""The optimizers in trainers that others wrote: transformers, Lightning and Accelerate."""

import contextlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp
from tests.optim.loops import TOY, fresh_model
from tests.problems import labelled

pytestmark = pytest.mark.filterwarnings("ignore")


def needs(package):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed")


def parameters_of(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def assert_the_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[k]) for k, x in a.items())


# ----------------------------------------------------------------------------------- transformers
TOKENS = 24


def sentences(count=48, length=12):
    """Sentences that follow a rule: each word is the last one plus 5."""
    start = torch.randint(TOKENS, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + 5 * torch.arange(length)) % TOKENS
    return [{"input_ids": x, "labels": x.clone()} for x in ids]


def language_model():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=12, n_embd=16, n_layer=1, n_head=2, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trained(folder, make, steps=12, resume=None, watched=False, **options):
    """The model and the losses of an unmodified script, but for the optimizer."""
    import transformers

    model = language_model()
    opt = make(model)

    class Watched(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            with opt.watch():
                return super().compute_loss(*args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, lr_scheduler_type="constant",
        **{"save_strategy": "no", "per_device_train_batch_size": 8, **options},
    )  # fmt: skip
    trainer = (Watched if watched else transformers.Trainer)(
        model=model, args=arguments, train_dataset=sentences(), optimizers=(opt, None)
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses


def caspr(model):
    return fp.optim.CASPR(model.parameters(), lr=0.1, weight_decay=0.01)


def kfac(model):
    return fp.optim.KFAC(model, lr=0.1, damping=0.001)


@needs("transformers")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_one_line_of_a_trainer_script_changes(tmp_path, options):
    _, losses = trained(tmp_path, caspr, **options)
    assert losses[-1] < 0.75 * losses[0]


@needs("transformers")
@pytest.mark.parametrize("name", ["Adam", "SOAP", "Muon", "Shampoo", "SPlus", "KLShampoo"])
def test_other_methods_train_too(tmp_path, name):
    cls = getattr(fp.optim, name)
    _, losses = trained(tmp_path, lambda m: cls(m.parameters(), lr=0.02))
    assert losses[-1] < losses[0]


@needs("transformers")
def test_accumulation_is_one_large_batch(tmp_path):
    whole, _ = trained(tmp_path, caspr, 4)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, _ = trained(tmp_path, caspr, 4, **options)
    for (k, x), y in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4), k


@needs("transformers")
@pytest.mark.parametrize(("make", "watched"), [(caspr, False), (kfac, True)])
def test_a_run_is_resumed_exactly(tmp_path, make, watched):
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    options["per_device_train_batch_size"] = 4
    whole, losses = trained(tmp_path / "whole", make, 8, watched=watched, **options)
    resumed, rest = trained(
        tmp_path / "whole", make, 8, tmp_path / "whole" / "checkpoint-4", watched, **options
    )
    assert_the_same(parameters_of(whole), parameters_of(resumed))
    assert losses[4:] == rest[4:]


@needs("transformers")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}])
def test_kfac_watches_the_loss_of_a_trainer(tmp_path, options):
    _, losses = trained(tmp_path, kfac, watched=True, **options)
    assert losses[-1] < 0.75 * losses[0]


@needs("transformers")
@pytest.mark.parametrize("items", [None, 77])
def test_the_curvature_of_a_model_that_computes_its_own_loss(items):
    model = language_model().double()
    batch = {k: torch.stack([s[k] for s in sentences(6)]) for k in ("input_ids", "labels")}
    opt = fp.optim.KFAC(model, lr=1.0, damping=0.1, labels="empirical")
    with opt.watch():
        options = {} if items is None else {"num_items_in_batch": items}
        loss = model(**batch, **options).loss
    loss.backward()
    before = parameters_of(model)
    opt.step()
    fresh = language_model().double()
    targets = fp.losses.next_tokens(batch["input_ids"])
    divisor = 66 if items is None else items

    def mean(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / divisor

    own = fp.losses.Custom(mean, divisor=lambda outputs, targets: divisor)
    problem = fp.problem(fresh, own, outputs="logits")
    method = fp.kfac(damping=0.1, labels="empirical")
    pair = {"input_ids": batch["input_ids"]}, targets
    evidence = fp.observe(problem, problem.params, pair, method.needs(0))
    # Transformers computes the loss in float32.
    assert torch.allclose(evidence.loss.float(), loss, rtol=1e-5)
    _, direction = method.update(method.init(problem.params), evidence.grads, evidence)
    for k, p in model.named_parameters():
        moved = before[k] - p.detach()
        assert torch.allclose(
            moved, direction[k], rtol=1e-3, atol=1e-4 * float(moved.abs().max())
        ), k


@needs("transformers")
def test_kfac_in_a_trainer_accumulates(tmp_path):
    def exact(model):
        return fp.optim.KFAC(model, lr=0.3, damping=0.03, labels="empirical")

    whole, _ = trained(tmp_path, exact, 3, watched=True)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, _ = trained(tmp_path, exact, 3, watched=True, **options)
    for (k, x), y in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-2, atol=2e-3), k


# -------------------------------------------------------------------------------------- Lightning
def fitted(optimizer, steps=6, watched=False, **options):
    """A model that Lightning trained by its automatic optimization."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = fresh_model()
            self.losses = []

        def configure_optimizers(self):
            return optimizer(self)

        def training_step(self, batch, _):
            opt = self.optimizers().optimizer
            watch = opt.watch if watched else contextlib.nullcontext
            with watch():
                loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

    batches = [TOY.at(t) for t in range(steps)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=options.pop("epochs", 1), accelerator="cpu", logger=False, barebones=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module, trainer


def by_hand(name, steps=6, clip=None, **options):
    from tests.optim.loops import make, step

    model = fresh_model()
    opt = make(name, model, **options)
    for t in range(steps):
        if clip is None:
            step(opt, model, TOY.at(t))
            continue
        opt.zero_grad()
        F.cross_entropy(model(TOY.at(t)[0]), TOY.at(t)[1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
    return model


@needs("lightning")
@pytest.mark.parametrize("name", list(fp.optim.CLASSES))
def test_automatic_optimization_of_lightning(name):
    from tests.optim.loops import make

    module, _ = fitted(lambda m: make(name, m.net))
    expected = by_hand(name)
    for (k, x), y in zip(module.net.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-8, atol=1e-9), k


@needs("lightning")
def test_clipping_and_saving_by_lightning(tmp_path):
    from tests.optim.loops import make

    module, trainer = fitted(lambda m: make("caspr", m.net), gradient_clip_val=0.05)
    expected = by_hand("caspr", clip=0.05)
    for x, y in zip(module.net.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-8)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    again = make("caspr", fresh_model())
    again.load_state_dict(kept)
    assert again.state_dict()["state"][0]["steps"] == 6


@needs("lightning")
def test_accumulation_by_lightning():
    def make(module):
        return fp.optim.KFAC(module.net, lr=0.1, damping=0.1, labels="exact")

    whole = fresh_model()
    opt = make(type("Holder", (), {"net": whole}))
    for t in (0, 2):
        with opt.watch():
            inputs, targets = (torch.cat(x) for x in zip(TOY.at(t), TOY.at(t + 1), strict=True))
            loss = F.cross_entropy(whole(inputs), targets)
        opt.zero_grad()
        loss.backward()
        opt.step()
    module, _ = fitted(make, 4, watched=True, accumulate_grad_batches=2)
    assert len(module.losses) == 4
    for x, y in zip(module.net.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-6)


# ------------------------------------------------------------------------------------- Accelerate
@needs("accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["CASPR", "KFAC"])
def test_accelerate(name, precision, tmp_path):
    import accelerate

    torch.manual_seed(0)
    inputs, targets = labelled(64, 3, 3, 0, torch.float32)
    data = torch.utils.data.TensorDataset(inputs, targets)
    model = fresh_model().float()
    cls = getattr(fp.optim, name)
    options = {"lr": 0.1, "weight_decay": 0.01}
    opt = (
        cls(model, damping=0.1, **options) if name == "KFAC" else cls(model.parameters(), **options)
    )
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model, wrapped, loader = accelerator.prepare(model, opt, loader)
    losses = []
    for _ in range(5):
        for x, y in loader:
            with accelerator.accumulate(model):
                if name == "KFAC":
                    with opt.watch():
                        loss = F.cross_entropy(model(x), y)
                else:
                    loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                wrapped.step()
                wrapped.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert opt.state_dict()["state"][0]["steps"] == 10
    accelerator.save_state(str(tmp_path))
    before = parameters_of(model)
    accelerator.load_state(str(tmp_path))
    assert_the_same(before, parameters_of(model))
    assert opt.state_dict()["state"][0]["steps"] == 10
