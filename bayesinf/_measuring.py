"""What a piece of work costs: wall and processor seconds, and memory beyond what was there."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "measured", "peak_mb", "resident_mb"]

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Cost:
    """Seconds, and mebibytes at the peak beyond those resident at the start."""

    wall: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body; the fields are filled when it ends.

    The peak is reset first where the kernel allows it (Linux); elsewhere it is the process's, so
    that work after heavier work reads 0.
    """
    with suppress(OSError):
        _RESET.write_text("5")
    cost, start = Cost(), peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost.memory = max(0.0, peak_mb() - start)


def peak_mb() -> float:
    """Peak resident memory in MiB."""
    found = _status("VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if found is None else found


def resident_mb() -> float:
    """Resident memory in MiB; where the kernel does not tell, its peak."""
    found = _status("VmRSS:")
    return peak_mb() if found is None else found


def _status(field: str) -> float | None:
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
