"""Runs the PTX that NVRTC makes of the kernels, on NumPy: what cuda_cpu leaves out, the instructions of ptx.cuh.

    module = RawModule(path=KERNELS / "rms_norm.cu", options=("-DHIDDEN=192",))
    module.get_function("rms_norm")((rows,), (32,), (out, scales, x, weight, None, np.int32(rows), np.float32(eps)))

A register is an array with an element for each thread of the block; an instruction is done for all threads that stand
at it, as the PTX ISA defines it (docs.nvidia.com/cuda/parallel-thread-execution). Blocks run one after the other,
`seed` shuffles them. Registers and shared memory start as noise. An instruction or a modifier of one that is not in
OPCODES raises KernelError; so do

- an access that is misaligned, out of bounds, or of another state space than it says
- a store outside of shared memory, or the end of a thread, before griddepcontrol.wait
- shuffles, votes and mma that not all 32 lanes reach; different barriers

cp.async lands when it is waited for and not sooner: until then its destination is noise.

It cannot show races (cuda_cpu does), what ptxas makes of the PTX, or speed. What a card approximates (.approx) is
nearer to the exact result here.
"""
from __future__ import annotations

import bisect
import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

import cuda_cpu
from cuda_cpu import KernelError, merge, span_of
from kernel_code import compile_text

ARCH = "compute_90"  # the first with programmatic dependent launch; ptxas has no part in it
LANES, FULL_WARP = 32, 0xFFFFFFFF
LOWEST, HIGHEST = 1 << 16, 1 << 47  # addresses that a process of Linux may have
MOST_TURNS = 100_000  # of a block; more are taken for an endless loop
SMALLEST_NORMAL = np.float32(2.0**-126)

TYPES = {"pred": np.bool_, "f32": np.float32, "f64": np.float64,
         **{f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}").type
            for kind in "bsu" for bits in (8, 16, 32, 64)}}
REGISTER_TYPES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.float32, "fd": np.float64}

Step = Callable[["Block", np.ndarray], None]  # does an instruction for the threads of a mask, (threads,) bool


# ------------------------------------------------------------------------------
# Memory


def address_space(size: int) -> np.ndarray:
    """All memory of the process; cell i is at LOWEST + i * size. Only for addresses that were checked."""
    cell = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[size]
    return np.frombuffer((cell * ((HIGHEST - LOWEST) // size)).from_address(LOWEST), f"u{size}")


MEMORY = {size: address_space(size) for size in (1, 2, 4, 8)}


def cells(addresses: np.ndarray, size: int) -> np.ndarray:
    """Where they are in MEMORY[size]."""
    return (addresses - LOWEST) // size


def noise(shape: int, dtype) -> np.ndarray:
    """Ones in every bit, which is NaN or true."""
    dtype = np.dtype(dtype)
    return np.ones(shape, bool) if dtype == bool else np.full(shape * dtype.itemsize, 0xFF, np.uint8).view(dtype)


class Registers(dict):
    """{name: (threads,) array}; the name tells the type, and what nobody wrote yet is noise."""

    def __init__(self, threads: int):
        self.threads = threads

    def __missing__(self, name: str) -> np.ndarray:
        kind = re.match(r"%([a-z]+)\d+$", name)
        if not kind:
            raise KernelError(f"unknown register {name}")
        self[name] = array = noise(self.threads, REGISTER_TYPES[kind[1]])
        return array


def reinterpret(array: np.ndarray, dtype) -> np.ndarray:
    """The same bits as another type: the low ones of a larger register, or zeros before those of a smaller one."""
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if array.itemsize != dtype.itemsize:
        array = array.view(f"u{array.itemsize}").astype(f"u{dtype.itemsize}")
    return array.view(dtype)


def widen(value: np.ndarray, dtype) -> np.ndarray:
    """A result as its register holds it: a narrow integer is extended by its sign, or by zeros."""
    if value.itemsize < dtype.itemsize and value.dtype.kind in "iu":
        value = value.astype(f"{value.dtype.kind}{dtype.itemsize}")
    if value.itemsize != dtype.itemsize or (value.dtype == bool) != (dtype == bool):
        raise KernelError(f"a result of type {value.dtype} for a register of type {dtype}")
    return value.view(dtype)


# ------------------------------------------------------------------------------
# Text of an instruction


def split_operands(text: str) -> list[str]:
    """At commas that no brace or bracket encloses."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def elements(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or the one of `%r1`."""
    return split_operands(operand.strip("{}"))


def constant(text: str, dtype) -> np.generic:
    """`-1`, or the bits of a float32 (`0f3F800000`) or of a float64 (`0d...`)."""
    dtype = np.dtype(dtype)
    if dtype == bool:
        return np.bool_(int(text, 0))
    value = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text, 0)
    return np.array(value % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]


class Instruction:
    """`@!%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+8];` in parts; names of shared arrays stand for their addresses."""

    def __init__(self, text: str, symbols: dict[str, int], inline: bool):
        matched = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*?);", text)
        if not matched:
            raise KernelError(f"cannot read: {text}")
        self.text, self.symbols, self.inline = text, symbols, inline
        self.negated, self.guard, self.opcode, operands = matched.groups()
        self.name, *parts = self.opcode.split(".")
        self.types = [TYPES[part] for part in parts if part in TYPES]
        self.modifiers = [part for part in parts if part not in TYPES]
        self.operands = split_operands(operands)

    @property
    def dtype(self):
        """The type of its operands; of conversions, of the result."""
        return self.types[0]

    @property
    def space(self) -> str:
        return next((part for part in self.modifiers if part in ("shared", "global")), "generic")

    def error(self, why: str) -> KernelError:
        return KernelError(f"{why}: {self.text}")

    def read(self, operand: str, dtype) -> Callable[[Block], np.ndarray]:
        """What an operand is for each thread."""
        if operand.startswith("%"):
            return lambda block: reinterpret(block.registers[operand], dtype)
        value = dtype(self.symbols[operand]) if operand in self.symbols else constant(operand, dtype)
        return lambda block: np.full(block.threads, value)

    def read_address(self, operand: str) -> Callable[[Block], np.ndarray]:
        """Where `[%rd1+8]` points for each thread, in the address space of the instruction."""
        matched = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand)
        base, offset = self.read(matched[1], np.uint64), np.int64(matched[2] or 0)
        return lambda block: base(block).view(np.int64) + offset

    def addresses(self, operand: str, size: int, writes: bool) -> Callable[[Block, np.ndarray], np.ndarray]:
        """The same of some threads as addresses of the process, checked for an access of `size` bytes."""
        read = self.read_address(operand)
        return lambda block, threads: block.check(read(block)[threads], size, self, threads, writes)

    def holding(self) -> Callable[[Block, np.ndarray], np.ndarray]:
        """Which threads of a mask its guard lets it happen for."""
        if not self.guard:
            return lambda block, mask: mask
        if self.negated:
            return lambda block, mask: mask & ~block.registers[self.guard]
        return lambda block, mask: mask & block.registers[self.guard]


# ------------------------------------------------------------------------------
# Instructions that look at no thread but their own


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: a subnormal float32 is zero."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def compute(ins: Instruction, function: Callable, dtypes=None) -> Step:
    """Writes function(operands) to the first operand; the others are of the instruction's type, or of `dtypes`."""
    dtypes = dtypes or [ins.dtype] * (len(ins.operands) - 1)
    reads = [ins.read(operand, dtype) for operand, dtype in zip(ins.operands[1:], dtypes, strict=True)]
    flushed = flush if "ftz" in ins.modifiers else lambda x: x
    return lambda block, mask: block.write(
        ins.operands[0], flushed(function(*(flushed(read(block)) for read in reads))), mask)


def simple(function: Callable) -> Callable[[Instruction], Step]:
    """By one function for all types."""
    return lambda ins: compute(ins, function)


def chosen(functions: dict[str, Callable]) -> Callable[[Instruction], Step]:
    """By the one modifier that names a function."""
    return lambda ins: compute(ins, next(functions[part] for part in ins.modifiers if part in functions))


def min_max(of_floats: Callable, of_integers: Callable) -> Callable[[Instruction], Step]:
    """Of floats the number, where the other one is NaN."""
    return lambda ins: compute(ins, of_floats if np.dtype(ins.dtype).kind == "f" else of_integers)


def fused_multiply_add(ins: Instruction) -> Step:
    """One rounding, to nearest or down (.rm), of a long double: it holds the product, and nearly always the sum."""
    def function(a, b, c):
        exact = a.astype(np.longdouble) * b + c
        rounded = exact.astype(np.float32)
        too_large = (rounded > exact) & ("rm" in ins.modifiers)
        return np.where(too_large, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    return compute(ins, function)


def divide(ins: Instruction) -> Step:
    """By the type and .approx."""
    if np.dtype(ins.dtype).kind in "iu":
        return compute(ins, divide_integers)
    return compute(ins, divide_approximately if "approx" in ins.modifiers else np.divide)


def divide_integers(a, b):
    """Towards zero; by zero it is not defined."""
    quotient = a // np.where(b == 0, b.dtype.type(1), b)
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def divide_approximately(a, b):
    """a * (1 / b), of which the ISA says: zero, or NaN of an infinity, where 1 / b is subnormal."""
    beyond = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(beyond, np.where(np.isinf(a), np.float32(np.nan), np.float32(0)), a * (np.float32(1) / b))


def multiply_wide(ins: Instruction) -> Step:
    """All bits of the product."""
    wide = np.dtype(f"{np.dtype(ins.dtype).kind}{2 * np.dtype(ins.dtype).itemsize}")
    return compute(ins, lambda a, b: a.astype(wide) * b.astype(wide))


def multiply_high(ins: Instruction) -> Step:
    """The upper half of the product, in Python's integers."""
    bits = 8 * np.dtype(ins.dtype).itemsize
    return compute(ins, lambda a, b: (a.astype(object) * b.astype(object) >> bits).astype(ins.dtype))


def multiply(ins: Instruction) -> Step:
    """By .wide, .hi or the lower half; of floats there is one product."""
    return (multiply_wide if "wide" in ins.modifiers else multiply_high if "hi" in ins.modifiers else
            simple(np.multiply))(ins)


def shift(of_all: Callable, function: Callable) -> Callable[[Instruction], Step]:
    """By any number of bits; `of_all` makes what is left when all are shifted out."""
    def make(ins):
        bits = 8 * np.dtype(ins.dtype).itemsize
        return compute(ins, lambda x, n: np.where(
            n >= bits, of_all(x), function(x, np.minimum(n, bits - 1).astype(x.dtype))), [ins.dtype, np.uint32])
    return make


def sign_bits(x):
    """What a shift to the right leaves: copies of the sign, or zeros of an unsigned number."""
    return x >> x.dtype.type(8 * x.itemsize - 1) if x.dtype.kind == "i" else np.zeros_like(x)


def bit_by_bit(function: Callable[[int], int]) -> Callable[[Instruction], Step]:
    """32 bits of every thread in Python: these are rare."""
    return lambda ins: compute(ins, lambda x: np.array([function(int(v)) for v in x], np.uint32), [np.uint32])


def insert_bits(ins: Instruction) -> Step:
    """bfi d, a, b, position, length: the low bits of a in that place of b."""
    position, length = map(int, ins.operands[3:])
    field = ins.dtype((1 << length) - 1 << position)
    step = lambda a, b, *_: b & ~field | a << ins.dtype(position) & field
    return compute(ins, step, [ins.dtype, ins.dtype, np.uint32, np.uint32])


def select(ins: Instruction) -> Step:
    """selp d, a, b, p: a where p is true."""
    return compute(ins, lambda a, b, p: np.where(p, a, b), [ins.dtype, ins.dtype, np.bool_])


def function_in_double(function: Callable) -> Callable[[Instruction], Step]:
    """Rounded to float32 once."""
    return simple(lambda x: function(x.astype(np.float64)).astype(np.float32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 in the lower half of a word; every NaN is 0x7FFF."""
    return np.where(np.isnan(x), np.uint32(0x7FFF), cuda_cpu.bf16(x).astype(np.uint32))


def to_integer(x: np.ndarray, dtype) -> np.ndarray:
    """.rzi: towards zero, at most the ends of the range; NaN is zero."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    finite = np.nan_to_num(np.clip(x, -2.0**64, 2.0**64))
    return np.array([min(max(int(v), low), high) for v in finite], dtype)


def convert(ins: Instruction) -> Step:
    """Between the types for which the kernels do it."""
    if ins.opcode == "cvt.rn.bf16x2.f32":
        return compute(ins, lambda high, low: to_bf16(high) << np.uint32(16) | to_bf16(low), [np.float32] * 2)
    kinds = "".join("f" if np.dtype(dtype).kind == "f" else "i" for dtype in ins.types)
    cast = lambda x: x.astype(ins.dtype)
    conversions = {  # kinds of the result and the operand, how to round
        ("ii",): cast, ("fi", "rn"): cast, ("ff",): cast, ("ff", "rn"): cast, ("ff", "rpi"): np.ceil,
        ("ff", "sat"): lambda x: np.nan_to_num(np.clip(x, 0, 1)), ("if", "rzi"): lambda x: to_integer(x, ins.dtype)}
    key = kinds, *(part for part in ins.modifiers if part != "ftz")
    if key not in conversions:
        raise ins.error("unknown conversion")
    return compute(ins, conversions[key], [ins.types[1]])


def move(ins: Instruction) -> Step:
    """Also of several registers into a wider one, and of one into several narrower ones."""
    to, of = map(elements, ins.operands)
    wide = np.dtype(ins.dtype).itemsize
    reads = [ins.read(part, TYPES[f"b{8 * wide // len(of)}"] if len(of) > 1 else ins.dtype) for part in of]

    def step(block, mask):
        value = reads[0](block)
        if len(of) > 1:
            value = np.stack([read(block) for read in reads], 1).view(f"u{wide}")[:, 0]
        parts = value.copy().view(f"u{wide // len(to)}").reshape(-1, len(to)).T if len(to) > 1 else [value]
        for name, part in zip(to, parts, strict=True):
            block.write(name, reinterpret(part.copy(), block.registers[name].dtype), mask)
    return step


def nothing(ins: Instruction) -> Step:
    """For what has no meaning where blocks run one after the other."""
    return lambda block, mask: None


def wait_for_grids(ins: Instruction) -> Step:
    def step(block, mask):
        block.waited |= mask
    return step if ins.opcode == "griddepcontrol.wait" else nothing(ins)


# ------------------------------------------------------------------------------
# Instructions that use memory


def load(ins: Instruction) -> Step:
    """Of a parameter of the kernel, or of one to four cells of memory; caches mean nothing here."""
    if "param" in ins.modifiers:
        name = ins.operands[1].strip("[]")
        return lambda block, mask: block.write(ins.operands[0], block.parameter(name, ins.dtype), mask)
    names, size = elements(ins.operands[0]), np.dtype(ins.dtype).itemsize
    addresses = ins.addresses(ins.operands[1], size * len(names), writes=False)

    def step(block, mask):
        threads = np.flatnonzero(mask)
        at = cells(addresses(block, threads), size)
        values = [MEMORY[size][at + i].view(ins.dtype) for i in range(len(names))]  # before an address is overwritten
        for name, value in zip(names, values):
            block.registers[name][threads] = widen(value, block.registers[name].dtype)
    return step


def store(ins: Instruction) -> Step:
    """To one to four cells."""
    values, size = elements(ins.operands[1]), np.dtype(ins.dtype).itemsize
    addresses = ins.addresses(ins.operands[0], size * len(values), writes=True)
    reads = [ins.read(value, TYPES[f"u{8 * size}"] if value.startswith("%") else ins.dtype) for value in values]

    def step(block, mask):
        threads = np.flatnonzero(mask)
        at = cells(addresses(block, threads), size)
        for i, read in enumerate(reads):
            MEMORY[size][at + i] = read(block)[threads].view(f"u{size}")
    return step


ATOMICS = {"add": lambda old, x: (old + x) % 2**32, "or": lambda old, x: old | x,
           "inc": lambda old, x: 0 if old >= x else old + 1}


def atomic(ins: Instruction) -> Step:
    """One thread after the other."""
    function = next(ATOMICS[part] for part in ins.modifiers if part in ATOMICS)
    addresses, value = ins.addresses(ins.operands[1], 4, writes=True), ins.read(ins.operands[2], np.uint32)

    def step(block, mask):
        threads = np.flatnonzero(mask)
        values, result = value(block), block.registers[ins.operands[0]]
        for thread, at in zip(threads, cells(addresses(block, threads), 4)):
            old = MEMORY[4][at]
            MEMORY[4][at] = function(int(old), int(values[thread]))
            result[thread] = old
    return step


def to_address(ins: Instruction) -> Step:
    """Generic addresses are those of the process; of shared memory there are its own, which begin with 0."""
    read = ins.read(ins.operands[1], ins.dtype)
    if ins.opcode == "cvta.shared.u64":
        return lambda block, mask: block.write(ins.operands[0], read(block) + np.uint64(block.shared_begin), mask)
    if ins.opcode == "cvta.to.global.u64":
        return lambda block, mask: block.write(ins.operands[0], read(block), mask)
    raise ins.error("unknown conversion of an address")


def copy_async(ins: Instruction) -> Step:
    """cp.async in its three forms."""
    if "commit_group" in ins.modifiers:
        return commit_group(ins)
    return wait_group(ins) if "wait_group" in ins.modifiers else start_copy(ins)


def start_copy(ins: Instruction) -> Step:
    """Notes the copies of 16 bytes, or of none and 16 zeros, and makes noise of where they go."""
    if ins.opcode != "cp.async.cg.shared.global" or ins.operands[2] != "16":
        raise ins.error("unknown copy")
    size = ins.read(ins.operands[3], np.uint32)
    to, of = ins.read_address(ins.operands[0]), ins.read_address(ins.operands[1])

    def step(block, mask):
        threads = np.flatnonzero(mask)
        sizes, sources = size(block)[threads], of(block)[threads]
        if not np.isin(sizes, (0, 16)).all():
            raise ins.error("neither 0 nor 16 bytes")
        targets = block.check(to(block)[threads], 16, ins, threads, True, space="shared")
        block.check(sources[sizes > 0], 16, ins, threads[sizes > 0], False, space="global")
        for thread, *copy in zip(threads, targets, sources, sizes):
            block.copies[thread][-1].append(copy)
        write_words(targets, 2**64 - 1)
    return step


def commit_group(ins: Instruction) -> Step:
    """Closes the open group of each thread."""
    def step(block, mask):
        for thread in np.flatnonzero(mask):
            block.copies[thread].append([])
    return step


def wait_group(ins: Instruction) -> Step:
    """All committed groups of a thread but the last few land; the open one, the last of the list, need not."""
    left = int(ins.operands[0]) + 1

    def step(block, mask):
        landing = []
        for groups in (block.copies[thread] for thread in np.flatnonzero(mask)):
            while len(groups) > left:
                landing += groups.pop(0)
        targets, sources, sizes = np.array(landing, np.int64).reshape(-1, 3).T
        write_words(targets, 0)
        whole = sizes > 0
        write_words(targets[whole], MEMORY[8][cells(sources[whole], 8)[:, None] + np.arange(2)])
    return step


def write_words(addresses: np.ndarray, words) -> None:
    """16 bytes at each address."""
    MEMORY[8][cells(addresses, 8)[:, None] + np.arange(2)] = words


# ------------------------------------------------------------------------------
# Instructions of a warp; their masks are of whole warps


def full_warp(ins: Instruction, operand: str) -> Callable[[Block, np.ndarray], None]:
    """Checks the mask of lanes that take part."""
    read = ins.read(operand, np.uint32)

    def check(block, mask):
        if (read(block)[mask] != FULL_WARP).any():
            raise ins.error("not of all lanes")
    return check


def sync_warp(ins: Instruction) -> Step:
    """That lanes meet is all there is to it."""
    return full_warp(ins, ins.operands[0])


SHUFFLES = {"up": lambda lane, b, segment: lane - b, "bfly": lambda lane, b, segment: lane ^ b,
            "idx": lambda lane, b, segment: lane & segment | b & ~segment}


def shuffle(ins: Instruction) -> Step:
    """The value of the lane that SHUFFLES tells, or the lane's own where that one is beyond the end of its segment."""
    mode = next(part for part in ins.modifiers if part in SHUFFLES)
    value, b, c = (ins.read(operand, np.uint32) for operand in ins.operands[1:4])
    check, (target, found) = full_warp(ins, ins.operands[4]), ins.operands[0].split("|")

    def step(block, mask):
        check(block, mask)
        lane, clamp = block.lane, c(block).astype(np.int64)
        segment = clamp >> 8 & 31
        last = lane & segment | clamp & 31 & ~segment
        other = SHUFFLES[mode](lane, b(block).astype(np.int64) & 31, segment)
        inside = other >= last if mode == "up" else other <= last
        values = value(block)[block.thread - lane + np.where(inside, other, lane)]
        block.write(target, values, mask)
        block.write(found, inside, mask)
    return step


def ballot(ins: Instruction) -> Step:
    """A bit for each lane."""
    vote, check = ins.read(ins.operands[1], np.bool_), full_warp(ins, ins.operands[2])

    def step(block, mask):
        check(block, mask)
        bits = np.packbits(vote(block).reshape(-1, LANES), 1, "little").view(np.uint32)
        block.write(ins.operands[0], np.repeat(bits, LANES), mask)
    return step


def fragment(row_groups: list[int], columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the elements of each lane, (32, n) both: groups of 8 rows, columns beyond lane % 4 * 2."""
    lane = np.arange(LANES)[:, None]
    return lane // 4 + 8 * np.array(row_groups), lane % 4 * 2 + np.array(columns)


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". In B rows and columns change places.
A = fragment([0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 8, 9, 8, 9])
B = fragment([0, 0, 0, 0], [0, 1, 8, 9])[::-1]
C = fragment([0, 0, 1, 1], [0, 1, 0, 1])


def halves(words: np.ndarray) -> np.ndarray:
    """bf16 pairs (threads, n) to float32 (threads, 2n), the lower half of a word first."""
    return cuda_cpu.f32(np.ascontiguousarray(words).view(np.uint16))


def matrix(values: np.ndarray, places: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(warps, *shape) float64 of what the lanes hold."""
    result = np.empty((len(values) // LANES, *shape))
    result[:, places[0], places[1]] = values.reshape(-1, LANES, values.shape[1])
    return result


def multiply_matrices(ins: Instruction) -> Step:
    """d = a * b + c with one rounding, by NumPy's product in float64, which a sum of 16 products of bf16 fits."""
    if ins.opcode != "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        raise ins.error("unknown mma")
    names = [elements(operand) for operand in ins.operands]

    def step(block, mask):
        a, b, c = (np.stack([block.registers[name] for name in operand], 1) for operand in names[1:])
        products = matrix(halves(a), A, (16, 16)) @ matrix(halves(b), B, (16, 8))
        d = (products + matrix(c, C, (16, 8))).astype(np.float32)[:, C[0], C[1]].reshape(block.threads, 4)
        for name, column in zip(names[0], d.T, strict=True):
            block.write(name, column, mask)
    return step


# ------------------------------------------------------------------------------
# The instructions that are known: what does them, and the modifiers that they may have

COMPARISONS = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "neu": np.not_equal, "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b)}

OPCODES: dict[str, tuple[Callable[[Instruction], Step], str]] = {
    "add": (simple(np.add), "rn ftz"),
    "and": (simple(np.bitwise_and), ""),
    "bfi": (insert_bits, ""),
    "bfind": (bit_by_bit(lambda v: 32 - v.bit_length() if v else FULL_WARP), "shiftamt"),
    "brev": (bit_by_bit(lambda v: int(f"{v:032b}"[::-1], 2)), ""),
    "clz": (bit_by_bit(lambda v: 32 - v.bit_length()), ""),
    "cvt": (convert, "rn rzi rpi sat ftz bf16x2"),
    "div": (divide, "rn approx ftz"),
    "ex2": (function_in_double(np.exp2), "approx ftz"),
    "fma": (fused_multiply_add, "rn rm ftz"),
    "mad": (simple(lambda a, b, c: a * b + c), "lo"),
    "max": (min_max(np.fmax, np.maximum), "ftz"),
    "min": (min_max(np.fmin, np.minimum), "ftz"),
    "mov": (move, ""),
    "mul": (multiply, "rn ftz lo hi wide"),
    "neg": (simple(np.negative), "ftz"),
    "not": (simple(np.invert), ""),
    "or": (simple(np.bitwise_or), ""),
    "rcp": (function_in_double(np.reciprocal), "rn ftz"),
    "rsqrt": (function_in_double(lambda x: 1 / np.sqrt(x)), "approx ftz"),
    "selp": (select, ""),
    "setp": (chosen(COMPARISONS), f"ftz {' '.join(COMPARISONS)}"),
    "shl": (shift(np.zeros_like, np.left_shift), ""),
    "shr": (shift(sign_bits, np.right_shift), ""),
    "sub": (simple(np.subtract), "rn ftz"),
    "xor": (simple(np.bitwise_xor), ""),
    # memory
    "atom": (atomic, f"shared global {' '.join(ATOMICS)}"),
    "cp": (copy_async, "async cg shared global commit_group wait_group"),
    "cvta": (to_address, "to shared global"),
    "griddepcontrol": (wait_for_grids, "wait launch_dependents"),
    "ld": (load, "param shared global volatile cg v2 v4 L1::no_allocate L2::256B"),
    "membar": (nothing, "gl sys"),
    "st": (store, "shared global volatile v2 v4"),
}
WARP_OPCODES = {
    "bar.warp": (sync_warp, "warp sync"),
    "mma": (multiply_matrices, "sync aligned m16n8k16 row col bf16"),
    "shfl": (shuffle, f"sync {' '.join(SHUFFLES)}"),
    "vote": (ballot, "sync ballot"),
}


def make_step(ins: Instruction, opcodes: dict, name: str) -> Step:
    """The step of an instruction that the table knows with all its modifiers."""
    if name not in opcodes or not set(ins.modifiers) <= set(opcodes[name][1].split()):
        raise ins.error("unknown instruction")
    return opcodes[name][0](ins)


# ------------------------------------------------------------------------------
# Where a thread goes on. A control takes (block, mask, pc) and returns the pc at which the same threads go on together,
# or None where it has set each thread's own.

Control = Callable[["Block", np.ndarray, int], "int | None"]


def branch(ins: Instruction, target: int) -> Control:
    """Also of some threads only."""
    holds = ins.holding()

    def control(block, mask, pc):
        taken = holds(block, mask)
        block.pc[mask], block.pc[taken] = pc + 1, target
        return None if taken.any() else pc + 1
    return control


def leave(ins: Instruction) -> Control:
    """The end of a thread."""
    holds = ins.holding()

    def control(block, mask, pc):
        gone = holds(block, mask)
        if not block.waited[gone].all():
            raise ins.error("a thread ends before it has waited for the kernels before this one")
        block.pc[mask], block.state[gone] = pc + 1, DONE
    return control


def barrier(ins: Instruction) -> Control:
    """Threads stand there until Block.release finds that all do."""
    if ins.guard or ins.operands != ["0"]:
        raise ins.error("unknown barrier")

    def control(block, mask, pc):
        block.pc[mask], block.state[mask] = pc + 1, AT_BARRIER
    return control


def meet(ins: Instruction, step: Step) -> Control:
    """Lanes wait until all 32 are there."""
    if ins.guard:
        raise ins.error("a condition on an instruction of a warp")

    def control(block, mask, pc):
        block.pc[mask] = pc
        here = (block.pc == pc) & ((block.state == READY) | (block.state == AT_WARP))
        whole = np.repeat(here.reshape(-1, LANES).all(1), LANES)
        block.state[here] = np.where(whole[here], READY, AT_WARP)
        if whole.any():
            step(block, whole)
            block.pc[whole] = pc + 1
        return pc + 1 if np.array_equal(whole, mask) else None
    return control


class Program:
    """One kernel: a step for each instruction, but a control where threads may part, meet or end.

    run_end[pc]   the first control at or after pc, or label after it: up to there threads stay together
    """

    def __init__(self, name: str, parameters: list[tuple[str, str]], body: str, module: str, executed: set[str]):
        self.name, self.parameters, self.executed = name, parameters, executed
        self.symbols, self.shared_bytes = place_shared_arrays(module, body)
        self.labels, self.steps, self.controls = {}, [], {}
        instructions = self.read(body)
        for pc, ins in enumerate(instructions):
            self.steps.append(self.add(pc, ins))
        stops = sorted({*self.controls, *self.labels.values(), len(instructions)})
        self.run_end = [stops[bisect.bisect_left(stops, pc if pc in self.controls else pc + 1)]
                        for pc in range(len(instructions))]
        self.joins = set(self.labels.values())

    def read(self, body: str) -> list[Instruction]:
        instructions, inline = [], False
        for line in map(str.strip, body.splitlines()):
            if line.startswith("//"):
                inline = {"// begin inline asm": True, "// end inline asm": False}.get(line, inline)
            elif line.endswith(":"):
                self.labels[line[:-1]] = len(instructions)
            elif line and line[0] not in ".{}":
                instructions.append(Instruction(line, self.symbols, inline))
        return instructions

    def add(self, pc: int, ins: Instruction) -> Step | None:
        """The step of an instruction; its control, if it has one, is noted."""
        if ins.name == "bra":
            self.controls[pc] = branch(ins, self.labels[ins.operands[0]])
        elif ins.name == "ret":
            self.controls[pc] = leave(ins)
        elif ins.opcode == "bar.sync":
            self.controls[pc] = barrier(ins)
        elif (name := "bar.warp" if ins.name == "bar" else ins.name) in WARP_OPCODES:
            self.controls[pc] = meet(ins, self.noted(ins, make_step(ins, WARP_OPCODES, name)))
        else:
            return self.noted(ins, self.guarded(ins, make_step(ins, OPCODES, ins.name)))

    def guarded(self, ins: Instruction, step: Step) -> Step:
        holds = ins.holding()

        def run(block, mask):
            if (some := holds(block, mask)).any():
                step(block, some)
        return run if ins.guard else step

    def noted(self, ins: Instruction, step: Step) -> Step:
        """An instruction that somebody wrote as asm is noted when it is executed."""
        def run(block, mask):
            self.executed.add(ins.opcode)
            step(block, mask)
        return run if ins.inline else step


def place_shared_arrays(module: str, body: str) -> tuple[dict[str, int], int]:
    """({array: its first byte}, bytes) of the shared memory of fixed size; behind it is what a launch asks for."""
    symbols, end = {}, 0
    file_level = "\n".join(re.findall(r"^\.(?:shared|extern \.shared) .*;$", module, re.MULTILINE))
    fixed = r"\.shared \.align (\d+) \.[bu](\d+) (\w+)(?:\[(\d+)\])?;"
    for align, bits, name, count in re.findall(fixed, file_level + body):
        symbols[name] = -(-end // int(align)) * int(align)
        end = symbols[name] + int(bits) // 8 * int(count or 1)
    end = -(-end // 16) * 16
    symbols.update(dict.fromkeys(re.findall(r"\.extern \.shared .*?(\w+)\[\];", file_level), end))
    return symbols, end


# ------------------------------------------------------------------------------
# A block

READY, AT_BARRIER, AT_WARP, DONE = range(4)


class Block:
    """The threads of one block. Those that stand first in the code go on, so that the others can catch up with them."""

    def __init__(self, launch: Launch, place: tuple[int, int, int]):
        self.launch, self.program, self.threads = launch, launch.program, launch.threads
        self.thread = np.arange(self.threads)
        self.lane = self.thread % LANES
        self.registers = Registers(self.threads)
        self.registers["%tid.x"] = self.thread.astype(np.uint32)
        self.registers["%ntid.x"] = np.full(self.threads, self.threads, np.uint32)
        for axis, at, size in zip("xyz", place, launch.grid):
            self.registers[f"%ctaid.{axis}"] = np.full(self.threads, at, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.threads, size, np.uint32)
        self.pc, self.state = np.zeros(self.threads, int), np.full(self.threads, READY)
        self.waited = np.zeros(self.threads, bool)
        self.copies = [[[]] for _ in range(self.threads)]  # groups of (target, source, bytes) of each; the last is open
        self.memory = noise(launch.shared_bytes + 1024, np.uint8)
        self.shared_begin = -(-self.memory.ctypes.data // 1024) * 1024

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Sets a register for the threads of a mask."""
        register = self.registers[name]
        np.copyto(register, value if value.dtype == register.dtype else widen(value, register.dtype), where=mask)

    def parameter(self, name: str, dtype) -> np.ndarray:
        return np.full(self.threads, self.launch.arguments[name].view(dtype))

    def check(self, addresses, size: int, ins: Instruction, threads, writes: bool, space: str = "") -> np.ndarray:
        """Addresses of the process for those of a state space, if these threads may use `size` bytes at each."""
        space = space or ins.space
        if space == "shared":
            addresses = addresses + self.shared_begin
        if (addresses % size).any():
            raise ins.error(f"not aligned to {size} bytes")
        offsets = addresses - self.shared_begin
        in_shared = (offsets >= 0) & (offsets + size <= self.launch.shared_bytes)
        in_global = self.launch.contains(addresses, size)
        allowed = {"shared": in_shared, "global": in_global, "generic": in_shared | in_global}[space]
        if not allowed.all():
            raise ins.error(f"out of bounds in thread {threads[~allowed][0]}, {size} bytes")
        if writes and not (self.waited[threads] | in_shared).all():
            raise ins.error("written before it has waited for the kernels before this one")
        return addresses

    def run(self) -> None:
        """To the end of all threads."""
        for _ in range(MOST_TURNS):
            ready = self.state == READY
            if ready.any():
                pc = self.pc[ready].min()
                self.go_on(int(pc), ready & (self.pc == pc))
            elif not self.release():
                return
        raise KernelError(f"{self.program.name}: an endless loop")

    def release(self) -> bool:
        """Lets threads pass the barrier at which all stand; False at the end of the block."""
        alive = self.state != DONE
        if (self.state == AT_WARP).any() or len(set(self.pc[alive])) > 1:
            raise KernelError("threads wait for others that never come")
        self.state[alive] = READY
        return bool(alive.any())

    def go_on(self, pc: int | None, mask: np.ndarray) -> None:
        """Until the threads of the mask part, wait, end, or come to where others may join them."""
        program = self.program
        while True:
            end = program.run_end[pc]
            for step in program.steps[pc:end]:
                step(self, mask)
            pc = program.controls[end](self, mask, end) if end in program.controls else end
            if pc is None:
                return
            if pc in program.joins:
                self.pc[mask] = pc
                return


# ------------------------------------------------------------------------------
# Modules and kernels


@functools.cache
def compile_file(path: Path, macros: tuple[tuple[str, str], ...]) -> str:
    """The PTX of a file, with the headers beside it."""
    return compile_text(path.read_text(encoding="utf-8"), path.name, ARCH, dict(macros), headers=path.parent)[1]


class RawModule:
    """The kernels of a .cu file, as cuda_cpu.RawModule; of its modes there is but one.

    buffers    arrays that kernels reach through pointers in memory
    executed   opcodes of asm statements that were executed
    """

    def __init__(self, *, path: Path, options=(), mode="fast", seed=0):
        if mode != "fast":
            raise ValueError(f"mode {mode}; PTX is executed in one way, which is called fast")
        self.seed, self.buffers, self.executed, self.programs = seed, [], set(), {}
        macros = tuple(tuple(option.removeprefix("-D").split("=")) for option in options)
        self.ptx = compile_file(Path(path).resolve(), macros)

    def get_function(self, name: str) -> RawKernel:
        if name not in self.programs:
            pattern = rf"^\.visible \.entry {name}\(([^)]*)\)[^{{]*^\{{(.*?)^\}}"
            if not (entry := re.search(pattern, self.ptx, re.MULTILINE | re.DOTALL)):
                raise KernelError(f"no kernel {name}")
            parameters = re.findall(r"\.param \.(\w+) (\w+)", entry[1])
            self.programs[name] = Program(name, parameters, entry[2], self.ptx, self.executed)
        return RawKernel(self, self.programs[name])


class RawKernel(cuda_cpu.RawKernel):
    """One kernel: kernel(grid, block, arguments, shared_mem=bytes); arguments are arrays, None and NumPy scalars."""

    def __init__(self, module: RawModule, program: Program):
        self.module, self.program, self.name = module, program, program.name
        self.max_dynamic_shared_size_bytes = 49152

    def __call__(self, grid, block, args, *, shared_mem=0, seed=None) -> None:
        self.check_shape(grid, block, shared_mem)
        if len(block) > 1 or block[0] % LANES:
            raise KernelError(f"{self.name}: a block of {block} threads, not of whole warps in one dimension")
        launch = Launch(self.program, (*grid, 1, 1)[:3], block[0], args, self.module.buffers, shared_mem)
        places = np.array(list(np.ndindex(*launch.grid[::-1])))[:, ::-1]
        if seed := self.module.seed if seed is None else seed:
            np.random.default_rng(seed).shuffle(places)
        with np.errstate(all="ignore"):
            for place in places:
                Block(launch, place).run()


class Launch:
    """What all blocks of a launch share."""

    def __init__(self, program: Program, grid, threads: int, args, buffers, shared_mem: int):
        self.program, self.grid, self.threads = program, tuple(map(int, grid)), threads
        self.shared_bytes = program.shared_bytes + shared_mem
        self.arguments = {name: self.convert(name, value, TYPES[kind])
                          for (kind, name), value in zip(program.parameters, args, strict=True)}
        arrays = [array for array in (*args, *buffers) if isinstance(array, np.ndarray)]
        spans = merge([span_of("", array, True) for array in arrays])
        self.begins, self.ends = np.array([(0, 0), *((begin, end) for begin, end, _, _ in spans)]).T

    @staticmethod
    def convert(name: str, value, dtype) -> np.generic:
        """An argument as the parameter's type, which tells of a pointer no more than that it has 8 bytes."""
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                raise TypeError(f"{name}: the array is not contiguous, which the kernel cannot see")
            value = np.uint64(value.ctypes.data)
        value = np.uint64(0) if value is None else value
        if not isinstance(value, np.generic) or value.itemsize != np.dtype(dtype).itemsize or (
                (value.dtype.kind == "f") != (np.dtype(dtype).kind == "f")):
            raise TypeError(f"{name}: {value!r} for a parameter of type {np.dtype(dtype)}")
        return value

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Whether all bytes of each access lie in one array."""
        span = np.searchsorted(self.begins, addresses, side="right") - 1
        return (addresses >= self.begins[span]) & (addresses + size <= self.ends[span])
