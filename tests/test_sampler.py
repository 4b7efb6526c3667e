"""Sampler: the published generator, exact sets of allowed tokens, the right distribution, rows that share nothing."""
import numpy as np
import pytest
import strict_device
from harness import REFERENCES, need_compiler
from rustinfer import (ArrayBackend, CpuBackend, CpuSampler, EngineConfig, ModelConfig, Sampler, SamplingParams,
                       philox_uniform, pick_backend)

GREEDY = SamplingParams(temperature=0)
WORD = 0xFFFFFFFF


@pytest.fixture(scope="module")
def sampler():
    backend = ArrayBackend()
    yield Sampler(backend)
    backend.close()


def logits_of(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def draw(sampler, logits, params, count=1, seed=0, choice=0):
    """Token ids of `count` draws from one row of logits, at positions 0, 1, ..."""
    rows = np.repeat(logits[None], count, 0)
    drawn = sampler.sample(rows, [params] * count, [seed] * count, [choice] * count, range(count))
    return np.array([row.token_id for row in drawn])


# ---- the generator --------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 in plain integers, as in the paper (Salmon et al. 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ k, second & WORD, first >> 32 ^ d ^ m, first & WORD
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return a, b, c, d


@pytest.mark.parametrize("counter, key, expected", [  # the known answers that Random123 publishes
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))])
def test_the_plain_generator_gives_the_published_answers(counter, key, expected):
    assert philox(counter, key) == expected


def test_uniform_numbers_are_the_first_word_of_the_generator():
    rng = np.random.default_rng(0)
    edges = np.array([0, 2**64 - 1, 2**32, 2**32 - 1], np.uint64)
    seeds = np.concatenate((edges, rng.integers(0, 2**64, 200, np.uint64)))
    choices, positions = rng.integers(0, 128, len(seeds)), rng.integers(0, 2**31, len(seeds))
    choices[0] = positions[0] = 0
    found = philox_uniform(np, seeds, choices, positions)
    for uniform, seed, choice, position in zip(found, seeds.tolist(), choices.tolist(), positions.tolist()):
        word = philox((position, choice, 0, 0), (seed & WORD, seed >> 32))[0]
        assert uniform == (word + 0.5) / 2**32
    assert found[0] == (0x6627E8D5 + 0.5) / 2**32 and found.dtype == np.float64 and 0 < found.min() and found.max() < 1


def test_uniform_numbers_are_uniform_over_each_of_their_arguments():
    count, zeros = 20_000, np.zeros(20_000, np.int64)
    for arguments in ((np.arange(count, dtype=np.uint64), zeros, zeros),
                      (zeros.astype(np.uint64), np.arange(count), zeros),
                      (zeros.astype(np.uint64), zeros, np.arange(count))):
        counts = np.histogram(philox_uniform(np, *arguments), 50, (0, 1))[0]
        assert chi_square(counts, np.full(50, 1 / 50)) < 1
    assert len(set(philox_uniform(np, *arguments))) > count - 3


# ---- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_is_the_first_maximum(sampler):
    logits = np.random.default_rng(0).standard_normal((7, 333), np.float32)
    logits[3, [5, 9]] = 99
    drawn = sampler.sample(logits, [GREEDY] * 7, range(7), [0] * 7, range(7))
    assert [row.token_id for row in drawn] == logits.argmax(-1).tolist() and drawn[3].token_id == 5
    assert all(row.finite and row.logprob is None and row.top is None for row in drawn)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_the_least_temperatures_are_greedy(sampler, temperature, filters):
    logits = np.random.default_rng(0).standard_normal(50, np.float32) * 10
    params = SamplingParams(temperature=temperature, **filters)
    assert set(draw(sampler, logits, params, 20)) == {logits.argmax()}


# ---- distributions --------------------------------------------------------------------------------------------------


def chi_square(counts, probabilities):
    """Pearson's statistic over its limit: chi^2 exceeds df + 5 sqrt(2 df) by chance less than once in 10^4."""
    expected = counts.sum() * probabilities
    assert counts[expected == 0].sum() == 0 and expected[expected > 0].min() >= 5  # below 5 the statistic means nothing
    statistic = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    degrees = (expected > 0).sum() - 1
    return statistic / (degrees + 5 * np.sqrt(2 * degrees))


PROBABILITIES = np.array([0.05, 0.3, 0.1, 0.25, 0.02, 0.08, 0.2])  # in no order


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_gives_its_distribution(sampler, temperature):
    expected = PROBABILITIES ** (1 / temperature)
    drawn = draw(sampler, logits_of(*PROBABILITIES), SamplingParams(temperature=temperature), 20_000)
    assert chi_square(np.bincount(drawn, minlength=7), expected / expected.sum()) < 1


@pytest.mark.parametrize("filters, kept", [
    ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 3, 6]), ({"top_k": 7}, range(7)), ({"top_k": 1000}, range(7)),
    ({"top_k": -1}, range(7)),
    ({"top_p": 0.29}, [1]), ({"top_p": 0.31}, [1, 3]), ({"top_p": 0.56}, [1, 3, 6]), ({"top_p": 0.999}, range(7)),
    ({"top_p": 1e-9}, [1]),
    ({"min_p": 0.2}, [1, 2, 3, 5, 6]), ({"min_p": 1}, [1]), ({"min_p": 0.7}, [1, 3]),
    ({"top_k": 3, "top_p": 0.7}, [1, 3]), ({"top_k": 2, "min_p": 0.2}, [1, 3]),
    ({"top_k": 5, "top_p": 0.99, "min_p": 0.5}, [1, 3, 6])])
def test_filters_keep_exactly_their_tokens_in_proportion(sampler, filters, kept):
    """top_p counts what top_k and min_p leave: 0.3 and 0.25 of the three likeliest are 0.733 of their sum."""
    expected = np.zeros(7)
    expected[list(kept)] = PROBABILITIES[list(kept)]
    drawn = draw(sampler, logits_of(*PROBABILITIES), SamplingParams(**filters), 5_000)
    assert set(drawn) == set(kept)
    assert len(kept) == 1 or chi_square(np.bincount(drawn, minlength=7), expected / expected.sum()) < 1


def test_filters_work_on_the_tempered_distribution(sampler):
    # the second is to the first as 0.25 / 0.3: 0.1615 to the 10th; the fifth as 0.08 / 0.3: 0.516 under the root
    for temperature, kept in ((0.1, {1, 3}), (2.0, {1, 2, 3, 5, 6})):
        drawn = draw(sampler, logits_of(*PROBABILITIES),
                     SamplingParams(temperature=temperature, min_p=0.16 if temperature < 1 else 0.5), 3000)
        assert set(drawn) == kept


def test_ties_are_kept_by_token_id(sampler):
    logits = np.random.default_rng(0).integers(0, 3, 1000).astype(np.float32)
    assert set(draw(sampler, logits, SamplingParams(top_k=3), 500)) == set(np.flatnonzero(logits == 2)[:3].tolist())
    assert set(draw(sampler, np.zeros(8, np.float32), SamplingParams(top_p=0.5), 500)) == {0, 1, 2, 3}  # 4 reach it


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.99}])
def test_forbidden_tokens_are_never_drawn(sampler, filters):
    logits = logits_of(0, 0.5, 0, 0.5, 0, 0)
    assert set(draw(sampler, logits, SamplingParams(**filters), 500)) == {1, 3}
    assert all(row.finite for row in sampler.sample(logits[None], [SamplingParams(**filters)], [0], [0], [0]))


def test_a_large_vocabulary_gives_its_distribution(sampler):
    logits = np.random.default_rng(0).standard_normal(20_000, np.float32)
    weights = np.exp(logits.astype(np.float64))
    for params in (SamplingParams(), SamplingParams(top_p=0.9999999)):
        drawn = draw(sampler, logits, params, 200)
        place = np.cumsum(weights)[drawn] / weights.sum()  # uniform in 0 to 1
        assert 0.4 < place.mean() < 0.6 and len(set(drawn)) > 190  # mean of 200: 0.5, deviation 0.02


# ---- penalties and biases -------------------------------------------------------------------------------------------


def choose(sampler, logits, params, prompt=(), output=()):
    """The token of one row and its record."""
    [row] = sampler.sample(np.array([logits], np.float32), [params], [0], [0], [0], [(prompt, output)])
    return row


@pytest.mark.parametrize("options, prompt, output, expected", [
    ({}, [0], [0], 0),
    ({"repetition_penalty": 1.5}, [0], [], 1), ({"repetition_penalty": 1.5}, [], [0], 1),  # 4 / 1.5 < 3
    ({"repetition_penalty": 1.2}, [0], [0], 0), ({"repetition_penalty": 1.2}, [0, 0], [0, 0], 0),  # 3.33 however often
    ({"repetition_penalty": 0.5}, [2], [], 0), ({"repetition_penalty": 0.5}, [1], [], 1),  # -2 becomes -1, 3 becomes 6
    ({"presence_penalty": 1.5}, [0], [], 0), ({"presence_penalty": 1.5}, [], [0], 1),  # the prompt does not count
    ({"presence_penalty": 0.9}, [], [0, 0, 0], 0), ({"presence_penalty": -2}, [], [1], 1),
    ({"frequency_penalty": 0.6}, [], [0], 0), ({"frequency_penalty": 0.6}, [0, 0], [0, 0], 1),  # 4 - 2 * 0.6 < 3
    ({"frequency_penalty": 0.6, "presence_penalty": 0.5}, [], [0], 1),  # 4 - 0.6 - 0.5 < 3
    ({"repetition_penalty": 2, "presence_penalty": -1.5}, [], [0], 0),  # 4 / 2 + 1.5 > 3, but (4 + 1.5) / 2 is not
    ({"logit_bias": {2: 6}}, [], [], 0), ({"logit_bias": {2: 6.1}}, [], [], 2), ({"logit_bias": {0: -100}}, [], [], 1),
    ({"repetition_penalty": 2, "logit_bias": {0: 1.5}}, [0], [], 0)])  # 4 / 2 + 1.5 > 3: the bias comes last
def test_penalties_and_biases_change_the_choice(sampler, options, prompt, output, expected):
    for temperature in (0, 1e-6):
        for filters in ({}, {"top_k": 2}):
            params = SamplingParams(temperature=temperature, **filters, **options)
            assert choose(sampler, [4, 3, -2], params, prompt, output).token_id == expected


def test_penalties_and_biases_shape_the_distribution(sampler):
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=1.5, logit_bias={3: 1})
    logits = np.array([2, 1.5, -1, 0, 0.5], np.float32)
    expected = np.exp([2 / 1.5 - 2 * 0.5 - 0.25, 1.5 / 1.5, -1 * 1.5 - 0.5 - 0.25, 1, 0.5])
    count, history = 20_000, ([1, 1], [0, 2, 0])
    drawn = sampler.sample(np.repeat(logits[None], count, 0), [params] * count, [0] * count, [0] * count, range(count),
                           [history] * count)
    counts = np.bincount([row.token_id for row in drawn], minlength=5)
    assert chi_square(counts, expected / expected.sum()) < 1


def test_logprobs_are_those_of_the_logits_before_penalties_and_biases(sampler):
    logits = [4, 3, -2]
    plain = choose(sampler, logits, SamplingParams(temperature=0, logprobs=3))
    changed = choose(sampler, logits, SamplingParams(temperature=0, logprobs=3, logit_bias={2: 50},
                                                     repetition_penalty=3), [0], [1])
    assert changed.token_id == 2 and changed.top == plain.top and changed.logprob == dict(plain.top)[2]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("repetition", [1e-40, 1e-300])
def test_the_least_repetition_penalty_keeps_logits_finite(sampler, repetition):
    row = choose(sampler, [1, 2, -3, 0], SamplingParams(repetition_penalty=repetition, logit_bias={1: 1}), [0, 1], [2])
    assert row.finite and row.token_id in (0, 1)


def test_no_bias_brings_a_forbidden_token_back(sampler):
    params = SamplingParams(logit_bias={0: 100}, repetition_penalty=0.1, presence_penalty=-2)
    row = choose(sampler, [-np.inf, 0, 0], params, [0], [0])
    assert row.finite and row.token_id in (1, 2)


# ---- rows -----------------------------------------------------------------------------------------------------------


def random_step(rows, seed=0):
    """Logits, parameters, seeds, choices, positions and histories of unlike rows."""
    rng = np.random.default_rng(seed)
    params = [SamplingParams(temperature=float(rng.choice([0, 0.3, 1, 2])), top_k=int(rng.choice([0, 1, 20])),
                             top_p=float(rng.choice([0.5, 1])), min_p=float(rng.choice([0, 0.1])),
                             presence_penalty=float(rng.choice([0, 1])), frequency_penalty=float(rng.choice([0, -1])),
                             repetition_penalty=float(rng.choice([1, 1.3])), logit_bias=[{}, {3: 5}][rng.integers(2)],
                             logprobs=[None, 0, 5][rng.integers(3)]) for _ in range(rows)]
    histories = [(rng.integers(0, 300, 40).tolist(), rng.integers(0, 300, 90).tolist()) for _ in range(rows)]
    return (rng.standard_normal((rows, 300), np.float32) * 3, params, rng.integers(0, 2**63, rows).tolist(),
            rng.integers(0, 4, rows).tolist(), rng.integers(0, 1000, rows).tolist(), histories)


def test_rows_depend_on_no_other_row(sampler):
    step = random_step(40)
    together = sampler.sample(*step)
    alone = [sampler.sample(*(column[row : row + 1] for column in step))[0] for row in range(40)]
    order = np.random.default_rng(1).permutation(40)
    mixed = sampler.sample(step[0][order], *([column[row] for row in order] for column in step[1:]))
    assert together == alone and mixed == [together[row] for row in order]


def test_a_device_draws_what_the_host_draws(sampler):
    step = random_step(40)
    backend = ArrayBackend(strict_device)
    assert Sampler(backend).sample(strict_device.asarray(step[0]), *step[1:]) == sampler.sample(*step)
    backend.close()


def test_the_same_seed_draws_the_same_and_another_does_not(sampler):
    logits = np.zeros(1000, np.float32)
    first = draw(sampler, logits, SamplingParams(), 50, seed=7)
    assert np.array_equal(first, draw(sampler, logits, SamplingParams(), 50, seed=7))
    for other in ({"seed": 8}, {"seed": 7 + 2**32}, {"seed": 7, "choice": 1}):
        assert (first == draw(sampler, logits, SamplingParams(), 50, **other)).mean() < 0.1


def test_logits_are_not_changed(sampler):
    step = random_step(10)
    before = step[0].copy()
    sampler.sample(*step)
    assert np.array_equal(step[0], before)


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_plain_distribution_and_sum_to_one(sampler):
    logits = np.random.default_rng(0).standard_normal((3, 20), np.float32) * 5
    params = [SamplingParams(logprobs=20), SamplingParams(temperature=0.2, top_k=2, logprobs=20),
              SamplingParams(temperature=0, logprobs=20)]
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    for row, drawn in enumerate(sampler.sample(logits, params, [1, 2, 3], [0] * 3, [0] * 3)):
        assert abs(sum(np.exp(value) for _, value in drawn.top) - 1) < 1e-5  # 20 roundings of 2^-24
        assert abs(drawn.logprob - expected[row, drawn.token_id]) < 1e-5
        assert all(abs(value - expected[row, token_id]) < 1e-5 for token_id, value in drawn.top)
        assert dict(drawn.top)[drawn.token_id] == drawn.logprob


@pytest.fixture(scope="module", params=["numpy", "kernels"])
def any_sampler(request):
    """The specification and the sampler of the C kernels."""
    off = request.param == "numpy"
    off or need_compiler()
    config = EngineConfig(device="cpu", cpu_kernels="off" if off else "auto")
    backend, reason = pick_backend(config, ModelConfig.load(REFERENCES / "llama3-tied"))
    assert off or isinstance(backend, CpuBackend), reason
    yield (Sampler if off else CpuSampler)(backend)
    backend.close()


def distribution(kind, size):
    rng = np.random.default_rng(3)
    return {"flat": np.zeros(size), "even": np.full(size, -31.7), "normal": rng.standard_normal(size) * 3,
            "wide": rng.standard_normal(size) * 30, "peaked": np.where(np.arange(size) == size // 3, 60, 0),
            "nearly peaked": np.where(np.arange(size) == size // 3, 10, rng.standard_normal(size)),
            "high": rng.standard_normal(size) + 200}[kind].astype(np.float32)


def forced_logprobs(sampler, logits, token_ids):
    """The log-probability of each of these tokens where it is the only one allowed."""
    found, params = [], SamplingParams(temperature=0, logprobs=0)
    for start in range(0, len(token_ids), 32):
        given = token_ids[start : start + 32]
        masks = [np.arange(len(logits)) == token_id for token_id in given]
        rows, none = np.repeat(logits[None], len(given), 0), [0] * len(given)
        drawn = sampler.sample(rows, [params] * len(given), none, none, none, masks=masks)
        assert [row.token_id for row in drawn] == list(given)
        assert [row.logprob for row in sampler.score(rows, given, none)] == pytest.approx(
            [row.logprob for row in drawn], abs=1e-4)
        found += [row.logprob for row in drawn]
    return np.array(found)


KINDS = ["flat", "even", "normal", "wide", "peaked", "nearly peaked", "high"]


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one_over_the_vocabulary(any_sampler, kind):
    logprobs = forced_logprobs(any_sampler, distribution(kind, 777), np.arange(777))
    assert abs(np.exp(logprobs).sum() - 1) < 1e-5 and logprobs.max() <= 0


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one_over_a_large_vocabulary(any_sampler, kind):
    """A row's log-probabilities are its logits less one number; what some tokens say of it holds for all.

    Those above e^-30 say it: below, the rounding of a float32 is larger than what the token adds to the sum.
    """
    logits = distribution(kind, 128_256)
    some = np.unique([*np.random.default_rng(0).integers(0, len(logits), 60), *np.argsort(logits)[-20:]])
    logprobs, logits = forced_logprobs(any_sampler, logits, some), logits.astype(np.float64)
    numbers = (logits[some] - logprobs)[logprobs > -30]
    for number in (numbers.min(), numbers.max()):
        assert abs(np.exp(logits - number).sum() - 1) < 1e-5


def test_the_likeliest_tokens_come_in_order(sampler):
    logits = np.random.default_rng(0).standard_normal(5000, np.float32)
    for k in (0, 1, 5, 20):
        [drawn] = sampler.sample(logits[None], [SamplingParams(temperature=0, logprobs=k)], [0], [0], [0])
        assert [token_id for token_id, _ in drawn.top] == np.argsort(-logits, kind="stable")[:k].tolist()
        assert [value for _, value in drawn.top] == sorted((value for _, value in drawn.top), reverse=True)


def test_equally_likely_tokens_come_by_token_id(sampler):
    logits = np.random.default_rng(0).integers(0, 3, 1000).astype(np.float32)
    for k in (1, 5, 20):
        [drawn] = sampler.sample(logits[None], [SamplingParams(temperature=0, logprobs=k)], [0], [0], [0])
        assert [token_id for token_id, _ in drawn.top] == np.flatnonzero(logits == 2)[:k].tolist()
        assert drawn.top[0] == (drawn.token_id, drawn.logprob)


def test_more_logprobs_than_tokens_are_all_tokens(sampler):
    [drawn] = sampler.sample(np.zeros((1, 3), np.float32), [SamplingParams(logprobs=20)], [0], [0], [0])
    assert [token_id for token_id, _ in drawn.top] == [0, 1, 2]


# ---- broken logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params",
                         [GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5, min_p=0.1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, [-np.inf] * 40, [np.nan] * 40])
def test_broken_logits_are_told_and_leave_other_rows_alone(sampler, params, value):
    """A NaN anywhere, not only at the token that was drawn, means that the model is broken."""
    logits = np.random.default_rng(0).standard_normal((3, 40), np.float32)
    healthy = sampler.sample(logits, [params] * 3, [0] * 3, [0] * 3, range(3))
    logits[1, slice(None) if isinstance(value, list) else 33] = value
    drawn = sampler.sample(logits, [params] * 3, [0] * 3, [0] * 3, range(3))
    assert [row.finite for row in drawn] == [True, False, True] and 0 <= drawn[1].token_id < 40
    assert drawn[0] == healthy[0] and drawn[2] == healthy[2]
