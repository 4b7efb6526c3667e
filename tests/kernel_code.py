"""What the compiler makes of the kernels, on a machine without a card: NVRTC and nvdisasm from pip wheels.

    python tests/kernel_code.py [FILE ...] [--dims 1B] [--arch sm_90]     resources of each kernel, order of its loads
    python tests/kernel_code.py --record                                  writes tests/references/registers.json
"""
from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
RECORD = Path(__file__).resolve().parent / "references" / "registers.json"

# What CudaBackend passes, what CuPy adds (cupy/cuda/compiler.py), and -v for the report on registers.
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
# Shared memory that one block may have, in bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
                 "sm_120": 99 << 10}
REGISTER_FILE = 65536  # 32-bit registers that one block may have; a warp takes them in portions of 8 a thread
ARCHITECTURES = tuple(SHARED_LIMITS)
DIMS = {
    "1B": dict(HIDDEN=2048, INTER=8192, HEADS=32, KV_HEADS=8, HEAD_DIM=64, VOCAB=128256),
    "3B": dict(HIDDEN=3072, INTER=8192, HEADS=24, KV_HEADS=8, HEAD_DIM=128, VOCAB=128256),
    "8B": dict(HIDDEN=4096, INTER=14336, HEADS=32, KV_HEADS=8, HEAD_DIM=128, VOCAB=128256),
    "demo": dict(HIDDEN=192, INTER=512, HEADS=6, KV_HEADS=2, HEAD_DIM=32, VOCAB=1536),
}
# Files that are compiled once for each of several values of a macro of their own.
VARIANTS = {"add_linear": {"output": lambda dims: {"WIDTH": dims["HEADS"] * dims["HEAD_DIM"]},
                           "down": lambda dims: {"WIDTH": dims["INTER"]}}}


# (opcode, operands) of a kernel's instructions as they lie in memory; a label has no opcode.
Code = list[tuple[str, str]]


class Build(NamedTuple):
    """One compilation: a file (and a variant of it, after a slash) for a model and an architecture."""

    unit: str
    dims: str
    arch: str

    @property
    def file(self) -> str:
        return self.unit.partition("/")[0]

    @property
    def variant(self) -> str:
        return self.unit.partition("/")[2]

    @property
    def macros(self) -> dict[str, int]:
        dims = DIMS[self.dims]
        return {**dims, "BLOCK_SIZE": 16, **(VARIANTS[self.file][self.variant](dims) if self.variant else {})}

    @property
    def can_wait(self) -> bool:
        """Whether the architecture has programmatic dependent launch."""
        return int(self.arch[3:]) >= 90

    def key(self, kernel: str) -> str:
        """The kernel's name in the record."""
        return f"{kernel}/{self.variant}" if self.variant else kernel

    def __str__(self) -> str:
        return "-".join(self)


def units() -> list[str]:
    """Every kernel file, each variant on its own."""
    names = sorted(path.stem for path in KERNELS.glob("*.cu"))
    return [f"{name}/{variant}" if variant else name for name in names for variant in VARIANTS.get(name, {"": None})]


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs; stack, spills and shared memory (the static part) in bytes."""

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int  # of a block, as __launch_bounds__ promises


@dataclass(frozen=True)
class Module:
    """A compiled file."""

    build: Build
    cubin: bytes
    kernels: dict[str, Kernel]
    warnings: list[str]

    @functools.cached_property
    def code(self) -> dict[str, Code]:
        return disassemble(self.cubin)


# ------------------------------------------------------------------------------
# Compiling

def wheel_file(pattern: str) -> str:
    """The file of an NVIDIA wheel whose path ends like that, in whichever wheel (CUDA 12's have a folder each)."""
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations) if spec else ()
    found = (path for folder in folders for path in sorted(folder.glob(f"*/{pattern}")) if ".alt." not in path.name)
    if (path := next(found, None)) is None:
        raise FileNotFoundError(f"nvidia/*/{pattern}; pip install '.[test]'")
    return str(path)


def need_wheels(*patterns: str) -> None:
    """Skips the test where the wheels are not to be had; where all tools are promised it fails instead."""
    import pytest

    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("setup.cfg installs NVIDIA's wheels on Linux x86-64 only")
    try:
        [wheel_file(pattern) for pattern in patterns]
    except FileNotFoundError as missing:
        pytest.fail(str(missing)) if os.environ.get("RUSTINFER_TEST_ALL") == "1" else pytest.skip(str(missing))


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """The compiler. It looks for its builtins on the linker's path, where they are not: they are loaded before it."""
    ctypes.CDLL(wheel_file("lib/libnvrtc-builtins.so.*"), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(wheel_file("lib/libnvrtc.so.*"))


def nvrtc_version() -> str:
    return importlib.metadata.version("nvidia-cuda-nvrtc")


def compile_text(text: str, name: str, arch: str, macros: dict[str, int], headers: Path = KERNELS
                 ) -> tuple[bytes, str, str]:
    """(cubin, PTX, log) of CUDA source; raises ValueError with the compiler's words."""
    library, program = nvrtc(), ctypes.c_void_p()
    options = [f"-arch={arch}", *OPTIONS, f"-I{headers}", *(f"-D{name}={value}" for name, value in macros.items())]
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    try:
        result = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(
            *(option.encode() for option in options)))
        log = read_output(program, "ProgramLog").rstrip(b"\0").decode()
        if result:
            raise ValueError(f"{name} for {arch}: NVRTC result {result}\n{log}")
        return read_output(program, "CUBIN"), read_output(program, "PTX").rstrip(b"\0").decode(), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def read_output(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def compile_build(build: Build) -> Module:
    """One file, compiled; NVRTC runs outside Python's lock, so threads compile side by side."""
    path = KERNELS / f"{build.file}.cu"
    cubin, ptx, log = compile_text(path.read_text(encoding="utf-8"), path.name, build.arch, build.macros)
    threads = {name: int(count) for name, count in re.findall(r"\.entry (\w+)\([^)]*\)\s+\.maxntid (\d+)", ptx)}
    return Module(build, cubin, read_resources(log, threads), read_warnings(log))


def read_resources(log: str, threads: dict[str, int]) -> dict[str, Kernel]:
    kernels = {}
    for report in log.split("Compiling entry function ")[1:]:
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())
        name, registers = re.match(r"'(\w+)'", report)[1], int(re.search(r"Used (\d+) registers", report)[1])
        shared = int((re.search(r"(\d+) bytes smem", report) or [0, 0])[1])
        kernels[name] = Kernel(registers, stack, stores + loads, shared, threads.get(name, 1024))
    return kernels


def read_warnings(log: str) -> list[str]:
    """The log without the report of ptxas -v; remarks of ptxas on performance, which have a number, stay."""
    usual = re.compile(r"ptxas info    : [^(]|ptxas         \.     \d+ bytes stack frame|$")
    return [line for line in log.splitlines() if not usual.match(line)]


def compile_all(builds: list[Build]) -> list[Module]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_build, builds))


# ------------------------------------------------------------------------------
# Machine code

# The first that matches. `weights` is load_weights of ptx.cuh, `copy` is cp_async16, `wait` and `launch` are pdl_wait
# and pdl_launch; `constant` is a read-only load, which the compiler may move anywhere.
KINDS = {
    "weights": r"LDG\.(?=.*\bNA\b).*\b128\b",
    "constant": r"LDG\.(?=.*\b(CONSTANT|CI)\b)",
    "copy": r"LDGSTS",
    "load128": r"LDG?\.(?=.*\b128\b)",
    "load": r"LDG?\.|LD$",
    "store": r"STG|ST$|ST\.|RED|ATOM",
    "mma": r"HMMA",
    "wait": r"ACQBULK",
    "launch": r"PREEXIT",
    "local": r"LDL|STL",
    "barrier": r"BAR\.",
    "exit": r"EXIT",
}


def disassemble(cubin: bytes) -> dict[str, Code]:
    """The code of every kernel of a module."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [wheel_file("bin/nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return {name: parse_instructions(text) for name, text in zip(sections[1::2], sections[2::2])}


def parse_instructions(text: str) -> Code:
    pattern = r"^(\.L_x_\d+):$|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    return [("", label) if label else (opcode, operands)
            for label, opcode, operands in re.findall(pattern, text, re.MULTILINE)]


def kind_of(opcode: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, opcode)), None)


def events(code: Code) -> list[str]:
    """The kinds of a kernel's instructions, in the order they lie in memory; arithmetic and addresses are left out."""
    return [kind for opcode, _ in code if (kind := kind_of(opcode))]


def ahead_of(sequence: list[str], mark: str) -> list[str]:
    """What comes before the first `mark`; all of it where there is none."""
    return sequence[:sequence.index(mark)] if mark in sequence else sequence


def straight_pieces(code: Code) -> list[list[str]]:
    """The events of each piece of code that nothing jumps into or out of."""
    is_edge = lambda opcode: not opcode or opcode.startswith(("BRA", "EXIT", "RET", "CALL"))
    pieces = itertools.groupby(code, key=lambda instruction: is_edge(instruction[0]))
    return [events(list(piece)) for edge, piece in pieces if not edge]


def rounds_of_weights(code: Code) -> list[int]:
    """How many 16-byte loads of weights stand together, with no mma and no jump between them."""
    runs = [itertools.groupby(filter({"weights", "mma"}.__contains__, piece)) for piece in straight_pieces(code)]
    return [len(list(group)) for run in runs for event, group in run if event == "weights"]


def faults_of_waiting(code: Code) -> list[str]:
    """What breaks the rules of programmatic dependent launch.

    A kernel lets the next one start before it does anything, touches nothing but weights until it has waited, and every
    thread waits: nothing ahead of the wait ends the thread or jumps to what lies behind the wait.
    """
    sequence = events(code)
    if "wait" not in sequence:
        return ["does not wait"]
    faults = [f"{kind} before the wait" for kind in ahead_of(sequence[1:], "wait") if kind not in ("weights", "copy")]
    if sequence[0] != "launch" or sequence.count("launch") != 1:
        faults.append("does not begin with launch")
    wait = next(i for i, (opcode, _) in enumerate(code) if kind_of(opcode) == "wait")
    labels_behind = {label for opcode, label in code[wait:] if not opcode}
    for opcode, operands in code[:wait]:
        jumps_over = opcode.startswith(("BR", "JMP")) and labels_behind & set(re.findall(r"\.L_x_\d+", operands))
        if jumps_over or opcode.startswith(("EXIT", "RET")):
            faults.append(f"{opcode} {operands} leaves the wait out")
    return faults


def describe(code: Code) -> str:
    """`launch, 16 weights, wait, 16 load, 8 mma, ...`"""
    groups = [(kind, len(list(group))) for kind, group in itertools.groupby(events(code))]
    return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in groups)


# ------------------------------------------------------------------------------
# The record

def source_hash(path: Path) -> str:
    """A digest of a kernel file and of what it includes, comments and white space aside."""
    text = path.read_text(encoding="utf-8")
    included = [source_hash(KERNELS / name) for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
    words = re.sub(r"//.*|/\*.*?\*/", "", text).split()
    return hashlib.sha256(" ".join([*words, *included]).encode()).hexdigest()[:16]


def register_counts(modules: list[Module]) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {dims: {architecture: registers}}}."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for module in modules:
        build = module.build
        for name, kernel in module.kernels.items():
            counts.setdefault(build.key(name), {}).setdefault(build.dims, {})[build.arch] = kernel.registers
    return counts


def record() -> None:
    sources = {path.stem: source_hash(path) for path in sorted(KERNELS.glob("*.cu"))}
    modules = compile_all([Build(unit, dims, arch) for unit in units() for dims in DIMS for arch in ARCHITECTURES])
    faults = [f"{module.build} {name}: {kernel.stack} bytes of stack, {kernel.spills} of spills" for module in modules
              for name, kernel in module.kernels.items() if kernel.stack or kernel.spills]
    if faults:
        raise SystemExit("not recorded:\n" + "\n".join(faults))
    lines = {name: ",\n".join(f'    "{dims}": {json.dumps(counts)}' for dims, counts in by_dims.items())
             for name, by_dims in sorted(register_counts(modules).items())}
    registers = ",\n".join(f'  "{name}": {{\n{text}}}' for name, text in lines.items())
    head = f'"nvrtc": "{nvrtc_version()}",\n "sources": {json.dumps(sources, indent=2)}'
    RECORD.write_text(f'{{{head},\n "registers": {{\n{registers}}}}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="kernel files without .cu (default: all)")
    parser.add_argument("--dims", nargs="+", choices=DIMS, default=["1B"])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_90"])
    parser.add_argument("--no-code", action="store_true", help="do not disassemble")
    parser.add_argument("--record", action="store_true", help="compile everything and write down the register counts")
    args = parser.parse_args()
    if args.record:
        return record()
    builds = [Build(unit, dims, arch) for unit in units() for dims in args.dims for arch in args.arch]
    for build in builds:
        if args.files and build.file not in args.files:
            continue
        module = compile_build(build)
        print("\n".join([f"== {module.build}", *module.warnings]))
        for name, kernel in module.kernels.items():
            print(f"{name:24}", *(f"{value} {field}," for field, value in vars(kernel).items()))
            if not args.no_code:
                print(f"    {describe(module.code[name])}")


if __name__ == "__main__":
    sys.exit(main())
