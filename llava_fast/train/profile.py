"""--profile: a trace of a few steps for a viewer, and one page of text that says where the time went."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMED, TAKEN = 2, 1, 3  # steps

# The first group whose word is in a name has the time; what no word is in is memory-bound: norms, copies, AdamW, ...
GROUPS = {
    "waiting for data": ("dataloader",),
    "communication": ("nccl", "gloo", "all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "c10d"),
    "attention": ("attention", "flash", "fmha", "attn"),
    "matrix products": ("gemm", "aten::mm", "aten::addmm", "aten::bmm", "cutlass", "cublas", "_mm_", "scaled_mm",
                        "nvjet", "xmma", "project_splice", "linear_gelu"),
}  # fmt: skip
REST = "memory-bound and other"


class Profiler:
    """Looks at steps 4 to 6 of this start and writes trace.json and profile.txt into ``folder``, then is done."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.cuda = folder, device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.steps = 0
        self.profile: profile | None = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARMED, active=TAKEN),
            on_trace_ready=self._write,
        )
        self.profile.start()

    def step(self) -> None:
        """After each optimizer step."""
        if self.profile is None:
            return
        self.steps += 1
        self.profile.step()
        if self.steps == SKIPPED + WARMED + TAKEN:
            self.close()

    def close(self) -> None:
        if self.profile is not None:
            self.profile.stop()
            self.profile = None

    def _write(self, done: Any) -> None:
        done.export_chrome_trace(str(self.folder / "trace.json"))
        (self.folder / "profile.txt").write_text(summary(done, self.cuda))


def group_of(name: str) -> str:
    low = name.lower()
    return next((group for group, words in GROUPS.items() if any(word in low for word in words)), REST)


def summary(done: Any, cuda: bool) -> str:
    """Shares of the wall-clock time of the steps by group, what was idle, and the dearest kernels (on a CPU: ops)."""
    wall, busy, groups, names = times(done, cuda)
    what = "kernels on the device" if cuda else "operators on the CPU, all threads of the process as one"
    lines = [f"{TAKEN} steps, {wall / 1e3:.1f} ms; {what}", ""]
    for group in (*GROUPS, REST):
        lines.append(f"{group:24} {groups.get(group, 0.0) / 1e3:10.1f} ms {groups.get(group, 0.0) / wall:7.1%}")
    idle = max(0.0, wall - busy)
    lines += [f"{'idle':24} {idle / 1e3:10.1f} ms {idle / wall:7.1%}", ""]
    overlap = sum(groups.values()) - busy
    if overlap > 0.005 * wall:
        lines += [f"the parts overlap by {overlap / 1e3:.1f} ms: streams run side by side", ""]
    for name, (time, count) in sorted(names.items(), key=lambda item: -item[1][0])[:20]:
        lines.append(f"{time / 1e3:10.1f} ms {time / wall:7.1%} {count:7d} x  {name[:90]}")
    return "\n".join(lines) + "\n"


def times(done: Any, cuda: bool) -> tuple[float, float, dict[str, float], dict[str, tuple[float, int]]]:
    """Microseconds: wall clock; when anything ran; by group; by name with its count.

    On a CPU an op's own time, without what it calls.
    """
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, tuple[float, int]] = {}
    steps = [e for e in done.events() if e.name.startswith("ProfilerStep") and e.device_type == DeviceType.CPU]
    wall = max(e.time_range.end for e in steps) - min(e.time_range.start for e in steps)
    spans = []
    for event in done.events():
        annotation = event.name.startswith(("ProfilerStep", "FSDP::")) or getattr(event, "is_user_annotation", False)
        if (event.device_type == DeviceType.CUDA) != cuda or (
            annotation and (cuda or event.name.startswith("ProfilerStep"))
        ):
            continue
        time = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        spans.append((event.time_range.start, event.time_range.end))
        groups[group_of(event.name)] += time
        before, count = names.get(event.name, (0.0, 0))
        names[event.name] = (before + time, count + 1)
    busy = union(spans) if cuda else sum(groups.values())
    return float(wall), busy, dict(groups), names


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what the intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
