"""Our gradient statistics and curvature over BackPACK's, on the same work in one process.

    pip install --no-deps backpack-for-pytorch==1.7.1   # and what it imports
    python tests/benchmarks/against_backpack.py [--rounds 15] [--problems mlp,cnn] [--only norms]

Process CPU time on one thread; the contenders take turns, and each call stands beside a gradient.
Printed are medians in gradients, and ours over theirs. Before the clock starts both sides' numbers
are compared; of what is sampled, the norms. A convolution's output factor is another one there: of
output gradients that are summed over the positions first, as with ``sharing="reduce"`` here. Of the
Gram matrix they have no extension: it is taken of their per-sample gradients.
"""

import argparse
import copy
import os
import statistics
import sys
import warnings
from pathlib import Path

from funcprecond.linalg import treemath

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from against_curvlinops import cnn, gradient, measure, mlp, work
from torch import nn

import funcprecond as fp
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.layers.blocks import split_block
from funcprecond.linalg.gram import square
from funcprecond.operators.diagonal import diagonal_of

MOMENT = LayerStatistics("empirical", per_sample=True)


def ours(model, batch, v):
    generator = torch.Generator().manual_seed(0)
    problem = fp.problem(model, fp.losses.cross_entropy)
    params = problem.params
    data = (problem, params, batch)

    def variance():
        found = fp.observe(*data, (MOMENT,))
        second = diagonal_of(found[MOMENT], params)
        return {k: second[k] - found.grads[k] ** 2 for k in params}

    def diagonal(labels):
        return fp.DiagonalGGN(*data, labels=labels, generator=generator).values

    def factored(kind):
        return fp.KroneckerFactored(*data, kind=kind, generator=generator)

    return {
        "per-sample gradients": lambda: fp.per_sample_grads(*data),
        "their squared norms": lambda: fp.per_sample_norms(*data).square(),
        "their second moment": lambda: diagonal("empirical"),
        "their variance": variance,
        "their Gram matrix": lambda: fp.per_sample_gram(*data),
        "GGN diagonal, exact": lambda: diagonal("exact"),
        "GGN diagonal, sampled": lambda: diagonal("mc"),
        "K-FAC factors, mc": lambda: factored("kfac"),
        "K-FAC factors, exact": lambda: factored("kflr"),
        "Hessian, one product": lambda: fp.Hessian(*data) @ v,
        "GGN, one product": lambda: fp.ggn_mv(*data, v),
    }


def theirs(model, batch, v):
    from backpack import backpack, extend, extensions
    from backpack.hessianfree.ggnvp import ggn_vector_product
    from backpack.hessianfree.hvp import hessian_vector_product

    plain, loss = copy.deepcopy(model), nn.CrossEntropyLoss()
    model, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    named, (x, y), n = dict(model.named_parameters()), batch, len(batch[0])
    vector = list(v.values())

    def of(extension, field):
        def call():
            model.zero_grad()
            with backpack(extension):
                loss(model(x), y).backward()
            return {k: getattr(p, field) for k, p in named.items()}

        return call

    def norms():
        return n**2 * torch.stack([*squared().values()]).sum(0)

    def gram():
        rows = torch.cat([g.flatten(1) for g in single().values()], 1)
        return n**2 * rows @ rows.mT

    def hessian():
        value = nn.functional.cross_entropy(plain(x), y)
        found = hessian_vector_product(value, list(plain.parameters()), vector)
        return dict(zip(v, found, strict=True))

    def ggn():
        outputs = plain(x)
        value = nn.functional.cross_entropy(outputs, y)
        found = ggn_vector_product(value, outputs, plain, vector)
        return dict(zip(v, found, strict=True))

    squared = of(extensions.BatchL2Grad(), "batch_l2")
    single = of(extensions.BatchGrad(), "grad_batch")
    return {
        "per-sample gradients": single,
        "their squared norms": norms,
        "their second moment": of(extensions.SumGradSquared(), "sum_grad_squared"),
        "their variance": of(extensions.Variance(), "variance"),
        "their Gram matrix": gram,
        "GGN diagonal, exact": of(extensions.DiagGGNExact(), "diag_ggn_exact"),
        "GGN diagonal, sampled": of(extensions.DiagGGNMC(), "diag_ggn_mc"),
        "K-FAC factors, mc": of(extensions.KFAC(), "kfac"),
        "K-FAC factors, exact": of(extensions.KFLR(), "kflr"),
        "Hessian, one product": hessian,
        "GGN, one product": ggn,
    }


def check(a, b, model, batch):
    """Raise AssertionError unless both sides' numbers agree; of what is sampled, to a third."""
    n = len(batch[0])
    # A gradient of theirs is that of an example's share of the mean.
    factors = {"per-sample gradients": n, "their second moment": n, "their variance": n**2}
    for key in a:
        if "K-FAC" not in key:
            x, y = flat(a[key]()), factors.get(key, 1) * flat(b[key]())
            if "sampled" in key:
                assert abs(x.norm() / y.norm() - 1) < 1 / 3, key
            else:
                torch.testing.assert_close(x, y, rtol=0, atol=1e-3 * float(y.abs().max()))
    # Their output gradients are summed over a convolution's positions, which is "reduce" here; and
    # their inputs are summed, not averaged, over them.
    problem = fp.problem(model, fp.losses.cross_entropy)
    kinds = {"expand": "right", "reduce": "left"}
    theirs = b["K-FAC factors, exact"]()
    for sharing, side in kinds.items():
        found = fp.KroneckerFactored(problem, problem.params, batch, kind="kflr", sharing=sharing)
        for block, factor in getattr(found.factors, side).items():
            y = theirs[split_block(block)[0]][side == "right"]
            # Their weights' factors are without the bias.
            x = square(factor)[: len(y), : len(y)]
            torch.testing.assert_close(x / x.norm(), y / y.norm(), rtol=0, atol=1e-3)


def flat(x):
    return x if isinstance(x, torch.Tensor) else treemath.ravel(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--problems", default="mlp,cnn")
    parser.add_argument("--only", default="", help="part of the operations' names")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, table = args.problems.split(","), {}
    for name in names:
        model, batch, v, _ = work({"mlp": mlp, "cnn": cnn}[name])
        sides = {"ours": ours(model, batch, v), "theirs": theirs(model, batch, v)}
        check(*sides.values(), model, batch)
        calls = {
            (side, key): call
            for side, of in sides.items()
            for key, call in of.items()
            if args.only in key
        }
        found = measure(calls, gradient(model, batch), args.rounds)
        for key in dict.fromkeys(key for _, key in calls):
            table.setdefault(key, []).append((found["ours", key], found["theirs", key]))
    print(f"torch {torch.__version__}, one thread, CPU time, {args.rounds} rounds; in gradients")
    print("| operation | " + " | ".join(f"{n}: ours | BackPACK | ratio" for n in names) + " |")
    print("|---" * (1 + 3 * len(names)) + "|")
    for key, cells in table.items():
        print(f"| {key} | " + " | ".join(f"{a:.2f} | {b:.2f} | {a / b:.2f}" for a, b in cells), "|")
    ratios = [a / b for cells in table.values() for a, b in cells]
    print(f"\nours / BackPACK: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")


if __name__ == "__main__":
    main()
