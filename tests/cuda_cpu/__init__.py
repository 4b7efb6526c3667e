"""Runs the .cu files of kernels/ on a CPU: the part of cupy.RawModule that the tests need, on NumPy arrays.

    module = RawModule(path=KERNELS / "rms_norm.cu", options=("-DHIDDEN=192",), mode="check")
    module.get_function("rms_norm")((rows,), (32,), (out, scales, x, weight, None, np.int32(rows), np.float32(eps)))

A file is compiled as C++17 with device.h before it, linked with runtime.cpp and called through ctypes. A launch is
deterministic; `seed` shuffles the order of blocks, warps and lanes. Shared memory starts as NaN.

mode    what is compiled                       what it finds
fast    -O2                                    wrong numbers, deadlocks, endless loops, divergent barriers, shuffles
check   -O1, every access calls the checker    also: races, missing fences, access out of bounds, misaligned, to const
init    -O0, stacks filled with NaN            wrong numbers from local variables that nobody set

It cannot show what ptx.cuh does on a card, registers, speed, or overflow at sizes that no test runs.
"""
import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
CPU_SECONDS = 60                # a launch that runs longer is taken for an endless loop
MAX_SHARED_BYTES = 232448       # runtime.cpp: MAX_DYNAMIC_BYTES
NOISE_BYTES = 16384             # of each stack, in mode init

# -ffp-contract=off: a * b + c is two roundings in every mode, on every machine; fmaf is one.
# -fno-extern-tls-init: dynamic shared memory needs no constructor.
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-strict-aliasing", "-ffp-contract=off",
         "-fno-extern-tls-init", "-fstack-clash-protection", "-U_FORTIFY_SOURCE"]
KERNEL_FLAGS = ["-Wno-attributes", "-Werror=return-type", "-Werror=uninitialized", "-Wno-maybe-uninitialized"]
MODES = {
    "fast": ["-O2", "-ftrivial-auto-var-init=pattern"],
    "check": ["-O1", "-g1", "-ftrivial-auto-var-init=pattern", "-fsanitize=thread",
              "--param=tsan-distinguish-volatile=1", "-fsanitize=alignment,bounds,shift"],
    "init": ["-O0", "-Wno-error"],
}
IGNORED_OPTIONS = ("-std=", "--std=", "-fmad=", "-lineinfo")    # for the card's compiler alone

# In preprocessed text, where macros are gone; see __global__ and __shared__ in device.h.
KERNEL = re.compile(r'extern\s+"C"\s+__attribute__\(\(visibility\("default"\)\)\)\s+void\s+(\w+)\s*\(')
DYNAMIC_SHARED = re.compile(r"\bextern\s+thread_local\b[^;]*?(\w+)\s*\[\s*\]\s*;")

# One launch at a time: signal handlers and the timer belong to the process, and ctypes releases the GIL.
LAUNCHING = threading.Lock()


class KernelError(RuntimeError):
    """A kernel does not compile, or did something that it must not do."""


def why_not():
    """Why kernels cannot be run here; None if they can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"kernels are emulated on Linux, x86_64 or aarch64, not on {platform.system()} {platform.machine()}"
    try:
        version = compiler_version()
    except OSError:
        return f"there is no compiler {CXX}; install g++ or set CXX"
    major = int(version.split(".")[0])
    return None if major >= 12 else f"{CXX} is version {version}; version 12 is needed"


# ---------------------------------------------------------------- build


@functools.cache
def compiler_version():
    return subprocess.run([CXX, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()


def run_compiler(arguments, text=None):
    """Returns what the compiler prints; `text` is its standard input."""
    result = subprocess.run([CXX, *map(str, arguments)], input=text, capture_output=True, text=True)
    if result.returncode:
        raise KernelError(f"{CXX} failed:\n{result.stderr}")
    return result.stdout


def digest(*parts):
    """A file name for what is built from these: texts, lists or paths (whose contents count)."""
    state = hashlib.sha256(f"{CXX} {compiler_version()}".encode())
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else repr(part).encode()
        state.update(hashlib.sha256(content).digest())
    return state.hexdigest()[:16]


def cache_folder():
    """Builds are kept for the next run, in a folder of this user's own."""
    folder = Path(os.environ.get("CUDA_CPU_CACHE") or Path(tempfile.gettempdir()) / f"cuda_cpu_{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def build_once(target, build):
    """Calls build(temporary path) unless `target` is there. Another process never sees half a file."""
    if not target.exists():
        temporary = target.with_name(f".{os.getpid()}.{threading.get_ident()}.{target.name}")
        build(temporary)
        os.replace(temporary, target)
    return target


def emulator_files():
    return [HERE / "__init__.py", HERE / "device.h", HERE / "runtime.cpp"]


def build_runtime(folder):
    command = [*FLAGS, "-O3", "-c", HERE / "runtime.cpp", "-o"]
    return build_once(folder / f"runtime-{digest(*emulator_files())}.o", lambda path: run_compiler([*command, path]))


def shared_memory_source(names):
    """Every `extern __shared__` array of a module is this one block, as on a card."""
    aliases = [f'extern thread_local char {name}[] __attribute__((alias("cc_dynamic_shared")));' for name in names]
    block = f"alignas(1024) thread_local char cc_dynamic_shared[{MAX_SHARED_BYTES}];"
    return "\n".join(['extern "C" {', block, *aliases, "}"])


def compile_kernels(source, arguments, mode, path):
    """Compiles and links a .cu file to the library `path`."""
    text = f'#include "{HERE / "device.h"}"\n#include "{source}"\n'
    preprocessed = run_compiler([*FLAGS, *arguments, "-E", "-P", "-x", "c++", "-"], text)
    text += "".join(f"CC_KERNEL({kernel})\n" for kernel in dict.fromkeys(KERNEL.findall(preprocessed)))
    shared = shared_memory_source(dict.fromkeys(DYNAMIC_SHARED.findall(preprocessed)))
    compiled = path.with_suffix(".o")
    run_compiler([*FLAGS, *KERNEL_FLAGS, *MODES[mode], *arguments, "-x", "c++", "-c", "-", "-o", compiled], text)
    run_compiler([*FLAGS, "-shared", "-Wl,-Bsymbolic,-z,defs", compiled, build_runtime(path.parent), "-x", "c++", "-",
                  "-o", path], shared)
    compiled.unlink()


def build_module(source, options, mode):
    """The library of a .cu file, built anew if the file, a header beside it or in an -I folder, or this changed."""
    folder, includes = cache_folder(), [source.parent, *(Path(o[2:]) for o in options if o.startswith("-I"))]
    options = [o for o in options if not o.startswith(("-I", *IGNORED_OPTIONS))]
    headers = [path for include in includes for path in sorted(include.glob("*.cuh"))]
    key = digest(source, options, mode, [path.name for path in headers], *headers, *emulator_files())
    short_names = [f"-ffile-prefix-map={include}/=" for include in includes]
    arguments = [*options, *short_names, *(f"-I{include}" for include in (folder, *includes))]
    target = folder / f"{source.stem}-{mode}-{key}.so"
    return build_once(target, lambda path: compile_kernels(source, arguments, mode, path))


# ---------------------------------------------------------------- modules and kernels


class Buffer(ctypes.Structure):     # runtime.cpp has the same
    _fields_ = [("address", ctypes.c_size_t), ("bytes", ctypes.c_size_t), ("name", ctypes.c_char_p),
                ("writable", ctypes.c_uint32), ("unused", ctypes.c_uint32)]


class Launch(ctypes.Structure):     # runtime.cpp has the same
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared_bytes", ctypes.c_uint32),
                ("seed", ctypes.c_uint32), ("noise_bytes", ctypes.c_uint32), ("cpu_seconds", ctypes.c_uint32),
                ("buffers", ctypes.POINTER(Buffer)), ("num_buffers", ctypes.c_size_t), ("stacks", ctypes.c_void_p)]


class Parameter(ctypes.Structure):  # device.h has the same
    _fields_ = [("pointer", ctypes.c_int), ("writable", ctypes.c_int), ("kind", ctypes.c_int), ("bytes", ctypes.c_int)]

    def __str__(self):
        kind = {"f": "floating-point", "i": "integer", "s": "struct", "v": "byte"}[chr(self.kind)]
        return f"{self.bytes}-byte {kind}" + (" pointer" if self.pointer else "")


class RawModule:
    """The kernels of a .cu file (`path`) or of its text (`code`; its headers are found by -I options).

    buffers   arrays that kernels reach through pointers in memory or through integer addresses
    """
    stacks = None       # of the threads of all modules

    def __init__(self, *, path=None, code=None, options=(), mode="fast", seed=0, cpu_seconds=CPU_SECONDS):
        if (path is None) == (code is None):
            raise TypeError("RawModule needs either path or code")
        self.mode, self.seed, self.cpu_seconds, self.buffers = mode, seed, cpu_seconds, []
        if path is None:
            path = build_once(cache_folder() / f"code-{digest(code)}.cu", lambda part: part.write_text(code))
        self.library_path = build_module(Path(path).resolve(), tuple(options), mode)
        self.library = ctypes.CDLL(str(self.library_path))
        self.library.cc_launch.restype = ctypes.c_char_p
        self.library.cc_allocate_stacks.restype = ctypes.c_void_p
        with LAUNCHING:
            RawModule.stacks = RawModule.stacks or self.library.cc_allocate_stacks()

    def get_function(self, name):
        if not hasattr(self.library, f"cc_run_{name}"):
            raise KernelError(f'{self.library_path.name} has no kernel {name}; kernels are extern "C" __global__ void')
        return RawKernel(self, name)


class RawKernel:
    """One kernel: kernel(grid, block, arguments, shared_mem=bytes). Errors name the argument or the line of the source.

    Pointer parameters take an array, None, or an integer address inside an array of module.buffers; a kernel may touch
    what lies in these arrays and nothing else. Scalars are NumPy scalars of the parameter's size.
    """

    def __init__(self, module, name):
        self.module, self.name = module, name
        self.max_dynamic_shared_size_bytes = 49152      # as in CuPy: raised before launches that need more
        self.function = getattr(module.library, f"cc_run_{name}")
        table = ctypes.POINTER(Parameter)()
        count = getattr(module.library, f"cc_parameters_{name}")(ctypes.byref(table))
        self.parameters = table[:count]

    def __call__(self, grid, block, args, *, shared_mem=0, seed=None):
        self.check_shape(grid, block, shared_mem)
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: {len(args)} arguments for {len(self.parameters)} parameters")
        spans = []
        cells = [self.convert(f"argument {i}", value, parameter, spans)
                 for i, (value, parameter) in enumerate(zip(args, self.parameters))]
        spans += [span_of(f"registered array {i}", array, True) for i, array in enumerate(self.module.buffers)]
        buffers = [Buffer(begin, end - begin, name.encode(), writable) for begin, end, name, writable in merge(spans)]
        launch = Launch(dimensions(grid), dimensions(block), shared_mem, self.module.seed if seed is None else seed,
                        NOISE_BYTES if self.module.mode == "init" else 0, self.module.cpu_seconds,
                        (Buffer * len(buffers))(*buffers), len(buffers), self.module.stacks)
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        with LAUNCHING:
            error = self.module.library.cc_launch(self.function, pointers, ctypes.byref(launch))
        if error:
            raise KernelError(f"{self.name}: {locate(error.decode(), self.module.library_path)}")

    def check_shape(self, grid, block, shared_mem):
        threads, blocks = math.prod(block), math.prod(grid)
        if not 1 <= threads <= 1024 or not 1 <= blocks < 2**31:
            raise KernelError(f"{self.name}: a grid of {blocks} blocks of {threads} threads; a block has 1 to 1024")
        if shared_mem > min(self.max_dynamic_shared_size_bytes, MAX_SHARED_BYTES):
            raise KernelError(f"{self.name}: {shared_mem} bytes of shared memory; max_dynamic_shared_size_bytes is "
                              f"{self.max_dynamic_shared_size_bytes}, a block of a card has at most {MAX_SHARED_BYTES}")

    def convert(self, place, value, parameter, spans):
        """The argument as C wants it; arrays are added to `spans`."""
        if not parameter.pointer:
            if not isinstance(value, np.generic) or not fits(value.dtype, parameter):
                raise TypeError(f"{self.name} {place}: {value!r} for a {parameter}; pass a NumPy scalar of that type")
            return ctypes.create_string_buffer(value.tobytes(), parameter.bytes)
        if value is None:
            return ctypes.c_size_t(0)
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise TypeError(f"{self.name} {place}: the array is not contiguous, which the kernel cannot see")
            if not fits(value.dtype, parameter):
                raise TypeError(f"{self.name} {place}: an array of {value.dtype} for a {parameter}")
            spans.append(span_of(place, value, parameter.writable))
            return ctypes.c_size_t(value.ctypes.data)
        if isinstance(value, (int, np.integer)) and any(is_inside(array, value) for array in self.module.buffers):
            return ctypes.c_size_t(int(value))
        raise TypeError(f"{self.name} {place}: {value!r} for a {parameter}; pass an array, None or an address inside "
                        "an array of module.buffers")


def fits(dtype, parameter):
    """Bytes (void *) may be of any type, structs (float4 *) of any type that divides them."""
    kind = chr(parameter.kind)
    if kind in "sv":
        return kind == "v" or bool(parameter.pointer) and parameter.bytes % dtype.itemsize == 0
    return dtype.itemsize == parameter.bytes and (dtype.kind == "f") == (kind == "f")


def dimensions(shape):
    return (ctypes.c_uint32 * 3)(*(*shape, 1, 1, 1)[:3])


def is_inside(array, address):
    return 0 <= int(address) - array.ctypes.data < array.nbytes


def span_of(name, array, writable):
    return array.ctypes.data, array.ctypes.data + array.nbytes, name, bool(writable)


def merge(spans):
    """Overlapping spans as one, since two names of one byte have one history; writable if one of them is."""
    merged = []
    for begin, end, name, writable in sorted(span for span in spans if span[0] < span[1]):
        if merged and begin < merged[-1][1]:
            last = merged.pop()
            name = last[2] if name == last[2] else f"{last[2]} and {name}"
            begin, end, writable = last[0], max(end, last[1]), writable or last[3]
        merged.append((begin, end, name, writable))
    return merged


def locate(message, library_path):
    """Replaces an address of machine code by the line of the source and those that it was inlined into."""
    found = re.search(r"\[pc (0x[0-9a-f]+)\]", message)
    if not found:
        return message
    command = ["addr2line", "-i", "-s", "-e", str(library_path), found[1]]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return message.replace(found[0], "at " + " < ".join(line for line in lines if ":" in line))


# ---------------------------------------------------------------- arrays


def bf16(values):
    """float32 to bfloat16, which NumPy sees as uint16 (to nearest, ties to even)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def f32(bits):
    """bfloat16 to float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def nan_like(shape, dtype):
    """An array of 0xFF bytes, NaN in every floating-point format: what no thread writes shows."""
    return np.full(np.prod(shape, dtype=int) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
