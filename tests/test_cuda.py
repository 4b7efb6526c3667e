"""CudaBackend and CudaRunner on the CPU: the real kernels, graphs and host code, on a stand-in for CuPy."""
import contextlib
import gc
import json
import re
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import cupy_cpu
import numpy as np
import pytest
from make_references import random_checkpoint
from test_batch_invariance import answer_of

import rustinfer
from cuda_cpu import why_not
from harness import ROOT, RawConnection, ServerProcess, chat_body, local_server
from rustinfer import (PENDING, CudaBackend, EngineConfig, EngineError, ModelConfig, SamplingParams, SettingsError,
                       Structure)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

DIMS = dict(hidden_size=64, intermediate_size=96, num_layers=2, num_attention_heads=4, num_kv_heads=2, head_dim=32,
            vocab_size=331)
WAIT = 60


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A card, as far as `import cupy` can tell."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_cpu)
    monkeypatch.setattr(cupy_cpu, "MEMORY", [8 << 30])
    yield
    cupy_cpu.FAULTS.clear()
    cupy_cpu.LOST.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model") / "model", **DIMS)


@pytest.fixture
def open_llm(folder):
    opened = []

    def open_one(model=folder, **options):
        options = dict(max_num_seqs=5, max_model_len=256, device="cuda:0") | options
        opened.append(rustinfer.LLM(model, **options))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()
        llm.engine.blocks.check(())
        assert not llm.engine._handles


def requests():
    """Prompts of all kinds of length, two with the same beginning; greedy, drawn, filtered, with penalties."""
    rng, made = np.random.default_rng(3), []
    stem = rng.integers(0, 331, 70).tolist()
    kinds = [dict(temperature=0), dict(temperature=1.0), dict(temperature=1.3, top_k=20, top_p=0.9),
             dict(temperature=0, repetition_penalty=1.5, presence_penalty=0.5), dict(temperature=0.8, min_p=0.02),
             dict(temperature=1.0, frequency_penalty=1.0, logit_bias={7: 5.0, 11: -100})]
    for number, length in enumerate((1, 5, 16, 33, 70, 17, 2, 64)):
        prompt = stem[:length] if number % 2 else rng.integers(0, 331, length).tolist()
        made.append((prompt, SamplingParams(seed=number, max_tokens=6 + 5 * (number % 3), ignore_eos=True, logprobs=3,
                                            **kinds[number % len(kinds)])))
    return made


def answers(llm):
    return [answer_of(handle) for handle in [llm.engine.submit(*request) for request in requests()]]


@pytest.fixture(scope="module")
def alone(folder):
    """Each request with the engine to itself, kernel by kernel."""
    sys.modules["cupy"] = cupy_cpu
    try:
        with rustinfer.LLM(folder, device="cuda:0", max_num_seqs=1, max_model_len=256, enforce_eager=True,
                           no_prefix_caching=True) as llm:
            return [answer_of(llm.engine.submit(*request)) for request in requests()]
    finally:
        del sys.modules["cupy"]


def test_the_demo_model_answers_as_on_numpy(open_llm):
    card = open_llm(ROOT / "demo")
    assert card.backend_name.startswith("CUDA kernels (sm_80, captured decode")
    with rustinfer.LLM(ROOT / "demo", device="cpu") as host:
        for text in ("What is Rust?", "Who are you?"):
            message, options = [{"role": "user", "content": text}], dict(temperature=0, max_tokens=12)
            found, expected = (llm.chat(message, **options)[0].outputs[0] for llm in (card, host))
            assert found.token_ids == expected.token_ids


def test_logprobs_are_close_to_numpy(alone, folder):
    with rustinfer.LLM(folder, device="cpu") as host:
        prompt, params = requests()[4]
        first = answer_of(host.engine.submit(prompt, params))[0]
    assert abs(float.fromhex(first[1]) - float.fromhex(alone[4][0][1])) < 0.05  # bf16 inputs


@pytest.mark.parametrize("options", [
    {}, dict(enforce_eager=True, max_num_batched_tokens=24), dict(max_num_batched_tokens=40, max_num_seqs=8)],
    ids=["graphs", "eager, chunked", "graphs, chunked"])
def test_together_equals_alone(open_llm, alone, options):
    llm = open_llm(**options)
    assert answers(llm) == alone
    assert answers(llm) == alone and llm.engine.snapshot()["cached_tokens"] > 100


def test_no_kernel_reads_or_writes_beyond_what_the_host_gives_it(open_llm, alone, monkeypatch):
    monkeypatch.setattr(cupy_cpu, "MODE", ["check"])
    llm = open_llm(max_num_batched_tokens=80, max_num_seqs=2, enforce_eager=True)  # padding rows race, harmlessly
    numbers = (3, 5)
    handles = [llm.engine.submit(*requests()[number]) for number in numbers]
    assert [answer_of(handle) for handle in handles] == [alone[number] for number in numbers]


@pytest.mark.parametrize("options", [{}, dict(enforce_eager=True), dict(no_pdl=True)], ids=["graphs", "eager", "off"])
def test_programmatic_launches_change_no_answer(open_llm, alone, monkeypatch, options):
    monkeypatch.setattr(cupy_cpu.Device, "compute_capability", "90")
    monkeypatch.setattr(rustinfer, "KernelLauncher", cupy_cpu.Launcher)
    llm = open_llm(**options)
    assert ("programmatic launch" in llm.backend_name) == ("no_pdl" not in options)
    assert answers(llm) == alone


def test_a_piece_of_a_prompt_may_end_one_token_before_it(open_llm):
    prompt, params = list(range(65)), SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1, temperature=0)
    whole, pieces = (answer_of(open_llm(max_num_batched_tokens=budget).engine.submit(prompt, params))
                     for budget in (128, 64))
    assert whole == pieces


def test_unrelated_traffic_and_aborts_change_nothing(open_llm, alone):
    llm, rng, noise, handles = open_llm(max_num_batched_tokens=48), np.random.default_rng(5), [], []
    for request in requests() * 2:
        handles.append(llm.engine.submit(*request))
        prompt = rng.integers(0, 331, rng.integers(1, 60)).tolist()
        noise.append(llm.engine.submit(prompt, SamplingParams(max_tokens=50, frequency_penalty=1.0)))
        noise[rng.integers(len(noise))].abort()
    assert [answer_of(handle) for handle in handles] == alone * 2
    for handle in noise:
        handle.abort()
    assert llm.engine.dead is None


def test_preempted_sequences_resume_with_the_same_bits(open_llm):
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=3, logprobs=2, presence_penalty=1.0)
    with_room = answer_of(open_llm().engine.submit(list(range(14)), params))
    llm = open_llm(kv_cache_memory=8 * 2 * 2 * 16 * 64 * 2, no_prefix_caching=True)
    handles = [llm.engine.submit(list(range(14)), params) for _ in range(5)]
    assert [answer_of(handle) for handle in handles] == [with_room] * 5
    assert llm.engine.snapshot()["num_preemptions"] > 0


def test_no_copy_reads_memory_that_may_be_gone(open_llm, monkeypatch):
    def checked(self, source, stream):
        assert any(np.shares_memory(source, memory) for memory in cupy_cpu._pinned)
        send(self, source, stream)

    send = cupy_cpu.DeviceArray.set
    monkeypatch.setattr(cupy_cpu.DeviceArray, "set", checked)
    params = SamplingParams(max_tokens=3, min_tokens=2, repetition_penalty=1.2, prompt_logprobs=1)
    assert len(list(open_llm().engine.submit([1, 2, 3], params))) == 3


def test_steady_decode_sends_nothing_to_the_card(open_llm, monkeypatch):
    llm, sent = open_llm(), []
    send = llm.engine.model.backend.patch_state
    monkeypatch.setattr(llm.engine.model.backend, "patch_state", lambda patches: sent.append(patches) or send(patches))
    handle = llm.engine.submit(list(range(20)), SamplingParams(max_tokens=40, ignore_eos=True))
    list(handle)
    assert [len(patches) for patches in sent[2:]] == [1, 1]  # the blocks that begin at tokens 32 and 48


# ---- masks: structured output and min_tokens ------------------------------------------------------------------------

STOPS = tuple(range(0, 331, 2))  # so many that an answer soon ends
POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99},
                                          "label": {"enum": ["north", "south"]}},
         "required": ["x", "label"], "additionalProperties": False}
SHAPES = [Structure(kind, source, "x") for kind, source in (
    ("regex", "[a-f]{3}-[0-9]{2}"), ("json", POINT), ("regex", r"red|green\.|\(blue\)"),
    ("lark", 'start: ("yes" | "no") "!"{1,3}'), ("regex", "[a-z]{1,40}"))]


def masked_requests():
    """(prompt, params, structure): free ones, those with a shape, those with a least length, one with both."""
    rng, made = np.random.default_rng(6), []
    kinds = [dict(temperature=0), dict(temperature=1.3), dict(temperature=1.0, top_k=20, top_p=0.9),
             dict(temperature=0, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={9: 5}),
             dict(temperature=0.8, min_p=0.02), dict(temperature=1.0, frequency_penalty=1.0, logit_bias={7: 5.0})]
    for number, length in enumerate((1, 5, 16, 33, 17, 2, 64, 40, 3, 15, 31, 9, 12, 30, 7)):
        kind = number % 3
        options = [dict(ignore_eos=True, max_tokens=9 + number), dict(max_tokens=60),
                   dict(max_tokens=3 * number, min_tokens=number, stop_token_ids=STOPS)][kind]
        shape = SHAPES[number // 3] if kind == 1 or number == 14 else None
        params = SamplingParams(seed=number, logprobs=3, **kinds[number % 6 if number < 12 else 1], **options)
        made.append((rng.integers(0, 331, length).tolist(), params, shape))
    return made


def submit(llm, prompt, params, shape):
    return llm.engine.submit(prompt, params, constraint=llm.grammars.compile(shape) if shape else None)


def masked_answers(llm):
    return [answer_of(handle) for handle in [submit(llm, *request) for request in masked_requests()]]


@contextlib.contextmanager
def one_at_a_time(folder):
    """A model whose requests each have the engine to themselves, kernel by kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy_cpu)
        with rustinfer.LLM(folder, device="cuda:0", max_num_seqs=1, max_model_len=256, enforce_eager=True,
                           no_prefix_caching=True) as llm:
            yield llm


@pytest.fixture(scope="module")
def masked_alone(folder):
    """Of each request its answer and how it ended."""
    with one_at_a_time(folder) as llm:
        handles = [submit(llm, *request) for request in masked_requests()]
        return [(answer_of(handle), text_of(llm, handle), handle.finish_reason) for handle in handles]


def text_of(llm, handle):
    """What was put out, without a token that ended it."""
    return llm.tokenizer.decode(token for token in handle.seq.history[1] if token not in handle.seq.end_token_ids)


def test_masked_answers_have_their_shape_and_their_length(masked_alone):
    shortest = []
    for (_, params, shape), (answer, text, reason) in zip(masked_requests(), masked_alone):
        assert len(answer) > params.min_tokens
        if shape and shape.kind == "regex":
            assert re.fullmatch(shape.source, text) and reason == "stop"
        elif shape and shape.kind == "lark":
            assert re.fullmatch("(yes|no)!{1,3}", text)
        elif shape:
            assert json.loads(text)["label"] in ("north", "south")
        elif params.min_tokens:
            assert reason == "stop" and not set(STOPS) & {token for token, *_ in answer[: params.min_tokens]}
            shortest.append(len(answer) - params.min_tokens)
    assert min(shortest) == 1  # the first token that may end an answer does


@pytest.mark.parametrize("options", [
    {}, dict(enforce_eager=True, max_num_batched_tokens=24), dict(max_num_batched_tokens=40, max_num_seqs=16)],
    ids=["graphs", "eager, chunked", "graphs, chunked"])
def test_masked_and_free_requests_answer_together_as_alone(open_llm, masked_alone, options):
    llm, expected = open_llm(**options), [answer for answer, *_ in masked_alone]
    assert masked_answers(llm) == expected
    assert masked_answers(llm) == expected


def test_programmatic_launches_come_behind_the_masks(open_llm, masked_alone, monkeypatch):
    monkeypatch.setattr(cupy_cpu.Device, "compute_capability", "90")
    monkeypatch.setattr(rustinfer, "KernelLauncher", cupy_cpu.Launcher)
    assert masked_answers(open_llm()) == [answer for answer, *_ in masked_alone]


def test_no_kernel_reads_beyond_a_mask(open_llm, masked_alone, monkeypatch):
    monkeypatch.setattr(cupy_cpu, "MODE", ["check"])
    llm, numbers = open_llm(max_num_batched_tokens=80, max_num_seqs=2, enforce_eager=True), (1, 2)
    handles = [submit(llm, *masked_requests()[number]) for number in numbers]
    assert [answer_of(handle) for handle in handles] == [masked_alone[number][0] for number in numbers]


def test_masked_sequences_resume_after_preemption_with_the_same_tokens(open_llm):
    base = dict(temperature=1.2, seed=3, logprobs=2, max_tokens=40)
    kinds = [(SamplingParams(**base), Structure("regex", "[a-z]{30}", "x")),
             (SamplingParams(ignore_eos=True, **base), None),
             (SamplingParams(min_tokens=25, stop_token_ids=STOPS, **base), None)]
    llm, prompt = open_llm(), list(range(14))
    with_room = [answer_of(submit(llm, prompt, *kind)) for kind in kinds]
    llm = open_llm(kv_cache_memory=8 * 2 * 2 * 16 * 64 * 2, no_prefix_caching=True)
    handles = [submit(llm, prompt, *kind) for kind in kinds * 3]
    assert [answer_of(handle) for handle in handles] == with_room * 3
    assert llm.engine.snapshot()["num_preemptions"] > 0


def test_aborted_neighbours_leave_no_mask_behind(open_llm, masked_alone):
    llm, rng, noise, handles = open_llm(max_num_batched_tokens=48), np.random.default_rng(5), [], []
    for number, request in enumerate(masked_requests() * 2):
        handles.append(submit(llm, *request))
        prompt = rng.integers(0, 331, rng.integers(1, 30)).tolist()
        params = SamplingParams(max_tokens=90, min_tokens=90 * (number % 2), ignore_eos=False)
        noise.append(submit(llm, prompt, params, None if number % 2 else Structure("regex", "[a-z]{90}", "x")))
        noise[rng.integers(len(noise))].abort()
    assert [answer_of(handle) for handle in handles] == [answer for answer, *_ in masked_alone] * 2
    for handle in noise:
        handle.abort()
    assert llm.engine.dead is None


def watch_launches(llm, monkeypatch):
    """[(number of sequences, whether the step before was still in flight)], and the seats that got masks each time."""
    engine, launches, sent = llm.engine, [], []
    launch, send = engine._runner.launch, engine.model.backend.masks.send

    def watched(step):
        assert not any(seq.constraint and seq.token_ids[-1] == PENDING for seq in step)
        launches.append((len(step), engine._in_flight is not None))
        return launch(step)

    monkeypatch.setattr(engine._runner, "launch", watched)
    monkeypatch.setattr(engine.model.backend.masks, "send", lambda masks: sent.append(list(masks)) or send(masks))
    return launches, sent


def test_a_least_length_costs_one_mask_and_no_waiting(open_llm, monkeypatch):
    llm = open_llm()
    launches, sent = watch_launches(llm, monkeypatch)
    patches, patch = [], llm.engine.model.backend.patch_state
    monkeypatch.setattr(llm.engine.model.backend, "patch_state", lambda made: patches.append(made) or patch(made))
    handle = llm.engine.submit(list(range(10)), SamplingParams(max_tokens=40, min_tokens=20, temperature=0))
    assert len(list(handle)) > 20
    assert launches[0] == (1, False) and all(ahead for _, ahead in launches[1:])
    assert [seats for seats in sent if seats] == [[sent[0][0]]]
    (place, _), = llm.engine.model.backend.state.patch("ints", sent[0][0], [0], 7)
    assert [dict(made)[place] for made in patches if place in dict(made)] == [1, 0]


def test_a_grammar_waits_for_its_tokens(open_llm, monkeypatch):
    llm = open_llm()
    launches, sent = watch_launches(llm, monkeypatch)
    free = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    shaped = submit(llm, [1, 2, 3], SamplingParams(max_tokens=30), Structure("regex", "[a-z]{999}", "x"))
    other = llm.engine.submit([4, 5, 6], free)
    assert len(list(shaped)) == 30 and len(list(other)) == 60
    assert not any(ahead for _, ahead in launches[:30]) and sum(ahead for _, ahead in launches) > 20
    assert len([seats for seats in sent if seats]) == 30


def test_a_mask_waits_in_its_own_memory_until_it_is_copied():
    stream, seen = cupy_cpu.Stream(), []
    masks = rustinfer.SeatMasks(cupy_cpu, stream, 2, 40)
    for value in (1, 2, 3):
        masks.send({1: np.array([value, value], np.uint32)})
        stream.add(lambda: seen.append(np.array(masks.array).tolist()))
    stream.synchronize()
    assert seen == [[[0, 0], [value, value]] for value in (1, 2, 3)]


def test_the_demo_model_fills_shapes_as_on_numpy(open_llm):
    prompt = "The capital of France is"
    found = []
    for options in (dict(device="cuda:0"), dict(device="cpu")):
        llm = open_llm(ROOT / "demo", **options)
        ids = llm.tokenizer.encode_prompt(prompt)
        stops = tuple(token for token in range(1500) if b"e" in llm.tokenizer.token_bytes(token))[:256]
        handles = [submit(llm, ids, SamplingParams(temperature=0, max_tokens=30), shape) for shape in SHAPES]
        handles += [llm.engine.submit(ids, SamplingParams(temperature=0, max_tokens=20, min_tokens=least,
                                                          stop_token_ids=stops)) for least in (0, 8)]
        found.append([[token.token_id for token in handle] for handle in handles])
    assert found[0] == found[1] and len(found[0][-2]) < 8 < len(found[0][-1])


def test_structured_requests_are_served_on_a_card(open_llm):
    fields = dict(temperature=1.0, max_tokens=60, min_tokens=3, seed=1, response_format={
        "type": "json_schema", "json_schema": {"name": "point", "schema": POINT}})
    with local_server(open_llm(ROOT / "demo")) as server, RawConnection(server.port) as connection:
        status, _, body = connection.request("POST", "/v1/chat/completions", chat_body(**fields))
    assert status == 200, body
    assert json.loads(body["choices"][0]["message"]["content"])["label"] in ("north", "south")


# ---- prompts that are scored ----------------------------------------------------------------------------------------


def scored_requests():
    """Prompts longer than a scored step and shorter, with equal beginnings, each with its own number of likeliest."""
    rng, made = np.random.default_rng(8), []
    stem = rng.integers(0, 331, 150).tolist()
    for number, (length, count) in enumerate([(150, 3), (1, 2), (2, 0), (17, 20), (70, 1), (33, 0), (131, 5)]):
        prompt = stem[:length] if number % 2 == 0 else rng.integers(0, 331, length).tolist()
        made.append((prompt, SamplingParams(prompt_logprobs=count, logprobs=2, seed=number, max_tokens=3 + 9 * number,
                                            ignore_eos=True, presence_penalty=0.5 * (number % 2))))
    return made


def scored_answer(handle):
    """The prompt's scores, as they are when the first token comes, and the answer; floats to the bit."""
    first = handle.take(WAIT)
    scores = [(token, logprob.hex(), tuple((i, value.hex()) for i, value in top), finite)
              for token, logprob, top, finite in handle.seq.prompt_scores]
    assert [score[0] for score in scores] == handle.seq.history[0][1:]
    return scores, [(token.token_id, token.logprob.hex()) for token in [*first, *handle]]


def scored_answers(llm):
    return [scored_answer(handle) for handle in [llm.engine.submit(*request) for request in scored_requests()]]


@pytest.fixture(scope="module")
def scored_alone(folder):
    """Each request, one row of logits at a time."""
    with one_at_a_time(folder) as llm:
        return [scored_answer(llm.engine.submit(*request)) for request in scored_requests()]


def test_prompts_have_the_scores_of_numpy(scored_alone, folder):
    """As near as bf16 inputs come; the logprobs of other tokens and places are 3 away, in the mean."""
    apart, size = [], float.fromhex
    with rustinfer.LLM(folder, device="cpu", cpu_kernels="off") as host:
        expected = scored_answers(host)
    for (_, params), (found, _), (others, _) in zip(scored_requests(), scored_alone, expected):
        for one, other in zip(found, others, strict=True):
            assert len(one[2]) == len(other[2]) == params.prompt_logprobs and one[3] and other[3]
            apart += [size(one[1]) - size(other[1])]
            apart += [size(a) - size(b) for (_, a), (_, b) in zip(one[2], other[2])]
    assert len(apart) > 1000 and np.abs(apart).mean() < 0.05 and np.abs(apart).max() < 0.2


def test_a_prompt_is_scored_as_if_it_had_been_generated(open_llm):
    llm, ids = open_llm(), list(range(20))
    answer = list(llm.engine.submit(ids, SamplingParams(temperature=1, seed=4, logprobs=4, max_tokens=30,
                                                        ignore_eos=True)))
    longer = ids + [token.token_id for token in answer]
    handle = llm.engine.submit(longer, SamplingParams(prompt_logprobs=4, max_tokens=1))
    list(handle)
    assert len(handle.seq.prompt_scores) == 49 and handle.seq.prompt_scores[19:] == answer


@pytest.mark.parametrize("options", [
    {}, dict(enforce_eager=True, max_num_batched_tokens=24), dict(max_num_batched_tokens=65, max_num_seqs=8)],
    ids=["graphs", "eager, chunked", "graphs, chunked"])
def test_scored_and_other_requests_answer_together_as_alone(open_llm, alone, scored_alone, options):
    llm = open_llm(**options)
    for _ in range(2):  # the second time every block is cached
        others = [llm.engine.submit(*request) for request in requests()]
        assert scored_answers(llm) == scored_alone
        assert [answer_of(handle) for handle in others] == alone


def test_programmatic_launches_change_no_score(open_llm, scored_alone, monkeypatch):
    monkeypatch.setattr(cupy_cpu.Device, "compute_capability", "90")
    monkeypatch.setattr(rustinfer, "KernelLauncher", cupy_cpu.Launcher)
    assert scored_answers(open_llm()) == scored_alone


def test_scoring_reads_and_writes_nothing_beyond_what_the_host_gives_it(open_llm, scored_alone, monkeypatch):
    monkeypatch.setattr(cupy_cpu, "MODE", ["check"])
    llm = open_llm(max_num_batched_tokens=80, max_num_seqs=2, enforce_eager=True)
    assert scored_answer(llm.engine.submit(*scored_requests()[3])) == scored_alone[3]


@pytest.mark.parametrize("lengths, num_blocks, counts", [((14, 150), 12, range(1, 149)), ((14,) * 5, 8, [13])],
                         ids=["while it is scored", "later"])
def test_a_preempted_sequence_keeps_its_scores(open_llm, monkeypatch, lengths, num_blocks, counts):
    params = SamplingParams(prompt_logprobs=2, max_tokens=24, ignore_eos=True, temperature=0, logprobs=0)
    prompts, llm = [list(range(number, number + length)) for number, length in enumerate(lengths)], open_llm()
    expected = [scored_answer(llm.engine.submit(prompt, params)) for prompt in prompts]
    llm = open_llm(kv_cache_memory=num_blocks * 2 * 2 * 16 * 64 * 2, max_num_batched_tokens=6)
    preempt, scored = llm.engine.scheduler._preempt, []
    monkeypatch.setattr(llm.engine.scheduler, "_preempt",
                        lambda seq: scored.append(len(seq.prompt_scores)) or preempt(seq))
    handles = [llm.engine.submit(prompt, params) for prompt in prompts]
    assert [scored_answer(handle) for handle in handles] == expected
    assert set(scored) & set(counts)


def test_requests_that_end_while_they_are_scored_change_nothing(open_llm, scored_alone):
    llm, rng, noise, handles = open_llm(max_num_batched_tokens=32), np.random.default_rng(5), [], []
    for request in scored_requests():
        handles.append(llm.engine.submit(*request))
        noise.append(llm.engine.submit(rng.integers(0, 331, 90).tolist(),
                                       SamplingParams(prompt_logprobs=20, max_tokens=9)))
        noise[rng.integers(len(noise))].abort()
    assert [scored_answer(handle) for handle in handles] == scored_alone
    for handle in noise:
        handle.abort()
    assert llm.engine.dead is None


def test_an_echoed_prompt_has_its_logprobs_on_a_card(open_llm):
    llm, fields = open_llm(ROOT / "demo"), dict(echo=True, logprobs=2, max_tokens=2, temperature=0)
    ids = llm.tokenizer.encode_prompt("The capital of France is")
    with local_server(llm) as server, RawConnection(server.port) as connection:
        status, _, body = connection.request("POST", "/v1/completions", {"prompt": ids, **fields})
    assert status == 200, body
    shown, expected = body["choices"][0]["logprobs"], llm.generate(ids, prompt_logprobs=2, max_tokens=1)[0]
    assert body["choices"][0]["text"].startswith(llm.tokenizer.decode(ids))
    assert shown["token_logprobs"][0] is None and len(shown["tokens"]) == len(ids) + 2
    for place, entries in enumerate(expected.prompt_logprobs[1:], 1):
        assert shown["token_logprobs"][place] == entries[ids[place]].logprob
        assert len(shown["top_logprobs"][place]) >= 2


# ---- errors and limits ----------------------------------------------------------------------------------------------


def test_a_failed_launch_ends_the_engine_and_names_the_kernel(open_llm, caplog):
    llm, died = open_llm(enforce_eager=True), threading.Event()
    llm.engine.on_death = died.set
    list(llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
    cupy_cpu.FAULTS["gate_up_fused"] = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    handles = [llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=300 - 100)) for _ in range(3)]
    for handle in handles:
        with pytest.raises(EngineError, match="the engine has failed"):
            list(handle)
    assert died.wait(WAIT) and isinstance(llm.engine.dead, rustinfer.DeviceError)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (last kernel launched: gate_up_fused)" in caplog.text


def test_a_card_that_is_lost_while_it_works_ends_the_engine(open_llm, monkeypatch):
    llm = open_llm()
    monkeypatch.setattr(cupy_cpu.Event, "synchronize", lambda self: 1 // 0)
    with pytest.raises(EngineError, match="the engine has failed"):
        list(llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
    monkeypatch.undo()
    assert "ZeroDivisionError" in str(llm.engine.dead)


def test_memory_that_runs_short_in_a_step_ends_the_engine(open_llm, monkeypatch):
    llm = open_llm()
    monkeypatch.setattr(cupy_cpu, "MEMORY", [0])
    with pytest.raises(EngineError, match="the engine has failed"):
        list(llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
    assert "memory is not enough" in str(llm.engine.dead)


def test_an_engine_on_a_lost_card_can_be_closed(open_llm):
    llm = open_llm()
    cupy_cpu.LOST.append(RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"))
    with pytest.raises(EngineError, match="the engine has failed"):
        list(llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
    llm.close()


def test_a_card_that_is_lost_at_the_start_is_told_once(open_llm, monkeypatch):
    def lose(module, name):
        cupy_cpu.LOST.append(RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered"))
        raise cupy_cpu.LOST[0]

    monkeypatch.setattr(cupy_cpu.RawModule, "get_function", lose)
    with pytest.raises(rustinfer.DeviceError) as found:
        open_llm()
    assert str(found.value).count("cudaErrorIllegalAddress") == str(found.value).count("last kernel launched") == 1


def test_an_error_while_graphs_are_captured_is_told_once(open_llm, monkeypatch):
    monkeypatch.setattr(cupy_cpu.Graph, "upload", lambda *_: raise_(RuntimeError("no driver for graphs")))
    with pytest.raises(rustinfer.DeviceError) as found:
        open_llm()
    assert str(found.value) == "RuntimeError: no driver for graphs (last kernel launched: sample_draw)"


def test_a_card_that_is_taken_is_not_used(monkeypatch):
    monkeypatch.setattr(cupy_cpu.Device, "use", lambda self: raise_(RuntimeError("cudaErrorDevicesUnavailable: busy")))
    assert rustinfer.find_card("auto") == (None, "no card: cudaErrorDevicesUnavailable: busy")
    with pytest.raises(SettingsError, match="--device: 'cuda:0' cannot be used: cudaErrorDevicesUnavailable: busy"):
        rustinfer.find_card("cuda:0")


def test_cupy_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("try:\n    import numpy.nothing\n"
                                      "except ImportError as error:\n    raise ImportError('\\n=====') from error\n")
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(tmp_path)
    assert rustinfer.find_card("auto") == (None, "no card: No module named 'numpy.nothing'")


def test_a_missing_compiler_is_told_with_what_brings_it(open_llm, monkeypatch):
    monkeypatch.setattr(cupy_cpu.RawModule, "compile", lambda self: raise_(OSError("no libnvrtc.so.12")))
    with pytest.raises(rustinfer.DeviceError, match=r"patch_state.cu .*no libnvrtc.so.12; .* rustinfer\[cuda12\]"):
        open_llm()


def raise_(error):
    raise error


def test_too_little_memory_is_an_error_that_says_what_to_change(open_llm, monkeypatch):
    monkeypatch.setattr(cupy_cpu, "MEMORY", [100_000])
    with pytest.raises(SettingsError, match="card's memory is not enough.*lower --max-num-seqs"):
        open_llm()


@pytest.mark.parametrize("owner, name", [(cupy_cpu.cuda, "alloc_pinned_memory"), (cupy_cpu.Graph, "upload")])
def test_too_little_memory_beside_the_pool_is_told_alike(open_llm, monkeypatch, owner, name):
    error = RuntimeError("cudaErrorMemoryAllocation: out of memory")
    monkeypatch.setattr(owner, name, lambda *_: raise_(error))
    with pytest.raises(SettingsError, match="memory is not enough: cudaError.*or --gpu-memory-utilization"):
        open_llm()


def test_the_card_of_the_metrics_is_found_by_its_place_in_the_machine(open_llm, monkeypatch):
    class Card:  # as pynvml has it; it does not know CUDA_VISIBLE_DEVICES
        total, used, gpu = 8 << 30, 1 << 30, 50

    cards = {"0000:09:00.0": None, "0000:08:00.0": Card}
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: list(cards.values())[index],
        nvmlDeviceGetHandleByPciBusId=cards.get, nvmlDeviceGetMemoryInfo=lambda card: card,
        nvmlDeviceGetUtilizationRates=lambda card: card, nvmlDeviceGetTemperature=lambda card, kind: 40,
        nvmlDeviceGetPowerUsage=lambda card: 70_000, NVML_TEMPERATURE_GPU=0, NVMLError=RuntimeError))
    llm = open_llm()
    found = rustinfer.MachineProbe(llm.device_index, llm.pci_bus_id).card()
    assert found["device_id"] == 0 and found["memory_used_mb"] == 1024 and found["power_watts"] == 70


def test_a_closed_model_holds_nothing_on_the_card(open_llm):
    gc.collect()  # of other tests
    pool = cupy_cpu.get_default_memory_pool()
    before, llm = pool.used_bytes(), open_llm()
    list(llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
    assert pool.used_bytes() > before
    llm.close()
    assert pool.used_bytes() <= before


def test_a_checkpoint_that_is_not_whole_is_still_told_as_such(open_llm, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(rustinfer.CheckpointError, match="layers.2.* is missing"):
        open_llm(tmp_path / "model")


def test_cache_takes_what_the_card_has_left(open_llm):
    llm = open_llm(max_num_seqs=5)
    assert llm.kv_capacity == 5 * 256  # no more than every sequence can use


@pytest.mark.parametrize("change, reason", [
    (dict(block_size=8), "--block-size is 8; the kernels need 16"),
    (dict(hidden_size=40), "must be multiples of 32"), (dict(attention_bias=True), "the kernels have no biases"),
    (dict(num_attention_heads=34, num_kv_heads=1), "34 query heads share a KV head; at most 16 may"),
    (dict(capability="75"), "compute capability is 7.5; the kernels need 8.0"),
    (dict(folder=None), "no folder kernels/"),
])
def test_what_the_kernels_cannot_do_is_said(folder, monkeypatch, change, reason):
    model, config, kernels = ModelConfig.load(folder), EngineConfig(), ROOT / "kernels"
    for name, value in change.items():
        if name == "block_size":
            config = EngineConfig(block_size=value)
        elif name == "capability":
            monkeypatch.setattr(cupy_cpu.Device, "compute_capability", value)
        elif name == "folder":
            kernels = value
        else:
            object.__setattr__(model, name, value)
    assert reason in CudaBackend.why_not(cupy_cpu, config, model, kernels)


def nearest_bf16(value: float) -> float:
    """The nearest bfloat16, of two the one with an even last bit."""
    bits = int(np.float32(value).view(np.uint32)) >> 16
    below, above = (float((np.uint32(b) << np.uint32(16)).view(np.float32)) for b in (bits, bits + 1))
    distances = abs(value - below), abs(above - value)
    return below if distances[0] < distances[1] or (distances[0] == distances[1] and bits % 2 == 0) else above


def test_upload_is_exact_in_pieces_and_rounds_to_bf16(monkeypatch):
    monkeypatch.setattr(rustinfer.PinnedUpload, "BUFFER_BYTES", 64)
    stream, rng = cupy_cpu.Stream(), np.random.default_rng(0)
    upload, values = rustinfer.PinnedUpload(cupy_cpu, stream), rng.standard_normal(301).astype(np.float32)
    values[:4] = 1.00390625, 1.01171875, -0.0, 1e-40  # two ties, and what has no exponent
    for dtype, kind in (("BF16", np.uint16), ("F32", np.float32), ("F16", np.float16)):
        data = (values.view(np.uint32) >> 16).astype(kind) if dtype == "BF16" else values.astype(kind)
        part, target = rustinfer.RawTensor(data.reshape(43, 7), dtype), cupy_cpu.zeros((301,), np.uint16)
        upload.copy(part, target)
        stream.synchronize()
        found = (np.asarray(target).astype(np.uint32) << 16).view(np.float32)
        assert found.tolist() == [nearest_bf16(value) for value in part.to_float32().reshape(-1).tolist()]
    special = np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32)
    assert rustinfer.to_bfloat16(rustinfer.RawTensor(special, "F32")).tolist() == [0x7F80, 0xFF80, 0x7FC0, 0x7FC0]


def card_server(**env):
    """A real server process that finds a card."""
    path = f"{ROOT / 'tests' / 'fake_card'}:{ROOT / 'tests'}"
    return ServerProcess("--device", "cuda:0", "--max-num-seqs", "2", "--max-model-len", "256", "--enforce-eager",
                         env={"PYTHONPATH": path, **env})


def test_a_server_on_a_card_says_so_and_answers():
    with card_server() as server:
        hello = server.process.stdout.readline()
        assert "CUDA kernels (sm_80, eager) (CuPy sees 1 card(s))" in hello
        status, _, body = server.chat("What is Rust?", max_tokens=8, temperature=0)
        assert status == 200 and body["usage"]["completion_tokens"] == 8
        assert server.stop() == 0


def test_a_broken_card_answers_its_requests_with_an_error_and_ends_the_process_with_1():
    with card_server(CUPY_CPU_FAULT="gate_up_fused:30") as server:
        status, _, body = server.chat("What is Rust?", max_tokens=100, temperature=0)
        assert status == 500 and body["error"]["type"] == "server_error"
        assert server.process.wait(20) == 1
        assert "ECC error encountered (last kernel launched: gate_up_fused)" in server.read_log()


def test_the_script_for_a_card_runs_all_its_stages(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "bench" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout + done.stderr and "bits" in str(results)
