"""The cost of a step of a method compared with a step of SGD: time and peak memory."""

import contextlib
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import funcprecond as fp
from funcprecond import tree as trees
from funcprecond.compare.data import Data, batches
from funcprecond.compare.plan import Setting
from funcprecond.compare.recipe import options, recipe
from funcprecond.compare.tasks import TASKS
from funcprecond.compare.train import clock
from funcprecond.methods.card import CARDS

ROUNDS = 25
SECONDS = 1.0  # after this time and at least five rounds, no further round is started
PROFILED = 10  # the maximal number of steps whose memory is traced, including one refresh


class Loop:
    """A training loop that runs a few steps at a time.

    Args:
        setting: the task, batch size and device.
        method: a name in `CARDS`.
        interval: the interval of the method, or None.
        data: the data of the task on the device.
    """

    def __init__(self, setting: Setting, method: str, interval: int | None, data: Data) -> None:
        self.device = torch.device(setting.device)
        task = TASKS[setting.task]
        self.model = task.model(data, 0, self.device)
        self.problem = fp.problem(self.model, fp.losses.cross_entropy)
        self.transform = recipe(method, CARDS[method].learning_rate, interval, task.ends)
        self.step = fp.make_step(self.problem, self.transform, compile=False)
        self.params = self.problem.params
        self.state = self.transform.init(self.params)
        # The batches are made beforehand, so that only the steps are timed.
        stream = batches(data.train, setting.batch_size, torch.Generator().manual_seed(0))
        self.batches = list(itertools.islice(stream, 8))
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.t = 0

    def run(self, steps: int) -> None:
        """Take further steps."""
        for _ in range(steps):
            batch = self.batches[self.t % len(self.batches)]
            needs = self.transform.needs(self.t)
            noise = fp.draw(self.problem, self.params, batch, needs, generator=self.generator)
            self.params, self.state, _ = self.step(self.params, self.state, batch, self.t, noise)
            self.t += 1

    def seconds(self, steps: int) -> float:
        """Take further steps, and return their wall-clock time in seconds."""
        started = clock(self.device)
        self.run(steps)
        return clock(self.device) - started


def cost(setting: Setting, data: Data) -> dict[str, Any]:
    """The time and memory of one step, and their ratios to those of SGD on the same batches.

    The method and SGD take turns, each for a whole number of intervals, so that changes of the load
    of the machine affect both. The reported time is the minimum over the rounds, because other
    processes can only make a step slower. It includes the drawing of random numbers.

    Args:
        setting: the row.
        data: the data of the task on its device.

    Returns:
        A dict with `status` ("ok"); `step_ms`, `sgd_step_ms`, and `time_ratio`, their ratio;
        `time_ratio_range`, the smallest and the largest ratio of a single round; `rounds`, the
        number of rounds; `peak_bytes`, `sgd_peak_bytes`, and `memory_ratio`, their ratio, which are
        None if the device does not report its peak; `state_bytes`, the size of the method's state;
        and `load`, the load average of the machine over one minute.
    """
    method = Loop(setting, setting.method, setting.interval, data)
    sgd = Loop(setting, "sgd", None, data)
    block = setting.interval or 1
    block *= -(-5 // block)  # a multiple of the interval, and at least five steps
    # The first steps, each of which refreshes the curvature, do not count.
    warm_up = options(setting.method, setting.interval).get("start", 0) // block + 1
    method.run(warm_up * block)
    sgd.run(block)
    times: list[tuple[float, float]] = []
    began = clock(method.device)
    while len(times) < ROUNDS:
        if len(times) >= 5 and clock(method.device) - began > SECONDS:
            break
        times.append((method.seconds(block), sgd.seconds(block)))
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    ratios = [mine / sgds for mine, sgds in times]
    peak, sgd_peak = (peak_bytes(loop, setting.interval or 1) for loop in (method, sgd))
    return {
        "status": "ok",
        "step_ms": 1e3 * ours / block,
        "sgd_step_ms": 1e3 * theirs / block,
        "time_ratio": ours / theirs,
        "time_ratio_range": [min(ratios), max(ratios)],
        "rounds": len(times),
        "peak_bytes": peak,
        "sgd_peak_bytes": sgd_peak,
        "memory_ratio": peak / sgd_peak if peak and sgd_peak else None,
        "state_bytes": storage_bytes(method.state),
        "load": os.getloadavg()[0],
    }


def peak_bytes(loop: Loop, interval: int) -> int | None:
    """The peak memory of a step: the tensors kept between steps, plus the peak of the allocations.

    On the CPU, the peak is computed from a trace of torch's allocator, which does not include the
    workspace that LAPACK allocates itself. On CUDA, it is the peak of the caching allocator.

    Args:
        loop: the training loop, which takes a few further steps.
        interval: the number of steps between two refreshes.

    Returns:
        The number of bytes, or None on any other device.
    """
    steps = min(interval, PROFILED)
    if loop.device.type == "cuda":
        resident = storage_bytes(
            (module_tensors(loop.model), loop.params, loop.state, loop.batches[0])
        )
        torch.cuda.synchronize(loop.device)
        before = torch.cuda.memory_allocated(loop.device)
        torch.cuda.reset_peak_memory_stats(loop.device)
        loop.run(steps)
        return resident + torch.cuda.max_memory_allocated(loop.device) - before
    if loop.device.type != "cpu":
        return None
    old = loop.params, loop.state
    gc.collect()
    with allocations() as changes:
        # The parameters and the state are copied within the trace, because a trace only contains
        # the sizes of tensors that are allocated within it. The originals live until it ends, so
        # that it does not contain their deallocation either.
        loop.params, loop.state = trees.map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, old
        )
        loop.run(steps)
    del old
    return storage_bytes((module_tensors(loop.model), loop.batches[0])) + highest(changes)


def highest(changes: Sequence[int]) -> int:
    """The largest partial sum of the changes, at least 0."""
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Trace torch's CPU allocator.

    Yields:
        A list that is filled when the block ends: the numbers of bytes that were allocated
        (positive) and freed (negative), in order.
    """
    # This keeps the profiler from logging to standard error; it must be set before the first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    changes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield changes
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]
        for event in trace.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    changes.extend(size for _, size in sorted(events, key=lambda event: event[0]))


def module_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def storage_bytes(tree: Any) -> int:
    """The size in bytes of the distinct storages of the tensors of a tree.

    A view counts with the whole storage of its base.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in trees.leaves(tree)
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())
