"""What a benchmark ran on, and the physical limits it is held against."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["copy_bandwidth", "describe", "write"]

_VERSIONED = ("lhcompile", "torch", "onnx", "onnxruntime", "numpy")


def describe(more: tuple[str, ...] = ()) -> dict[str, object]:
    """Processor, cores, versions and commit; more: distributions whose versions matter too."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*_VERSIONED, *more)},
        "commit": _commit(),
    }


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second of a large memory copy, read plus written: the median of seven."""
    source = np.ones(megabytes << 17)
    target = np.empty_like(source)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / float(np.median(times))


def write(result: dict[str, Any], lines: list[str], path: Path | None) -> None:
    """Shows the lines of a table, and writes the result to `path` and the lines beside it, as .md, if there is one."""
    print("\n".join(lines))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(lines))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the code that ran; "-dirty" where it was changed since."""
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # there is no git
        return None
    return result.stdout.strip() or None
