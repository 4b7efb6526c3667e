"""Embedding, norm and the four products on the CPU: right numbers, and the same bits from every kernel of an op."""
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cuda_cpu import MODES, RawModule, bf16, f32, nan_like, why_not
from harness import ROOT
from rustinfer import CudaBackend

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

EPS, BLOCK_SIZE = 1e-5, 16
GUARD = 16  # rows behind an output that nobody may write
TILES = {f"tiled_{rows}": (rows, columns, threads, shared) for _, rows, columns, threads, shared in CudaBackend.TILES}


def model(hidden, inter=32, heads=1, kv_heads=1, head_dim=32, vocab=41, width=32):
    return dict(HIDDEN=hidden, INTER=inter, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, VOCAB=vocab,
                WIDTH=width, BLOCK_SIZE=BLOCK_SIZE)


# How long the quarters of HIDDEN are, then those of WIDTH, which is K of add_linear.
MODELS = {
    "small": model(96, inter=160, heads=3, vocab=77, width=192),  # 32, 32, 32, 0;  64, 64, 64, 0
    "short": model(160, inter=96, heads=2, head_dim=128, width=64),  # 64, 64, 32, 0;  32, 32, 0, 0
    "tiny": model(32, heads=4, head_dim=64, vocab=130, width=128),  # 32, 0, 0, 0;  32, 32, 32, 32
    "wide": model(192, heads=8, head_dim=96),  # 64, 64, 64, 0
    "long": model(2272),  # 576, 576, 576, 544: two rounds of linear_stream and a rest
    "deep": model(32, width=4256),  # 1088, 1088, 1088, 992
}
CASES = {
    "embedding": ["small"],
    "rms_norm": ["small", "short", "tiny", "wide", "long"],
    "qkv_rope": ["small", "short", "tiny", "wide"],
    "gate_up": ["small", "short"],
    "add_linear": ["small", "short", "tiny", "deep"],
    "lm_head": ["small", "tiny", "long"],
}
OP_CASES = [(op, name) for op in ("qkv_rope", "gate_up", "add_linear", "lm_head") for name in CASES[op]]
CHECKED = "small"  # the model that is run in every mode of the emulator


@functools.cache
def module(file, name, mode="fast"):
    options = tuple(f"-D{macro}={value}" for macro, value in MODELS[name].items())
    return RawModule(path=ROOT / "kernels" / f"{file}.cu", options=options, mode=mode)


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Compiles side by side what the tests will ask for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, names in CASES.items():
            for name in names:
                for mode in MODES if name == CHECKED else ["fast"]:
                    pool.submit(module, file, name, mode)


def launch(file, name, mode, entry, grid, block, args, shared=0, seed=0):
    kernel = module(file, name, mode).get_function(entry)
    kernel.max_dynamic_shared_size_bytes = shared
    kernel(grid, (block,), args, shared_mem=shared, seed=seed)


def unwritten(array):
    """True where the bytes are those of nan_like."""
    return array.view({2: np.uint16, 4: np.uint32}[array.itemsize]) == (0xFFFF if array.itemsize == 2 else 0xFFFFFFFF)


# ------------------------------------------------------------------------------
# The ops on random arrays


class Op:
    """One op and `tokens` tokens: `run` launches a kernel on some of them, `expected` is what NumPy makes of all."""

    TILES = 2  # n8 tiles of a unit

    def __init__(self, name, tokens=1, mode="fast"):
        self.file, self.name, self.tokens, self.mode = type(self).__name__, name, tokens, mode
        self.dims, self.hidden = MODELS[name], MODELS[name]["HIDDEN"]
        self.rng = np.random.default_rng(tokens)
        self.x = self.random(tokens, self.hidden) * self.random(tokens, 1) * np.float32(10)
        self.norm = 1 + self.random(self.hidden) / 8
        self.prepare()

    def prepare(self):
        """Sets the shape of the op, its weight and what else it reads."""

    @functools.cached_property
    def normed(self):
        return norm_with_kernel(self.name, self.x, self.norm)

    def random(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def weights(self, rows, columns):
        return bf16(self.random(rows, columns) / np.sqrt(columns))

    def inputs(self, rows):
        return [array[rows] for array in self.normed]

    def run(self, variant, rows=None, *, splits=1, seed=0, inputs=None):
        """(rows, N): what "fused", "stream" or "tiled_64" writes for these rows of the tokens, and nothing else."""
        rows = np.arange(self.tokens) if rows is None else np.asarray(rows)
        inputs, rest, grid, block, shared = inputs or self.inputs(rows), [], (self.units,), 128, 0
        if variant == "fused":
            inputs, rest = [self.x[rows], self.norm], [np.float32(EPS)]
        if variant in TILES:
            height, width, block, shared = TILES[variant]
            grid = -(-self.units * self.TILES // (width // 8)), -(-len(rows) // height), splits
            tickets = np.zeros(grid[0] * grid[1], np.uint32)
            rest = [nan_like((len(tickets) * 4 * height * width,), np.float32), tickets]
        outputs = self.outputs(rows)
        args = [*outputs, *inputs, self.weight, *self.places(rows), np.int32(len(rows)), *rest]
        launch(self.file, self.name, self.mode, f"{self.file}_{variant}", grid, block, args, shared, seed)
        assert not rest or variant == "fused" or not tickets.any()
        return self.results(outputs, rows)

    def places(self, rows):
        return []

    def outputs(self, rows):
        return [nan_like((len(rows) + GUARD, self.columns), self.kind)]

    def results(self, outputs, rows):
        assert unwritten(outputs[0][len(rows):]).all()
        return outputs[0][: len(rows)]

    def products(self):
        """(norm(x) * weight^T, a bound for the error of its sums) in float64."""
        return self.product(*norm_with_numpy(self.x, self.norm))

    def product(self, a, scales):
        a, w = f32(a).astype("d") * scales[:, None], f32(self.weight).astype("d")
        # Each of K additions errs by 2^-24 of the sum so far, that of a card by twice as much; sizes bound the sum.
        return a @ w.T, w.shape[1] * 2.0**-23 * (np.abs(a) @ np.abs(w).T)


class qkv_rope(Op):
    kind = np.uint16

    def prepare(self):
        self.heads, self.kv_heads, self.head_dim = (self.dims[key] for key in ("HEADS", "KV_HEADS", "HEAD_DIM"))
        self.columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.weight, self.units = self.weights(self.columns, self.hidden), self.columns // 16
        angles = self.rng.uniform(0, 7, (200, self.head_dim // 2))
        self.cos_sin = np.stack([np.cos(angles), np.sin(angles)], -1).astype("f")
        self.positions = self.rng.integers(0, 200, self.tokens).astype(np.int32)
        self.num_blocks = self.tokens // BLOCK_SIZE + 2
        self.slots = self.rng.permutation(self.num_blocks * BLOCK_SIZE)[: self.tokens].astype(np.int32)

    def places(self, rows):
        return [self.cos_sin, self.positions[rows], self.slots[rows]]

    def outputs(self, rows):
        shape = self.num_blocks, self.kv_heads
        return [nan_like((len(rows) + GUARD, self.heads, self.head_dim), np.uint16),
                nan_like((*shape, BLOCK_SIZE, self.head_dim), np.uint16),
                nan_like((*shape, self.head_dim, BLOCK_SIZE), np.uint16)]

    def results(self, outputs, rows):
        q, k, v = outputs
        v = v.swapaxes(2, 3)
        block, offset = np.divmod(self.slots[rows], BLOCK_SIZE)
        found = [q[: len(rows)], k[block, :, offset], v[block, :, offset]]
        k[block, :, offset] = v[block, :, offset] = 0xFFFF
        assert all(unwritten(array).all() for array in (q[len(rows):], k, v))
        return np.concatenate([array.reshape(len(rows), -1) for array in found], 1)

    def expected(self):
        shape = self.tokens, self.heads + 2 * self.kv_heads, self.head_dim
        (y, bound), turned = (array.reshape(shape) for array in self.products()), self.heads + self.kv_heads
        cos, sin = np.tile(self.cos_sin[self.positions].astype("d").transpose(2, 0, 1)[:, :, None], 2)
        swap = lambda array: np.roll(array, self.head_dim // 2, -1)
        sin[..., : self.head_dim // 2] *= -1
        out = np.concatenate([y * cos + swap(y) * sin, y], 1)[:, np.r_[:turned, -self.kv_heads:0]]
        bound = bound + swap(bound) + 2.0**-22 * (np.abs(y) + np.abs(swap(y)))  # the rotation is in float32
        return [array.reshape(self.tokens, -1) for array in (out, bound + 2.0**-8 * np.abs(out))]  # rounded to bf16


class gate_up(Op):
    kind = np.uint16

    def prepare(self):
        self.columns = self.dims["INTER"]
        self.weight, self.units = self.weights(2 * self.columns, self.hidden), self.columns // 8

    def expected(self):
        (a, b), (a_bound, b_bound) = (np.split(array, 2, 1) for array in self.products())
        silu = a / (1 + np.exp(-a))
        # The slope of silu is at most 1.1. exp of a card errs by 2^-21, and more the larger its argument.
        bound = 1.1 * a_bound * (np.abs(b) + b_bound) + np.abs(silu) * b_bound
        return silu * b, bound + (2.0**-8 + 2.0**-18) * np.abs(silu * b)


class add_linear(Op):
    TILES, kind = 1, np.float32

    def prepare(self):
        self.columns, width = self.hidden, self.dims["WIDTH"]
        self.weight, self.units = self.weights(self.hidden, width), self.hidden // 8
        self.a = bf16(self.random(self.tokens, width))

    def inputs(self, rows):
        return [self.a[rows]]

    def outputs(self, rows):
        return [np.concatenate([self.x[rows], nan_like((GUARD, self.hidden), np.float32)])]

    def expected(self):
        y, bound = self.product(self.a, np.ones(self.tokens))
        return self.x + y, bound + 2.0**-23 * np.abs(self.x + y)


class lm_head(Op):
    kind = np.float32

    def prepare(self):
        self.columns = self.dims["VOCAB"]
        self.weight, self.units = self.weights(self.columns, self.hidden), -(-self.columns // 16)

    def expected(self):
        y, bound = self.products()
        return y, bound + 2.0**-22 * np.abs(y)


OPS = {cls.__name__: cls for cls in (qkv_rope, gate_up, add_linear, lm_head)}


def norm_with_numpy(x, norm):
    """bf16(x * g) and the rows' factors in float64."""
    return bf16(x * norm), 1 / np.sqrt((x.astype("d") ** 2).mean(-1) + EPS)


def blocks_of_quarters(x):
    """The four quarters of the rows' elements, each (rows, blocks, 4 lanes, 8)."""
    size = -(-x.shape[1] // 128) * 32
    return [x[:, size * q : size * (q + 1)].reshape(len(x), -1, 4, 8) for q in range(4)]


def add_quarters(sums):
    return ((sums[0] + sums[1]) + sums[2]) + sums[3]


def squares_in_order(x):
    """sum(x^2) of each row in float32, every addition where linear.cuh has it."""
    quarters = []
    for blocks in blocks_of_quarters(x.astype("d")):
        lanes = np.zeros((len(x), 4), "f")
        for element in blocks.transpose(1, 3, 0, 2).reshape(-1, len(x), 4):
            lanes = (element * element + lanes).astype("f")
        quarters.append((lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3]))
    return add_quarters(quarters)


def product_in_order(a, weight):
    """a * weight^T in float32: a step of mma takes half of each lane's elements and rounds once."""
    quarters = []
    for x, w in zip(blocks_of_quarters(f32(a).astype("d")), blocks_of_quarters(f32(weight).astype("d"))):
        sums = np.zeros((len(a), len(weight)), "f")
        for i in range(2 * x.shape[1]):
            half = np.s_[:, i // 2, :, i % 2 * 4 : i % 2 * 4 + 4]
            sums = (x[half].reshape(len(a), 16) @ w[half].reshape(len(weight), 16).T + sums).astype("f")
        quarters.append(sums)
    return add_quarters(quarters)


def norm_with_kernel(name, x, norm, rows=None, mode="fast"):
    """What rms_norm writes, guard rows cut off."""
    count = len(x if rows is None else rows)
    a, scales = nan_like((count + GUARD, x.shape[1]), np.uint16), nan_like((count + GUARD,), np.float32)
    launch("rms_norm", name, mode, "rms_norm", (count,), 32, [a, scales, x, norm, rows, np.float32(EPS)])
    assert unwritten(a[count:]).all() and unwritten(scales[count:]).all()
    return a[:count], scales[:count]


def for_ops(cases=OP_CASES):
    return pytest.mark.parametrize("op, name", cases)


NORMED_OPS = for_ops([(op, CHECKED) for op in ("qkv_rope", "gate_up", "lm_head")])


def variants(op):
    return [*([] if op == "add_linear" else ["fused"]), "stream", *TILES]


def launches(op, tokens):
    """Every way to launch an op: (variant, number of tokens, splits)."""
    streamed = [(variant, count, 1) for variant in variants(op) if variant not in TILES
                for count in (1, 2, 3, 8, 9, 16) if count <= tokens]
    return streamed + [(variant, count, splits) for variant in TILES for count in (1, 17, tokens) for splits in (1, 4)]


def assert_close(found, expected, bound):
    values = f32(found) if found.dtype == np.uint16 else found
    error = np.abs(values - expected) / bound
    assert not np.isnan(values).any() and error.max() <= 1, f"{error.max():.2f} of the bound"


# ------------------------------------------------------------------------------
# One arithmetic


@for_ops()
def test_product_agrees_with_numpy(op, name):
    case = OPS[op](name, 33)
    assert_close(case.run("tiled_64"), *case.expected())


@for_ops()
def test_every_kernel_gives_a_row_the_same_bits_wherever_it_stands(op, name):
    case, rng = OPS[op](name, 33), np.random.default_rng(0)
    bits = case.run("tiled_64")
    for variant, count, splits in launches(op, 33):
        rows = rng.permutation(33)[:count]
        assert np.array_equal(case.run(variant, rows, splits=splits), bits[rows]), (variant, count, splits)


@for_ops([(op, name) for op, name in OP_CASES if op == "lm_head"])
def test_product_is_summed_in_quarters_in_order(op, name):
    case = OPS[op](name, 9)
    logits = case.run("stream", inputs=[case.normed[0], None])
    assert np.array_equal(logits, product_in_order(case.normed[0], case.weight))


@pytest.mark.parametrize("variant, tokens", [("tiled_32", 300), ("tiled_64", 65), ("tiled_128", 130)])
@for_ops([(op, name) for op, name in OP_CASES if name == "tiny"])
def test_many_rows_of_tiles(op, name, variant, tokens):
    case = OPS[op](name, tokens)
    bits = case.run(variant)
    assert_close(bits, *case.expected())
    assert np.array_equal(case.run("stream", np.arange(tokens - 16, tokens)), bits[-16:])


@NORMED_OPS
def test_null_scales_are_ones(op, name):
    case = OPS[op](name, 9)
    for variant in variants(op)[1:]:
        ones = case.run(variant, inputs=[case.normed[0], np.ones(9, "f")])
        assert np.array_equal(case.run(variant, inputs=[case.normed[0], None]), ones)


@for_ops([(op, CHECKED) for op in OPS])
def test_row_of_nans_leaves_the_others_alone(op, name):
    case = OPS[op](name, 16)
    bits = case.run("tiled_32")
    case.x[5] = np.nan
    if op == "add_linear":
        case.a[5] = 0x7FC0
    for variant in variants(op):
        assert np.array_equal(np.delete(case.run(variant), 5, 0), np.delete(bits, 5, 0))


def test_padding_rows_may_share_a_slot():
    case = qkv_rope(CHECKED, 16)
    alone = case.run("fused", np.arange(5))
    case.slots[5:] = case.slots[15]
    for variant in variants("qkv_rope"):
        assert np.array_equal(case.run(variant)[:5], alone), variant


def test_silu_of_large_gates_is_zero_or_the_gate():
    case = gate_up(CHECKED, 16)
    for variant in variants("gate_up")[1:]:
        large = np.full(16, 1e6, "f")
        h = f32(case.run(variant, inputs=[case.normed[0], large]))
        gate, up = np.split(f32(case.normed[0]) @ f32(case.weight).T * large[:, None], 2, 1)
        np.testing.assert_allclose(h, np.maximum(gate, 0) * up, rtol=2.0**-7, atol=1e-3 * np.abs(gate * up).max())
        assert not h[gate < -1e3].any()


# ------------------------------------------------------------------------------
# Under the checker


@pytest.mark.parametrize("mode", ["check", "init"])
@for_ops([(op, CHECKED) for op in OPS])
def test_no_race_no_stray_access_nothing_unset(op, name, mode):
    """With every order of blocks and warps the same bits; who comes last adds the splits."""
    case, checked = OPS[op](name, 33), OPS[op](name, 33, mode)
    bits = case.run("tiled_64")
    for seed, (variant, count, splits) in enumerate(launches(op, 33)):
        found = checked.run(variant, np.arange(count), splits=splits, seed=seed)
        assert np.array_equal(found, bits[:count]), (variant, count, splits)


# ------------------------------------------------------------------------------
# Norm and embedding


@pytest.mark.parametrize("mode", MODES)
def test_norm_agrees_with_numpy(mode):
    case = Op(CHECKED, 33)
    case.x[7] = 0
    a, scales = norm_with_kernel(CHECKED, case.x, case.norm, mode=mode)
    expected = norm_with_numpy(case.x, case.norm)
    assert np.array_equal(a, expected[0])
    np.testing.assert_allclose(scales, expected[1], rtol=2e-6)


@pytest.mark.parametrize("name", CASES["rms_norm"])
def test_squares_are_summed_in_quarters_in_order(name):
    case = Op(name, 200)  # another order shows in one scale of ten
    mean = squares_in_order(case.x).astype("d") * (np.float32(1) / np.float32(case.hidden)) + np.float32(EPS)
    assert np.array_equal(case.normed[1], (1 / np.sqrt(mean.astype("f").astype("d"))).astype("f"))


def test_norm_of_chosen_rows():
    case, rows = Op("long", 5), np.array([4, 0, 0, 2], np.int32)
    a, scales = norm_with_kernel("long", case.x, case.norm)
    chosen = norm_with_kernel("long", case.x, case.norm, rows)
    assert np.array_equal(chosen[0], a[rows]) and np.array_equal(chosen[1], scales[rows])


@pytest.mark.parametrize("mode", MODES)
def test_embedding(mode):
    """What the host gives wins over what the card knows of the seat."""
    hidden, rng = MODELS[CHECKED]["HIDDEN"], np.random.default_rng(0)
    table = bf16(rng.standard_normal((50, hidden)))
    blocks = rng.permutation(4 * 7).reshape(4, 7).astype(np.int32)
    seats = np.array([2, 2, 0, 1, 3, 3], np.int32)
    ids, given = np.array([[7, 49, -1, 3, -1, -1], [30, 31, -1, -1, 111, -1]], np.int32)
    last_token, next_position = np.array([[11, 12, 13, 14], [0, 16, 95, 47]], np.int32)
    x = nan_like((6 + GUARD, hidden), np.float32)
    positions, slots = nan_like((2, 6 + GUARD), np.int32)
    launch("embedding", CHECKED, mode, "embedding", (6,), 128,
           [x, positions, slots, table, ids, given, seats, last_token, next_position, blocks, np.int32(7)])
    assert np.array_equal(x[:6], f32(table[[7, 49, 11, 3, 14, 14]]))
    assert positions[:6].tolist() == [30, 31, 0, 16, 111, 47]
    assert np.array_equal(slots[:6], blocks[seats, positions[:6] // 16] * 16 + positions[:6] % 16)
    assert all(unwritten(array[6:]).all() for array in (x, positions, slots))
