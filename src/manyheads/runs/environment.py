"""Where a number came from, and what could make it faster."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("manyheads", "torch", "transformers", "accelerate", "numpy", "scikit-learn", "altair", "distributed")


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on; those that are missing are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Versions, device, threads and commit, as flat text: goes with every stored result."""
    facts = versions() | {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def fast_paths() -> dict[str, str]:
    """What can run faster than the eager files here, by name, with what it needs where it cannot."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    cuda = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    return {
        "scaled_dot_product_attention": "yes, PyTorch's own kernels",
        "blocked windows and routed blocks": "yes, plain PyTorch on any device",
        "torch.compile": f"yes, with {compiler}" if compiler else "no C++ compiler found: modules run eagerly",
        "CUDA": torch.cuda.get_device_name() if cuda else "no CUDA device: modules run on the CPU",
        "Triton": "yes" if triton and cuda else "no: needs a CUDA device and the triton package",
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that manyheads is imported from, marked where code has changes; '' outside of one.
    What was measured, and what is said of it, changes nothing that a measurement rests on."""
    here, said = Path(__file__).parent, ("benchmarks/results", "docs")
    code = ["--", ":(top)", *(f":(top,exclude){path}" for path in said)]
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", *code], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
