"""Scheduler: who runs in a step, how many tokens of each, who yields when blocks run out. No model: tokens by hand."""
import random

import pytest

from rustinfer import BlockManager, SamplingParams, Scheduler, Sequence

S = 8  # block size


class Simulation:
    """The engine's loop without a model: every complete sequence draws one made-up token a step."""

    def __init__(self, num_blocks=1000, max_num_seqs=64, budget=64, prefix_caching=False):
        self.blocks = BlockManager(num_blocks, S, prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget)
        self.budget, self.max_num_seqs, self.steps, self.live = budget, max_num_seqs, 0, []
        self.first_token, self.next_token = {}, 1000

    def add(self, length, max_tokens=1000, token_ids=None, tenant=""):
        if token_ids is None:
            token_ids = range(self.next_token, self.next_token + length)
            self.next_token += length
        seq = Sequence(len(self.first_token) + len(self.live), token_ids, SamplingParams(max_tokens=max_tokens), seed=0,
                       tenant=tenant)
        self.scheduler.add(seq)
        self.live.append(seq)
        return seq

    def schedule(self):
        step = self.scheduler.schedule()
        assert sum(step.values()) <= self.budget and len(self.scheduler.running) <= self.max_num_seqs
        assert set(step) <= set(self.scheduler.running)
        assert step or not self.scheduler.running
        for seq, count in step.items():
            assert 0 < count <= seq.num_remaining and len(seq.block_table) == self.blocks.blocks_for(seq.num_tokens)
        self.blocks.check(self.live)
        return step

    def update(self, step):
        for seq, count in step.items():
            before = seq.num_computed_tokens
            seq.num_computed_tokens += count
            self.blocks.name_full_blocks(seq, before, seq.num_computed_tokens)
            if seq.num_remaining == 0:
                self.first_token.setdefault(seq, self.steps)
                seq.token_ids.append(seq.seq_id)
                if seq.num_output_tokens == seq.params.max_tokens:
                    self.remove(seq)
        self.steps += 1
        self.blocks.check(self.live)

    def step(self):
        """Schedule and update; {sequence: tokens it computed}."""
        assert self.steps < 20000, "no end"
        step = self.schedule()
        self.update(step)
        return step

    def remove(self, seq):
        self.scheduler.remove(seq)
        self.live.remove(seq)

    def run(self, limit=20000):
        while self.scheduler.has_work:
            self.step()
            assert self.steps <= limit, "no end"


def test_prompt_within_the_budget_is_computed_in_one_step():
    run = Simulation()
    seq = run.add(30)
    assert run.step() == {seq: 30} and run.step() == {seq: 1}
    assert seq.num_output_tokens == 2


def test_long_prompt_is_computed_in_chunks_of_the_budget():
    run = Simulation(budget=16)
    seq = run.add(40)
    assert [run.step()[seq] for _ in range(4)] == [16, 16, 8, 1]


def test_decoding_sequences_come_first():
    run = Simulation(budget=16)
    decoding = [run.add(1) for _ in range(10)]
    run.step()
    long = run.add(100)
    assert run.step() == {**dict.fromkeys(decoding, 1), long: 6}


def test_short_prompt_is_not_held_up_by_long_ones():
    run = Simulation(budget=32)
    long = [run.add(320) for _ in range(3)]
    run.step()
    short = run.add(10)
    step = run.step()
    assert step[short] == 10 and step[long[0]] >= 16
    assert run.first_token[short] == 1 and not any(seq in run.first_token for seq in long)


def test_oldest_prompt_gets_at_least_half():
    run = Simulation(budget=33)
    oldest = run.add(300)
    while oldest.num_remaining > 33:
        for _ in range(8):
            run.add(4, max_tokens=1)
        step = run.step()
        assert step[oldest] >= 17 and sum(step.values()) == 33


def test_oldest_prompt_takes_what_others_leave():
    run = Simulation(budget=32)
    oldest, other = run.add(100), run.add(4)
    assert run.step() == {oldest: 28, other: 4}


def test_other_prompts_follow_shortest_first():
    run = Simulation(budget=40)
    oldest, longer, shorter = run.add(200), run.add(30), run.add(15)
    assert run.step() == {oldest: 20, shorter: 15, longer: 5}


def test_no_more_than_max_num_seqs_run():
    run = Simulation(max_num_seqs=3)
    seqs = [run.add(4, max_tokens=5) for _ in range(7)]
    assert list(run.step()) == seqs[:3] and list(run.scheduler.waiting) == seqs[3:]
    run.run()
    assert all(seq in run.first_token for seq in seqs)


def test_more_decoding_sequences_than_budget_take_turns():
    run = Simulation(budget=4, max_num_seqs=10)
    seqs = [run.add(1) for _ in range(10)]
    for _ in range(100):
        run.step()
    counts = [seq.num_output_tokens for seq in seqs]
    assert sum(counts) == 400 and max(counts) - min(counts) <= 1


def test_budget_of_one_token_still_serves_all():
    run = Simulation(budget=1, max_num_seqs=3)
    seqs = [run.add(length, max_tokens=4) for length in (5, 1, 9, 2)]
    run.run(limit=100)
    assert [seq.num_output_tokens for seq in seqs] == [4] * 4


def test_prompt_starts_as_soon_as_decoding_leaves_budget():
    run = Simulation(budget=4, max_num_seqs=8)
    for _ in range(4):
        run.add(1, max_tokens=3)
    prompt = run.add(6, max_tokens=1)
    run.run(limit=8)
    assert prompt in run.first_token


def test_newest_is_preempted_and_resumes_before_newcomers():
    run = Simulation(num_blocks=8)
    old, middle, new = (run.add(2 * S) for _ in range(3))
    run.step()
    late = run.add(3)
    step = run.step()
    assert new not in step and old in step and middle in step
    assert list(run.scheduler.waiting) == [new, late] and new.block_table == [] and new.num_preemptions == 1
    run.remove(old)
    step = run.step()
    assert step[new] == 2 * S + 1 and late not in step or list(step).index(new) < list(step).index(late)


def test_preempted_sequences_resume_in_the_order_of_arrival():
    run = Simulation(num_blocks=8, max_num_seqs=4)
    seqs = [run.add(S, max_tokens=4 * S) for _ in range(4)]
    while not all(seq.num_preemptions for seq in seqs[2:]):
        run.step()
    ids = [seq.seq_id for seq in run.scheduler.waiting]
    assert ids == sorted(ids)
    run.run()
    assert seqs[0].num_preemptions == 0 and [seq.num_output_tokens for seq in seqs] == [4 * S] * 4


def test_preempted_sequence_keeps_its_tokens():
    run = Simulation(num_blocks=5)
    old, new = run.add(2 * S), run.add(2 * S)
    run.step()
    tokens = list(new.token_ids)
    while not new.num_preemptions:
        run.step()
    assert new.token_ids[: len(tokens)] == tokens and new.num_computed_tokens == 0
    run.remove(old)
    assert run.step() == {new: new.num_tokens - 1}


def test_oldest_is_never_preempted():
    run = Simulation(num_blocks=6, prefix_caching=True)
    for _ in range(20):
        run.add(S, max_tokens=3 * S)
    oldest, before = run.live[0], 0
    while run.scheduler.has_work:
        run.step()
        assert oldest.num_preemptions == before
        if oldest not in run.live and run.live:
            oldest, before = run.live[0], run.live[0].num_preemptions
    assert run.scheduler.num_preemptions > 0


def test_admission_leaves_a_spare_block_for_each_running_sequence():
    run = Simulation(num_blocks=7)
    first = run.add(2 * S)
    run.step()
    second = run.add(3 * S)
    assert second in run.step()  # 3 of the first, 3 of its own and the spare one
    run.remove(second)
    third = run.add(4 * S)
    assert third not in run.step() and first in run.scheduler.running


def test_prompt_as_large_as_the_cache_is_admitted_alone():
    run = Simulation(num_blocks=4)
    small, large = run.add(S, max_tokens=2), run.add(4 * S - 1, max_tokens=1)
    run.run(limit=20)
    assert run.first_token[small] < run.first_token[large]


def test_large_prompt_at_the_head_is_not_overtaken():
    run = Simulation(num_blocks=6)
    running = run.add(3 * S, max_tokens=4)
    run.step()
    large, small = run.add(5 * S), run.add(1)
    assert list(run.step()) == [running] and list(run.scheduler.waiting) == [large, small]


def test_cached_prefix_is_not_computed_again():
    run = Simulation(prefix_caching=True)
    first = run.add(4 * S + 3, max_tokens=1)
    run.run()
    second = run.add(0, token_ids=first.token_ids[: 4 * S + 3])
    assert run.step() == {second: 3} and second.num_cached_tokens == 4 * S


def test_cached_tokens_are_those_of_the_first_admission():
    run = Simulation(num_blocks=8, prefix_caching=True)
    old, new = run.add(2 * S, max_tokens=6 * S), run.add(2 * S, max_tokens=4 * S)
    while not new.num_preemptions:
        run.step()
    run.run()
    assert new.num_cached_tokens == old.num_cached_tokens == 0


@pytest.mark.parametrize("state", ["waiting", "prefill", "decode", "preempted"])
def test_removed_sequence_leaves_nothing_behind(state):
    run = Simulation(num_blocks=8, budget=16, max_num_seqs=2)
    old = run.add(2 * S, max_tokens=5 * S)
    if state == "waiting":
        run.add(S)
    seq = run.add(3 * S if state == "prefill" else S)
    reached = {"waiting": lambda: run.steps == 2, "prefill": lambda: 0 < seq.num_computed_tokens < 3 * S,
               "decode": lambda: seq.num_output_tokens > 1, "preempted": lambda: seq.num_preemptions > 0}[state]
    while not reached():
        run.step()
    run.remove(seq)
    run.blocks.check(run.live)
    assert seq not in run.scheduler.waiting and seq not in run.scheduler.running and seq.block_table == []
    for other in list(run.live):
        run.remove(other)
    assert run.blocks.num_free == 8 and not run.scheduler.has_work and old.block_table == []


class Arrivals:
    """Random arrivals, lengths and aborts on a simulation; every sequence that is not aborted must end."""

    def __init__(self, seed, num_blocks, max_num_seqs, budget):
        self.rng = random.Random(seed)
        self.run = Simulation(num_blocks, max_num_seqs, budget, prefix_caching=self.rng.random() < 0.5)
        self.all, self.aborted = [], set()
        self.longest = num_blocks * S

    def arrive(self):
        length = min(int(self.rng.expovariate(1 / 40)) + 1, self.longest - 1)
        output = min(self.rng.randint(1, 40), self.longest - length)
        token_ids = [self.rng.randrange(2)] * length if self.rng.random() < 0.5 else None
        self.all.append(self.run.add(length, output, token_ids))

    def abort(self, kind):
        candidates = {"waiting": self.run.scheduler.waiting, "running": self.run.scheduler.running,
                      "preempted": [seq for seq in self.run.scheduler.waiting if seq.num_preemptions]}[kind]
        if candidates:
            seq = self.rng.choice(list(candidates))
            self.run.remove(seq)
            self.aborted.add(seq)

    def steps(self, count):
        for _ in range(count):
            while self.rng.random() < 0.3:
                self.arrive()
            if self.rng.random() < 0.1:
                self.abort(self.rng.choice(["waiting", "running", "preempted"]))
            self.run.step()

    def check_end(self):
        self.run.run(limit=20000)
        for seq in set(self.all) - self.aborted:
            assert seq.num_output_tokens == seq.params.max_tokens
        assert self.run.blocks.num_free == self.run.blocks.num_blocks and not self.run.live


@pytest.mark.parametrize("seed, num_blocks, max_num_seqs, budget", [
    (0, 200, 64, 64), (1, 30, 16, 32), (2, 12, 16, 24), (3, 40, 32, 7), (4, 9, 4, 1), (5, 25, 64, 512)])
def test_random_arrivals_and_aborts_all_end_and_free_their_blocks(seed, num_blocks, max_num_seqs, budget):
    arrivals = Arrivals(seed, num_blocks, max_num_seqs, budget)
    arrivals.steps(400)
    arrivals.check_end()
    if num_blocks < 100:
        assert arrivals.run.scheduler.num_preemptions > 0


def test_no_prompt_starves_under_a_stream_of_short_ones():
    """Each prompt waits at most for the older ones: as long as it would take if they shared half the budget."""
    run = Simulation(budget=32, max_num_seqs=16)
    rng, long = random.Random(0), []
    for step in range(600):
        for _ in range(2):
            run.add(rng.randint(1, 12), max_tokens=rng.randint(1, 4))
        if step % 40 == 0:
            long.append((run.add(200, max_tokens=1), step))
        run.step()
    waits = [run.first_token[seq] - step for seq, step in long[:8]]
    assert max(waits) < 250, waits


# -- fair shares between tenants


def test_a_newcomer_is_next_however_many_wait_before_it():
    run = Simulation(max_num_seqs=4, budget=32)
    crowd = [run.add(8, max_tokens=6, tenant="many") for _ in range(50)]
    for _ in range(5):
        run.step()
    alone = run.add(8, max_tokens=3, tenant="one")
    steps = run.steps
    while alone not in run.first_token:
        assert [seq for seq in crowd if seq.num_preemptions] == [] or run.steps - steps > Scheduler.PATIENCE
        run.step()
    assert run.first_token[alone] - steps <= Scheduler.PATIENCE + 1


def test_if_no_place_frees_the_newest_of_the_tenant_most_over_its_share_makes_room():
    run = Simulation(max_num_seqs=6, budget=64)
    few = [run.add(8, tenant="few") for _ in range(2)]
    many = [run.add(8, tenant="many") for _ in range(9)]
    run.step()
    assert len(run.scheduler.running) == 6
    alone, steps = run.add(8, tenant="one"), run.steps
    while alone not in run.scheduler.running:
        run.step()
    assert run.steps - steps == Scheduler.PATIENCE + 1
    assert [seq for seq in few + many if seq.num_preemptions] == [many[3]]  # of the four that ran
    for _ in range(30):
        run.step()
    assert many[3].num_preemptions == 1 and alone.num_preemptions == 0  # nobody is below a share of two that waits


@pytest.mark.parametrize("length", [8, 100])
def test_a_newcomer_gets_blocks_as_it_gets_a_place_and_keeps_them(length):
    run = Simulation(num_blocks=60, max_num_seqs=64, budget=128)
    crowd = [run.add(8, max_tokens=200, tenant="many") for _ in range(100)]
    for _ in range(40):
        run.step()
    assert run.scheduler.waiting and len(run.scheduler.running) < 32  # blocks are short, places are not
    alone, steps = run.add(length, max_tokens=60, tenant="one"), run.steps
    while alone in run.live:
        run.step()
    assert run.first_token[alone] - steps <= Scheduler.PATIENCE + 1
    assert run.steps - steps <= Scheduler.PATIENCE + 1 + 60 and alone.num_preemptions == 0
    assert not crowd[0].num_preemptions


def test_equal_shares_are_reached_and_kept():
    run = Simulation(max_num_seqs=8, budget=64)
    for tenant, count in (("a", 30), ("b", 9), ("c", 5)):
        for _ in range(count):
            run.add(8, max_tokens=400, tenant=tenant)
    for _ in range(60):
        run.step()
    counts = {tenant: sum(seq.tenant == tenant for seq in run.scheduler.running) for tenant in "abc"}
    assert all(count >= 8 // 3 for count in counts.values()) and sum(counts.values()) == 8
    preempted = run.scheduler.num_preemptions
    for _ in range(100):
        run.step()
    assert run.scheduler.num_preemptions == preempted


def test_served_tokens_decide_whose_turn_it_is():
    run = Simulation(max_num_seqs=1, budget=64)
    long = [run.add(40, max_tokens=1, tenant="long") for _ in range(3)]
    short = [run.add(8, max_tokens=1, tenant="short") for _ in range(12)]
    while run.live:
        run.step()
    order = sorted(run.first_token, key=run.first_token.get)
    places = [order.index(seq) for seq in long]
    assert [order.index(seq) for seq in short] == sorted(order.index(seq) for seq in short)
    assert places == [0, 6, 12]  # about five short ones to a long one


def test_a_tenant_who_comes_back_has_neither_debts_nor_savings():
    run = Simulation(max_num_seqs=2, budget=64)
    run.add(60, max_tokens=30, tenant="busy")
    early = run.add(8, max_tokens=1, tenant="rare")
    for _ in range(40):
        run.step()
    assert early in run.first_token and run.scheduler.waiting._served == {}
    run.add(8, max_tokens=50, tenant="busy")
    run.step()
    rare = [run.add(8, max_tokens=1, tenant="rare") for _ in range(4)]
    assert run.scheduler.waiting._served["rare"] == run.scheduler.waiting._served["busy"]
    assert [run.scheduler.waiting.position(seq) for seq in rare] == [0, 1, 2, 3]


def test_positions_count_those_who_have_their_turn_before():
    run = Simulation(max_num_seqs=1)
    run.add(8, tenant="a")
    run.step()
    first, second = [run.add(8, tenant="a") for _ in range(2)]
    other = [run.add(8, tenant="b") for _ in range(5)]
    assert [run.scheduler.waiting.position(seq) for seq in (first, second, other[0], other[4])] == [1, 3, 1, 6]


@pytest.mark.parametrize("seed", range(20))
def test_random_tenants_all_end_and_no_block_is_lost(seed):
    rng = random.Random(seed)
    run = Simulation(num_blocks=40, max_num_seqs=rng.choice([1, 3, 8]), budget=rng.choice([4, 16, 64]),
                     prefix_caching=True)
    for _ in range(200):
        if rng.random() < 0.4:
            run.add(rng.randrange(1, 60), rng.randrange(1, 30), tenant=rng.choice("abcd"))
        if run.live and rng.random() < 0.05:
            run.remove(rng.choice(run.live))
        run.step()
    while run.live:
        run.step()
    assert run.blocks.num_free == 40 and run.scheduler.waiting._served == {} and not run.scheduler.has_work
