"""Backend: every op against plain float64 arithmetic at its edges, and rows whose bits depend on the row alone."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import threadpoolctl
from rustinfer import ArrayBackend, Batch, EngineConfig, SettingsError, find_card, pick_backend

# float32 carries 24 bits: a sum of n products is off by at most about n * 2^-24 of the sum of their magnitudes, and by
# sqrt(n) of it as a rule. The ops here sum up to 4096 terms of size 1, hence 1e-5 of the largest output.
TOLERANCE = 1e-5
PRODUCTS = [(1, 1), (48, 5), (80, 333), (513, 64), (4096, 16)]  # (C, F)


@pytest.fixture(scope="module")
def ops():
    backend = ArrayBackend()
    backend.calibrate([(height, width) for width, height in PRODUCTS], 16)
    yield backend
    backend.close()


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("t", [1, 3, 17])
@pytest.mark.parametrize("width", [1, 7, 64, 4096])
def test_rms_norm_equals_its_formula(ops, t, width):
    x, weight = draw(t, width) * 30, draw(width, seed=1)
    wide = x.astype(np.float64)
    assert_close(ops.rms_norm(x, weight, 1e-5), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight)


def test_rms_norm_of_zeros_is_zero(ops):
    assert not ops.rms_norm(np.zeros((2, 8), np.float32), draw(8), 1e-6).any()


def test_embedding_takes_rows(ops):
    table = draw(9, 4)
    assert same_bits(ops.embedding(SimpleNamespace(input_ids=np.array([8, 0, 8])), table), table[[8, 0, 8]])


@pytest.mark.parametrize("t", [1, 2, 3, 7, 8, 9, 31, 33, 100])
@pytest.mark.parametrize("width, height", PRODUCTS)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_its_formula(ops, t, width, height, biased):
    x, weight, bias = draw(t, width), draw(height, width, seed=1), draw(height, seed=2) if biased else None
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (bias if biased else 0)
    assert_close(ops.linear(x, weight, bias), expected)


@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_rope_turns_pairs_of_halves(ops, head_dim, heads):
    x, angles = draw(5, heads, head_dim), draw(5, 1, head_dim // 2, seed=1).astype(np.float64) * 100
    turned = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * np.exp(1j * angles)
    found = ops.rope(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    assert_close(found, np.concatenate((turned.real, turned.imag), -1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("t, width", [(1, 1), (3, 7), (17, 64)])
def test_silu_mul_equals_its_formula_without_overflow(ops, t, width):
    gate, up = draw(t, width) * 50, draw(t, width, seed=1)
    gate[0, 0] = -1e4
    wide = gate.astype(np.float64)
    expected = wide * 0.5 * (1 + np.tanh(wide / 2)) * up
    assert_close(ops.silu_mul(np.concatenate((gate, up), -1)), expected)


@pytest.mark.parametrize("width", [1, 2, 333, 128_256])
def test_log_softmax_sums_to_one(ops, width):
    logits = draw(3, width) * 10
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found = ops.log_softmax(logits)
    assert_close(found, wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
    assert np.abs(np.exp(found.astype(np.float64)).sum(-1) - 1).max() < 1e-5


def test_append_kv_writes_its_slots_and_no_others(ops):
    cache = draw(2, 3, 5, 8, 2, 4)  # with a layer axis, which the model takes a view of
    before, k, v = cache.copy(), draw(3, 2, 4, seed=1), draw(3, 2, 4, seed=2)
    slots = np.array([39, 0, 17])
    ops.append_kv(cache[:, 1], k, v, slots)
    expected = before.copy()
    for i, slot in enumerate(slots):
        expected[0, 1, slot // 8, slot % 8], expected[1, 1, slot // 8, slot % 8] = k[i], v[i]
    assert same_bits(cache, expected)


# ---- attention ------------------------------------------------------------------------------------------------------


def make_case(sequences, kv_heads, group, head_dim, block_size=16, seed=0, layers=None):
    """A step of `sequences`, each (context, queries); all cache that no sequence holds is NaN.

    Returns q, the cache (2, N, S, K, D), the batch and each sequence's own keys and values (2, context, K, D).
    """
    rng = np.random.default_rng(seed)
    counts = [-(-context // block_size) for context, _ in sequences]
    blocks = rng.permutation(sum(counts) + 3)
    cache = np.full((2, len(blocks), block_size, kv_heads, head_dim), np.nan, np.float32)
    tables, contents, positions, first = np.zeros((len(sequences), max(counts) + 1), np.int64), [], [], 0
    tables[:] = blocks[-1]  # what pads a table is never read either
    for b, ((context, queries), count) in enumerate(zip(sequences, counts)):
        content = np.random.default_rng([seed, context]).standard_normal((2, context, kv_heads, head_dim), np.float32)
        tables[b, :count] = blocks[first : first + count]
        flat = np.full((2, count * block_size, kv_heads, head_dim), np.nan, np.float32)
        flat[:, :context] = content
        cache[:, tables[b, :count]] = flat.reshape(2, count, block_size, kv_heads, head_dim)
        contents.append(content)
        positions += range(context - queries, context)
        first += count
    q = np.concatenate([np.random.default_rng([seed + 1, context]).standard_normal(
        (context, kv_heads * group, head_dim), np.float32)[context - queries :] for context, queries in sequences])
    return q, cache, make_batch(sequences, positions, tables), contents


def make_batch(sequences, positions, tables):
    cu = np.concatenate(([0], np.cumsum([queries for _, queries in sequences])))
    empty = np.zeros(0, np.int64)
    return Batch(empty, np.array(positions), empty, cu, tables, empty)


def plain_attention(q, contents, sequences, scale):
    """The definition, in float64: softmax(q k / sqrt(d)) v over the keys up to each query."""
    out, row = np.empty(q.shape), 0
    for (context, queries), (keys, values) in zip(sequences, (content.astype(np.float64) for content in contents)):
        group = q.shape[1] // keys.shape[1]
        for place in range(context - queries, context):
            for head in range(q.shape[1]):
                scores = keys[: place + 1, head // group] @ q[row, head].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ values[: place + 1, head // group] / weights.sum()
            row += 1
    return out


def attend(ops, case, group, block_size=16):
    q, cache, batch, _ = case
    ops.group_size, ops.block_size = group, block_size
    return ops.paged_attention(q, cache, ops.attention_plan(batch), q.shape[-1] ** -0.5)


EDGES = [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 400]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kv_heads, head_dim", [(1, 8), (2, 16), (1, 64), (2, 128)])
def test_attention_equals_its_formula_and_reads_no_other_cache(ops, group, kv_heads, head_dim):
    """Single queries and chunks of prompts at the borders of blocks and chunks, all in one step, all else NaN."""
    sequences = [(context, 1) for context in EDGES] + [(1, 1), (17, 17), (130, 5), (129, 129), (33, 16)]
    case = make_case(sequences, kv_heads, group, head_dim)
    assert_close(attend(ops, case, group), plain_attention(case[0], case[3], sequences, head_dim**-0.5))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
def test_attention_with_every_block_size(ops, block_size):
    sequences = [(context, 1) for context in (1, 7, 8, 9, 31, 63, 64, 65, 128, 129)] + [(140, 139), (20, 3)]
    case = make_case(sequences, 2, 2, 8, block_size)
    assert_close(attend(ops, case, 2, block_size), plain_attention(case[0], case[3], sequences, 8**-0.5))


def test_attention_survives_large_scores(ops):
    sequences = [(140, 1), (20, 20)]
    q, cache, batch, contents = make_case(sequences, 1, 2, 8)
    case = (q * 1000, cache, batch, contents)  # scores of some thousands: exp would overflow without the maximum
    assert_close(attend(ops, case, 2), plain_attention(case[0], contents, sequences, 8**-0.5), 1e-4)


def test_attention_leaves_the_cache_as_it_is(ops):
    case = make_case([(20, 1), (130, 4)], 2, 2, 8)
    before = case[1].copy()
    attend(ops, case, 2)
    assert same_bits(case[1], before)


@pytest.mark.parametrize("group, kv_heads, head_dim", [(1, 2, 8), (3, 1, 16), (4, 2, 64), (7, 1, 128)])
def test_attention_rows_keep_their_bits_in_any_batch_and_chunk(ops, group, kv_heads, head_dim):
    ops.calibrate([(333, 48)], head_dim)
    run = lambda sequences: attend(ops, make_case(sequences, kv_heads, group, head_dim), group)
    whole = {context: run([(context, context)]) for context in (5, 129, 300)}
    single = {context: run([(context, 1)]) for context in EDGES}
    for context, rows in whole.items():
        for queries in (1, 2, 3, context // 2 + 1):
            chunk = run([(context, queries)])
            assert same_bits(chunk, rows[context - queries :])
    for order in (EDGES, EDGES[::-1], EDGES[3:8] * 3):
        together = run([(context, 1) for context in order])
        for row, context in enumerate(order):
            assert same_bits(together[row : row + 1], single[context])
    mixed = [(129, 1), (300, 100), (5, 5), (129, 128), (400, 1)]
    out = run(mixed)
    assert same_bits(out[:1], whole[129][-1:]) and same_bits(out[1:101], whole[300][200:])
    assert same_bits(out[101:106], whole[5]) and same_bits(out[106:234], whole[129][1:])
    assert same_bits(out[234:], single[400])


# ---- rows of products -----------------------------------------------------------------------------------------------


def assert_rows_keep_their_bits(ops, width, height):
    weight, x = draw(height, width, seed=1), draw(70, width)
    expected = ops.linear(x, weight)
    for row in (0, 1, 33, 69):
        assert same_bits(ops.linear(x[row : row + 1], weight), expected[row : row + 1])
    for t in (2, 3, 7, 8, 9, 31, 32, 33, 64, 65):
        assert same_bits(ops.linear(x[:t], weight), expected[:t])
        assert same_bits(ops.linear(x[-t:][::-1].copy(), weight), expected[-t:][::-1])
    shuffled = np.random.default_rng(3).permutation(70)
    assert same_bits(ops.linear(x[shuffled], weight), expected[shuffled])


@pytest.mark.parametrize("widths", [(48, 80), (64,), (96, 33), (576, 1536), (2048,)])
@pytest.mark.parametrize("heights", [(1, 7), (48, 80, 333), (1000,)])
def test_calibrated_tiles_keep_the_bits_of_every_row(widths, heights):
    shapes = [(height, width) for width in widths for height in heights]
    backend = ArrayBackend()
    try:
        backend.calibrate(shapes, 16)
        assert backend.tile in backend.TILES and backend.attention_tile in backend.ATTENTION_TILES
        for height, width in shapes:
            assert_rows_keep_their_bits(backend, width, height)
    finally:
        backend.close()


def test_threads_change_no_bit():
    one, three = ArrayBackend(), ArrayBackend(threads=3)
    try:
        for backend in (one, three):
            backend.calibrate([(1025, 512)], 16)
        weight = draw(1025, 512, seed=1)  # large enough to be split, into parts of unequal height
        assert weight.size >= three.PARALLEL_SIZE
        for t in (1, 5, 40):
            x = draw(t, 512)
            assert_close(three.linear(x, weight), x.astype(np.float64) @ weight.T)
        assert_rows_keep_their_bits(three, 512, 1025)
    finally:
        one.close()
        three.close()


def test_calibrate_takes_smaller_tiles_where_larger_ones_mix_rows():
    class Mixing(ArrayBackend):
        """A BLAS whose rows depend on their place in tiles of more than 4."""

        def _product(self, tiles, weight):
            out = super()._product(tiles, weight).copy()
            if tiles.shape[1] > 4:
                out[:, 0] += np.float32(1)
            return out

    backend = Mixing()
    try:
        backend.calibrate([(64, 64), (100, 32)], 16)
        assert backend.tile <= 4
    finally:
        backend.close()


@pytest.mark.parametrize("rows", [1, 49, 111, 112, 113, 160, 161, 300])
def test_wide_products_give_the_bits_of_tiles(rows):
    backend = ArrayBackend()
    try:
        backend.calibrate([(333, 96), (80, 512)], 16)
        if not backend.wide:
            pytest.skip("on this CPU the two shapes differ, and only tiles are used")
        for height, width in ((333, 96), (80, 512)):
            x, weight = draw(rows, width), draw(height, width, seed=1)
            mixed = backend.linear(x, weight)
            backend.wide = False
            assert same_bits(mixed, backend.linear(x, weight))
            backend.wide = True
    finally:
        backend.close()


def test_calibrate_gives_wide_products_up_where_they_differ():
    class Differing(ArrayBackend):
        def _wide(self, x, weight):
            return np.nextafter(super()._wide(x, weight), np.float32(9))

    backend = Differing()
    try:
        backend.calibrate([(64, 64)], 16)
        assert not backend.wide
        assert_rows_keep_their_bits(backend, 64, 64)
    finally:
        backend.close()


def test_without_batch_invariance_the_results_are_as_close(ops):
    backend = ArrayBackend(batch_invariant=False)
    try:
        backend.calibrate([(48, 80)], 16)
        for t in (1, 5, 40):
            x, weight, bias = draw(t, 80), draw(37, 80, seed=1), draw(37, seed=2)
            assert_close(backend.linear(x, weight, bias), x.astype(np.float64) @ weight.T + bias)
        sequences = [(129, 1), (17, 17)]
        case = make_case(sequences, 2, 3, 16)
        assert_close(attend(backend, case, 3), plain_attention(case[0], case[3], sequences, 0.25))
    finally:
        backend.close()


def blas_threads():
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]


def test_blas_has_one_thread_while_any_engine_lives(ops):
    first, second = ArrayBackend(), ArrayBackend()
    first.close()
    first.close()  # twice is once
    assert set(blas_threads()) <= {1}
    second.close()
    assert set(blas_threads()) <= {1}  # `ops` lives still


def test_blas_gets_its_threads_back(monkeypatch):
    import rustinfer

    calls = []
    limiter = SimpleNamespace(restore_original_limits=lambda: calls.append("restored"))
    monkeypatch.setattr(rustinfer.threadpoolctl, "threadpool_limits", lambda **limits: calls.append(limits) or limiter)
    monkeypatch.setattr(rustinfer.BlasThreads, "_holders", 0)
    monkeypatch.setattr(rustinfer.BlasThreads, "_limiter", None)
    backends = [ArrayBackend(), ArrayBackend(threads=2)]
    for backend in backends:
        backend.close()
    assert calls == [{"limits": 1, "user_api": "blas"}, "restored"]


def test_the_cpu_is_taken_when_asked_for():
    backend, reason = pick_backend(EngineConfig(device="cpu", cpu_kernels="off"), None)
    assert backend.name == "NumPy" and reason == "--device cpu; no C kernels: --cpu-kernels off"
    assert backend.batch_invariant
    backend.close()


def test_a_card_that_cannot_be_had_is_an_error_that_says_why():
    try:
        import cupy  # noqa: F401
    except ImportError:
        assert find_card("auto") == (None, "no card: CuPy is not installed")
        with pytest.raises(SettingsError, match="--device: 'cuda:0' cannot be used: CuPy is not installed"):
            find_card("cuda:0")
    with pytest.raises(SettingsError, match="--device: 'cuda:99' cannot be used: "):
        find_card("cuda:99")


def test_scores_are_scaled_by_the_head_dimension(ops):
    sequences = [(3, 3)]
    case = make_case(sequences, 1, 1, 64)
    assert math.isclose(case[0].shape[-1] ** -0.5, 0.125)
    assert_close(attend(ops, case, 1), plain_attention(case[0], case[3], sequences, 0.125))
