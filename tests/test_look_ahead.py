"""Engine with a runner that launches a step before the tokens of the one before it are read, as on a card."""
import random
import threading
import time

import pytest
from make_references import random_checkpoint
from test_batch_invariance import answer_of, answers_together, check_equal, requests

import rustinfer
from rustinfer import PENDING, ArrayRunner, EngineError, SamplingParams

PROMPT = list(range(20, 40))
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)


class LateRunner(ArrayRunner):
    """Keeps a step's tokens to itself until they are collected, and knows by itself what a pending one is."""

    looks_ahead = True

    def __init__(self, model, config):
        super().__init__(model, config)
        self.newest, self.in_flight, self.num_ahead = {}, 0, 0

    def launch(self, step):
        self.in_flight += 1
        self.num_ahead += self.in_flight == 2
        assert self.in_flight <= 2
        hidden = [seq for seq in step if seq.token_ids[-1] == PENDING]
        assert not any(seq.constraint for seq in hidden)
        for seq in hidden:
            seq.token_ids[-1] = self.newest[seq]
        drawn = super().launch(step)
        for seq in hidden:
            seq.token_ids[-1] = PENDING
        self.newest.update((seq, token.token_id) for seq, token in zip(step, drawn) if token)
        return drawn

    def collect(self, launched):
        self.in_flight -= 1
        return launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}
    return random_checkpoint(tmp_path_factory.mktemp("model") / "model", **small)


@pytest.fixture
def open_late(folder, monkeypatch):
    """LLM(...) with a LateRunner; in the end every block must be free."""
    monkeypatch.setattr(rustinfer, "make_runner", LateRunner)
    opened = []

    def open_one(**options):
        opened.append(rustinfer.LLM(folder, device="cpu", **options))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()
        llm.engine.blocks.check(())
        assert not llm.engine._handles and not llm.engine.scheduler.has_work


@pytest.fixture(scope="module")
def alone(folder):
    with rustinfer.LLM(folder, device="cpu", no_prefix_caching=True) as llm:
        return [answer_of(llm.engine.submit(*request)) for request in requests(folder)]


@pytest.mark.parametrize("options", [
    {}, dict(max_num_batched_tokens=64, block_size=8), dict(no_prefix_caching=True, max_num_seqs=5),
], ids=["defaults", "chunked", "few at once"])
def test_looking_ahead_changes_no_answer(open_late, alone, options):
    llm = open_late(**options)
    check_equal(answers_together(llm), alone)
    assert llm.engine._runner.num_ahead > 20


def test_preemption_waits_for_the_tokens_in_flight(open_late, folder):
    config = rustinfer.ModelConfig.load(folder)
    block_bytes = 2 * config.num_layers * 16 * config.num_kv_heads * config.head_dim * 4
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=3, logprobs=2)
    with_room = answer_of(open_late().engine.submit(PROMPT, params))
    llm = open_late(kv_cache_memory=8 * block_bytes)
    handles = [llm.engine.submit(PROMPT, params) for _ in range(6)]
    assert all(answer_of(handle) == with_room for handle in handles)
    assert llm.engine.snapshot()["num_preemptions"] > 0 and llm.engine._runner.num_ahead > 20


def test_who_waits_for_blocks_holds_nobody_up(open_late, folder):
    config = rustinfer.ModelConfig.load(folder)
    block_bytes = 2 * config.num_layers * 16 * config.num_kv_heads * config.head_dim * 4
    llm = open_late(kv_cache_memory=5 * block_bytes)
    running = llm.engine.submit(PROMPT, GREEDY)  # grows to 4 blocks
    large = llm.engine.submit(PROMPT * 3, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(list(running)) == 40 and llm.engine._runner.num_ahead > 20
    assert len(list(large)) == 20 and large.timing.started > running.timing.finished


def test_tokens_after_a_stop_are_dropped(open_late):
    llm = open_late()
    whole = [token.token_id for token in llm.engine.submit(PROMPT, GREEDY)]
    wanted = whole.index(whole[7]) + 1
    params = SamplingParams(max_tokens=40, temperature=0, stop_token_ids=(whole[7],), ignore_eos=True)
    handle = llm.engine.submit(PROMPT, params)
    assert [token.token_id for token in handle] == whole[:wanted] and handle.finish_reason == "stop"
    assert handle.seq.token_ids == PROMPT + whole[:wanted] and handle.seq.num_output_tokens == wanted


def masked_answers(llm):
    """Five with a grammar, five with a least length, five free ones."""
    grammar = llm.grammars.compile(rustinfer.Structure("regex", "[a-z]{3,20}", "x"))
    stops, base = tuple(range(0, 250, 2)), dict(temperature=1.2, max_tokens=24, logprobs=1)
    kinds = [(dict(), grammar), (dict(min_tokens=9, stop_token_ids=stops), None), (dict(ignore_eos=True), None)]
    handles = [llm.engine.submit(PROMPT[number:], SamplingParams(seed=number, **base, **options),
                                 constraint=constraint and constraint.copy())
               for number in range(5) for options, constraint in kinds]
    return [answer_of(handle) for handle in handles]


@pytest.mark.parametrize("options", [{}, dict(max_num_batched_tokens=16, max_num_seqs=4)], ids=["defaults", "few"])
def test_a_grammar_waits_for_its_tokens_and_a_least_length_does_not(open_late, folder, options):
    with rustinfer.LLM(folder, device="cpu") as llm:
        expected = masked_answers(llm)
    llm = open_late(**options)
    assert masked_answers(llm) == expected and min(map(len, expected[1::3])) > 9
    llm.engine._runner.num_ahead = 0
    list(llm.engine.submit(PROMPT, SamplingParams(max_tokens=30, min_tokens=30)))
    assert llm.engine._runner.num_ahead == 29


def test_no_more_tokens_than_asked_for_are_computed(open_late):
    llm = open_late()
    handle = llm.engine.submit(PROMPT, GREEDY)
    assert len(list(handle)) == 40 and PENDING not in handle.seq.token_ids
    assert llm.engine.metrics.steps == 40


def test_sequences_put_aside_and_let_go_on_at_any_moment_keep_their_tokens(open_late, folder):
    params = SamplingParams(max_tokens=120, ignore_eos=True, seed=3, logprobs=2)
    llm, rng = open_late(max_num_seqs=4), random.Random(5)
    expected = answer_of(llm.engine.submit(PROMPT, params))
    handles = [llm.engine.submit(PROMPT, params) for _ in range(7)]
    held = 0
    while not all(handle.finish_reason for handle in handles):
        llm.engine.hold(rng.choice(handles), rng.random() < 0.4)
        held += len(llm.engine.scheduler.aside)
        if held > 300:
            for handle in handles:
                llm.engine.hold(handle, False)
        time.sleep(0.0005)
    assert held and all(answer_of(handle) == expected for handle in handles)
    assert not llm.engine.scheduler.aside and llm.engine._runner.num_ahead > 20


def test_abort_while_a_step_is_in_flight(open_late):
    llm = open_late(max_num_seqs=4)
    long = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0)
    for _ in range(20):
        handles = [llm.engine.submit(PROMPT, long) for _ in range(6)]
        handles[0].take(10, at_least=3)
        for handle in handles:
            handle.abort()
        for handle in handles:
            list(handle)
            assert handle.finish_reason == "abort" and PENDING not in handle.seq.token_ids
    assert llm.engine.snapshot()["kv_blocks_used"] == 0


def test_broken_logits_leave_no_token_on_its_way(open_late):
    llm = open_late()
    run, turn = llm.engine.model.run, iter(range(1000))
    llm.engine.model.run = lambda batch: run(batch) * (float("nan") if next(turn) == 3 else 1)
    handle = llm.engine.submit(PROMPT, GREEDY)
    with pytest.raises(EngineError, match="not finite"):
        list(handle)
    assert PENDING not in handle.seq.token_ids and llm.engine.snapshot()["completion_tokens"] == 3


def test_a_failed_launch_ends_its_sequences_and_no_others(open_late):
    llm = open_late(max_num_seqs=2)
    runner = llm.engine._runner
    launch, turn = runner.launch, iter(range(1000))
    runner.launch = lambda step: launch(step) if next(turn) != 3 else 1 // 0
    doomed = llm.engine.submit(PROMPT, GREEDY)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        list(doomed)
    assert len(list(llm.engine.submit(PROMPT, GREEDY))) == 40 and llm.engine.dead is None


def test_a_failed_device_ends_the_engine_and_every_request(open_late):
    llm, died, submitted = open_late(max_num_seqs=2), threading.Event(), threading.Event()
    llm.engine.on_death = died.set

    def fail(launched):
        submitted.wait(10)
        raise rustinfer.DeviceError("the card is gone")

    llm.engine._runner.collect = fail
    handles = [llm.engine.submit(PROMPT, GREEDY) for _ in range(4)]
    submitted.set()
    for handle in handles:
        with pytest.raises(EngineError, match="the engine has failed"):
            list(handle)
    assert died.wait(10) and isinstance(llm.engine.dead, rustinfer.DeviceError)
