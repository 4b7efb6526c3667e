"""attention.cu on the CPU: right numbers, nothing read but the row's own keys, the same bits from both kernels."""
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cuda_cpu import MODES, RawModule, bf16, f32, nan_like, why_not
from harness import ROOT

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

BLOCK_SIZE, STEP, CHUNK = 16, 64, 128
STALE = 1 << 26  # a block table entry that nobody may follow: no memory is there
GUARD = 1  # row behind the output that nobody may write
CONTEXTS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300]

# query heads, KV heads, elements of a head
MODELS = {"g1-d96": (2, 2, 96), "g2-d128": (4, 2, 128), "g3-d32": (6, 2, 32), "g4-d64": (8, 2, 64),
          "g8-d64": (8, 1, 64), "g12-d32": (12, 1, 32)}
CHECKED = "g3-d32"  # the model that is run in every mode of the emulator


@functools.cache
def module(name, mode="fast"):
    heads, kv_heads, head_dim = MODELS[name]
    macros = dict(HIDDEN=32, INTER=32, VOCAB=32, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim)
    options = tuple(f"-D{macro}={value}" for macro, value in {**macros, "BLOCK_SIZE": BLOCK_SIZE}.items())
    return RawModule(path=ROOT / "kernels" / "attention.cu", options=options, mode=mode)


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Compiles side by side what the tests will ask for."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in MODELS:
            for mode in MODES if name == CHECKED else ["fast"]:
                pool.submit(module, name, mode)


class Case:
    """Sequences of these lengths in a paged cache; what no sequence wrote is NaN, other entries of a table are STALE.

    keys, values (n, K, D) and queries (n, H, D) are what a sequence has at its positions, in bf16. The last seat is the
    scratch seat, with one block.
    """

    def __init__(self, name, lengths, mode="fast", spare_blocks=3):
        self.name, self.mode, self.lengths = name, mode, lengths
        self.heads, self.kv_heads, self.head_dim = MODELS[name]
        self.group, self.scale = self.heads // self.kv_heads, np.float32(self.head_dim**-0.5)
        self.tokens_per_tile = 8 * (16 // self.group)
        rng = np.random.default_rng(len(lengths))
        self.keys = [bf16(rng.standard_normal((n, self.kv_heads, self.head_dim))) for n in lengths]
        self.values = [bf16(rng.standard_normal((n, self.kv_heads, self.head_dim))) for n in lengths]
        self.queries = [bf16(self.random_queries(rng, f32(keys))) for keys in self.keys]
        self.fill_cache(rng, spare_blocks)

    def random_queries(self, rng, keys):
        """Half of them look for one key that they may see, which then has most of the weight."""
        n = len(keys)
        queries = rng.standard_normal((n, self.heads, self.head_dim))
        wanted = keys.repeat(self.group, 1)[(rng.random(n) * (1 + np.arange(n))).astype(int)]
        return queries * 0.7 + wanted * rng.choice([0, 0.8], (n, self.heads, 1))

    def fill_cache(self, rng, spare_blocks):
        blocks = [-(-n // BLOCK_SIZE) for n in self.lengths]
        order = rng.permutation(sum(blocks) + spare_blocks).astype(np.int32)
        shape = len(order) + 1, self.kv_heads, BLOCK_SIZE, self.head_dim
        self.k_cache, self.v_cache = nan_like(shape, np.uint16), nan_like((*shape[:2], *shape[:1:-1]), np.uint16)
        self.tables = np.full((len(blocks) + 1, max(blocks)), STALE, np.int32)
        self.tables[-1, 0] = len(order)
        for seat, count in enumerate(blocks):
            self.tables[seat, :count], order = order[:count], order[count:]
            for position in range(self.lengths[seat]):
                block, offset = self.tables[seat, position // BLOCK_SIZE], position % BLOCK_SIZE
                self.k_cache[block, :, offset] = self.keys[seat][position]
                self.v_cache[block, :, :, offset] = self.values[seat][position]

    # -- launches: rows are (seat, position)

    def arrays(self, rows, queries=None):
        seats, positions = (np.array(column, np.int32) for column in zip(*rows))
        if queries is None:
            queries = np.stack([self.queries[seat][position] for seat, position in rows])
        out = nan_like((len(rows) + GUARD, self.heads, self.head_dim), np.uint16)
        return out, queries, self.k_cache, self.v_cache, positions, seats, self.tables, np.int32(self.tables.shape[1])

    def decode(self, rows, splits=1, seed=0, queries=None):
        args = self.arrays(rows, queries)
        max_chunks = max(position for _, position in rows) // CHUNK + 1
        partials = nan_like((len(rows), self.kv_heads, max_chunks, self.group, self.head_dim + 2), np.float32)
        tickets = np.zeros((len(rows), self.kv_heads), np.uint32)
        module(self.name, self.mode).get_function("attention_decode")(
            (self.kv_heads, len(rows), splits), (128,), (*args, partials, tickets, np.int32(max_chunks), self.scale),
            seed=seed)
        assert not tickets.any()
        return self.result(args[0])

    def prefill(self, pieces, seed=0):
        """Pieces are (seat, first position, number of tokens); longer ones than a tile are cut."""
        size = self.tokens_per_tile
        tiles = [(seat, first + at, min(size, count - at))
                 for seat, first, count in pieces for at in range(0, count, size)]
        rows = [(seat, first + i) for seat, first, count in tiles for i in range(count)]
        counts = [count for _, _, count in tiles]
        args, table = self.arrays(rows), np.array([np.cumsum([0, *counts[:-1]]), counts], np.int32).T
        kernel = module(self.name, self.mode).get_function("attention_prefill")
        kernel.max_dynamic_shared_size_bytes = shared = 512 * self.head_dim
        kernel((len(tiles), self.kv_heads), (256,), (*args, np.ascontiguousarray(table), self.scale), shared_mem=shared,
               seed=seed)
        return rows, self.result(args[0])

    @staticmethod
    def result(out):
        assert (out[-GUARD:] == 0xFFFF).all(), "a row behind the output was written"
        return out[:-GUARD]

    # -- the formula

    def check(self, rows, out, queries=None):
        for i, (seat, position) in enumerate(rows):
            q = f32(self.queries[seat][position] if queries is None else queries[i])
            for head in range(self.heads):
                keys, values = (f32(a[seat][: position + 1, head // self.group]) for a in (self.keys, self.values))
                expected, slack = attention(q[head], keys, values, self.scale)
                error = np.abs(f32(out[i, head]) - expected)
                assert (error <= slack).all(), (self.name, seat, position, head, error.max(), slack[error.argmax()])


def attention(q, keys, values, scale):
    """(softmax(q K^T scale) V, how far a kernel may be off) of one head, in float64, with the kernel's roundings.

    Weights are rounded to bf16 relative to the largest score of their chunk so far, so they are rounded here where the
    kernel does. What is left are float32 errors of a score, a relative error of its weight, and weights so close
    to the middle between two bf16 values that this error rounds them to the other one; and the result in bf16.
    """
    x = keys.astype(np.float64) @ q * scale * np.log2(np.e)
    off = 2.0**-20 * (1 + (np.abs(keys) @ np.abs(q)).max() * scale)
    top, weights, moved = x.max(), np.empty(len(x)), np.empty(len(x))
    for step in range(0, len(x), STEP):
        part = slice(step, step + STEP)
        m = x[step // CHUNK * CHUNK : step + STEP].max()
        exact = np.exp2(x[part] - m)
        low, high = (f32(bf16(exact * (1 + sign * off))).astype(np.float64) for sign in (-1, 1))
        weights[part] = f32(bf16(exact)) * np.exp2(m - top)
        moved[part] = (high - low + exact * off) * np.exp2(m - top)
    total = np.exp2(x - top).sum()
    expected = weights @ values / total
    return expected, (moved @ np.abs(values) + off * weights @ np.abs(values)) / total + 2.0**-8 * np.abs(expected)


def last_rows(case):
    return [(seat, n - 1) for seat, n in enumerate(case.lengths)]


# ------------------------------------------------------------------------------
# Numbers

@pytest.mark.parametrize("name", MODELS)
def test_decode_equals_its_formula(name):
    case = Case(name, CONTEXTS)
    case.check(last_rows(case), case.decode(last_rows(case)))


@pytest.mark.parametrize("name", MODELS)
def test_prefill_equals_its_formula(name):
    case = Case(name, [300, 129, 40, 1])
    rows, out = case.prefill([(0, 240, 60), (1, 0, 129), (2, 7, 33), (3, 0, 1)])
    case.check(rows, out)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_met_by_its_own_value(name):
    """A query that is one key, enlarged, returns that key's value, wherever in a chunk the key is."""
    n = 150
    case = Case(name, [n])
    case.keys[0] = bf16(np.sign(f32(case.keys[0])))  # all of one length, so that none is closer to another than itself
    case.fill_cache(np.random.default_rng(0), 3)
    rows = -(-n // case.group)
    wanted = np.arange(rows * case.group).reshape(rows, 1, case.group) % n + np.zeros((1, case.kv_heads, 1), int)
    heads = np.arange(case.kv_heads).reshape(1, -1, 1)
    queries = bf16(4 * f32(case.keys[0][wanted, heads])).reshape(rows, case.heads, case.head_dim)
    out = case.decode([(0, n - 1)] * rows, queries=queries)
    found = f32(out).reshape(rows, case.kv_heads, case.group, case.head_dim)
    assert np.abs(found - f32(case.values[0][wanted, heads])).max() < 0.1


def test_large_scores_neither_overflow_nor_drown():
    """Scores beyond what exp holds; the whole weight is then on one key."""
    case = Case(CHECKED, [300])
    case.queries[0] = bf16(f32(case.queries[0]) * 100)
    case.check(last_rows(case), case.decode(last_rows(case)))
    rows, out = case.prefill([(0, 290, 10)])
    case.check(rows, out)


# ------------------------------------------------------------------------------
# Bits

@pytest.mark.parametrize("name", MODELS)
def test_decode_and_prefill_have_the_same_bits(name):
    case = Case(name, [300])
    rows, out = case.prefill([(0, 0, 3), (0, 60, 8), (0, 120, 20), (0, 250, 50)])
    some = [i for i, (_, position) in enumerate(rows) if position % 3 == 0 or position % CHUNK in (0, 1, 63, 64, 127)]
    assert np.array_equal(case.decode([rows[i] for i in some]), out[some])


@pytest.mark.parametrize("name", ["g3-d32", "g8-d64"])
def test_a_row_keeps_its_bits_in_any_piece_and_any_batch(name):
    case = Case(name, [200, 70])
    rows, out = case.prefill([(0, 110, 30), (1, 60, 10)])
    bits = dict(zip(rows, out))
    for pieces in [[(1, 65, 1)], [(0, 126, 1), (0, 127, 2), (0, 129, 7)], [(1, 60, 3), (0, 111, 29), (1, 63, 7)]]:
        for row, found in zip(*case.prefill(pieces)):
            assert np.array_equal(found, bits[row]), (pieces, row)
    for batch in [[(0, 128)], [(1, 69), (0, 139), (1, 60), (0, 127)]]:
        assert np.array_equal(case.decode(batch), np.stack([bits[row] for row in batch])), batch


@pytest.mark.parametrize("name", ["g4-d64", "g12-d32"])
def test_number_of_splits_and_order_of_blocks_change_no_bit(name):
    case = Case(name, [1, 300, 513, 1100])
    bits = case.decode(last_rows(case))
    case.check(last_rows(case), bits)
    for splits in (2, 3, 4, 8):
        assert np.array_equal(case.decode(last_rows(case), splits, seed=splits), bits), splits


def test_later_tokens_do_not_change_a_row():
    """A row's bits are the same whether what follows it in the cache was never written or is large."""
    cases = Case("g4-d64", [141]), Case("g4-d64", [200])
    for kept, longer in zip(*((case.keys, case.values, case.queries) for case in cases)):
        longer[0] = np.concatenate([kept[0], bf16(f32(longer[0][141:]) * 1000)])
    cases[1].fill_cache(np.random.default_rng(1), 3)
    bits = [out for case in cases for out in (case.decode([(0, 140)])[0], case.prefill([(0, 139, 2)])[1][1])]
    assert all(np.array_equal(found, bits[0]) for found in bits)


def test_padded_rows_on_the_scratch_seat_leave_the_others_alone():
    case = Case("g4-d64", [130, 20])
    rows, scratch = last_rows(case), (2, 0)
    queries = np.stack([case.queries[seat][position] for seat, position in rows])
    padded = np.concatenate([queries, nan_like((2, *queries.shape[1:]), np.uint16)])
    out = case.decode([*rows, scratch, scratch], splits=2, queries=padded)
    assert np.array_equal(out[:2], case.decode(rows))


# ------------------------------------------------------------------------------
# Modes of the emulator

@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "fast"])
def test_every_access_is_in_bounds_ordered_and_of_something_set(mode):
    """The tables end where those of the longest sequence end, so a look at an entry beyond is out of bounds."""
    case, checked = (Case(CHECKED, [33, 600], mode, spare_blocks=0) for mode in ("fast", mode))
    checked.tables = checked.tables[:2]
    bits = case.decode(last_rows(case))
    for seed in range(2):
        assert np.array_equal(checked.decode(last_rows(case), splits=2, seed=seed), bits)
    pieces = [(1, 100, 42), (0, 30, 3), (1, 598, 2)]
    assert np.array_equal(checked.prefill(pieces)[1], case.prefill(pieces)[1])
