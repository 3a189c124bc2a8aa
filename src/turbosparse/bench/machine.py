"""The machine that a figure belongs to: its CPU, its caches, how busy it is, how much memory this process took."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

_SYS_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP = Path("/sys/fs/cgroup")
_ASSUMED_CACHE = 64 << 20
"""Where the system does not tell the size of its last-level cache: more than most have."""


def cpu_name() -> str:
    """The CPU's marketing name, or the architecture where the system does not tell it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    except OSError:
        pass
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _sysctl(key: str) -> str:
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()


def last_level_cache_bytes(caches: Path = _SYS_CACHES) -> int:
    """Size of the largest cache in bytes."""
    sizes = [int(size) for key in ("hw.l3cachesize", "hw.l2cachesize") if (size := _sysctl(key)).isdigit()]
    for entry in caches.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", entry.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=_ASSUMED_CACHE)


def _cpu_times() -> tuple[int, int] | None:
    """(idle, all) CPU time since boot in clock ticks, from the first line of /proc/stat."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return fields[3] + fields[4], sum(fields[:8])


def busy_share(seconds: float = 0.3) -> float:
    """How much of the machine's CPU time other work takes, 0..1, watched for this long.

    The load average would do, but it remembers the minutes before, such as our own build. It is the fallback.
    """
    before = _cpu_times()
    time.sleep(seconds)
    after = _cpu_times()
    if before is None or after is None or after[1] == before[1]:
        return min(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 0.0
    return 1.0 - (after[0] - before[0]) / (after[1] - before[1])


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held so far."""
    try:
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    import resource  # not on Windows, where /proc is missing too: import it where it is needed

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory that can be taken without swapping or passing the container's limit; 4 GB where nobody tells."""
    available = _machine_memory_bytes()
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or one whose limit is the word "max"
        return available
    return min(available, max(limit - used, 0))


def _machine_memory_bytes() -> int:
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    except OSError:
        pass
    return 4_000_000_000
