"""What this process may use of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_threads() -> int:
    """CPU threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Free memory in bytes: what the system has, capped by the container's limit where there is one."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        except (AttributeError, OSError, ValueError):
            free = 4 * 2**30  # neither Linux nor POSIX: assume little
    try:
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, KeyError, ValueError):
        pass  # no limit ("max" is not a number), or no control group
    return max(free, 0)
