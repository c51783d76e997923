"""Our training step over ASDL's, on the same work in one process.

    PYTHONPATH=<a checkout of kazukiosawa/asdl> python tests/benchmarks/against_asdl.py [--compiled]

An MLP 784-512-512-10, batch 128, cross-entropy, momentum 0.9; process CPU time on one thread. All
methods of both sides take turns in one process, with another one first each round; a sample is one
whole interval, of SGD four steps. The ratios of medians are what counts.
"""

import argparse
import itertools
import os
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch
from torch import nn
from torch.nn import functional as F

import funcprecond as fp

DIMS, BATCH = (784, 512, 512, 10), 128
# The same curvature, damping convention and intervals on both sides.
OURS = {
    "sgd": lambda T: fp.sgd(),
    "kfac mc": lambda T: fp.kfac(
        damping=1e-3, damping_split="pi", decay=None, every=T, refresh_every=T, start=0
    ),
    "kfac emp": lambda T: fp.kfac(
        labels="empirical",
        damping=1e-3,
        damping_split="pi",
        decay=None,
        every=T,
        refresh_every=T,
        start=0,
    ),
    # ASDL takes its roots in float32; ours are in float64 on a CPU unless told otherwise.
    "shampoo": lambda T: fp.shampoo(every=T, refresh_every=T, dtype=torch.float32),
    "shampoo float64": lambda T: fp.shampoo(every=T, refresh_every=T),
}


def model():
    torch.manual_seed(0)
    layers = []
    for i, o in itertools.pairwise(DIMS):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(count):
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, DIMS[0], generator=g),
            torch.randint(DIMS[-1], (BATCH,), generator=g),
        )
        for _ in range(count)
    ]


def ours(name, interval, compiled=False):
    problem = fp.problem(model(), fp.losses.cross_entropy)
    opt = fp.chain(OURS[name](interval), fp.momentum(0.9))
    step = fp.make_step(problem, opt, rate=1e-6, compile=compiled)
    generator = torch.Generator().manual_seed(0)
    params, state, t = problem.params, opt.init(problem.params), 0

    def one(batch):
        nonlocal params, state, t
        noise = fp.draw(problem, params, batch, opt.needs(t), generator=generator)
        params, state, _ = step(params, state, batch, t, noise)
        t += 1

    return one


def theirs(name, interval):
    # ASDL annotates with NVTX ranges, which a CPU build of torch refuses.
    torch.cuda.nvtx.range = _NoRange
    import asdl

    net = model()
    config = asdl.PreconditioningConfig(
        data_size=BATCH,
        damping=1e-12 if "shampoo" in name else 1e-3,
        preconditioner_upd_interval=interval,
        curvature_upd_interval=interval,
    )
    makers = {
        "sgd": lambda: asdl.GradientMaker(net),
        "kfac mc": lambda: asdl.KfacGradientMaker(net, config, fisher_type=asdl.FISHER_MC),
        "kfac emp": lambda: asdl.KfacGradientMaker(net, config, fisher_type=asdl.FISHER_EMP),
        "shampoo": lambda: asdl.ShampooGradientMaker(net, config),
        "shampoo float64": lambda: asdl.ShampooGradientMaker(net, config),
    }
    maker = makers[name]()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)

    def one(batch):
        x, y = batch
        optimizer.zero_grad(set_to_none=True)
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(net, x), y)
        maker.forward_and_backward()
        optimizer.step()

    return one


class _NoRange:
    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __call__(self, function):
        return function


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", default=",".join(OURS))
    parser.add_argument("--intervals", default="1,10")
    parser.add_argument("--compiled", action="store_true", help="also our step compiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, CPU time, {args.rounds} rounds")
    print("| method | interval | ours ms | ASDL ms | ours / ASDL | compiled / ASDL |")
    print("|---|---|---|---|---|---|")
    for interval in map(int, args.intervals.split(",")):
        methods = [m for m in args.methods.split(",") if interval == 1 or m != "sgd"]
        for name, median in measure(methods, interval, args.rounds, args.compiled).items():
            over = f"{median['compiled'] / median['theirs']:.2f}" if args.compiled else ""
            print(
                f"| {name} | {interval} | {median['ours'] * 1e3:.2f} | "
                f"{median['theirs'] * 1e3:.2f} | "
                f"{median['ours'] / median['theirs']:.2f} | {over} |",
                flush=True,
            )


def measure(methods, interval, rounds, compiled):
    """The median seconds of a step, by method and contender."""
    data = batches(10)
    steps = {}
    for name in methods:
        steps[name, "ours"] = ours(name, interval)
        steps[name, "theirs"] = theirs(name, interval)
        if compiled:
            steps[name, "compiled"] = ours(name, interval, compiled=True)
    samples = {key: [] for key in steps}
    order = list(steps)
    for r in range(rounds + 1):
        order = order[1:] + order[:1]
        for key in order:
            count = 4 if key[0] == "sgd" else interval
            start = time.process_time()
            for i in range(count):
                steps[key](data[(r + i) % len(data)])
            if r:  # the first round warms up and compiles
                samples[key].append((time.process_time() - start) / count)
    return {
        name: {key[1]: statistics.median(v) for key, v in samples.items() if key[0] == name}
        for name in methods
    }


if __name__ == "__main__":
    main()
