"""sample.cu, run on the CPU: it draws the tokens of `Sampler`, and leaves the card ready for the next step."""
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import cuda_cpu
import numpy as np
import pytest
from cuda_cpu import RawModule

from harness import ROOT
from rustinfer import ArrayBackend, Sampled, Sampler, SamplingParams, pack_bits, philox_uniform

pytestmark = pytest.mark.skipif(cuda_cpu.why_not() is not None, reason=str(cuda_cpu.why_not()))

VOCABS = [1, 7, 100, 1536, 5000]
DIMS = dict(HIDDEN=192, INTER=512, HEADS=6, KV_HEADS=2, HEAD_DIM=32, BLOCK_SIZE=16)
RING, RECORD, MAX_BIAS, UNTOUCHED = 4, 44, 300, -77
GREEDY = SamplingParams(temperature=0)
I32 = np.int32


def build(vocab, mode="fast"):
    options = tuple(f"-D{name}={value}" for name, value in (DIMS | {"VOCAB": vocab}).items())
    return RawModule(path=ROOT / "kernels" / "sample.cu", options=options, mode=mode, seed=int(mode != "fast"))


@pytest.fixture(scope="module")
def modules():
    """{(vocab, mode): future of the module}, compiled side by side while the first tests run."""
    pool = ThreadPoolExecutor(2)
    wanted = [*((vocab, "fast") for vocab in (*VOCABS, 140_001, 270_003)), (2500, "check"), (2500, "init")]
    yield {key: pool.submit(build, *key) for key in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def sampler():
    backend = ArrayBackend()
    yield Sampler(backend)
    backend.close()


@dataclasses.dataclass
class Drawer:
    """What is drawn for one sequence: its parameters and the tokens so far; the next one comes at their end."""

    params: SamplingParams
    seed: int
    choice: int = 0
    prompt: list = dataclasses.field(default_factory=list)
    output: list = dataclasses.field(default_factory=list)
    mask: np.ndarray | None = None  # (V,) bool: the tokens that may come

    @property
    def position(self):
        return len(self.prompt) + len(self.output)


def draw(sampler, logits, drawers):
    """The tokens of the array twin."""
    return sampler.sample(logits, *zip(*((d.params, d.seed, d.choice, d.position) for d in drawers)),
                          [(d.prompt, d.output) for d in drawers], [d.mask for d in drawers])


class Card:
    """The seats' state, and the launches that the host makes."""

    def __init__(self, module, vocab, num_seats=80, max_rows=70):
        self.module, self.vocab, self.num_seats, self.max_rows = module, vocab, num_seats, max_rows
        self.num_slices = -(-vocab // (128 * -(-vocab // 131072)))
        self.floats, self.ints = np.zeros((num_seats, 8), np.float32), np.zeros((num_seats, 8), I32)
        self.bias_ids = np.full((num_seats, MAX_BIAS), UNTOUCHED, I32)
        self.bias_values = np.full((num_seats, MAX_BIAS), np.nan, np.float32)
        self.counts = np.full((num_seats, vocab), 0xFFFF, np.uint16)
        self.masks = np.zeros((num_seats, -(-vocab // 32)), np.uint32)  # who has none and obeys it may say nothing
        self.slices = np.full((max_rows, self.num_slices, 4), 0xFFFFFFFF, np.uint32)
        self.records = np.full((RING, max_rows, RECORD), UNTOUCHED, I32)
        self.scores = np.full((max_rows, RECORD), UNTOUCHED, I32)
        self.ring, self.ticket = np.zeros(1, I32), np.zeros(1, np.uint32)
        self.last_token, self.next_position = np.full(num_seats, UNTOUCHED, I32), np.full(num_seats, UNTOUCHED, I32)

    def run(self, name, grid, block, *args):
        self.module.get_function(name)(grid, (block,), args)

    def sit(self, seat, drawer):
        """What the host sends when a sequence takes a seat."""
        p = drawer.params
        self.floats[seat] = (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty,
                             p.frequency_penalty, 0, 0)
        seed = np.array([drawer.seed % 2**64], np.uint64).view(I32)
        num_logprobs = -1 if p.logprobs is None else p.logprobs
        self.ints[seat] = (p.top_k, num_logprobs, drawer.choice, *seed, len(p.logit_bias), p.has_penalties,
                           drawer.mask is not None)
        if drawer.mask is not None:
            self.masks[seat] = pack_bits(drawer.mask)
        for place, (token_id, value) in enumerate(p.logit_bias):
            self.bias_ids[seat, place], self.bias_values[seat, place] = token_id, value
        if p.has_penalties:
            self.reset(seat, drawer.prompt, drawer.output)

    def reset(self, seat, prompt, output):
        token_ids = np.array([*prompt, *output, 0], I32)
        self.run("reset_counts", (-(-self.vocab // 2048),), 256, self.counts, I32(seat), token_ids, I32(len(prompt)),
                 I32(len(prompt) + len(output)))

    def launch(self, logits, seats, positions, row_tokens=None):
        seats, positions = np.array(seats, I32), np.array(positions, I32)
        parameters = (self.floats, self.ints, self.bias_ids, self.bias_values)
        self.run("sample_scan", (-(-self.num_slices // 8), len(seats)), 256, self.slices, logits, seats, *parameters,
                 self.counts, self.masks, I32(self.num_seats))
        self.run("sample_draw", (len(seats),), 512, self.records, self.ring, self.ticket, self.last_token,
                 self.next_position, self.counts, self.slices, logits, seats, row_tokens, positions, *parameters,
                 self.masks, I32(self.num_seats), I32(self.max_rows))

    def score(self, logits, token_ids, num_top):
        """Each row's token as if it had been drawn."""
        self.run("score", (len(logits),), 512, self.scores, self.slices, logits, np.array(token_ids, I32),
                 np.array(num_top, I32))
        return [self.read(record) for record in self.scores[: len(logits)]]

    @staticmethod
    def read(record):
        """A record as the host reads it."""
        token_id, finite, _, count = record[:4].tolist()
        floats = record.view(np.float32)
        if count < 0:
            return Sampled(token_id, None, None, bool(finite))
        top = tuple(zip(record[4 : 4 + count].tolist(), floats[24 : 24 + count].tolist()))
        return Sampled(token_id, float(floats[2]), top, bool(finite))

    def draw(self, logits, drawers, seats=None):
        """One token for each, seated one after the other."""
        seats = range(len(drawers)) if seats is None else seats
        for seat, drawer in zip(seats, drawers):
            self.sit(seat, drawer)
        self.ring[:] = 0
        self.launch(logits, seats, [drawer.position - 1 for drawer in drawers])
        return [self.read(self.records[0, row]) for row in range(len(drawers))]


@pytest.fixture
def card(modules, request):
    return Card(modules[request.param, "fast"].result(), request.param)


def for_vocabs(*vocabs):
    return pytest.mark.parametrize("card", vocabs, indirect=True)


def agrees(found, expected):
    """The same token; logprobs to some roundings of float32, the likeliest in the same order. Both may be broken."""
    if not found.finite and not expected.finite:
        return True  # what a mask leaves of mostly forbidden logits may be nothing
    close = lambda a, b: a == b or abs(a - b) < 2e-6 * (1 + abs(b))
    key = lambda row: (row.token_id, row.finite, row.logprob is None, row.top and len(row.top))
    return key(found) == key(expected) and (found.logprob is None or close(found.logprob, expected.logprob) and all(
        (id1 == id2 or a == b) and close(a, b) for (id1, a), (id2, b) in zip(found.top, expected.top)))


def neighbours(sampler, logits, drawer):
    """The tokens of the twin when weights are off by float32: the uniform number and the filters moved by 2e-6."""
    p, found = drawer.params, set()
    logits = sampler._forbid(sampler._adjust(logits[None], [p], [(drawer.prompt, drawer.output)]), [drawer.mask])
    uniform = philox_uniform(np, np.array([drawer.seed], np.uint64), np.array([drawer.choice]),
                             np.array([drawer.position]))
    filtered = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    for step in (-2e-6, 0, 2e-6):
        for filter_step in (-2e-6, 0, 2e-6) if filtered else (0,):
            near = dataclasses.replace(p, min_p=min(p.min_p * (1 + filter_step), 1),
                                       top_p=p.top_p if p.top_p == 1 else min(p.top_p * (1 + filter_step), 1 - 1e-12))
            method = sampler._draw_filtered if filtered else sampler._draw
            found.add(int(method(logits, [near], np.clip(uniform + step, 0, 1 - 1e-12))[0]))
    return found


def check_all(sampler, logits, drawers, found):
    """Every row agrees with the twin, or its number lay at the border of two tokens; returns how many did."""
    borders = 0
    for row, (one, other) in enumerate(zip(found, draw(sampler, logits, drawers))):
        if not agrees(one, other):
            assert one.token_id in neighbours(sampler, logits[row], drawers[row]), (row, one, other, drawers[row])
            borders += 1
    return borders


# ---- any parameters, any logits -------------------------------------------------------------------------------------


def random_params(rng, vocab):
    pick = lambda *values: values[rng.integers(len(values))]
    biased = rng.integers(0, vocab, pick(0, 0, 0, 1, 40, 600))[:MAX_BIAS].tolist()
    return SamplingParams(
        temperature=float(pick(0, 1e-3, 0.3, 0.7, 1, 1, 1.3, 2)), top_k=int(pick(0, 0, 1, 2, 5, 40, 300, vocab + 10)),
        top_p=float(pick(1, 1, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.9999999)),
        min_p=float(pick(0, 0, 0, 1e-12, 0.001, 0.1, 0.5, 1)), presence_penalty=float(pick(0, 0, 0, -1.5, 2)),
        frequency_penalty=float(pick(0, 0, 0, 0.7, -2)), repetition_penalty=float(pick(1, 1, 1, 1.3, 0.5, 10)),
        logit_bias={token_id: float(rng.uniform(-100, 100)) for token_id in biased},
        logprobs=pick(None, None, 0, 1, 5, 20))


def random_logits(rng, vocab):
    """Flat, likely, peaked, of few values, mostly forbidden, all the same."""
    noise = rng.standard_normal(vocab)
    few = rng.random(vocab) < 0.01
    return rng.choice([noise * 0.01, noise, noise * 4, noise * 10, rng.integers(0, 4, vocab), np.zeros(vocab),
                       np.where(few | (np.arange(vocab) == vocab // 3), noise * 3, -np.inf),
                       few * 8 - rng.exponential(3, vocab)]).astype(np.float32)


def random_drawer(rng, vocab, params=None):
    tokens = lambda most: rng.integers(0, vocab, rng.integers(1, most)).tolist()
    return Drawer(params or random_params(rng, vocab), int(rng.integers(2**64, dtype=np.uint64)), int(rng.integers(4)),
                  tokens(60), tokens(90))


def random_mask(rng, vocab):
    """None; half, some, one, or a range of the tokens; all but one; all."""
    place, ids = rng.integers(vocab), np.arange(vocab)
    masks = [None, None, rng.random(vocab) < 0.5, rng.random(vocab) < 0.01, ids == place,
             (ids >= place) & (ids < place + 40), ids != place, ids >= 0]
    mask = masks[rng.integers(len(masks))]
    return None if mask is None or not mask.any() else mask


def random_step(rng, vocab, rows):
    drawers = [random_drawer(rng, vocab) for _ in range(rows)]
    for drawer in drawers:
        drawer.mask = random_mask(rng, vocab)
    return np.stack([random_logits(rng, vocab) for _ in range(rows)]), drawers


@for_vocabs(*VOCABS)
def test_tokens_and_logprobs_are_the_array_twins(card, sampler):
    """But where the uniform number lies within float32's error of the border of two tokens, which is rare."""
    rng, borders, rows = np.random.default_rng(card.vocab), 0, 60
    steps = 2 if card.vocab < 100 else 4
    for _ in range(steps):
        logits, drawers = random_step(rng, card.vocab, rows)
        before = logits.copy()
        borders += check_all(sampler, logits, drawers, card.draw(logits, drawers))
        assert np.array_equal(logits, before, equal_nan=True)
    assert borders <= 1  # of 240; there was 1 in 50,000 such rows


@for_vocabs(5000)
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999, "temperature": 2},
                                     {"min_p": 0.02}, {"top_k": 2000, "top_p": 0.95, "temperature": 1.5}])
def test_many_seeds_draw_the_array_twins_tokens(card, sampler, options):
    rng = np.random.default_rng(5)
    logits = np.repeat((rng.standard_normal(card.vocab) * 3).astype(np.float32)[None], 60, 0)
    drawers = [random_drawer(rng, card.vocab, SamplingParams(**options)) for _ in logits]
    found = card.draw(logits, drawers)
    assert check_all(sampler, logits, drawers, found) <= 1 and len({row.token_id for row in found}) > 10


@pytest.mark.parametrize("mode", ["check", "init"])
def test_nothing_is_read_before_it_is_written_and_no_threads_race(modules, sampler, mode):
    rng, card = np.random.default_rng(0), Card(modules[2500, mode].result(), 2500)
    logits, drawers = random_step(rng, 2500, 24)
    assert check_all(sampler, logits, drawers, card.draw(logits, drawers)) == 0


# ---- greedy, ties, broken logits ------------------------------------------------------------------------------------


@for_vocabs(7, 1536)
def test_greedy_is_the_first_maximum(card):
    logits = np.random.default_rng(0).standard_normal((6, card.vocab), np.float32)
    logits[1, [2, 5]] = 99
    logits[2] = 0
    logits[3] = -np.inf
    logits[3, 4] = -1e30
    logits[4] = np.where(np.arange(card.vocab) % 2, 0.0, -0.0)  # the same number
    logits[5, card.vocab - 1] = 3e38
    found = card.draw(logits, [Drawer(GREEDY, 0, prompt=[0])] * 6)
    assert [row.token_id for row in found] == logits.argmax(-1).tolist()
    assert all(row.finite and row.logprob is None and row.top is None for row in found)


@for_vocabs(100, 5000)
@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_k": 70}, {"top_p": 0.1}, {"top_p": 0.7}, {"min_p": 1}, {}])
def test_equal_tokens_are_ranked_by_id(card, sampler, options):
    rng = np.random.default_rng(1)
    logits = rng.integers(0, 3, (30, card.vocab)).astype(np.float32)
    logits[10:20] = 7  # a tenth of them is exactly top_p 0.1
    drawers = [random_drawer(rng, card.vocab, SamplingParams(**options)) for _ in logits]
    assert check_all(sampler, logits, drawers, card.draw(logits, drawers)) == 0


@for_vocabs(1536)
@pytest.mark.parametrize("options", [
    {"temperature": 1e-6}, {"temperature": 1e-40}, {"temperature": 5e-324, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-9},
    {"min_p": 1}, {"min_p": 1, "top_p": 0.5, "top_k": 9}])
def test_the_narrowest_parameters_are_greedy(card, options):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8, card.vocab), np.float32) * 10
    drawers = [random_drawer(rng, card.vocab, SamplingParams(**options)) for _ in logits]
    assert [row.token_id for row in card.draw(logits, drawers)] == logits.argmax(-1).tolist()


ANY_WAY = [GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1),
           SamplingParams(logprobs=3, repetition_penalty=1.5, logit_bias={3: 50})]


@for_vocabs(100)
@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, [-np.inf] * 100, [np.nan] * 100])
def test_broken_logits_are_told_and_leave_other_rows_alone(card, broken):
    rng, rows = np.random.default_rng(0), 3 * len(ANY_WAY)
    logits = rng.standard_normal((rows, 100), np.float32)
    drawers = [random_drawer(rng, 100, params) for params in ANY_WAY for _ in range(3)]
    healthy = card.draw(logits, drawers)
    logits[1::3, slice(None) if isinstance(broken, list) else 33] = broken
    found = card.draw(logits, drawers)
    assert [row.finite for row in found] == [True, False, True] * len(ANY_WAY)
    assert all(0 <= row.token_id < 100 for row in found)
    assert found[0::3] == healthy[0::3] and found[2::3] == healthy[2::3]


@for_vocabs(1536)
def test_the_only_token_that_is_not_forbidden_is_drawn(card):
    rng = np.random.default_rng(0)
    logits = np.full((len(ANY_WAY), card.vocab), -np.inf, np.float32)
    allowed = rng.integers(0, card.vocab, len(ANY_WAY))
    logits[np.arange(len(ANY_WAY)), allowed] = rng.standard_normal(len(ANY_WAY))
    found = card.draw(logits, [random_drawer(rng, card.vocab, params) for params in ANY_WAY])
    assert [(row.token_id, row.finite) for row in found] == [(token_id, True) for token_id in allowed]
    assert found[-1].logprob == 0 and [value for _, value in found[-1].top] == [0, -np.inf, -np.inf]


# ---- penalties and biases -------------------------------------------------------------------------------------------


@for_vocabs(100)
def test_penalties_follow_the_output_from_step_to_step(card, sampler):
    rng = np.random.default_rng(2)
    strong = dict(frequency_penalty=1.1, presence_penalty=0.7, repetition_penalty=1.2)
    drawers = [random_drawer(rng, 100, SamplingParams(**options)) for options in (
        dict(temperature=0, **strong), dict(temperature=0.5, **strong), dict(temperature=0, frequency_penalty=-2),
        dict(temperature=0.3, presence_penalty=-1, top_k=20), {}, dict(temperature=0))]
    seats = [5, 2, 0, 7, 1, 3]
    for seat, drawer in zip(seats, drawers):
        card.sit(seat, drawer)
    for step in range(25):
        logits = (rng.standard_normal((len(seats), 100)) * 1.5).astype(np.float32)
        expected = draw(sampler, logits, drawers)
        card.launch(logits, seats, [drawer.position - 1 for drawer in drawers])
        assert [card.read(card.records[step % RING, row]) for row in range(len(seats))] == expected, step
        for drawer, row in zip(drawers, expected):
            drawer.output.append(row.token_id)
    for seat, drawer in zip(seats, drawers):
        counts = np.bincount(drawer.output, minlength=100) | 0x8000 * (np.bincount(drawer.prompt, minlength=100) > 0)
        assert np.array_equal(card.counts[seat], counts if drawer.params.has_penalties else np.full(100, 0xFFFF))


@for_vocabs(5000)
def test_counts_are_reset_to_prompt_and_output(card):
    rng = np.random.default_rng(0)
    for prompt, output in ([], []), ([4999, 0, 0], [0, 4999, 4999, 2048]), (rng.integers(0, 5000, 6000), [-1, 7, -1]):
        card.reset(3, prompt, output)
        expected = np.bincount([token_id for token_id in output if token_id >= 0], minlength=5000)
        expected |= 0x8000 * (np.bincount(np.array(prompt, int), minlength=5000) > 0)
        assert np.array_equal(card.counts[3], expected)
    assert (np.delete(card.counts, 3, 0) == 0xFFFF).all()
    card.reset(3, [], [9] * 40_000)
    assert card.counts[3, 9] == 0x7FFF and card.counts[3].sum() == 0x7FFF


@for_vocabs(7)
def test_the_greatest_count_stays(card):
    drawer = Drawer(SamplingParams(temperature=0, frequency_penalty=-1), 0, prompt=[3], output=[3] * 40_000)
    assert card.draw(np.zeros((1, 7), np.float32), [drawer])[0].token_id == 3
    assert card.counts[0].tolist() == [0, 0, 0, 0xFFFF, 0, 0, 0]


@for_vocabs(1536)
def test_biases_reach_every_token(card, sampler):
    rng, drawers = np.random.default_rng(0), []
    for count in (1, 31, 32, 33, 300):
        for value in (-100, 100):
            biased = rng.permutation(1536)[:count].tolist()
            params = SamplingParams(temperature=count % 2, logit_bias=dict.fromkeys(biased, value))
            drawers.append(random_drawer(rng, 1536, params))
    logits = rng.standard_normal((len(drawers), 1536), np.float32)
    found = card.draw(logits, drawers)
    assert check_all(sampler, logits, drawers, found) == 0
    for row, drawer in zip(found, drawers):
        biases = dict(drawer.params.logit_bias)
        assert biases.get(row.token_id, -100) == max(biases.values())


@for_vocabs(100)
def test_the_least_repetition_penalty_keeps_logits_finite(card, sampler):
    rng = np.random.default_rng(0)
    drawers = [random_drawer(rng, 100, SamplingParams(repetition_penalty=value, temperature=temperature, logprobs=5))
               for value in (1e-37, 1e-300) for temperature in (0, 1)]
    logits = rng.standard_normal((4, 100), np.float32)
    found = card.draw(logits, drawers)
    assert all(row.finite for row in found) and check_all(sampler, logits, drawers, found) == 0


# ---- masks ----------------------------------------------------------------------------------------------------------


@for_vocabs(1, 7, 100, 1536, 5000)
def test_the_only_token_of_a_mask_is_drawn_from_any_place(card, sampler):
    """With the raw logits' logprobs, though it be the least likely, and whatever the filters."""
    rng = np.random.default_rng(0)
    places = sorted({place for place in (0, 3, 4, 31, 32, 127, 128, card.vocab // 2, card.vocab - 2, card.vocab - 1)
                     if 0 <= place < card.vocab})
    any_way = [dataclasses.replace(params, logit_bias=tuple((i, v) for i, v in params.logit_bias if i < card.vocab))
               for params in ANY_WAY]
    for params in any_way:
        drawers = [random_drawer(rng, card.vocab, params) for _ in places]
        logits = rng.standard_normal((len(places), card.vocab), np.float32) * 9
        for row, place in enumerate(places):
            drawers[row].mask = np.arange(card.vocab) == place
            logits[row, place] = -40
        found = card.draw(logits, drawers)
        assert [(row.token_id, row.finite) for row in found] == [(place, True) for place in places]
        assert check_all(sampler, logits, drawers, found) == 0


@for_vocabs(100, 1536)
def test_masks_come_after_penalties_and_biases(card, sampler):
    rng, drawers = np.random.default_rng(1), []
    strong = dict(frequency_penalty=2, presence_penalty=2, repetition_penalty=10)
    for count in range(24):
        biased = rng.permutation(card.vocab)[:50].tolist()
        params = SamplingParams(temperature=count % 2, logit_bias=dict.fromkeys(biased, 100), logprobs=5, **strong)
        drawers.append(random_drawer(rng, card.vocab, params))
        drawers[-1].mask = ~np.isin(np.arange(card.vocab), biased) if count % 3 else None
    logits = rng.standard_normal((len(drawers), card.vocab), np.float32)
    found = card.draw(logits, drawers)
    assert check_all(sampler, logits, drawers, found) == 0
    for row, drawer in zip(found, drawers):
        assert (row.token_id in dict(drawer.params.logit_bias)) == (drawer.mask is None)


@for_vocabs(100)
@pytest.mark.parametrize("value, where, finite", [
    (np.nan, "forbidden", False), (np.nan, "allowed", False), (np.inf, "forbidden", True), (np.inf, "allowed", False),
    (-np.inf, "all allowed", False), (-np.inf, "forbidden", True)])
def test_masks_leave_broken_logits_broken(card, sampler, value, where, finite):
    rng, mask = np.random.default_rng(0), np.arange(100) % 3 == 1
    drawers = [random_drawer(rng, 100, params) for params in ANY_WAY for _ in range(2)]
    logits = rng.standard_normal((len(drawers), 100), np.float32)
    for drawer in drawers[::2]:
        drawer.mask = mask
    healthy = card.draw(logits, drawers)
    logits[::2, {"forbidden": 33, "allowed": 34, "all allowed": mask}[where]] = value
    found = card.draw(logits, drawers)
    with np.errstate(invalid="ignore"):  # the logprobs of a row with an infinite logit
        expected = draw(sampler, logits, drawers)
    assert [row.finite for row in found] == [row.finite for row in expected] == [finite, True] * len(ANY_WAY)
    assert found[1::2] == healthy[1::2]
    if finite:
        assert [row.token_id for row in found] == [row.token_id for row in expected]
        assert all(mask[row.token_id] for row in found[::2])


def test_rows_without_a_mask_read_none(modules):
    card, rng = Card(modules[2500, "check"].result(), 2500), np.random.default_rng(0)
    logits = rng.standard_normal((2, 2500), np.float32)
    drawers = [random_drawer(rng, 2500, SamplingParams(logprobs=2)), random_drawer(rng, 2500, GREEDY)]
    card.masks = card.masks[:1, :1].copy()
    card.draw(logits, drawers, [3, 4])
    card.ints[3, 7] = True
    with pytest.raises(cuda_cpu.KernelError, match="out of bounds"):
        card.launch(logits, [3, 4], [0, 0])


@for_vocabs(140_001, 270_003)
def test_large_vocabularies_have_masks_too(card, sampler):
    """A lane has 8 or 12 tokens of a slice there, whose bits may stand in two words."""
    rng = np.random.default_rng(0)
    params = [GREEDY, SamplingParams(logprobs=2), SamplingParams(top_k=40, top_p=0.9)]
    drawers = [random_drawer(rng, card.vocab, params[row % 3]) for row in range(6)]
    for drawer in drawers[:5]:
        drawer.mask = rng.random(card.vocab) < 0.001
    logits = rng.standard_normal((6, card.vocab), np.float32)
    assert check_all(sampler, logits, drawers, card.draw(logits, drawers)) == 0


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@for_vocabs(1, 7, 1536)
def test_logprobs_of_any_number(card, sampler):
    rng = np.random.default_rng(0)
    params = [SamplingParams(temperature=count % 2, logprobs=count, logit_bias={0: 100}) for count in range(21)]
    drawers = [random_drawer(rng, card.vocab, each) for each in params]
    for logits in (rng.standard_normal((21, card.vocab), np.float32) * 5, np.zeros((21, card.vocab), np.float32),
                   rng.integers(0, 2, (21, card.vocab)).astype(np.float32)):
        found = card.draw(logits, drawers)
        assert check_all(sampler, logits, drawers, found) == 0 and {row.token_id for row in found} == {0}
        for count, row in enumerate(found):
            likeliest = np.argsort(-logits[count], kind="stable")[:count]  # equal ones by id
            assert [token_id for token_id, _ in row.top] == likeliest.tolist()


# ---- given tokens ---------------------------------------------------------------------------------------------------


@for_vocabs(*VOCABS, 140_001, 270_003)
def test_given_tokens_have_the_bits_that_they_have_when_drawn(card):
    rng, rows = np.random.default_rng(card.vocab), 21 if card.vocab < 100_000 else 4
    for _ in range(3):
        logits = np.stack([random_logits(rng, card.vocab) for _ in range(rows)])
        counts = rng.permutation(21)[:rows].tolist()
        drawers = [random_drawer(rng, card.vocab, SamplingParams(temperature=2, logprobs=count)) for count in counts]
        drawn = card.draw(logits, drawers)
        assert all(row.finite for row in drawn)
        card.slices[:] = 0xFFFFFFFF
        assert card.score(logits, [row.token_id for row in drawn], counts) == drawn
        assert (card.scores[rows:] == UNTOUCHED).all()


@for_vocabs(*VOCABS)
def test_given_tokens_are_scored_as_the_array_twin_does(card, sampler):
    """Any token, though it be forbidden, and any number of the likeliest, of which a vocabulary may have fewer."""
    rng = np.random.default_rng(card.vocab)
    for _ in range(3):
        logits = np.stack([random_logits(rng, card.vocab) for _ in range(63)])
        before, counts = logits.copy(), np.arange(63) % 21
        token_ids = rng.integers(0, card.vocab, 63)
        token_ids[:3] = 0, card.vocab - 1, card.vocab // 2
        found = card.score(logits, token_ids, counts)
        assert np.array_equal(logits, before)
        for one, other in zip(found, sampler.score(logits, token_ids.tolist(), counts.tolist())):
            assert one.finite and agrees(one, other), (one, other)
        order = rng.permutation(63)
        assert card.score(logits[order], token_ids[order], counts[order]) == [found[row] for row in order]
        assert card.score(logits[7:8], token_ids[7:8], counts[7:8]) == found[7:8]


@pytest.mark.parametrize("mode", ["check", "init"])
def test_scoring_reads_nothing_before_it_is_written_and_no_threads_race(modules, sampler, mode):
    rng, card = np.random.default_rng(0), Card(modules[2500, mode].result(), 2500)
    logits = np.stack([random_logits(rng, 2500) for _ in range(9)])
    token_ids, counts = rng.integers(0, 2500, 9).tolist(), [0, 1, 2, 3, 5, 8, 13, 19, 20]
    found = card.score(logits, token_ids, counts)
    assert all(agrees(*pair) for pair in zip(found, sampler.score(logits, token_ids, counts)))


@for_vocabs(100)
@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, [-np.inf] * 100, [np.nan] * 100])
def test_broken_logits_have_no_logprobs_and_leave_other_rows_alone(card, sampler, broken):
    logits = np.random.default_rng(0).standard_normal((9, 100), np.float32)
    token_ids, counts = [33, 33, 34] * 3, [0, 0, 1, 1, 5, 5, 20, 20, 20]
    healthy = card.score(logits, token_ids, counts)
    logits[1::3, slice(None) if isinstance(broken, list) else 33] = broken
    found = card.score(logits, token_ids, counts)
    with np.errstate(invalid="ignore"):
        expected = sampler.score(logits, token_ids, counts)
    assert found[0::3] == healthy[0::3] and found[2::3] == healthy[2::3]
    for one, other in zip(found[1::3], expected[1::3]):
        assert math.isnan(one.logprob) and math.isnan(other.logprob)
        assert one._replace(logprob=0) == other._replace(logprob=0) == Sampled(33, 0, (), False)


# ---- rows and steps -------------------------------------------------------------------------------------------------


@for_vocabs(1536)
def test_rows_depend_on_no_other_row(card):
    rng = np.random.default_rng(3)
    logits, drawers = random_step(rng, card.vocab, 16)
    together = card.draw(logits, drawers)
    order = rng.permutation(16)
    seats = (order + 40).tolist()
    assert card.draw(logits[order], [drawers[row] for row in order], seats) == [together[row] for row in order]
    assert [card.draw(logits[row : row + 1], drawers[row : row + 1], [77])[0] for row in range(16)] == together


@for_vocabs(100)
def test_a_step_moves_the_ring_and_touches_its_own_seats_alone(card):
    rng = np.random.default_rng(4)
    drawers = {seat: random_drawer(rng, 100) for seat in (6, 2, 30)}
    for seat, drawer in drawers.items():
        card.sit(seat, drawer)
    padding = card.num_seats - 1
    positions = {}
    for step, seats in enumerate(([6], [2, padding, 30], [padding], [30, 6, 2, padding], [padding, 6], [2])):
        logits = rng.standard_normal((len(seats), 100), np.float32)
        row_tokens = np.array(rng.permutation(10)[: len(seats)], I32)
        token_positions = rng.integers(0, 1000, 10)
        before, counts = card.records.copy(), card.counts.copy()
        card.launch(logits, seats, token_positions, row_tokens)
        assert (card.ring[0], card.ticket[0]) == (step + 1, 0)
        for row, (seat, token) in enumerate(zip(seats, row_tokens)):
            if seat == padding:
                assert np.array_equal(card.records[step % RING, row], before[step % RING, row])
            else:
                positions[seat] = token_positions[token] + 1
                assert card.records[step % RING, row, 0] == card.last_token[seat]
                assert card.next_position[seat] == positions[seat]
                before[step % RING, row] = card.records[step % RING, row]
                counts[seat] = card.counts[seat]
        assert np.array_equal(card.records, before) and np.array_equal(card.counts, counts)
    others = [seat for seat in range(card.num_seats) if seat not in drawers]
    assert (card.last_token[others] == UNTOUCHED).all() and (card.next_position[others] == UNTOUCHED).all()


@for_vocabs(100)
def test_the_drawn_number_is_that_of_seed_choice_and_position(card, sampler):
    logits = np.zeros((1, 100), np.float32)
    for seed, choice, position in ((0, 0, 1), (2**64 - 1, 3, 1), (2**32, 0, 131071), (7, 127, 1)):
        drawer = Drawer(SamplingParams(), seed, choice, [0] * position)
        assert card.draw(logits, [drawer]) == draw(sampler, logits, [drawer])
    assert card.next_position[0] == 1
