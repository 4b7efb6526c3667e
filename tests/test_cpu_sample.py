"""sample.c draws the tokens of `Sampler`, with its log-probabilities, whatever the lanes, the threads and the batch."""
import functools

import numpy as np
import pytest
from cpu_build import Team

from rustinfer import ArrayBackend, Sampled, Sampler, SamplingParams, philox_uniform

GREEDY = SamplingParams(temperature=0)
MAX_TOP = 20
DRAW = np.dtype([*((name, "f8") for name in ("temperature", "top_p", "min_p")),
                 *((name, "i8") for name in ("top_k", "num_top", "choice", "position")), ("seed", "u8")])
DRAWN = np.dtype([("token_id", "i8"), ("finite", "i8"), ("num_top", "i8"), ("logprob", "f8"),
                  ("top_ids", "i8", MAX_TOP), ("top_logprobs", "f8", MAX_TOP)])
F32 = np.float32


class Kernel(Team):
    """sample_rows on a team of its own."""

    def draw(self, logits, draws, raw=None):
        """The records of all rows. A stray write is told by what lies around them, a stray read by the NaN after."""
        logits = with_nan_after(logits)
        raw = logits if raw is None else with_nan_after(raw)
        records = np.full((len(draws) + 2) * DRAWN.itemsize, 0xA5, np.uint8).view(DRAWN)
        self.call("sample_rows", logits, raw, *logits.shape, draws, records[1:])
        assert {*records[[0, -1]].tobytes()} == {0xA5}
        return records[1:-1]

    def sample(self, logits, params, seeds, choices, positions, raw=None):
        return [sampled(record) for record in self.draw(logits, pack(params, seeds, choices, positions), raw)]


def with_nan_after(logits):
    room = np.full(logits.size + 64, np.nan, F32)
    room[: logits.size] = logits.ravel()
    return room[: logits.size].reshape(logits.shape)


def pack(params, seeds, choices, positions):
    return np.array([(p.temperature, p.top_p, p.min_p, p.top_k, -1 if p.logprobs is None else p.logprobs, *place)
                     for p, *place in zip(params, choices, positions, seeds)], DRAW)


def sampled(record):
    token_id, finite, num_top, logprob, ids, logprobs = record.tolist()
    if num_top < 0:
        return Sampled(token_id, None, None, bool(finite))
    return Sampled(token_id, logprob, tuple(zip(list(ids)[:num_top], list(logprobs)[:num_top])), bool(finite))


@pytest.fixture(scope="module", params=[4, 8, 16], ids="lanes={}".format)
def kernel(request):
    with Kernel(request.param) as kernel:
        yield kernel


@functools.cache
def twin():
    return Sampler(ArrayBackend())


# ---- any parameters, any logits -------------------------------------------------------------------------------------


def random_params(rng, vocab):
    pick = lambda *values: values[rng.integers(len(values))]
    params = SamplingParams(
        temperature=float(pick(0, 1e-6, 1e-3, 0.3, 0.7, 1, 1, 1.3, 2)),
        top_k=pick(0, 0, 0, 1, 2, 5, 40, 300, vocab + 10),
        top_p=float(pick(1, 1, 1, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.9999999)),
        min_p=float(pick(0, 0, 0, 0, 1e-12, 0.001, 0.1, 0.5, 1)), logprobs=pick(None, None, 0, 1, 5, 20))
    if rng.random() < 0.1:
        object.__setattr__(params, "temperature", pick(10.0, 100.0))  # hotter than a request may ask for
    return params


def random_logits(rng, vocab):
    """Flat, likely, peaked, of few values, mostly forbidden, all the same, in order, one far above a flat rest, ..."""
    noise, ids = rng.standard_normal(vocab), np.arange(vocab)
    few = rng.random(vocab) < 0.01
    kinds = [noise * 0.01, noise, noise * 4, noise * 10, noise * 1e4, rng.integers(0, 4, vocab), np.full(vocab, 7),
             np.where(few | (ids == vocab // 3), noise * 3, -np.inf), few * 8 - rng.exponential(3, vocab),
             np.linspace(-30, 0, vocab), np.where(ids == vocab // 2, 12, noise * 1e-2), -np.exp(noise * 6),
             np.where(few, 0.0, -0.0)]
    return kinds[rng.integers(len(kinds))].astype(F32)


@functools.cache
def step_of(vocab, rows, seed=0):
    """Logits, parameters, seeds, choices, positions of unlike rows, and what the twin draws from them."""
    rng = np.random.default_rng([vocab, seed])
    step = (np.stack([random_logits(rng, vocab) for _ in range(rows)]),
            [random_params(rng, vocab) for _ in range(rows)], rng.integers(0, 2**64, rows, np.uint64).tolist(),
            rng.integers(0, 4, rows).tolist(), rng.integers(0, 2**31, rows).tolist())
    return step, twin().sample(*step)


def assert_agree(found, expected, logits):
    """The same tokens; logprobs to the rounding of float32 that their size and that of the sum's logarithm bring."""
    close = lambda a, b: a == b or abs(a - b) <= 2e-6 + 2**-23 * abs(b)
    kind = lambda row: (row.token_id, row.finite, row.logprob is None)
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert kind(one) == kind(other), row
        if other.logprob is None:
            assert one.top is other.top is None
            continue
        assert close(one.logprob, other.logprob) and len(one.top) == len(other.top), row
        for (id1, value1), (id2, value2) in zip(one.top, other.top):
            same = id1 == id2 or (value1 == value2 and abs(logits[row, id1] - logits[row, id2]) < 4e-6)
            assert same and close(value1, value2), row


@pytest.mark.parametrize("vocab, rows", [(1, 100), (2, 200), (17, 600), (64, 200), (320, 600), (1536, 300), (5000, 100),
                                         (49152, 12), (128256, 5), (300001, 2)])
def test_tokens_and_logprobs_are_the_array_twins(kernel, vocab, rows):
    step, expected = step_of(vocab, rows)
    before = step[0].copy()
    assert_agree(kernel.sample(*step), expected, before)
    assert np.array_equal(step[0], before)


OPTIONS = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999, "temperature": 2}, {"min_p": 0.02},
           {"top_k": 3000, "top_p": 0.95, "temperature": 1.5}, {"top_k": 200, "min_p": 1e-3, "top_p": 0.8}]


@functools.cache
def seeds_step(option, shape, rows=60):
    """Rows of the same logits for different uniform numbers, and what the twin draws from them."""
    rng = np.random.default_rng(5)
    logits = {"normal": rng.standard_normal(5000) * 3, "tied": rng.integers(0, 3, 5000),
              "peaked": np.where(np.arange(5000) == 77, 3, rng.standard_normal(5000) * 1e-3)}[shape].astype(F32)
    step = (np.repeat(logits[None], rows, 0), [SamplingParams(**OPTIONS[option])] * rows, [3] * rows, [0] * rows,
            range(rows))
    return step, twin().sample(*step)


@pytest.mark.parametrize("option", range(len(OPTIONS)))
@pytest.mark.parametrize("shape", ["normal", "tied", "peaked"])
def test_many_seeds_draw_the_array_twins_tokens(kernel, option, shape):
    step, expected = seeds_step(option, shape)
    found = kernel.sample(*step)
    assert_agree(found, expected, step[0])
    assert len({row.token_id for row in found}) > 10


# ---- the generator, distributions -----------------------------------------------------------------------------------


def test_uniform_numbers_are_the_generators(kernel):
    """Of 2^16 equal tokens the one is drawn that the first 16 bits of the uniform number say."""
    rng, rows = np.random.default_rng(0), 24
    seeds = np.concatenate((np.array([0, 2**64 - 1, 2**32, 2**32 - 1], np.uint64),
                            rng.integers(0, 2**64, rows - 4, np.uint64)))
    choices, positions = rng.integers(0, 128, rows), rng.integers(0, 2**31, rows)
    choices[0] = positions[0] = 0
    found = kernel.sample(np.zeros((rows, 2**16), F32), [SamplingParams()] * rows, seeds.tolist(), choices, positions)
    expected = philox_uniform(np, seeds, choices, positions) * 2**16
    assert [row.token_id for row in found] == expected.astype(int).tolist() and found[0].token_id == 0x6627


PROBABILITIES = np.array([0.05, 0.3, 0.1, 0.25, 0.02, 0.08, 0.2])  # in no order
LOGITS = np.log(PROBABILITIES).astype(F32)


def draw_many(kernel, logits, count, **options):
    step = pack([SamplingParams(**options)], [9], [0], [0]).repeat(count)
    step["position"] = np.arange(count)
    return kernel.draw(np.repeat(logits[None], count, 0), step)["token_id"]


def assert_distributed(tokens, weights):
    """Pearson's chi^2 exceeds df + 5 sqrt(2 df) by chance less than once in 10^4; below 5 expected it means nothing."""
    expected = len(tokens) * weights / weights.sum()
    counts, likely = np.bincount(tokens, minlength=len(weights)), expected > 0
    assert counts[~likely].sum() == 0 and expected[likely].min() >= 5
    degrees = likely.sum() - 1
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic <= degrees + 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_gives_its_distribution(kernel, temperature):
    assert_distributed(draw_many(kernel, LOGITS, 20_000, temperature=temperature), PROBABILITIES ** (1 / temperature))


@pytest.mark.parametrize("filters, kept", [
    ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 3, 6]), ({"top_k": 7}, range(7)), ({"top_k": 1000}, range(7)),
    ({"top_k": -1}, range(7)), ({"top_p": 0.29}, [1]), ({"top_p": 0.31}, [1, 3]), ({"top_p": 0.56}, [1, 3, 6]),
    ({"top_p": 0.999}, range(7)), ({"top_p": 1e-9}, [1]), ({"min_p": 0.2}, [1, 2, 3, 5, 6]), ({"min_p": 1}, [1]),
    ({"min_p": 0.7}, [1, 3]), ({"top_k": 3, "top_p": 0.7}, [1, 3]), ({"top_k": 2, "min_p": 0.2}, [1, 3]),
    ({"top_k": 5, "top_p": 0.99, "min_p": 0.5}, [1, 3, 6])], ids=str)
def test_filters_keep_exactly_their_tokens_in_proportion(kernel, filters, kept):
    weights = np.zeros(7)
    weights[list(kept)] = PROBABILITIES[list(kept)]
    assert_distributed(draw_many(kernel, LOGITS, 5_000, **filters), weights)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9999999}, {"top_k": 250}], ids=str)
def test_many_tokens_give_their_distribution(kernel, options):
    logits = (np.random.default_rng(0).standard_normal(300) * 0.5).astype(F32)
    weights = np.exp(logits.astype(np.float64))
    if "top_k" in options:
        weights[np.argsort(-logits, kind="stable")[250:]] = 0
    assert_distributed(draw_many(kernel, logits, 20_000, **options), weights)


def test_weights_are_exact_to_a_few_units_in_the_fourteenth_place(kernel):
    """min_p just below the weight of all tokens but the likeliest keeps them, just above it they are gone."""
    scaled, rows = np.linspace(-6, -0.01, 120), 120
    logits = np.full((rows, 8192), -1, F32)
    logits[:, 5] = 0
    for step, kept in ((-2e-14, True), (2e-14, False)):
        draws = pack([SamplingParams()] * rows, *([0] * rows,) * 3)  # uniform: 0.4, and the others weigh 20 or more
        draws["temperature"] = -1 / scaled
        draws["min_p"] = np.exp(-1 / draws["temperature"]) * (1 + step)
        assert ((kernel.draw(logits, draws)["token_id"] != 5) == kept).all()


# ---- ties, narrow parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, kept", [
    ({"top_k": 3}, 3), ({"top_k": 700}, 700), ({"top_p": 0.1}, 100), ({"top_p": 0.5}, 500), ({"min_p": 1}, 1000),
    ({"top_k": 300, "top_p": 0.5}, 150)], ids=str)
def test_equal_tokens_are_kept_by_id(kernel, options, kept):
    """A thousand are equal, and more than are sorted at once; exactly a tenth reaches top_p 0.1."""
    logits = np.full(3000, -20, F32)
    equal = np.sort(np.random.default_rng(0).permutation(3000)[:1000])
    logits[equal] = 7
    tokens = draw_many(kernel, logits, 1500, temperature=0.1, **options)
    assert set(tokens) <= set(equal[:kept].tolist()) and len(set(tokens)) > 0.6 * kept


@pytest.mark.parametrize("vocab", [7, 1536])
def test_greedy_is_the_first_maximum(kernel, vocab):
    logits = np.random.default_rng(0).standard_normal((6, vocab), F32)
    logits[1, [2, 5]] = 99
    logits[2] = 0
    logits[3] = -np.inf
    logits[3, 4] = -1e30
    logits[4] = np.where(np.arange(vocab) % 2, 0.0, -0.0)  # the same number
    logits[5, vocab - 1] = 3e38
    found = kernel.sample(logits, [GREEDY] * 6, [0] * 6, [0] * 6, [0] * 6)
    assert found == [Sampled(token_id, None, None, True) for token_id in logits.argmax(-1).tolist()]


@pytest.mark.parametrize("options", [
    {"temperature": 1e-6}, {"temperature": 1e-310}, {"temperature": 5e-324, "top_p": 0.5}, {"top_k": 1},
    {"top_p": 1e-9}, {"min_p": 1}, {"min_p": 1, "top_p": 0.5, "top_k": 9},
    {"temperature": 5e-324, "top_k": 9, "min_p": 1e-9}], ids=str)
def test_the_narrowest_parameters_are_greedy(kernel, options):
    logits = np.random.default_rng(0).standard_normal((8, 1536), F32) * 10
    found = kernel.sample(logits, [SamplingParams(**options)] * 8, range(8), [0] * 8, [0] * 8)
    assert [row.token_id for row in found] == logits.argmax(-1).tolist()


# ---- broken and extreme logits --------------------------------------------------------------------------------------

ANY_WAY = [GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1),
           SamplingParams(logprobs=3), SamplingParams(temperature=0.7, top_k=90, top_p=0.9, min_p=1e-9, logprobs=20)]


@pytest.mark.parametrize("vocab", [40, 64, 1537])
@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, "all -inf", "all nan"])
def test_broken_logits_are_told_and_leave_other_rows_alone(kernel, vocab, broken):
    params = [each for each in ANY_WAY for _ in range(3)]
    logits = np.random.default_rng(0).standard_normal((len(params), vocab), F32)
    places = [range(len(params)), [0] * len(params), [7] * len(params)]
    healthy = kernel.sample(logits, params, *places)
    logits[1::3, slice(None) if isinstance(broken, str) else vocab - 3] = float(str(broken).removeprefix("all "))
    found = kernel.sample(logits, params, *places)
    assert [row.finite for row in found] == [True, False, True] * len(ANY_WAY)
    assert [row.token_id for row in found[1::3]] == logits[1::3].argmax(-1).tolist()  # a NaN is the greatest
    assert all(np.isnan(row.logprob) and row.top == () for row in found[1::3] if row.logprob is not None)
    assert found[0::3] == healthy[0::3] and found[2::3] == healthy[2::3]


def test_the_only_token_that_is_not_forbidden_is_drawn(kernel):
    rng = np.random.default_rng(0)
    logits = np.full((len(ANY_WAY), 1536), -np.inf, F32)
    allowed = rng.integers(0, 1536, len(ANY_WAY))
    logits[np.arange(len(ANY_WAY)), allowed] = rng.standard_normal(len(ANY_WAY))
    found = kernel.sample(logits, ANY_WAY, *([0] * len(ANY_WAY),) * 3)
    assert [(row.token_id, row.finite) for row in found] == [(token_id, True) for token_id in allowed]
    assert found[-1].logprob == 0 and [value for _, value in found[-1].top] == [0] + [-np.inf] * 19


def test_the_widest_logits_are_drawn_as_by_the_twin(kernel):
    """Their differences overflow float32, or are the least that it has."""
    rng, rows = np.random.default_rng(0), 20
    for size in (3e38, 1e-38, 1e-44):
        logits = (rng.uniform(-size, size, (rows, 700))).astype(F32)
        step = logits, [ANY_WAY[row % 5] for row in range(rows)], range(rows), [0] * rows, [1] * rows
        assert_agree(kernel.sample(*step), twin().sample(*step), logits)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 1536, 5000])
def test_the_likeliest_tokens_come_in_order_and_equal_ones_by_id(kernel, vocab):
    rng, rows = np.random.default_rng(0), 21
    params = [SamplingParams(temperature=count % 2, logprobs=count) for count in range(rows)]
    shape = rows, vocab
    for logits in (rng.standard_normal(shape, F32) * 5, np.zeros(shape, F32), rng.integers(0, 2, shape).astype(F32),
                   np.tile(np.linspace(-9, 9, vocab, dtype=F32), (rows, 1))):
        wide = logits.astype(np.float64)
        expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        for count, row in enumerate(kernel.sample(logits, params, range(rows), [0] * rows, [0] * rows)):
            likeliest = np.argsort(-logits[count], kind="stable")[:count]
            assert [token_id for token_id, _ in row.top] == likeliest.tolist()
            found = [row.logprob, *(value for _, value in row.top)]
            assert np.abs(found - expected[count, [row.token_id, *likeliest]]).max() < 4e-6  # two roundings below 64


def test_logprobs_are_those_of_the_raw_logits(kernel):
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((30, 500), F32) * 3
    adjusted = raw + np.where(rng.random(raw.shape) < 0.1, rng.integers(-9, 9, raw.shape), 0).astype(F32)
    params = [SamplingParams(temperature=row % 3, top_k=row % 2 * 9, logprobs=row % 21) for row in range(30)]
    found = kernel.sample(adjusted, params, range(30), [0] * 30, [0] * 30, raw)
    drawn = twin().sample(adjusted, params, range(30), [0] * 30, [0] * 30)
    logprobs = twin()._logprobs(raw, np.array([row.token_id for row in drawn]),
                                [p.logprobs for p in params])
    assert_agree(found, [Sampled(row.token_id, *logprobs[i], True) for i, row in enumerate(drawn)], raw)
    assert any(row.top and row.token_id != row.top[0][0] for row, p in zip(found, params) if p.temperature == 0)


def test_more_logprobs_than_there_is_room_for_are_as_many_as_there_is(kernel):
    draws = pack([GREEDY], [0], [0], [0])
    draws["num_top"] = 1000
    assert kernel.draw(np.zeros((1, 50), F32), draws)["num_top"][0] == MAX_TOP


# ---- rows -----------------------------------------------------------------------------------------------------------


def bits(records):
    return [record.tobytes() for record in records]


@pytest.mark.parametrize("vocab, rows", [(320, 60), (5000, 20)])
def test_rows_depend_on_no_other_row_and_not_on_threads(kernel, vocab, rows):
    (logits, *step), _ = step_of(vocab, rows, 1)
    draws = pack(*step)
    together = bits(kernel.draw(logits, draws))
    order = np.random.default_rng(1).permutation(rows)
    assert bits(kernel.draw(logits[order], draws[order])) == [together[row] for row in order]
    assert [bits(kernel.draw(logits[row : row + 1], draws[row : row + 1]))[0] for row in range(rows)] == together
    for threads in (1, 3):
        with Kernel(kernel.lanes, threads) as other:
            assert bits(other.draw(logits, draws)) == together


def test_no_rows_are_nothing(kernel):
    assert kernel.sample(np.empty((0, 7), F32), [], [], [], []) == []
