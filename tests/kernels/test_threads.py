"""The C library's threads: how many, that they sleep when there is nothing to do, and that none is left behind."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from llava_kernels import library

pytestmark = [
    pytest.mark.skipif(library.load() is None, reason="libllava_kernels was not built"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc"),
]


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def cpu_ticks() -> int:
    """Processor time of this process in 1/100 s, user and system."""
    return sum(map(int, Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[11:13]))


def use(handle: library.Handle) -> None:
    x, weight = torch.ones(4, 256), torch.ones(512, 256)
    assert (handle.linear(x, library.float_weight(weight)) == 256).all()


def test_idle_threads_sleep_and_closed_ones_are_gone():
    use(library.Handle(1))  # what the first call makes for ever
    before = tasks()
    handles = [library.Handle(4) for _ in range(3)]
    for handle in handles:
        use(handle)
    assert tasks() == before + 9
    time.sleep(0.05)
    spent = cpu_ticks()
    time.sleep(0.6)
    assert cpu_ticks() - spent <= 12  # nine threads that looked out would take 60 a processor
    del handle, handles
    assert tasks() == before


def test_several_handles_at_once_with_more_threads_than_processors():
    """Each caller gets its own results, however the threads are put aside."""
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(3, 96, generator=generator), torch.randn(200, 96, generator=generator)
        exact, handle, described = x @ weight.T, library.Handle(3 + seed), library.float_weight(weight)
        for _ in range(200):
            if not torch.allclose(handle.linear(x, described), exact, atol=1e-4):
                wrong.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.parametrize(("given", "expected"), [({"OMP_NUM_THREADS": "1"}, 1), ({}, None)])
def test_as_many_threads_as_torch_uses_and_processors_are_allowed(given, expected):
    """OMP_NUM_THREADS counts, and so does the processors' mask, which torch's own count does not follow later on."""
    script = (
        f"import os, torch; torch.set_num_threads(8) if {expected is None} else None\n"
        f"os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]) if {expected is None} else None\n"
        "from llava_kernels import library; print(library.default_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | given
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == 1
