"""The axis family beside other optimizers: one update on fixed sets of parameters.

    PYTHONPATH=.[:<other packages>] python tests/benchmarks/against_optimizers.py [--sets mlp ...]

Only the update is timed, with random gradients in place; process CPU time on one thread; the
contenders take turns, and a sample is one whole interval. Axes longer than 1024 have no factor, or
are cut, as each package does. Packages that cannot be imported are left out and named. The *floor*
is the time of the matrix products and decompositions that the method's equations ask for, and of
nothing else, in the same run.
"""

import argparse
import gc
import importlib
import itertools
import math
import os
import statistics
import sys
import time
import typing
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch

import funcprecond as fp
from funcprecond import tree

CAP, RATE = 1024, 1e-6


# ------------------------------------------------------------------------------ sets of parameters
def mlp():
    for i, (a, b) in enumerate(itertools.pairwise((784, 512, 512, 10))):
        yield f"fc{i}.weight", (b, a)
        yield f"fc{i}.bias", (b,)


def gpt(layers=4, width=256, vocabulary=4096, context=256):
    yield from (("wte", (vocabulary, width)), ("wpe", (context, width)))
    for i in range(layers):
        for norm in ("ln1", "ln2"):
            yield from ((f"h{i}.{norm}.weight", (width,)), (f"h{i}.{norm}.bias", (width,)))
        for name, out, into in (("qkv", 3, 1), ("proj", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            yield f"h{i}.{name}.weight", (out * width, into * width)
            yield f"h{i}.{name}.bias", (out * width,)
    yield from (("ln.weight", (width,)), ("ln.bias", (width,)))


def resnet18():
    def convolution(name, out, into, size):
        yield f"{name}.weight", (out, into, size, size)
        yield from ((f"{name}.norm.weight", (out,)), (f"{name}.norm.bias", (out,)))

    yield from convolution("stem", 64, 3, 7)
    into = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name = f"{stage}.{block}"
            yield from convolution(f"{name}.a", out, into, 3)
            yield from convolution(f"{name}.b", out, out, 3)
            if into != out:
                yield from convolution(f"{name}.down", out, into, 1)
            into = out
    yield from (("fc.weight", (1000, 512)), ("fc.bias", (1000,)))


SETS = {"mlp": mlp, "gpt": gpt, "resnet18": resnet18}


def normal(shapes, scale, seed):
    g = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(s, generator=g) for k, s in shapes.items()}


# ------------------------------------------------------------------------------------- contenders
class Ours:
    """A transform, with its learning rate in the subtraction."""

    def __init__(self, build, **options):
        self.build, self.options = build, options

    def start(self, params, interval):
        opt = self.build(interval)
        self.params = {k: p.clone() for k, p in params.items()}
        self.state = opt.init(self.params)
        self.update = fp.make_update(opt, rate=RATE, **self.options)
        return self

    def step(self, grads, t):
        self.params, self.state = self.update(self.params, self.state, grads, t)

    def take(self, grads):
        return grads

    def bytes(self):
        return sum(x.numel() * x.element_size() for x in tree.leaves(self.state))


class Theirs:
    """Objects like those of ``torch.optim``, made from the parameters."""

    def __init__(self, build):
        self.build = build

    def start(self, params, interval):
        self.params = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
        self.optimizers = self.build(list(self.params.values()), interval)
        return self

    def take(self, grads):
        for k, p in self.params.items():
            p.grad = grads[k].clone()
        for p, view in getattr(self.optimizers[0], "views", ()):
            view.grad = p.grad.reshape(view.shape)

    def step(self, grads, t):
        for optimizer in self.optimizers:
            optimizer.step()

    def bytes(self):
        seen, todo, total = {id(p) for p in self.params.values()}, [], 0
        todo += [optimizer.state for optimizer in self.optimizers]
        while todo:
            x = todo.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            if isinstance(x, torch.Tensor):
                total += x.numel() * x.element_size()
            elif isinstance(x, dict):
                todo += x.values()
            elif isinstance(x, (list, tuple)):
                todo += x
            elif hasattr(x, "__dict__") and not isinstance(x, type):
                todo += vars(x).values()
        return total


def intervals(method, **options):
    return lambda T: method(every=1, refresh_every=T, max_dim=CAP, **options)


def our_muon(**options):
    rules = [(lambda name, p: p.ndim > 1, "muon"), ("*", "adam")]
    return lambda _: fp.partition(rules, muon=fp.muon(**options), adam=fp.adam())


def adamw(params, **options):
    return torch.optim.AdamW(params, lr=RATE, **options)


def matrices(params, limit=math.inf):
    """Those with at least two axes, none longer than the limit, and the rest."""
    chosen = [p for p in params if p.ndim > 1 and max(p.shape) <= limit]
    return chosen, [p for p in params if not any(p is q for q in chosen)]


def torch_muon(params, _):
    chosen, rest = matrices(params)
    views = [torch.nn.Parameter(p.detach().reshape(len(p), -1)) for p in chosen]
    muon = torch.optim.Muon(views, lr=RATE)
    muon.views = list(zip(chosen, views, strict=True))  # pyright: ignore
    return [muon, adamw(rest, foreach=True)]


def heavyball(name, **options):
    def build(params, interval):
        package = importlib.import_module("heavyball")
        package.utils.compile_mode = None
        chosen = {k: 1 / interval if "prob" in k else interval for k in options if "freq" in k}
        chosen |= {k: 1 / interval for k in options if "prob" in k}
        return [getattr(package, name)(params, lr=RATE, **{**options, **chosen})]

    return Theirs(build)


def package(module, build):
    return Theirs(lambda params, T: build(importlib.import_module(module), params, T))


def capped_shampoo(po, params, T):
    chosen, rest = matrices(params, CAP)
    made = [po.Shampoo(chosen, lr=RATE, preconditioning_compute_steps=T)]
    return made + ([adamw(rest, foreach=True)] if rest else [])


def distributed(ds, params, T, **options):
    return [
        ds.DistributedShampoo(
            params,
            lr=RATE,
            epsilon=1e-8,
            max_preconditioner_dim=CAP,
            precondition_frequency=T,
            start_preconditioning_step=T,
            **options,
        )
    ]


# (name, interval at which it is measured or None for any, contender)
CONTENDERS = {
    "torch AdamW foreach": (None, Theirs(lambda p, T: [adamw(p, foreach=True)])),
    "torch AdamW fused": (1, Theirs(lambda p, T: [adamw(p, fused=True)])),
    "adam": (1, Ours(lambda T: fp.adam())),
    "adamw": (1, Ours(lambda T: fp.adamw())),
    "adamw compiled, donated": (1, Ours(lambda T: fp.adamw(), compile=True, donate=True)),
    "adagrad": (1, Ours(lambda T: fp.adagrad())),
    "muon + adam": (1, Ours(our_muon())),
    "muon bfloat16 + adam": (1, Ours(our_muon(dtype=torch.bfloat16))),
    "torch Muon + AdamW": (1, Theirs(torch_muon)),
    "heavyball Muon": (1, heavyball("MuonAdamW")),
    "shampoo": (None, Ours(intervals(fp.shampoo))),
    "shampoo float32": (None, Ours(intervals(fp.shampoo, dtype=torch.float32))),
    "shampoo staggered": (10, Ours(intervals(fp.shampoo, stagger=True))),
    "shampoo staggered, blocks": (10, Ours(intervals(fp.shampoo, stagger=True, block=512))),
    "pytorch_optimizer Shampoo": (None, package("pytorch_optimizer", capped_shampoo)),
    "DistributedShampoo": (
        None,
        package(
            "distributed_shampoo",
            lambda ds, p, T: distributed(
                ds,
                p,
                T,
                grafting_config=ds.AdamPreconditionerConfig(beta2=0.999, epsilon=1e-8),
            ),
        ),
    ),
    "caspr": (None, Ours(intervals(fp.caspr))),
    "caspr float32": (None, Ours(intervals(fp.caspr, dtype=torch.float32))),
    "caspr staggered": (10, Ours(intervals(fp.caspr, stagger=True))),
    "caspr staggered, blocks": (10, Ours(intervals(fp.caspr, stagger=True, block=512))),
    "soap": (None, Ours(intervals(fp.soap))),
    "pytorch_optimizer SOAP": (
        None,
        package(
            "pytorch_optimizer",
            lambda po, p, T: [
                po.SOAP(p, lr=RATE, precondition_frequency=T, max_precondition_dim=CAP)
            ],
        ),
    ),
    "heavyball SOAP": (
        None,
        heavyball("SOAP", precondition_frequency=0, max_precond_dim=CAP),
    ),
    "DistributedShampoo SOAP": (
        None,
        package(
            "distributed_shampoo",
            lambda ds, p, T: distributed(ds, p, T, preconditioner_config=ds.DefaultSOAPConfig),
        ),
    ),
}


# ----------------------------------------------------------------------------------------- floors
class Floor:
    """The products and decompositions of a method, on buffers that are there already.

    Args:
        products: how many an axis takes at each step, beside its Gram matrix.
        refresh: what a refresh does with one factor.
        turned: how many more products an axis takes then.
    """

    def __init__(self, products, refresh, turned=0):
        self.products, self.refresh, self.turned = products, refresh, turned

    def start(self, params, interval):
        self.interval, self.work = interval, []
        for p in params.values():
            shape = [n for n in p.shape if n > 1]
            for n in [n for n in shape if n <= CAP and len(shape) > 1]:
                x, s = torch.randn(n, p.numel() // n), torch.empty(n, n)
                torch.mm(x, x.T, out=s)
                self.work.append((x, s, torch.empty_like(x)))
        return self

    def take(self, grads):
        return grads

    def step(self, grads, t):
        due = t % self.interval == 0
        for x, s, out in self.work:
            torch.mm(x, x.T, out=s)
            for _ in range(self.products + due * self.turned):
                torch.mm(s, x, out=out)
            if due:
                self.refresh(s)

    def bytes(self):
        return 0


def by_eigh(dtype, root):
    def refresh(s):
        vectors = torch.linalg.eigh(s.to(dtype))[1]
        if root:
            torch.mm(vectors, vectors.mT)

    return refresh


FLOORS = {
    "floor of shampoo": (None, Floor(1, by_eigh(torch.float64, True))),
    "floor of shampoo float32": (None, Floor(1, by_eigh(torch.float32, True))),
    "floor of caspr": (None, Floor(2, by_eigh(torch.float64, False))),
    "floor of caspr float32": (None, Floor(2, by_eigh(torch.float32, False))),
    "floor of soap": (None, Floor(2, lambda s: torch.linalg.qr(s @ s), turned=1)),
}


# -------------------------------------------------------------------------------------- measuring
def measure(shapes, interval, rounds, only, slow):
    """Medians by contender, and why the others were left out."""
    params, pool = normal(shapes, 0.02, 0), [normal(shapes, 0.01, 1 + i) for i in range(3)]
    live, left_out, quick, spent = {}, {}, {}, {}
    for name, (when, contender) in {**CONTENDERS, **FLOORS}.items():
        if when not in (None, interval) or (only and not any(o in name for o in only)):
            continue
        try:
            live[name] = contender.start(params, interval)
            start = time.process_time()
            for t in range(max(interval, 2)):  # past compilation and lazy state
                contender.take(pool[t % 3])
                before = time.process_time()
                contender.step(pool[t % 3], t)
            quick[name] = time.process_time() - before < 0.1
            spent[name] = time.process_time() - start
        except Exception as error:  # whatever a package may raise
            live.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    samples = {name: [] for name in live}
    gc.disable()
    for r in range(rounds):
        for name, contender in live.items():
            if r % 3 and spent[name] > slow:
                continue
            times = []
            # A quick step is repeated: alone it would find its memory in nobody's cache.
            for i in range(interval if interval > 1 else 10 if quick[name] else 1):
                t = interval * (r + 2) + i  # a multiple of the interval comes first
                contender.take(pool[i % 3])
                start = time.process_time()
                contender.step(pool[i % 3], t)
                times.append(time.process_time() - start)
            samples[name].append(times)
        gc.collect()
    gc.enable()
    size = sum(p.numel() * p.element_size() for p in params.values())
    rows = {
        name: (
            statistics.median(statistics.fmean(x) for x in times),
            statistics.median(max(x) / statistics.fmean(x) for x in times),
            live[name].bytes() / size,
        )
        for name, times in samples.items()
    }
    return rows, left_out


def main():
    parser = argparse.ArgumentParser(description="The axis family beside other optimizers.")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--intervals", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="parts of contenders' names")
    parser.add_argument("--slow", type=float, default=1.5, help="seconds; beyond, fewer rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not hasattr(typing, "override"):  # two packages import it, and Python 3.11 lacks it
        typing.override = lambda function: function  # pyright: ignore
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, one thread, CPU time")
    for chosen in args.sets:
        shapes = dict(SETS[chosen]())
        entries = sum(math.prod(s) for s in shapes.values()) / 1e6
        for interval in args.intervals:
            title = f"{chosen}: {len(shapes)} tensors, {entries:.2f} M entries"
            print(f"\n**{title}; refreshed every {interval}**\n")
            print("| update | ms | × AdamW foreach | × floor | slowest / mean | state / params |")
            print("|---|---|---|---|---|---|", flush=True)
            rows, left_out = measure(shapes, interval, args.rounds, args.only, args.slow)
            unit = rows.get("torch AdamW foreach", (math.nan,))[0]
            for name, (mean, slowest, state) in rows.items():
                floor = rows.get(f"floor of {name.partition(' staggered')[0]}")
                over = f"{mean / floor[0]:.2f}" if floor else ""
                kept = "" if name in FLOORS else f"{state:.1f}"
                peak = f"{slowest:.1f}" if interval > 1 else ""
                print(
                    f"| {name} | {mean * 1e3:.2f} | {mean / unit:.2f} | {over} | {peak} | {kept} |"
                )
            if left_out:
                print("\nLeft out: " + "; ".join(f"{k} ({v})" for k, v in left_out.items()))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
