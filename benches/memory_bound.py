"""What the benches of memory-bound ops share: where and in what they run, how they are timed, what is noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benches.ceiling import copy_ceiling

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = {"rtol": 5e-2, "atol": 5e-2} if GPU else {"rtol": 1e-4, "atol": 1e-4}
IMPLS = ["ours", "eager", "compiled"] if GPU else ["ours", "eager"]  # compiled: the definition through torch.compile
REPEATS = 10  # a round's, on a GPU

Work = Callable[[], Any]


def chosen(impl: str, ours: Callable, reference: Callable) -> Callable:
    if impl == "compiled":
        return torch.compile(reference)
    return {"ours": ours, "eager": reference}[impl]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def measure(benchmark, make: Callable[[], Work], moved: int, shape: tuple[int, ...]) -> None:
    """Time the work that ``make`` returns; ``moved`` bytes pass through memory when it is done once."""
    if GPU:
        benchmark.pedantic(replay(make), rounds=20, warmup_rounds=2)
    else:
        benchmark(make())
    if benchmark.stats is None:
        return  # --benchmark-disable: the caller's check is all that was asked for
    rate = moved * (REPEATS if GPU else 1) / benchmark.stats.stats.median
    benchmark.extra_info |= {"shape": str(shape), "dtype": str(DTYPE), "device": DEVICE.type, "gb_per_s": rate / 1e9}
    if GPU:
        benchmark.extra_info |= {"repeats_a_round": REPEATS, "of_copy_ceiling": rate / copy_ceiling(DEVICE)}


def replay(make: Callable[[], Work]) -> Work:
    """The work, REPEATS times, as a CUDA graph: starting it from Python would take longer than it runs.

    Forward passes that ``make`` runs are on the stream of the capture too, because autograd runs each backward step on
    its forward step's stream.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work = make()
        for _ in range(3):  # compiles what is compiled
            work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATS):
            work()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return run
