"""Our curvature products, factors and estimates over curvlinops', on the same work in one process.

    pip install --no-deps curvlinops-for-pytorch==3.0.1   # and what it imports
    python tests/benchmarks/against_curvlinops.py [--rounds 15] [--problems mlp,cnn,encoder]
        [--what eager|compiled|memory|arithmetic]

Process CPU time on one thread; the contenders take turns, and each call stands beside a gradient.
Printed are medians in gradients, and ours over theirs. K-FAC is of the linear and convolutional
layers alone on both sides; products are over all parameters.

"compiled" compiles each operation as one graph by ``torch.compile``, batch, vectors and random
numbers as arguments; its gradient is eager. A dash stands where that fails, or takes longer than
:data:`PATIENCE`; the reason is printed. Curvlinops' estimates, and on both sides spectra, are eager
loops around the compiled product. "memory" is the peak of what torch's allocator holds during a
call, in MB, from the profiler's record. "arithmetic" counts the multiplications of matrix products
and convolutions, by torch's own formulas; decompositions are not counted.
"""

import argparse
import functools
import itertools
import math
import os
import random
import signal
import statistics
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.estimators.probes import draw_probes
from funcprecond.layers.blocks import split_block
from funcprecond.layers.second_moments import second_moments
from funcprecond.operators.algebra import Function
from funcprecond.operators.block_forms import Factors
from funcprecond.operators.layer_blocks import LayerBlocks
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.solver.cholesky import Cholesky

# Seconds that one operation may take to compile.
PATIENCE = 120


def mlp():
    layers = (nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(*layers), torch.rand(128, 784)


def cnn():
    layers = []
    for i, o in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))
    return model, torch.rand(64, 3, 32, 32)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, s, w = x.shape
        qkv = self.qkv(x).reshape(b, s, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(w // self.heads)
        return self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(b, s, w))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.ln1(x))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class Encoder(nn.Module):
    def __init__(self, vocabulary=256, width=128, heads=4, layers=2, length=64, classes=10):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def encoder():
    return Encoder(), torch.randint(0, 256, (16, 64))


def work(make):
    """(model, batch, one vector, a stack of eight)."""
    torch.manual_seed(0)
    model, x = make()
    batch = (x, torch.randint(0, 10, (len(x),)))
    g = torch.Generator().manual_seed(1)
    params = dict(model.named_parameters())
    v = {k: torch.randn(p.shape, generator=g) for k, p in params.items()}
    stack = {k: torch.randn(8, *p.shape, generator=g) for k, p in params.items()}
    return model, batch, v, stack


def layer_names(model):
    return [
        f"{m}.{p}"
        for m, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for p, _ in module.named_parameters(recurse=False)
    ]


def problems_of(model):
    """All parameters' problem, and that of the layers alone, with all others constant."""
    problem = fp.problem(model, fp.losses.cross_entropy)
    names = layer_names(model)
    trainable = {k: p.requires_grad for k, p in model.named_parameters()}
    for k, p in model.named_parameters():
        p.requires_grad_(k in names)
    layers = fp.problem(model, fp.losses.cross_entropy)
    for k, p in model.named_parameters():
        p.requires_grad_(trainable[k])
    return problem, layers


def ours(model, batch, v, stack):
    generator = torch.Generator().manual_seed(0)
    problem, layers = problems_of(model)
    params = problem.params
    lv = {k: v[k] for k in layers.params}

    def factored(**options):
        return fp.KroneckerFactored(layers, layers.params, batch, generator=generator, **options)

    def ggn():
        return fp.GGN(problem, params, batch)

    hessian, kept = fp.Hessian(problem, params, batch), ggn()
    inverse = factored().inverse(1e-3, split="equal")
    options = {"generator": generator}
    return {
        "Hessian, one product": lambda: fp.linearize(problem, params, batch).hvp(v, keep=False),
        "Hessian, kept": lambda: hessian @ v,
        "Hessian, 8 columns": lambda: fp.Hessian(problem, params, batch) @ stack,
        "GGN, one product": lambda: fp.ggn_mv(problem, params, batch, v),
        "GGN, kept": lambda: kept @ v,
        "GGN, 8 columns": lambda: ggn() @ stack,
        "empirical Fisher, one product": lambda: fp.fisher_mv(
            problem, params, batch, v, labels="empirical"
        ),
        "sampled Fisher, one product": lambda: fp.fisher_mv(
            problem, params, batch, v, labels="mc", **options
        ),
        "sampled Fisher, 8 columns": lambda: (
            fp.Fisher(problem, params, batch, labels="mc", **options) @ stack
        ),
        "K-FAC factors, mc": lambda: factored(),
        "K-FAC factors, exact": lambda: factored(kind="kflr"),
        "K-FAC factors, inputs only": lambda: factored(kind="foof"),
        "K-FAC inverse and one solve": lambda: factored_inverse(factored(), lv),
        "K-FAC solve": lambda: inverse @ lv,
        "EKFAC": lambda: factored(kind="ekfac"),
        "GGN diagonal, 8 products": lambda: fp.hutchinson_diagonal(ggn(), 8, **options),
        "GGN trace, 9 products": lambda: fp.hutchinson_trace(ggn(), 9, **options),
        "GGN Hutch++, 9 products": lambda: fp.hutchpp(ggn(), 9, **options),
        "GGN spectrum, 16 steps": lambda: fp.spectral_density(ggn(), steps=16, **options),
        "GGN spectrum, 3 vectors": lambda: fp.spectral_density(
            ggn(), steps=16, reorthogonalize=False, **options
        ),
    }


def ours_compiled(model, batch, v, stack):
    """Every operation as one graph; what is random is an argument.

    Columns come one after another, which is the faster graph, and under ``vmap``, which is the
    smaller one, where the first takes too long to compile.
    """
    generator = torch.Generator().manual_seed(0)
    problem, layers = problems_of(model)
    params = problem.params
    lv = {k: v[k] for k in layers.params}
    loss, targets = problem.loss, batch[1]
    noise = loss.label_noise(targets, 1, generator)
    kinds = {
        "mc": LayerStatistics("mc", others="none"),
        "kflr": LayerStatistics("exact", others="none"),
    }
    per_sample = LayerStatistics("mc", others="none", per_sample=True)

    def measured(need, b, noise):
        evaluation = fp.Evaluation(layers, layers.params, b, layers=True)
        return need.measure(evaluation, noise)

    def factors(need, b, noise):
        empty = KroneckerIO.init(layers.params, rows=True)
        return empty.accumulate(measured(need, b, noise), None)

    def inputs_only(b):
        return fp.KroneckerFactored(layers, layers.params, b, kind="foof").factors

    def inverse_and_solve(b, noise, v):
        found = factors(kinds["mc"], b, noise)
        prepared = Cholesky(1e-3, "equal").prepare(found, None)
        return Cholesky(1e-3, "equal").apply(prepared, v)

    def ekfac(b, noise):
        uses = measured(per_sample, b, noise)
        found = KroneckerIO.init(layers.params, rows=True).accumulate(uses, None)
        blocks = {k: Factors(x, found.right[k]) for k, x in found.left.items()}
        bases = LayerBlocks(layers.params, blocks, {}, {})._rotated()
        return {
            k: second_moments(u, split_block(k)[1] is not None, bases[k].left, bases[k].right)
            for k, u in uses.uses.items()
        }

    def hessian(b, v):
        return fp.linearize(problem, params, b).hvp(v)

    def ggn_product(b, v):
        return fp.ggn_mv(problem, params, b, v)

    def ggn(b):
        return fp.GGN(problem, params, b)

    def either(estimate, chunk_size, *args):
        return [(functools.partial(estimate, size), *args) for size in (None, chunk_size)]

    def sampled(b, noise, v):
        return fp.fisher_mv(problem, params, b, v, labels="mc", noise=noise)

    probes = draw_probes(ggn(batch), 9, generator)
    product = torch.compile(ggn_product, fullgraph=True, dynamic=False)
    within = Function(lambda v: product(batch, v), params)
    factored = fp.KroneckerFactored(layers, layers.params, batch, generator=generator)
    inverse = factored.inverse(1e-3, split="equal")
    return {
        "Hessian, one product": (hessian, batch, v),
        "Hessian, 8 columns": either(
            lambda size, b, v: fp.Hessian(problem, params, b).matmat(v, size), 8, batch, stack
        ),
        "GGN, one product": (ggn_product, batch, v),
        "GGN, 8 columns": either(lambda size, b, v: ggn(b).matmat(v, size), 8, batch, stack),
        "empirical Fisher, one product": (
            lambda b, v: fp.fisher_mv(problem, params, b, v, labels="empirical"),
            batch,
            v,
        ),
        "sampled Fisher, one product": (sampled, batch, noise, v),
        "sampled Fisher, 8 columns": (torch.vmap(sampled, (None, None, 0)), batch, noise, stack),
        "K-FAC factors, mc": (lambda b, n: factors(kinds["mc"], b, n), batch, noise),
        "K-FAC factors, exact": (lambda b: factors(kinds["kflr"], b, ()), batch),
        "K-FAC factors, inputs only": (inputs_only, batch),
        "K-FAC inverse and one solve": (inverse_and_solve, batch, noise, lv),
        "K-FAC solve": (inverse.matvec, lv),
        "EKFAC": (ekfac, batch, noise),
        "GGN diagonal, 8 products": either(
            lambda size, b, p: fp.hutchinson_diagonal(ggn(b), 8, probes=p, chunk_size=size),
            8,
            batch,
            probes[:8],
        ),
        "GGN trace, 9 products": either(
            lambda size, b, p: fp.hutchinson_trace(ggn(b), 9, probes=p, chunk_size=size),
            9,
            batch,
            probes,
        ),
        "GGN Hutch++, 9 products": either(
            lambda size, b, p: fp.hutchpp(ggn(b), 9, probes=p, chunk_size=size),
            3,
            batch,
            probes[:6],
        ),
        "GGN spectrum, 16 steps": lambda: fp.spectral_density(within, steps=16, vectors=probes[:1]),
        "GGN spectrum, 3 vectors": lambda: fp.spectral_density(
            within, steps=16, vectors=probes[:1], reorthogonalize=False
        ),
        "GGN spectrum, one graph": (
            lambda b, p: fp.spectral_density(ggn(b), steps=16, vectors=p),
            batch,
            probes[:1],
        ),
    }


def theirs_compiled(model, batch, v, stack):
    """The operators' own functions of a batch and columns; around them, estimates run eagerly."""
    import curvlinops as cl

    base = {"check_deterministic": False, "num_data": len(batch[0])}
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    one = [x.unsqueeze(-1) for x in v.values()]
    columns = [s.movedim(0, -1).contiguous() for s in stack.values()]

    def made(cls):
        return cls(model, loss, params, [batch], **base)

    hessian, empirical = made(cl.HessianLinearOperator), made(cl.EFLinearOperator)
    sampled, ggn = made(cl.FisherMCLinearOperator), made(cl.GGNLinearOperator)
    draws = (1, torch.Generator().manual_seed(0))
    within = made(cl.GGNLinearOperator)
    within.__dict__["_mp"] = torch.compile(ggn._mp, fullgraph=True, dynamic=False)
    named, names = dict(model.named_parameters()), layer_names(model)
    of_layers, lv = [named[k] for k in names], [v[k] for k in names]
    options = {"num_per_example_loss_terms": 1, "separate_weight_and_bias": False, **base}
    kinds = cl.FisherType

    def kfac(kind, b, cls=cl.KFACLinearOperator):
        return cls(model, loss, of_layers, [b], fisher_type=kind, **options)

    def factors(kind):
        def found(b):
            op = kfac(kind, b)
            op.compute_kronecker_factors()
            return op._input_covariances, op._gradient_covariances

        return found

    def inverse(b):
        op = kfac(kinds.MC, b)
        op.compute_kronecker_factors()
        return cl.KFACInverseLinearOperator(op, damping=1e-3)

    def ekfac(b):
        kfac(kinds.MC, b, cl.EKFACLinearOperator)._maybe_compute_ekfac()

    def spectrum():
        return cl.lanczos_approximate_spectrum(
            within, ncv=16, num_repeats=1, boundaries=(0.0, 50.0)
        )

    kept = inverse(batch)
    kept @ lv
    return {
        "Hessian, one product": (hessian._mp, *batch, *one),
        "Hessian, 8 columns": (hessian._mp, *batch, *columns),
        "GGN, one product": (ggn._mp, *batch, *one),
        "GGN, 8 columns": (ggn._mp, *batch, *columns),
        "empirical Fisher, one product": (empirical._mp, *batch, *one),
        "sampled Fisher, one product": (sampled._mp, *batch, *draws, *one),
        "sampled Fisher, 8 columns": (sampled._mp, *batch, *draws, *columns),
        "K-FAC factors, mc": (factors(kinds.MC), batch),
        "K-FAC factors, exact": (factors(kinds.TYPE2), batch),
        "K-FAC factors, inputs only": (factors(kinds.FORWARD_ONLY), batch),
        "K-FAC inverse and one solve": (lambda b: inverse(b) @ lv, batch),
        "K-FAC solve": (lambda v: kept @ v, lv),
        "EKFAC": (ekfac, batch),
        "GGN diagonal, 8 products": lambda: cl.hutchinson_diag(within, 8),
        "GGN trace, 9 products": lambda: cl.hutchinson_trace(within, 9),
        "GGN Hutch++, 9 products": lambda: cl.hutchpp_trace(within, 9),
        "GGN spectrum, 16 steps": spectrum,
        "GGN spectrum, 3 vectors": spectrum,
        "GGN spectrum, one graph": spectrum,
    }


def that_compile(calls, problem):
    """The calls that compile within :data:`PATIENCE`; of the others the reasons are printed."""
    # A graph for each kind of product and number of columns.
    torch._dynamo.config.recompile_limit = 64  # pyright: ignore

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    found = {}
    for (side, key), call in calls.items():
        for one in call if isinstance(call, list) else [call]:
            made = one if callable(one) else compiled(*one)
            start = time.monotonic()
            signal.alarm(PATIENCE)
            try:
                made()
                found[side, key] = made
                break
            except Exception as error:  # whatever the compiler says
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = " ".join(lines[:2]) or type(error).__name__
                # The compiler dresses up what it is stopped by.
                late = time.monotonic() - start >= PATIENCE
                reason = f"not compiled after {PATIENCE} s" if late else reason
                print(f"- {key}, {problem}, {side}: {reason}", flush=True)
            finally:
                signal.alarm(0)
    return found


def compiled(f, *args):
    f = torch.compile(f, fullgraph=True, dynamic=False)
    return lambda: f(*args)


def factored_inverse(factored, v):
    return factored.inverse(1e-3, split="equal") @ v


def theirs(model, batch, v, stack):
    import curvlinops as cl

    params, data = list(model.parameters()), [batch]
    loss = nn.CrossEntropyLoss()
    base = {"check_deterministic": False, "num_data": len(batch[0])}
    hessian = cl.HessianLinearOperator(model, loss, params, data, **base)
    ggn = cl.GGNLinearOperator(model, loss, params, data, **base)
    empirical = cl.EFLinearOperator(model, loss, params, data, **base)
    sampled = cl.FisherMCLinearOperator(model, loss, params, data, **base)
    one, columns = list(v.values()), [s.movedim(0, -1).contiguous() for s in stack.values()]
    named = dict(model.named_parameters())
    names = layer_names(model)
    of_layers, lv = [named[k] for k in names], [v[k] for k in names]
    options = {"num_per_example_loss_terms": 1, "separate_weight_and_bias": False, **base}
    kinds = cl.FisherType

    def kfac(kind):
        op = cl.KFACLinearOperator(model, loss, of_layers, data, fisher_type=kind, **options)
        op.compute_kronecker_factors()
        return op

    def ekfac():
        cls = cl.EKFACLinearOperator
        op = cls(model, loss, of_layers, data, fisher_type=kinds.MC, **options)
        op._maybe_compute_ekfac()

    inverse = cl.KFACInverseLinearOperator(kfac(kinds.MC), damping=1e-3)
    inverse @ lv

    def spectrum():
        # Without reorthogonalisation: no Lanczos vector is kept.
        return cl.lanczos_approximate_spectrum(ggn, ncv=16, num_repeats=1, boundaries=(0.0, 50.0))

    return {
        "Hessian, one product": lambda: hessian @ one,
        "Hessian, kept": lambda: hessian @ one,
        "Hessian, 8 columns": lambda: hessian @ columns,
        "GGN, one product": lambda: ggn @ one,
        "GGN, kept": lambda: ggn @ one,
        "GGN, 8 columns": lambda: ggn @ columns,
        "empirical Fisher, one product": lambda: empirical @ one,
        "sampled Fisher, one product": lambda: sampled @ one,
        "sampled Fisher, 8 columns": lambda: sampled @ columns,
        "K-FAC factors, mc": lambda: kfac(kinds.MC),
        "K-FAC factors, exact": lambda: kfac(kinds.TYPE2),
        "K-FAC factors, inputs only": lambda: kfac(kinds.FORWARD_ONLY),
        "K-FAC inverse and one solve": lambda: (
            cl.KFACInverseLinearOperator(kfac(kinds.MC), damping=1e-3) @ lv
        ),
        "K-FAC solve": lambda: inverse @ lv,
        "EKFAC": ekfac,
        "GGN diagonal, 8 products": lambda: cl.hutchinson_diag(ggn, 8),
        "GGN trace, 9 products": lambda: cl.hutchinson_trace(ggn, 9),
        "GGN Hutch++, 9 products": lambda: cl.hutchpp_trace(ggn, 9),
        "GGN spectrum, 16 steps": spectrum,
        "GGN spectrum, 3 vectors": spectrum,
    }


def gradient(model, batch):
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    return lambda: torch.autograd.grad(loss(model(batch[0]), batch[1]), params)


def clock(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(contenders, reference, rounds):
    """The median of a call's time over the mean of the two gradients around it."""
    ratios = {key: [] for key in contenders}
    order, shuffle = list(contenders), random.Random(0)
    for r in range(rounds + 1):
        shuffle.shuffle(order)
        for key in order:
            before, own, after = clock(reference), clock(contenders[key]), clock(reference)
            if r:  # the first round warms up
                ratios[key].append(2 * own / (before + after))
    return {key: statistics.median(x) for key, x in ratios.items()}


def peak(call):
    """MB that torch's allocator holds at most beyond what it held before the call."""
    call()
    # The profiler may lose events: the highest of three.
    return max(recorded_peak(call) for _ in range(3)) / 2**20


def recorded_peak(call):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


class Arithmetic(TorchDispatchMode):
    """Counts what matrix products and convolutions multiply."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, operation = func(*args, **(kwargs or {})), func.overloadpacket
        # torch has no formula for what is written in place.
        if operation is torch.ops.aten.addmm_:
            operation = torch.ops.aten.addmm
        if operation in flop_registry:
            self.count += flop_registry[operation](*args, **(kwargs or {}), out_val=out)
        return out


def counted(call):
    call()  # opens what is kept
    with Arithmetic() as found:
        call()
    return found.count


SIDES = {
    "eager": (ours, theirs),
    "memory": (ours, theirs),
    "arithmetic": (ours, theirs),
    "compiled": (ours_compiled, theirs_compiled),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--problems", default="mlp,cnn,encoder")
    parser.add_argument("--only", default="", help="part of the operations' names")
    parser.add_argument("--what", default="eager", choices=SIDES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"mlp": mlp, "cnn": cnn, "encoder": encoder}
    names = args.problems.split(",")
    table: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for name in names:
        model, batch, v, stack = work(makers[name])
        sides = zip(("ours", "theirs"), SIDES[args.what], strict=True)
        calls = {
            (side, key): call
            for side, make in sides
            for key, call in make(model, batch, v, stack).items()
            # What is kept is not seen between two calls.
            if args.only in key and not (args.what == "memory" and "kept" in key)
        }
        keys = dict.fromkeys(key for _, key in calls)
        if args.what == "compiled":
            calls = that_compile(calls, name)
        if args.what == "memory":
            found = {key: peak(call) for key, call in calls.items()}
        elif args.what == "arithmetic":
            one = counted(gradient(model, batch))
            found = {key: counted(call) / one for key, call in calls.items()}
        else:
            found = measure(calls, gradient(model, batch), args.rounds)
        for key in keys:
            cell = (found.get(("ours", key)), found.get(("theirs", key)))
            table.setdefault(key, {})[name] = cell
    timed = f"CPU time, {args.rounds} rounds; in gradients"
    unit = {"memory": "MB", "arithmetic": "in gradients"}.get(args.what, timed)
    print(f"torch {torch.__version__}, one thread, {args.what}, {unit}")
    print("| operation | " + " | ".join(f"{n}: ours | curvlinops | ratio" for n in names) + " |")
    print("|---" * (1 + 3 * len(names)) + "|")
    over = []
    for key, row in table.items():
        cells = []
        for n in names:
            a, b = row[n]
            ratio = a / b if a and b else None
            over += [ratio] if ratio else []
            cells += ["–" if x is None else f"{x:.2f}" for x in (a, b, ratio)]
        print(f"| {key} | " + " | ".join(cells) + " |")
    if over:
        print(f"\nours / curvlinops: median {statistics.median(over):.2f}, worst {max(over):.2f}")


if __name__ == "__main__":
    main()
