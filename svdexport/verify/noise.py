"""Did something else disturb a timed call? Counters of the system, read before and after it.

What matters is whether the threads that wanted a core had one. Our own CPU share alone cannot
say: onnxruntime's threads spin while they wait and look busy, ggml's wait at barriers, and parts
of a step run on one thread. So what is judged is what others took and how long our threads stood
in line:

- `other_cpu`: busy time of the cores we may use (/proc/stat through psutil), less our own;
- `waited`: time that our threads were ready to run and had no core (schedstat's run delay, Linux);
- `steal`: time that the hypervisor gave to other guests;
- `throttled`: time that a container's CPU quota held us back (cgroup v2).

Where a system tells neither of the first two, a probe asks directly: a fixed piece of work on
each thread, wall time against CPU time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from svdexport.core.machine import usable_cores

# Shares of threads x wall time above which a sample is marked. On an idle machine all four stay
# below 1 %; a busy loop on each core takes about 50 % and makes our threads wait as long.
MAX_OTHER = 0.10
MAX_WAITED = 0.05
MAX_STEAL = 0.05
MAX_THROTTLED = 0.02
MAX_STARVED = 0.20  # of the probe: wall time without a core; scheduling jitter alone reaches 10 %

_TASKS = Path("/proc/self/task")
_PROBE_BYTES = bytes(1 << 20)
_PROBE_SECONDS = 0.04


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment, in seconds; `waited` is by thread id."""

    wall: float
    own: float
    busy: float
    steal: float
    waited: dict[str, float]
    throttled: float
    preempted: int


@dataclass(frozen=True)
class Change:
    """What happened between two snapshots, in seconds, summed over cores or threads."""

    wall: float
    own: float
    other: float
    steal: float
    waited: float
    throttled: float
    preempted: int
    blind: bool


def snapshot() -> Snapshot:
    """Read all counters; those that the system does not have are 0."""
    busy, steal = _cores()
    return Snapshot(
        wall=time.perf_counter(),
        own=time.process_time(),
        busy=busy,
        steal=steal,
        waited=_run_delays(),
        throttled=_throttled(),
        preempted=psutil.Process().num_ctx_switches().involuntary,
    )


def change(before: Snapshot, after: Snapshot) -> Change:
    """The difference. `blind` is set where the system's counters show less than our own work."""
    own = after.own - before.own
    busy = after.busy - before.busy
    waited = sum(total - before.waited.get(tid, 0.0) for tid, total in after.waited.items())
    return Change(
        wall=after.wall - before.wall,
        own=own,
        other=max(0.0, busy - own),
        steal=max(0.0, after.steal - before.steal),
        waited=waited,
        throttled=after.throttled - before.throttled,
        preempted=after.preempted - before.preempted,
        blind=not after.waited and busy < 0.5 * own,
    )


def why_disturbed(change: Change, threads: int, starved: float = 0.0) -> str:
    """What disturbed a call that used `threads` threads, in words; empty where nothing did.

    Others may use half of the cores that we leave free: beyond that they share caches, memory
    bandwidth and clock with us.
    """
    span = change.wall * threads
    spare = max(0, usable_cores() - threads)
    found = []
    if change.other > MAX_OTHER * span + 0.5 * spare * change.wall:
        found.append(f"other processes used {change.other / change.wall:.2f} cores")
    if change.waited > MAX_WAITED * span:
        found.append(f"threads waited for a core {change.waited / span:.0%} of the time")
    if change.steal > MAX_STEAL * span:
        found.append(f"the hypervisor took {change.steal / span:.0%} of the time")
    if change.throttled > MAX_THROTTLED * change.wall:
        found.append(f"the CPU quota held it back {change.throttled / change.wall:.0%} of the time")
    if starved > MAX_STARVED:
        found.append(f"a probe had no core {starved:.0%} of the time")
    return "; ".join(found)


def probe(threads: int, seconds: float = _PROBE_SECONDS) -> float:
    """Share of wall time in which the worst of `threads` busy threads had no core, by asking for
    it.
    """

    def work(_: int) -> float:
        wall, own = time.perf_counter(), time.thread_time()
        while time.perf_counter() - wall < seconds:
            hashlib.sha256(_PROBE_BYTES).digest()  # releases the interpreter lock
        return 1.0 - (time.thread_time() - own) / (time.perf_counter() - wall)

    with ThreadPoolExecutor(threads) as pool:
        return max(0.0, *pool.map(work, range(threads)))


def _cores() -> tuple[float, float]:
    """Busy and stolen seconds of the cores that we may use, since the start of the system."""
    every = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    busy = steal = 0.0
    for index in allowed:
        if index >= len(every):  # a core that was switched off after the start
            continue
        times = every[index]
        lost = getattr(times, "steal", 0.0)
        waiting = times.idle + getattr(times, "iowait", 0.0)
        # guest time is in user time already, and guest_nice in nice
        inside = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        busy += sum(times) - waiting - lost - inside
        steal += lost
    return busy, steal


def _run_delays() -> dict[str, float]:
    """Seconds each of our threads has waited for a core: field 2 of schedstat, in nanoseconds."""
    delays: dict[str, float] = {}
    if not _TASKS.is_dir():
        return delays
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):  # the thread may just have ended
            delays[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return delays


def _throttled() -> float:
    """Seconds that the CPU quota of our cgroup (v2) has held us back."""
    groups = Path("/proc/self/cgroup")
    if not groups.exists():
        return 0.0
    for line in groups.read_text().splitlines():
        if not line.startswith("0::"):
            continue
        stat = Path("/sys/fs/cgroup") / line[3:].lstrip("/") / "cpu.stat"
        if stat.exists():
            for entry in stat.read_text().splitlines():
                key, _, value = entry.partition(" ")
                if key == "throttled_usec":
                    return int(value) / 1e6
    return 0.0
