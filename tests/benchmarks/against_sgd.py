"""A step of K-FAC in steps of SGD, on the models that people have.

    python tests/benchmarks/against_sgd.py [--models gpt2 ...] [--methods kfac ...] [--profile]

Both go through the same loop and differ in the line of the method. Process CPU time on one thread;
the methods take turns, and a sample is one interval of ten steps. The memory is what a process of
its own needs at its peak beyond what it had before the first step (``ru_maxrss``). The models of
transformers are left out where the package is missing.
"""

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
import typing
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch
import torch.nn.functional as F
from torch import nn

import funcprecond as fp

INTERVAL, TOKENS, WORDS = 10, 64, 1000
LANGUAGE = {
    "vocab_size": WORDS,
    "use_cache": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


# ------------------------------------------------------------------------------------------ models
class Logits(nn.Module):
    """A model of transformers, whose outputs are an object."""

    def __init__(self, model, options):
        import transformers

        super().__init__()
        config = getattr(transformers, model + "Config")
        kind = "ForImageClassification" if model == "ViT" else "ForCausalLM"
        name = "GPT2LMHeadModel" if model == "GPT2" else model + kind
        self.model = getattr(transformers, name)(config(**options))

    def forward(self, x):
        return self.model(x).logits


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 128)
        self.layer = nn.LSTM(128, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, WORDS)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids))[0])


def words(batch):
    ids = torch.randint(WORDS, (batch, TOKENS + 1))
    return ids[:, :-1], ids[:, 1:]


def gpt2(batch):
    sizes = {"n_embd": 128, "n_layer": 6, "n_head": 4, "n_positions": 128}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Logits("GPT2", {**sizes, **drop, **LANGUAGE}), words(batch)


def llama(batch):
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Logits("Llama", {**sizes, **heads, **LANGUAGE}), words(batch)


def vit(batch):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    images = {"num_attention_heads": 4, "image_size": 32, "patch_size": 4, "num_labels": 10}
    return Logits("ViT", {**sizes, **images}), (
        torch.randn(batch, 3, 32, 32),
        torch.randint(10, (batch,)),
    )


def lstm(batch):
    return Recurrent(), words(batch)


MODELS = {"gpt2": gpt2, "llama": llama, "vit": vit, "lstm": lstm}
METHODS = {
    "sgd": lambda: fp.sgd(),
    "kfac": lambda: fp.kfac(damping=0.1, every=1, refresh_every=INTERVAL),
}


# --------------------------------------------------------------------------------------- measuring
class Run:
    """A training run, one step a call."""

    def __init__(self, problem, method, batch):
        self.problem, self.batch, self.t = problem, batch, 0
        self.opt = fp.chain(METHODS[method](), fp.scale(1e-4))
        self.params, self.state = problem.params, self.opt.init(problem.params)
        self.buffers, self.generator = problem.buffers, torch.Generator().manual_seed(0)

    def step(self):
        e = fp.observe(
            self.problem,
            self.params,
            self.batch,
            self.opt.needs(self.t),
            buffers=self.buffers,
            generator=self.generator,
        )
        self.state, direction = self.opt.update(self.state, e.grads, e)
        self.params, self.buffers = fp.apply(self.params, direction), e.buffers
        self.t += 1


def built(name, batch):
    torch.manual_seed(0)
    model, data = MODELS[name](batch)
    return fp.problem(model, fp.losses.cross_entropy), data


def plain(name, batch):
    """A step of ``torch.optim.SGD`` in the loop that everybody writes."""
    torch.manual_seed(0)
    model, (x, y) = MODELS[name](batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return step


def times(name, methods, batch, rounds):
    """The mean time of a step in each round, by method."""
    problem, data = built(name, batch)
    steps = {method: Run(problem, method, data).step for method in methods}
    steps["torch.optim.SGD"] = plain(name, batch)
    for step in steps.values():  # past the first refreshes, one a step
        for _ in range(2 * INTERVAL):
            step()
    found = {method: [] for method in steps}
    gc.disable()
    for _ in range(rounds):
        for method, step in steps.items():
            start = time.process_time()
            for _ in range(INTERVAL):
                step()
            found[method].append((time.process_time() - start) / INTERVAL)
        gc.collect()
    gc.enable()
    return {method: statistics.median(samples) for method, samples in found.items()}


def high_water():
    """The most memory that this process has held, in megabytes."""
    try:
        # On Linux, ru_maxrss of a child begins with the memory of its parent.
        with open("/proc/self/status") as status:
            return next(float(x.split()[1]) for x in status if x.startswith("VmHWM")) / 2**10
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak(name, method, batch):
    """Megabytes at the peak of a run beyond those before its first step, in this process."""
    problem, data = built(name, batch)
    run = Run(problem, method, data)
    before = high_water()
    for _ in range(INTERVAL + 2):
        run.step()
    return high_water() - before


def peak_alone(name, method, batch):
    command = [sys.executable, __file__, "--peak", name, method, str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def profiled(name, method, batch):
    problem, data = built(name, batch)
    run = Run(problem, method, data)
    for _ in range(2 * INTERVAL):
        run.step()
    with torch.profiler.profile() as profile:
        for _ in range(INTERVAL):
            run.step()
    averages: typing.Any = profile.key_averages()
    print(averages.table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def main():
    parser = argparse.ArgumentParser(description="A step of K-FAC in steps of SGD.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=["kfac"], choices=list(METHODS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory-batch", type=int, default=32, help="0 leaves the memory out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        name, method, batch = args.peak
        print(peak(name, method, int(batch)))
        return
    print(f"torch {torch.__version__}, one thread, CPU time, batch {args.batch}\n")
    memory = f"MB at batch {args.memory_batch}"
    print(f"| model | parameters | step | ms | × sgd | {memory} | × sgd |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in args.models:
        try:
            problem, _ = built(name, 1)
        except ImportError as error:
            print(f"\nLeft out: {name} ({error})")
            continue
        entries = sum(p.numel() for p in problem.params.values()) / 1e6
        methods = ["sgd", *args.methods]
        found = times(name, methods, args.batch, args.rounds)
        used = {m: peak_alone(name, m, args.memory_batch) for m in methods if args.memory_batch}
        for method, seconds in found.items():
            row = [name, f"{entries:.2f} M", method, f"{1e3 * seconds:.1f}"]
            row += [f"{seconds / found['sgd']:.2f}"]
            if method in used:
                row += [f"{used[method]:.0f}", f"{used[method] / used['sgd']:.2f}"]
            else:
                row += ["", ""]
            print("| " + " | ".join(row) + " |", flush=True)
        for method in args.methods if args.profile else ():
            profiled(name, method, args.batch)


if __name__ == "__main__":
    main()
