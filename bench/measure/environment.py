"""The environment of a measurement: machine, versions, commit. Finding the commit does not need torch."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from net.data.processes import available_cores

from .kernels_code import kernels_code, read_sources

ROOT = Path(__file__).parents[2]
#: The folder with ``reports/``: the checkout, or the current folder for an installed package.
HOME = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def commit() -> str:
    """The measured commit: SOURCE_COMMIT, else the checkout's; empty if unknown."""
    return os.environ.get("SOURCE_COMMIT", "").removesuffix("-dirty")[:10] or _git("rev-parse", "--short=10", "HEAD")


def describe() -> dict[str, str | int | bool]:
    """The columns of every row of a record."""
    import torch

    now = datetime.datetime.now(datetime.UTC)
    return {
        **_lasting(),
        "threads": torch.get_num_threads(),
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M:%S"),
    }


def _version(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _lasting() -> dict[str, str | int | bool]:
    """The columns that stay the same while the process runs; some come from other programs."""
    import numpy as np
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "machine": gpu or f"CPU: {_cpu_model()}",
        "cores": available_cores(),
        "driver": _driver() if gpu else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": np.__version__,
        "kernels_code": kernels_code(read_sources(ROOT / "kernels")),
        "commit": commit(),
        # Only code counts: an uncommitted record or table does not make a checkout dirty.
        "dirty": os.environ["SOURCE_COMMIT"].endswith("-dirty")
        if os.environ.get("SOURCE_COMMIT")
        else bool(_git("status", "--porcelain", "--", "kernels", "net", "bench")),
    }
