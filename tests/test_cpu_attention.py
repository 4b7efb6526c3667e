"""attention.c gives the formula's numbers, reads and writes nothing else, and the same bits however tokens come."""
import functools

import numpy as np
import pytest
from cpu_build import Team

from rustinfer import ArrayBackend, Batch, CAttention

F32 = np.float32
BLOCK_SIZES = [8, 16, 32, 64, 128]
HEAD_DIMS = [8, 16, 24, 40, 64, 80, 128, 256]
GROUPS = [1, 2, 3, 4, 7, 8, 40]  # query heads of a KV head
GUARD = 65  # numbers before and after an array: it is on no boundary of a vector


def run(team, q, keys, values, batch, block_size):
    """out (T, H, D). A stray write is told by the numbers around out, a stray read by the NaN around the others."""
    (_, heads, dim), kv_heads = q.shape, keys.shape[1]
    q, keys, values = map(among_nan, (q, keys, values))
    out = among_nan(np.full_like(q, np.nan))
    room = out.base.view(np.uint32)
    before = room.copy()
    shape = CAttention(*batch.block_tables.shape, heads, kv_heads, dim, block_size, batch.cu_seqlens_q.ctypes.data,
                       batch.positions.ctypes.data, batch.block_tables.ctypes.data)
    team.call("run_attention", out, q, keys, values, shape)
    around = np.r_[:GUARD, -GUARD:0]
    assert (room[around] == before[around]).all(), "written outside of out"
    return out


def among_nan(array):
    """A copy between NaN."""
    room = np.full(array.size + 2 * GUARD, np.nan, F32)
    place = room[GUARD : GUARD + array.size]
    place[:] = array.ravel()
    return place.reshape(array.shape)


class Case:
    """Sequences of some lengths: queries (n, H, D), keys and values (n, K, D) for each of their positions."""

    def __init__(self, heads, kv_heads, dim, lengths, seed=0):
        rng = np.random.default_rng([seed, heads, kv_heads, dim, len(lengths)])
        draw = lambda count, n: rng.standard_normal((n, count, dim), F32)
        self.heads, self.kv_heads, self.dim, self.lengths = heads, kv_heads, dim, lengths
        self.queries, self.keys, self.values = ([draw(count, n) for n in lengths]
                                                for count in (heads, kv_heads, kv_heads))

    @functools.cache
    def cache(self, block_size):
        """keys (N, K, D, S), values (N, K, S, D), block_tables (B, blocks): in no order, the rest NaN and infinite."""
        rng = np.random.default_rng(block_size)
        counts = [-(-n // block_size) for n in self.lengths]
        order = rng.permutation(sum(counts) + 2)
        shape = len(order), self.kv_heads, block_size, self.dim
        values = rng.choice(np.array([np.nan, np.inf, -np.inf], F32), shape)
        keys = np.ascontiguousarray(values.swapaxes(2, 3))
        tables = np.full((len(counts), max(counts) + 1), order[-1])  # where nobody may look
        for b, (n, count, first) in enumerate(zip(self.lengths, counts, np.cumsum([0, *counts]))):
            tables[b, :count] = order[first : first + count]
            places = np.arange(n)
            blocks, offsets = tables[b, places // block_size], places % block_size
            keys[blocks, :, :, offsets] = self.keys[b]
            values[blocks, :, offsets] = self.values[b]
        return keys, values, tables

    def batch(self, pieces, block_size):
        """A step with these pieces: (sequence, first position, number of tokens)."""
        positions = np.concatenate([np.arange(first, first + count) for _, first, count in pieces]).astype(np.int64)
        tables = self.cache(block_size)[2][[b for b, _, _ in pieces]]
        none = np.empty(0, np.int64)
        return Batch(none, positions, none, np.cumsum([0, *(count for *_, count in pieces)]), tables, none)

    def rows(self, pieces):
        return np.concatenate([self.queries[b][first : first + count] for b, first, count in pieces])

    def run(self, team, pieces, block_size=16):
        keys, values, _ = self.cache(block_size)
        return run(team, self.rows(pieces), keys, values, self.batch(pieces, block_size), block_size)

    @functools.cache
    def expected(self, pieces):
        parts = [attention(self.queries[b][first : first + count], self.keys[b], self.values[b], first)
                 for b, first, count in pieces]
        return tuple(map(np.concatenate, zip(*parts)))

    def check(self, team, pieces, block_size=16):
        (expected, slack), found = self.expected(tuple(pieces)), self.run(team, pieces, block_size)
        error = np.abs(found - expected)
        assert (error <= slack).all(), (block_size, np.argwhere(~(error <= slack))[0], (error / slack).max())


def attention(q, keys, values, first):
    """(softmax(q K^T / sqrt(D)) V, how far the kernel may be off) in float64, of queries from position `first` on.

    With u = 2^-24, half a unit in the last place: the roundings of a sum of m numbers are independent, so it is off by
    less than 4 sqrt(m) u times the sum of their sizes (Higham & Mary 2019). A score is such a sum of D products of a
    query that was rounded twice, and its weight is off by that part of itself; by 6 u more, and by u times its
    distance to the maximum. Each of the n / 16 rescalings costs 6 u, and all of them together u times the rise of the
    maximum. Then weights and values are summed. Twice, since all of it may befall the weights' sum as well.
    """
    t, heads, dim = q.shape
    n, u = first + t, 2.0**-24
    group = heads // keys.shape[1]
    k, v = (a[:n].astype(np.float64).repeat(group, 1).transpose(1, 0, 2) for a in (keys, values))  # (H, n, D)
    by_head = q.astype(np.float64).transpose(1, 2, 0)  # (H, D, t)
    hidden = np.arange(n)[:, None] > np.arange(first, n)
    scores = np.where(hidden, -np.inf, k @ by_head / np.sqrt(dim))  # (H, n, t)
    sizes = np.where(hidden, 0, np.abs(k) @ np.abs(by_head) / np.sqrt(dim))
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    spread = np.minimum(scores.max(1) - np.where(hidden, np.inf, scores).min(1), 88)  # below that a weight is 0
    off = 2 * u * (4 * np.sqrt(dim + 4) * sizes.max(1) + 2 * spread + 4 * np.sqrt(n) + 6 * (n / 16 + 2))  # (H, t)
    mean = lambda x: (weights.transpose(0, 2, 1) @ x).transpose(1, 0, 2)
    return mean(v), mean(np.abs(v)) * off.T[..., None]


@functools.cache
def case_of(heads, kv_heads, dim, lengths):
    return Case(heads, kv_heads, dim, lengths)


@pytest.fixture(scope="module", params=[4, 8, 16], ids="lanes={}".format)
def team(request):
    with Team(request.param) as team:
        yield team


# ---- the formula ----------------------------------------------------------------------------------------------------

MIXED = (0, 0, 1), (1, 15, 1), (2, 16, 1), (3, 17, 1), (4, 0, 23), (5, 13, 9)
MIXED_LENGTHS = 1, 16, 17, 18, 23, 22


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_heads_of_any_size_and_number_are_the_formula(team, dim, group):
    case = case_of(2 * group, 2, dim, MIXED_LENGTHS)
    for block_size in BLOCK_SIZES:
        case.check(team, MIXED, block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (6, 2), (40, 1)])
@pytest.mark.parametrize("position", [0, 15, 16, 17, 255])
def test_one_token_is_the_formula(team, position, heads, kv_heads, block_size):
    case_of(heads, kv_heads, 40, (position + 1,)).check(team, [(0, position, 1)], block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dim, group", [(64, 4), (24, 3), (16, 1)])
def test_prompts_of_any_length_are_the_formula(team, dim, group, block_size):
    case_of(group, 1, dim, tuple(range(1, 71))).check(team, [(n - 1, 0, n) for n in range(1, 71)], block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_chunks_that_begin_inside_of_a_block_are_the_formula(team, block_size):
    pieces = [(b, first, 70 - first + b) for b, first in enumerate([1, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65])]
    case_of(4, 2, 64, tuple(70 + b for b in range(len(pieces)))).check(team, pieces, block_size)


def random_pieces(rng, lengths):
    """Decodes, prompts and chunks, of sequences in no order, some of them with nothing to do."""
    for b in rng.permutation(len(lengths)).tolist():
        count = [1, lengths[b], int(rng.integers(0, lengths[b] + 1))][rng.integers(3)]
        yield b, int(rng.integers(0, lengths[b] - count + 1)), count


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_mixed_batches_are_the_array_twins(team, block_size, seed):
    """Both are float32: either may be off by what the formula allows."""
    rng = np.random.default_rng(seed)
    case = case_of(6, 2, 48, tuple(rng.integers(1, 300, 12).tolist()))
    pieces = tuple(random_pieces(rng, case.lengths))
    _, slack = case.expected(pieces)
    error = np.abs(case.run(team, pieces, block_size) - twin_of(case, pieces, block_size))
    assert (error <= 2 * slack).all()


@functools.cache
def twin_of(case, pieces, block_size):
    backend = ArrayBackend()
    backend.group_size, backend.block_size = case.heads // case.kv_heads, block_size
    keys, values, _ = case.cache(block_size)
    cache = np.ascontiguousarray([keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)])  # (2, N, S, K, D)
    plan = backend.attention_plan(case.batch([piece for piece in pieces if piece[2]], block_size))
    with np.errstate(invalid="ignore"):  # what nobody may see is NaN
        out = backend.paged_attention(case.rows(pieces), cache, plan, case.dim**-0.5)
    backend.close()
    return out


@pytest.mark.parametrize("pieces", [[(0, 3, 0)], [(0, 3, 0), (1, 2, 0), (0, 0, 0)]], ids=str)
def test_no_tokens_are_nothing(team, pieces):
    assert case_of(4, 2, 16, (9, 9)).run(team, pieces).shape == (0, 4, 16)


# ---- extreme scores -------------------------------------------------------------------------------------------------


def case_with_scores(scores, dim=16):
    """A prompt whose keys have these scores, exactly, for every query; values are random."""
    case = Case(3, 1, dim, (len(scores),))
    case.queries[0][:], case.keys[0][:] = 0, 0
    case.queries[0][..., 0] = dim**0.5  # 4: scaled, it is 1
    case.keys[0][:, 0, 0] = scores
    return case


def run_last(team, scores):
    """What the last token gets, decoding and as the end of a prompt; the values (n, D)."""
    case, n = case_with_scores(scores), len(scores)
    for block_size in BLOCK_SIZES:
        prompt, decode = (case.run(team, [piece], block_size)[-1] for piece in ((0, 0, n), (0, n - 1, 1)))
        assert bits(prompt) == bits(decode)
    return decode, case.values[0][:, 0]


@pytest.mark.parametrize("score", [0, -0.0, 7, 1e4, -1e30, 3e38, -3e38, 1e-45])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 200])
def test_equal_scores_give_the_mean(team, n, score):
    """Weights are exactly 1, so that only the sum of n numbers rounds."""
    found, values = run_last(team, [score] * n)
    assert (np.abs(found - values.astype(np.float64).mean(0)) <= (n + 2) * 2.0**-24 * np.abs(values).mean(0)).all()


@pytest.mark.parametrize("rest", [0, -1e30, -3e38, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 99, 100])
def test_a_token_with_all_the_weight_gives_its_value_exactly(team, place, rest):
    scores = np.full(101, rest, F32)
    scores[place] = 200 if rest == 0 else 0
    found, values = run_last(team, scores)
    assert (found == values[place]).all()


@pytest.mark.parametrize("step", [1, 30, 200, 1e30])
@pytest.mark.parametrize("direction", [1, -1])
def test_rising_and_falling_scores_are_the_formula(team, direction, step):
    scores = np.arange(120)[::direction].astype(F32) * F32(step)
    case = case_with_scores(scores)
    expected, slack = attention(case.queries[0], case.keys[0], case.values[0], 0)
    assert (np.abs(case.run(team, [(0, 0, 120)]) - expected) <= np.where(step > 1e3, 0, slack)).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_query_breaks_no_other(team, broken):
    case, pieces = Case(6, 2, 24, (40, 17)), [(0, 0, 40), (1, 16, 1)]
    before = case.run(team, pieces)
    case.queries[0][7, 2, 5] = broken
    after = case.run(team, pieces)
    assert np.isnan(after[7, 2]).all()
    after[7, 2] = before[7, 2]
    assert bits(after) == bits(before)


def test_a_broken_sequence_breaks_no_other(team):
    case, pieces = Case(6, 2, 24, (40, 40, 40)), [(0, 0, 40), (1, 0, 40), (2, 39, 1)]
    before = case.run(team, pieces)
    other = Case(6, 2, 24, (40, 40, 40))
    other.keys[1][:], other.values[1][3:] = np.nan, np.inf
    after = other.run(team, pieces)
    assert np.isnan(after[40:80]).all() and bits(after[:40]) == bits(before[:40])
    assert bits(after[80]) == bits(before[80])


# ---- the same bits --------------------------------------------------------------------------------------------------


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def by_place(pieces, out):
    """The bits of each token, by sequence and position."""
    places = [(b, first + i) for b, first, count in pieces for i in range(count)]
    return dict(zip(places, map(bits, out), strict=True))


LENGTHS = 1, 9, 33, 70, 150
WHOLE = tuple((b, 0, n) for b, n in enumerate(LENGTHS))


def in_chunks(size):
    """Steps that run at most `size` tokens of each sequence."""
    return [[(b, first, min(size, n - first)) for b, n in enumerate(LENGTHS) if first < n]
            for first in range(0, max(LENGTHS), size)]


@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 1, 64), (6, 6, 24), (7, 1, 80), (40, 1, 16), (16, 2, 128)])
def test_bits_depend_on_no_other_token_nor_threads_nor_block_size(team, heads, kv_heads, dim):
    case = case_of(heads, kv_heads, dim, LENGTHS)
    expected = by_place(WHOLE, case.run(team, WHOLE))
    other_order = [[piece] for piece in WHOLE], [WHOLE[::-1]]
    for steps in (*other_order, in_chunks(1), in_chunks(5), in_chunks(16), in_chunks(37)):
        for pieces in steps:
            assert by_place(pieces, case.run(team, pieces)).items() <= expected.items(), pieces
    for block_size in BLOCK_SIZES:
        for pieces in (WHOLE, [(4, 149, 1)], [(2, 7, 20), (3, 69, 1)]):
            assert by_place(pieces, case.run(team, pieces, block_size)).items() <= expected.items(), block_size
    for threads in (1, 3):
        with Team(team.lanes, threads) as other:
            for pieces in (WHOLE, [(4, 149, 1)], [(3, 11, 50)]):
                assert by_place(pieces, case.run(other, pieces)).items() <= expected.items(), threads
