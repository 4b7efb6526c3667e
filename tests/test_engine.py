"""Engine: submit, abort, faults, death, close; a real engine on a small model, with faults put in by hand."""
import itertools
import re
import threading
import time

import numpy as np
import pytest
from make_references import random_checkpoint

import rustinfer
from rustinfer import (
    LLM, APIError, ContextLengthError, Engine, EngineError, Group, QueueFullError, SamplingParams, Tenant,
    UnavailableError)

PROMPT = list(range(20, 40))
LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
WAIT = 20  # seconds until a test gives up


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1}
    return random_checkpoint(tmp_path_factory.mktemp("model") / "model", **small)


@pytest.fixture
def open_llm(folder):
    """LLM(...) on the small model; closed after the test, when no block may be owned and no handle kept."""
    opened = []

    def open_one(**options):
        opened.append(LLM(folder, device="cpu", **options))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()
        engine = llm.engine
        engine.blocks.check(())
        assert not engine._handles and not engine.scheduler.has_work and not engine._thread.is_alive()


class Gate:
    """Stops the model between steps: each call of `open` lets `count` runs through. Records what each step ran."""

    def __init__(self, engine):
        self.engine, self.inner, self.steps, self.fault = engine, engine.model.run, [], lambda batch, logits: logits
        self.permits, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        engine.model.run = self.run

    def run(self, batch):
        self.arrived.release()
        assert self.permits.acquire(timeout=WAIT)
        self.steps.append(np.diff(batch.cu_seqlens_q).tolist())
        return self.fault(batch, self.inner(batch))

    def wait(self):
        """Until the engine stands before a run."""
        assert self.arrived.acquire(timeout=WAIT)

    def open(self, count=1):
        """Let runs through, and wait until the engine stands before the next one."""
        for _ in range(count):
            self.permits.release()
            self.wait()

    def free_after(self, condition):
        """Let runs through one by one until the condition holds, then everything, without the fault."""
        while not condition():
            self.open()
        self.free()

    def free(self):
        """Let everything through from now on."""
        self.engine.model.run = self.inner
        self.permits.release(2)


def wait_until(condition):
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "did not happen"
        time.sleep(0.002)


def used_blocks(llm):
    return llm.engine.snapshot()["kv_blocks_used"]


# -- answers


def test_handle_iterates_over_the_tokens(open_llm):
    llm = open_llm()
    handle = llm.engine.submit(PROMPT, SHORT)
    tokens = [token.token_id for token in handle]
    assert len(tokens) == 5 and handle.seq.token_ids == PROMPT + tokens and handle.finish_reason == "length"
    assert list(handle) == [] and handle.exhausted and used_blocks(llm) == 0


def test_take_waits_for_as_many_tokens_as_wanted(open_llm):
    handle = open_llm().engine.submit(PROMPT, SHORT)
    assert len(handle.take(WAIT, at_least=5)) == 5
    assert handle.take(WAIT) == [] and handle.exhausted


def test_take_returns_what_there_is_after_its_timeout(open_llm):
    llm = open_llm()
    gate = Gate(llm.engine)
    handle = llm.engine.submit(PROMPT, SHORT)
    gate.wait()
    assert handle.take(0.01) == []
    gate.open()
    assert len(handle.take(0.01, at_least=3)) == 1
    gate.free()


def test_eos_stops_unless_ignored(open_llm):
    llm = open_llm()
    first = llm.engine.submit(PROMPT, SHORT).take(WAIT, at_least=5)
    llm.engine.eos_token_ids = frozenset([first[2].token_id])
    place = [token.token_id for token in first].index(first[2].token_id)
    handle = llm.engine.submit(PROMPT, SamplingParams(max_tokens=5, temperature=0))
    assert list(handle) == first[: place + 1] and handle.finish_reason == "stop"
    assert list(llm.engine.submit(PROMPT, SHORT)) == first


def test_max_tokens_defaults_to_the_configs_and_to_the_room_there_is(open_llm):
    llm = open_llm(max_tokens=7, max_model_len=30)
    for length, wanted in ((5, 7), (27, 3)):
        handle = llm.engine.submit(PROMPT[:1] * length, SamplingParams(ignore_eos=True))
        assert len(list(handle)) == wanted and handle.finish_reason == "length"


def test_timing_and_counters_follow_the_request(open_llm):
    llm = open_llm()
    handle = llm.engine.submit(PROMPT, SHORT)
    list(handle)
    timing, counted = handle.timing, llm.engine.snapshot()
    assert timing.arrived <= timing.started <= timing.first_token <= timing.finished
    assert counted["requests"] == {"length": 1} and counted["completion_tokens"] == 5 and counted["steps"] == 5
    assert counted["num_requests_running"] == counted["num_requests_waiting"] == 0


# -- admission


def test_queue_is_bounded(open_llm):
    llm = open_llm(max_queue=2, max_num_seqs=1)
    gate = Gate(llm.engine)
    handles = [llm.engine.submit(PROMPT, SHORT)]
    gate.wait()
    handles += [llm.engine.submit(PROMPT, SHORT) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait and --max-queue is 2") as caught:
        llm.engine.submit(PROMPT, SHORT)
    assert caught.value.status == 429 and caught.value.headers["Retry-After"]
    handles[1].abort()  # makes room at once, while a step runs
    handles.append(llm.engine.submit(PROMPT, SHORT))
    gate.free()
    assert [len(list(handle)) for handle in handles] == [5, 0, 5, 5]


def test_the_predicted_wait_counts_no_idle_time(open_llm, monkeypatch):
    llm = open_llm(max_queue=1, max_num_seqs=1)
    for _ in range(3):
        list(llm.engine.submit(PROMPT, SHORT))
    now = time.monotonic
    monkeypatch.setattr(rustinfer.time, "monotonic", lambda: now() + 3600)  # an hour later
    gate = Gate(llm.engine)
    handles = [llm.engine.submit(PROMPT, SHORT)]
    gate.wait()
    handles.append(llm.engine.submit(PROMPT, SHORT))
    with pytest.raises(QueueFullError) as caught:
        llm.engine.submit(PROMPT, SHORT)
    assert int(caught.value.headers["Retry-After"]) < 60
    gate.free()
    assert [len(list(handle)) for handle in handles] == [5, 5]


def test_who_is_admitted_with_the_next_step_fills_no_queue(open_llm):
    llm = open_llm(max_queue=1, max_num_seqs=4)
    gate = Gate(llm.engine)
    handles = [llm.engine.submit(PROMPT, SHORT)]
    gate.wait()  # before the next step come three for the free places and one that waits
    handles += [llm.engine.submit(PROMPT, SHORT) for _ in range(4)]
    with pytest.raises(QueueFullError, match="4 requests wait"):
        llm.engine.submit(PROMPT, SHORT)
    gate.free()
    assert [len(list(handle)) for handle in handles] == [5] * 5


def test_who_waits_for_blocks_fills_the_queue(open_llm):
    llm = open_llm(max_queue=2, max_num_seqs=8, kv_cache_memory=4 * 2 * 16 * 32 * 4)  # four blocks
    gate = Gate(llm.engine)
    handles = [llm.engine.submit(PROMPT * 2, SHORT)]
    gate.wait()
    handles += [llm.engine.submit(PROMPT * 2, SHORT) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait"):
        llm.engine.submit(PROMPT, SHORT)
    gate.free()
    assert [len(list(handle)) for handle in handles] == [5] * 3


def test_choices_of_a_request_that_has_begun_find_no_full_queue(open_llm):
    llm = open_llm(max_queue=1, max_num_seqs=1)
    group = Group(llm, [PROMPT], SHORT, n=4)
    while not group.is_finished:
        group.advance()
    assert [len(answer.tokens) for answer in group.answers] == [5] * 4


def test_a_queue_that_one_tenant_filled_is_open_to_others_for_their_part(open_llm):
    llm = open_llm(max_queue=6, max_num_seqs=1)
    gate = Gate(llm.engine)
    handles = [llm.engine.submit(PROMPT, SHORT, Tenant("crowd"))]
    gate.wait()
    for name, part in (("crowd", 6), ("second", 3), ("third", 2)):
        handles += [llm.engine.submit(PROMPT, SHORT, Tenant(name)) for _ in range(part)]
        with pytest.raises(QueueFullError):
            llm.engine.submit(PROMPT, SHORT, Tenant(name))
    gate.free()
    assert [len(list(handle)) for handle in handles] == [5] * 12


@pytest.mark.parametrize("length, max_tokens", [(30, None), (31, None), (31, 5), (26, 5), (10, 1000)])
def test_context_errors_name_both_numbers(open_llm, length, max_tokens):
    llm = open_llm(max_model_len=30)
    with pytest.raises(ContextLengthError) as caught:
        llm.engine.submit([20] * length, SamplingParams(max_tokens=max_tokens))
    assert "30" in str(caught.value) and str(length) in str(caught.value) and str(max_tokens or "") in str(caught.value)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("options, longer", [
    ({}, None), ({"max_model_len": 30}, "--max-model-len"), ({"kv_cache_memory": 3 * 4096}, "--kv-cache-memory"),
    ({"max_model_len": 100, "kv_cache_memory": 3 * 4096}, "--kv-cache-memory")])
def test_context_errors_name_the_setting_that_makes_room_if_there_is_one(open_llm, options, longer):
    with pytest.raises(ContextLengthError) as caught:
        open_llm(**options).engine.submit([20] * 5, SamplingParams(max_tokens=10_000))
    assert re.findall("--[a-z-]+", str(caught.value)) == ([longer] if longer else [])


def test_prompt_that_can_never_fit_the_cache_is_refused(open_llm):
    block_bytes = 2 * 16 * 32 * 4
    llm = open_llm(kv_cache_memory=3 * block_bytes)
    with pytest.raises(ContextLengthError, match="48.*50"):
        llm.engine.submit([20] * 50, SHORT)
    assert len(list(llm.engine.submit([20] * 43, SHORT))) == 5


@pytest.mark.parametrize("token_ids", [
    [], [-1], [320], [5, 1 << 40], [5, 1 << 70], [1.5], ["5"], [True], [[5]], [None]])
def test_token_ids_that_are_none_are_refused(open_llm, token_ids):
    with pytest.raises(APIError) as caught:
        open_llm().engine.submit(token_ids, SHORT, param="input")
    assert caught.value.param == "input"


# -- abort


def test_abort_while_waiting_ends_at_once(open_llm):
    llm = open_llm(max_num_seqs=1)
    gate = Gate(llm.engine)
    first = llm.engine.submit(PROMPT, SHORT)
    gate.wait()
    second = llm.engine.submit(PROMPT, SHORT)
    second.abort()
    assert second.finish_reason == "abort" and list(second) == []
    assert llm.engine.snapshot()["prompt_tokens"] == 0  # of a prompt that was neither computed nor looked up
    gate.free()
    assert len(list(first)) == 5


def test_abort_during_prefill_frees_the_blocks(open_llm):
    llm = open_llm(max_num_batched_tokens=16)
    gate = Gate(llm.engine)
    handle = llm.engine.submit(PROMPT * 10, SHORT)
    gate.wait()
    gate.open(2)
    handle.abort()
    gate.free()
    assert list(handle) == [] and handle.finish_reason == "abort" and handle.timing.first_token is None
    wait_until(lambda: used_blocks(llm) == 0)


def test_abort_during_decode_keeps_the_tokens_so_far(open_llm):
    llm = open_llm()
    handle = llm.engine.submit(PROMPT, LONG)
    taken = handle.take(WAIT, at_least=3)
    handle.abort()
    taken += list(handle)
    assert 3 <= len(taken) < 400 and handle.finish_reason == "abort" and used_blocks(llm) == 0


def test_abort_of_a_preempted_sequence(open_llm):
    block_bytes = 2 * 16 * 32 * 4
    llm = open_llm(kv_cache_memory=8 * block_bytes)
    old, new = (llm.engine.submit(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True)) for _ in range(2))
    gate = Gate(llm.engine)
    gate.wait()
    while not new.seq.num_preemptions:
        gate.open()
    new.abort()
    assert new.finish_reason == "abort"
    gate.free()
    assert len(list(old)) == 100


def test_abort_after_the_end_and_twice_changes_nothing(open_llm):
    llm = open_llm()
    handle = llm.engine.submit(PROMPT, SHORT)
    list(handle)
    handle.abort()
    running = llm.engine.submit(PROMPT, LONG)
    running.take(WAIT)
    for _ in range(3):
        running.abort()
    list(running)
    running.abort()
    assert handle.finish_reason == "length" and running.finish_reason == "abort"
    assert llm.engine.snapshot()["requests"] == {"length": 1, "abort": 1} and llm.engine.dead is None


def test_abort_from_many_threads_at_random_times(open_llm):
    llm = open_llm(max_num_seqs=8, max_num_batched_tokens=32)
    handles = [llm.engine.submit(PROMPT * (1 + i % 5), LONG) for i in range(40)]
    threads = [threading.Thread(target=lambda part=part: [(time.sleep(0.002), h.abort()) for h in part])
               for part in (handles[::2], handles[::3], handles[1::2])]
    for thread in threads:
        thread.start()
    for handle in handles:
        list(handle)
    for thread in threads:
        thread.join()
    assert {handle.finish_reason for handle in handles} <= {"abort", "length"} and llm.engine.dead is None
    assert sum(llm.engine.snapshot()["requests"].values()) == 40


# -- scheduling, seen through the engine


def test_short_request_speaks_before_a_long_prefill_ends(open_llm):
    llm = open_llm(max_num_batched_tokens=32)
    gate = Gate(llm.engine)
    long = llm.engine.submit([20 + i % 200 for i in range(32 * 10)], SHORT)
    gate.wait()
    gate.open()
    short = llm.engine.submit(PROMPT, SHORT)
    gate.open(4)
    assert short.timing.first_token is not None and long.timing.first_token is None
    assert all(sum(step) <= 32 for step in gate.steps)
    gate.free()
    assert len(list(long)) == 5 and long.timing.first_token > short.timing.first_token


def test_tiny_cache_preempts_and_everyone_still_ends(open_llm):
    block_bytes = 2 * 16 * 32 * 4
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=3)
    with_room = list(open_llm().engine.submit(PROMPT, params))
    llm = open_llm(kv_cache_memory=8 * block_bytes)
    handles = [llm.engine.submit(PROMPT, params) for _ in range(6)]
    assert all(list(handle) == with_room for handle in handles)
    assert llm.engine.snapshot()["num_preemptions"] > 0


def test_cached_prefix_is_counted(open_llm):
    llm = open_llm()
    counts = []
    for _ in range(2):
        handle = llm.engine.submit(PROMPT * 2, SHORT)
        list(handle)
        counts.append(handle.seq.num_cached_tokens)
    assert counts == [0, 32]


# -- faults


def raise_once(batch, logits):
    raise RuntimeError("seeded fault")


def test_failed_run_ends_only_the_sequences_of_its_step(open_llm):
    llm = open_llm(max_num_seqs=2)
    gate = Gate(llm.engine)
    doomed = [llm.engine.submit(PROMPT, SHORT)]
    gate.wait()
    doomed.append(llm.engine.submit(PROMPT, SHORT))
    gate.open()  # now both run
    waiting = llm.engine.submit(PROMPT, SHORT)
    gate.fault = raise_once
    gate.open()
    gate.fault = lambda batch, logits: logits
    gate.free()
    for handle in doomed:
        with pytest.raises(EngineError, match="RuntimeError"):
            list(handle)
        assert handle.finish_reason == "error"
    assert len(list(waiting)) == 5 and llm.engine.dead is None


def test_failures_in_a_row_end_the_engine(open_llm):
    llm, died = open_llm(max_num_seqs=1), threading.Event()
    llm.engine.on_death = died.set
    llm.engine.model.run = lambda batch: raise_once(batch, None)
    handles = [llm.engine.submit(PROMPT, SHORT) for _ in range(Engine.MAX_FAILURES)]
    for handle in handles:
        with pytest.raises(EngineError):
            list(handle)
    assert died.wait(WAIT) and isinstance(llm.engine.dead, EngineError)
    with pytest.raises(UnavailableError, match="has failed"):
        llm.engine.submit(PROMPT, SHORT)


def test_success_between_failures_keeps_the_engine_alive(open_llm):
    llm, turn = open_llm(max_num_seqs=1), itertools.count()
    run = llm.engine.model.run
    llm.engine.model.run = lambda batch: run(batch) if next(turn) % 2 else raise_once(batch, None)
    for _ in range(2 * Engine.MAX_FAILURES):
        try:
            list(llm.engine.submit(PROMPT, SamplingParams(max_tokens=1)))
        except EngineError:
            pass
    assert llm.engine.dead is None and llm.engine.snapshot()["requests"] == {"error": 3, "length": 3}


def test_logits_that_are_not_finite_fail_one_request(open_llm):
    llm = open_llm(max_num_batched_tokens=24)
    gate = Gate(llm.engine)
    first, prompt = llm.engine.submit(PROMPT, SHORT), list(range(100, 140))
    gate.wait()
    broken = llm.engine.submit(prompt, SHORT)

    def break_row(batch, logits):
        last = batch.positions[batch.logits_indices] == len(prompt) - 1
        return np.where(last[:, None], np.nan, logits)

    gate.fault = break_row
    gate.free_after(lambda: broken.finish_reason)
    with pytest.raises(EngineError, match="not finite"):
        list(broken)
    assert len(list(first)) == 5
    again = llm.engine.submit(prompt, SHORT)
    assert len(list(again)) == 5 and again.seq.num_cached_tokens == 0, "what the broken request wrote was shared"


def test_prompt_scores_that_are_not_finite_fail_their_request(open_llm):
    llm = open_llm()
    inner = llm.engine.model.run

    def run(batch):
        logits = inner(batch)
        return np.where((batch.positions[batch.logits_indices] == 3)[:, None], np.nan, logits)

    llm.engine.model.run = run
    handle = llm.engine.submit(PROMPT, rustinfer.dataclasses.replace(SHORT, prompt_logprobs=1))
    with pytest.raises(EngineError, match="not finite"):
        list(handle)


@pytest.mark.parametrize("place", ["schedule", "_update"])
def test_error_outside_a_run_ends_the_engine_and_every_request(open_llm, place):
    llm, died = open_llm(max_num_seqs=2), threading.Event()
    engine = llm.engine
    engine.on_death = died.set
    gate = Gate(llm.engine)
    handles = [engine.submit(PROMPT, LONG) for _ in range(3)]
    gate.wait()

    def fail(*args):
        engine.blocks.blocks[0].ref_count += 1  # half changed
        raise KeyError("seeded fault")

    setattr(engine.scheduler if place == "schedule" else engine, place, fail)
    gate.free()
    for handle in handles:
        with pytest.raises(EngineError, match="the engine has failed"):
            list(handle)
    assert died.wait(WAIT) and isinstance(engine.dead, KeyError)
    assert engine.snapshot()["num_requests_running"] == 0


def test_stale_cache_contents_never_reach_an_answer(open_llm):
    """Whatever lies in free blocks, noise or NaN, changes no bit."""
    llm = open_llm(no_prefix_caching=True)
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=3, temperature=0)
    clean = list(llm.engine.submit(PROMPT, params))
    llm.engine.model.kv_cache[...] = np.nan
    assert list(llm.engine.submit(PROMPT, params)) == clean


# -- close


def test_close_ends_what_runs_and_what_waits_with_an_error(open_llm):
    llm = open_llm(max_num_seqs=1)
    running, waiting = (llm.engine.submit(PROMPT, LONG) for _ in range(2))
    running.take(WAIT)
    llm.close()
    for handle in (running, waiting):
        with pytest.raises(UnavailableError, match="shutting down"):
            list(handle)
    with pytest.raises(UnavailableError, match="closed"):
        llm.engine.submit(PROMPT, SHORT)
    running.abort()


def test_close_is_safe_twice_and_from_many_threads(open_llm):
    llm, errors = open_llm(), []

    def close():
        try:
            llm.close()
        except BaseException as error:
            errors.append(error)

    llm.engine.submit(PROMPT, LONG)
    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    llm.close()
    assert not errors and not llm.engine._thread.is_alive()


def test_every_submit_during_close_ends_or_is_refused(open_llm):
    llm, handles = open_llm(), []

    def submit():
        try:
            while True:
                handles.append(llm.engine.submit(PROMPT, LONG))
                time.sleep(0.001)
        except UnavailableError:
            pass

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    llm.close()
    for thread in threads:
        thread.join(WAIT)
    assert handles and all(handle.finish_reason for handle in handles)


def test_reader_with_a_shared_condition_misses_no_token(open_llm):
    llm, changed = open_llm(), threading.Condition()
    handles = [llm.engine.submit(PROMPT[i:], SHORT, changed=changed) for i in range(8)]
    counts = dict.fromkeys(handles, 0)
    while not all(handle.exhausted for handle in handles):
        with changed:
            running = [handle for handle in handles if counts[handle] < 5]
            changed.wait_for(lambda: any(handle.has_news for handle in running) or not running, WAIT)
        for handle in handles:
            counts[handle] += len(handle.take(0))
    assert set(counts.values()) == {5}


def test_long_run_keeps_nothing_of_ended_requests(open_llm):
    llm = open_llm()
    for index in range(300):
        handle = llm.engine.submit([index % 300, *PROMPT], SamplingParams(max_tokens=1))
        if index % 3 == 0:
            handle.abort()
        list(handle)
    engine = llm.engine
    assert not engine._handles and not engine.scheduler.has_work and used_blocks(llm) == 0
    wait_until(lambda: not engine._aborted)
    assert rustinfer.BlockManager.check(engine.blocks, ()) is None
