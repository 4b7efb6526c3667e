"""Builds kernels/*.c for the tests: any number of lanes, with or without sanitizers."""
from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from harness import ROOT, need_tool

FOLDER = tempfile.TemporaryDirectory(prefix="rustinfer-cpu-")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden",
         "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")


@functools.cache
def build(lanes: int | None = None, *flags: str) -> Path:
    """The path of a shared library of all kernels; `lanes` floats in a vector (None: what the machine has)."""
    compiler = need_tool("cc", "gcc", "clang")
    path = Path(FOLDER.name) / f"kernels-{lanes}-{abs(hash(flags))}.so"
    sources = sorted(map(str, (ROOT / "kernels").glob("*.c")))
    width = [f"-DVL={lanes}"] if lanes else []
    subprocess.run([compiler, *FLAGS, *width, *flags, *sources, "-o", str(path), "-lm"], check=True)
    return path


@functools.cache
def library(lanes: int | None = None) -> ctypes.CDLL:
    """The kernels, loaded into this process."""
    return ctypes.CDLL(str(build(lanes)))
