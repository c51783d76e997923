"""Cost of a method's step beside SGD's: time measured interleaved, memory at its peak."""

import contextlib
import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map

import funcprecond as fp
from funcprecond.compare.data import Data, batches
from funcprecond.compare.plan import Setting
from funcprecond.compare.recipe import options, recipe
from funcprecond.compare.tasks import TASKS
from funcprecond.compare.train import clock
from funcprecond.methods.card import CARDS

ROUNDS = 25
SECONDS = 1.0  # no new round is begun after this long, once there are five
PROFILED = 10  # steps at most whose memory is traced, one refresh among them


class Loop:
    """A training loop that can be run a few steps at a time.

    Args:
        setting: task, batch size, device.
        method: name in `CARDS`.
        interval: its interval, or None.
        data: the task's data on the device.
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
        # Few batches, made beforehand: it is the step that is timed.
        stream = batches(data.train, setting.batch_size, torch.Generator().manual_seed(0))
        self.batches = list(itertools.islice(stream, 8))
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.t = 0

    def run(self, steps: int) -> None:
        """Take so many more steps."""
        for _ in range(steps):
            batch = self.batches[self.t % len(self.batches)]
            needs = self.transform.needs(self.t)
            noise = fp.draw(self.problem, self.params, batch, needs, generator=self.generator)
            self.params, self.state, _ = self.step(self.params, self.state, batch, self.t, noise)
            self.t += 1

    def seconds(self, steps: int) -> float:
        """Wall-clock time of so many steps."""
        started = clock(self.device)
        self.run(steps)
        return clock(self.device) - started


def cost(setting: Setting, data: Data) -> dict[str, Any]:
    """Time and memory of one step, absolute and as ratios to SGD's on the same batches.

    Method and SGD take turns, a whole interval each, so that both see the machine in the same
    mood. A time is the least of the rounds: whatever else runs on a machine only makes a step
    longer. The drawing of random numbers counts.

    Args:
        setting: the row.
        data: the task's data on its device.

    Returns:
        `step_ms`, `sgd_step_ms`, `time_ratio`, `time_ratio_range` (of the rounds one by one),
        `rounds`, `peak_bytes`, `state_bytes`, `sgd_peak_bytes`, `memory_ratio` (the last two None
        where the device tells no peak), `load` (the machine's, 1 minute).
    """
    method = Loop(setting, setting.method, setting.interval, data)
    sgd = Loop(setting, "sgd", None, data)
    block = setting.interval or 1
    block *= -(-5 // block)  # at least five steps, and whole intervals
    # The steady state is measured: past the steps at which everything is refreshed each time.
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
    """Most bytes in use during a step: what stays between steps, and the most allocated on top.

    On the CPU the allocator's own trace is summed; memory that LAPACK takes past it is not seen.
    On CUDA it is the caching allocator's peak. Other devices tell neither: None.
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
        # Made anew within the trace, which cannot size what it has not seen being allocated; the
        # old ones live on until it ends, so that it does not hear of their end either.
        loop.params, loop.state = tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, old
        )
        loop.run(steps)
    del old
    return storage_bytes((module_tensors(loop.model), loop.batches[0])) + highest(changes)


def highest(changes: Sequence[int]) -> int:
    """Greatest sum of the first so many changes."""
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Trace the CPU allocator within the block.

    Yields:
        a list, filled when the block ends: bytes allocated (positive) and freed (negative), in
        the order in which it happened.
    """
    # The profiler's logger is chatty on standard error unless told otherwise before its first use.
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
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def storage_bytes(tree: Any) -> int:
    """Bytes of the distinct storages under the tensors of a tree; a view counts its whole base."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tree_leaves(tree)
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())
