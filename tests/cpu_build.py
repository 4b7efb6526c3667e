"""Builds kernels/*.c for the tests: any number of lanes, with or without sanitizers."""
from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from harness import ROOT, need_compiler

FOLDER = tempfile.TemporaryDirectory(prefix="rustinfer-cpu-")
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden",
         "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")


def new_folder() -> Path:
    """A folder that goes when the tests end."""
    return Path(tempfile.mkdtemp(dir=FOLDER.name))


def compile_c(name: str, *arguments: str | Path, compiler: str | None = None) -> Path:
    """What the system's compiler, or another one, makes of some flags and sources, in a new folder."""
    compiler, path = compiler or need_compiler(), new_folder() / name
    subprocess.run([compiler, *arguments, "-o", path], check=True)
    return path


@functools.cache
def build(lanes: int | None = None, *flags: str) -> Path:
    """The path of a shared library of all kernels; `lanes` floats in a vector (None: what the machine has)."""
    width = [f"-DVL={lanes}"] if lanes else []
    return compile_c("kernels.so", *FLAGS, *width, *flags, *sorted((ROOT / "kernels").glob("*.c")), "-lm")


@functools.cache
def library(lanes: int | None = None) -> ctypes.CDLL:
    """The kernels, loaded into this process."""
    return ctypes.CDLL(str(build(lanes)))


class Team:
    """Threads that run the kernels of a build; `with` ends them."""

    def __init__(self, lanes: int | None = None, threads: int = 2):
        self.lanes, self.library = lanes, library(lanes)
        self.library.team_create.restype = ctypes.c_void_p
        self._team = ctypes.c_void_p(self.library.team_create(threads))

    def call(self, name: str, *arguments) -> None:
        """A kernel with these arguments after the team; an array is its address, a whole number an int64."""
        getattr(self.library, name)(self._team, *map(c_argument, arguments))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_) -> None:
        self.library.team_free(self._team)


def c_argument(value):
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else ctypes.c_void_p(value.ctypes.data)
