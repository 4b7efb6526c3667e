"""LLM: text in, text out, for programs; and what a program may expect of a library: no traces, no side effects."""
import gc
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from harness import REFERENCES, ROOT, reference_answers

import rustinfer
from rustinfer import LLM, ContextLengthError, Piece, RustinferError, SamplingParams, SettingsError

TEXT = "The river runs down to the sea"
MESSAGES = [{"role": "user", "content": "Where does the river run?"}]
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}


def wait_until(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "did not happen"
        time.sleep(0.002)


def only(outputs):
    """The one answer of the one prompt."""
    (output,) = outputs
    (completion,) = output.outputs
    return completion


def used_blocks(llm):
    return llm.engine.snapshot()["kv_blocks_used"]


def aborted(llm):
    return llm.engine.snapshot()["requests"].get("abort", 0)


# -- generate and chat


def test_prompt_spellings_mean_the_same(tiny_llm):
    ids = tiny_llm.tokenizer.encode_prompt(TEXT)
    expected = only(tiny_llm.generate(TEXT, **GREEDY))
    as_dict = {"prompt_token_ids": ids}
    for prompt in (ids, [TEXT], [ids], tuple(ids), as_dict, [as_dict], {"prompt": TEXT}):
        assert only(tiny_llm.generate(prompt, **GREEDY)) == expected
    assert only(tiny_llm.generate(rustinfer.np.array(ids), **GREEDY)) == expected


def test_list_of_prompts_is_answered_in_order(tiny_llm):
    prompts = [TEXT, tiny_llm.tokenizer.encode_prompt(TEXT)[:3], {"prompt_token_ids": [40, 41, 42]}]
    outputs = tiny_llm.generate(prompts, **GREEDY)
    assert [only([output]) for output in outputs] == [only(tiny_llm.generate(prompt, **GREEDY)) for prompt in prompts]
    assert outputs[0].prompt == TEXT and outputs[1].prompt is None and outputs[2].prompt_token_ids == [40, 41, 42]
    assert tiny_llm.generate([], **GREEDY) == []


def test_answers_are_those_of_the_reference(tiny_llm):
    _, arrays = reference_answers("llama3-tied")
    for index in range(sum(name.startswith("prompt_token_ids_") for name in arrays)):
        prompt, wanted = (arrays[f"{kind}_token_ids_{index}"].tolist() for kind in ("prompt", "output"))
        answer = only(tiny_llm.generate(prompt, temperature=0, ignore_eos=True, max_tokens=len(wanted)))
        assert answer.token_ids == wanted and answer.finish_reason == "length"


def test_chat_answers_the_rendered_conversation(tiny_llm):
    expected = only(tiny_llm.generate({"prompt_token_ids": tiny_llm.template.encode(MESSAGES)}, **GREEDY))
    assert only(tiny_llm.chat(MESSAGES, **GREEDY)) == expected
    assert [only([output]) for output in tiny_llm.chat([MESSAGES, MESSAGES], **GREEDY)] == [expected] * 2


def test_chat_takes_a_streamed_piece_as_text_and_names_what_is_no_message(tiny_llm):
    talk = lambda text: [*MESSAGES, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
    assert only(tiny_llm.chat(talk(Piece("Hello")), **GREEDY)) == only(tiny_llm.chat(talk("Hello"), **GREEDY))
    for wrong, problem in [
            (("user", "Hello"), "messages[0] is of type string; object is expected"),
            ({"role": b"user", "content": "Hello"}, "messages[0].role is of type Python bytes; string is expected"),
            ({"role": "user", "content": ("Hello",)}, "messages[0].content must be a string or a list of text parts")]:
        with pytest.raises(RustinferError, match=re.escape(problem)):
            tiny_llm.chat([wrong])


@pytest.mark.parametrize("prompts", [TEXT, [TEXT, "There is a library", [50, 51, 52]]], ids=["one", "three"])
def test_streamed_pieces_join_to_the_unstreamed_answer(tiny_llm, prompts):
    outputs = tiny_llm.generate(prompts, **GREEDY)
    pieces = list(tiny_llm.generate(prompts, stream=True, **GREEDY))
    assert all(isinstance(piece, Piece) and piece.text == piece for piece in pieces)
    for index, output in enumerate(outputs):
        mine, answer = [piece for piece in pieces if piece.index == index], only([output])
        assert "".join(mine) == answer.text
        assert [i for piece in mine for i in piece.token_ids] == answer.token_ids
        assert [piece.finish_reason for piece in mine if piece.finish_reason] == [mine[-1].finish_reason] == ["length"]


def test_answers_and_pieces_go_from_process_to_process(tiny_llm):
    pieces, answers = list(tiny_llm.generate(TEXT, stream=True, **GREEDY)), tiny_llm.generate(TEXT, **GREEDY)
    assert pickle.loads(pickle.dumps(answers)) == answers
    assert [vars(piece) for piece in pickle.loads(pickle.dumps(pieces))] == [vars(piece) for piece in pieces]
    assert pickle.loads(pickle.dumps(pieces)) == pieces


def test_seeded_answers_repeat_and_unseeded_ones_vary(tiny_llm):
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    ask = lambda **options: only(tiny_llm.generate(TEXT, params, **options)).token_ids
    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask() != ask()


def test_logprobs_hold_the_chosen_and_the_likeliest(tiny_llm):
    answer = only(tiny_llm.generate(TEXT, logprobs=3, temperature=1.2, seed=4, max_tokens=10, ignore_eos=True))
    assert len(answer.logprobs) == len(answer.token_ids) == 10
    for token_id, entries in zip(answer.token_ids, answer.logprobs):
        assert token_id in entries and 3 <= len(entries) <= 4
        assert sorted(e.rank for e in entries.values() if e.rank) == [1, 2, 3]
        assert all(e.decoded_token == tiny_llm.tokenizer.decode([i]) for i, e in entries.items())
    chosen = [entries[token_id].logprob for token_id, entries in zip(answer.token_ids, answer.logprobs)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))


# -- options


def test_options_and_defaults_are_the_servers():
    defaults = {setting.name: setting.default for setting in rustinfer.SETTINGS}
    for item in rustinfer.dataclasses.fields(rustinfer.EngineConfig):
        assert getattr(rustinfer.EngineConfig(), item.name) == defaults[item.name]


@pytest.mark.parametrize("options, named", [
    ({"max_num_seq": 1}, "max_num_seq"), ({"port": 1}, "port"), ({"block_size": 17}, "block_size"),
    ({"max_num_seqs": 0}, "max_num_seqs"), ({"device": "tpu"}, "device"),
    ({"max_model_len": 1 << 20}, "max-model-len")])
def test_wrong_engine_option_is_named(options, named):
    with pytest.raises(SettingsError, match=named):
        LLM(REFERENCES / "llama3-tied", **{"device": "cpu", **options})


def test_wrong_sampling_option_is_named(tiny_llm):
    with pytest.raises(SettingsError, match="max_new_tokens"):
        tiny_llm.generate(TEXT, max_new_tokens=3)
    with pytest.raises(RustinferError, match="temperature"):
        tiny_llm.generate(TEXT, temperature=3)


def test_options_change_the_given_params(tiny_llm):
    params = SamplingParams(**GREEDY)
    assert len(only(tiny_llm.generate(TEXT, params, max_tokens=3)).token_ids) == 3
    assert len(only(tiny_llm.generate(TEXT, params)).token_ids) == 24


@pytest.mark.parametrize("prompt", [
    {}, {"prompt": None}, {"prompt_token_ids": 5}, [1.5, 2], [None], [[1, 2.5]], [["a"]], None, 5, {"a"}, b"ab",
    iter(["a"])])
def test_prompt_of_a_wrong_type_is_refused(tiny_llm, prompt):
    with pytest.raises(RustinferError, match="prompt|token ids"):
        tiny_llm.generate(prompt, **GREEDY)
    assert used_blocks(tiny_llm) == 0


@pytest.mark.parametrize("messages, wanted", [
    (MESSAGES[0], "messages is {'role': 'user'.*a list"), ("Hello", "messages is Hello; a list"),
    (None, "messages is None; a list"), ([], "at least one"), ([MESSAGES, []], "at least one"),
    ([MESSAGES, MESSAGES[0]], "messages is {'role'"), ([object()], r"messages\[0\] is of type Python object"),
    ([{"role": "user", "content": 5}], "content must be"), ([{"role": b"user"}], "role is of type Python bytes")])
def test_a_conversation_of_a_wrong_type_is_refused(tiny_llm, messages, wanted):
    with pytest.raises(rustinfer.InvalidTypeError, match=wanted):
        tiny_llm.chat(messages, **GREEDY)


def test_conversations_may_be_tuples(tiny_llm):
    assert tiny_llm.chat((tuple(MESSAGES),), **GREEDY)[0].outputs == tiny_llm.chat(MESSAGES, **GREEDY)[0].outputs


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, [SamplingParams()]])
def test_sampling_params_of_a_wrong_type_are_refused(tiny_llm, params):
    with pytest.raises(RustinferError, match="a SamplingParams is expected"):
        tiny_llm.generate(TEXT, params)


def test_too_long_prompt_among_others_is_refused_and_stops_the_others(tiny_llm):
    before = aborted(tiny_llm)
    with pytest.raises(ContextLengthError):
        tiny_llm.generate([TEXT, [5] * 2048], max_tokens=1900, ignore_eos=True)
    wait_until(lambda: aborted(tiny_llm) == before + 1)
    assert used_blocks(tiny_llm) == 0


# -- stops


def text_of(llm, **options):
    return only(llm.generate(TEXT, **{**GREEDY, **options})).text


def test_stop_string_ends_the_text_before_it(tiny_llm):
    whole = text_of(tiny_llm)
    for start in range(2, len(whole) - 8, 3):
        for length in (1, 2, 5, 8):  # the longer ones span tokens
            stop = whole[start : start + length]
            answer = only(tiny_llm.generate(TEXT, stop=stop, **GREEDY))
            assert answer.text == whole[: whole.index(stop)]
            assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
            assert tiny_llm.tokenizer.decode(answer.token_ids[:-1]).startswith(answer.text[:-8])
    wait_until(lambda: used_blocks(tiny_llm) == 0)


def test_streamed_text_never_shows_a_stop_string(tiny_llm):
    whole = text_of(tiny_llm)
    stop = whole[10:16]
    pieces = list(tiny_llm.generate(TEXT, stop=[stop, "never there"], stream=True, **GREEDY))
    assert "".join(pieces) == whole[: whole.index(stop)] and pieces[-1].finish_reason == "stop"


def test_held_back_text_comes_when_no_stop_string_follows(tiny_llm):
    whole = text_of(tiny_llm)
    answer = only(tiny_llm.generate(TEXT, stop=whole[-4:] + "and more", **GREEDY))
    assert answer.text == whole and (answer.finish_reason, answer.stop_reason) == ("length", None)


def test_stop_token_ends_the_answer_and_adds_no_text(tiny_llm):
    whole = only(tiny_llm.generate(TEXT, **GREEDY)).token_ids
    stop = whole[5]
    answer = only(tiny_llm.generate(TEXT, stop_token_ids=[stop], **GREEDY))
    assert answer.token_ids == whole[: whole.index(stop) + 1]
    assert answer.text == tiny_llm.tokenizer.decode(answer.token_ids[:-1])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_end_tokens_outside_the_vocabulary_end_nothing(tmp_path, tiny_llm):
    shutil.copytree(REFERENCES / "llama3-tied", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [1 << 70, 9999, -1, -9999]}))
    with LLM(tmp_path / "model", device="cpu") as llm:
        ask = lambda model: only(model.generate(TEXT, temperature=0, max_tokens=8, min_tokens=8))
        assert ask(llm) == ask(tiny_llm)
        llm.grammars.compile(rustinfer.Structure("lark", 'start: "a"', "prompt"))


def test_stop_string_ends_the_request_and_is_counted_as_stop():
    with LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        whole = text_of(llm)
        answer = only(llm.generate(TEXT, stop=whole[5:8], **{**GREEDY, "max_tokens": 1900}))
        wait_until(lambda: used_blocks(llm) == 0)
        assert llm.engine.snapshot()["requests"] == {"length": 1, "stop": 1}
        assert answer.finish_reason == "stop" and llm.engine.snapshot()["completion_tokens"] < 1900


# -- many callers


def test_many_threads_get_the_answers_of_one(tiny_llm):
    prompts = [f"{TEXT} {number}" for number in range(24)]
    expected = [only(tiny_llm.generate(prompt, seed=7, max_tokens=12)) for prompt in prompts]
    ask = lambda prompt: only(tiny_llm.generate(prompt, seed=7, max_tokens=12))
    stream = lambda prompt: "".join(tiny_llm.generate(prompt, seed=7, max_tokens=12, stream=True))
    with ThreadPoolExecutor(12) as pool:
        whole, streamed = pool.map(ask, prompts), pool.map(stream, prompts)
        assert list(whole) == expected and list(streamed) == [answer.text for answer in expected]


def test_more_prompts_than_the_queue_holds_are_all_answered():
    with LLM(REFERENCES / "llama3-tied", device="cpu", max_queue=3, max_num_seqs=2) as llm:
        prompts = [[20 + number, 30] for number in range(40)]
        ask = lambda _: llm.generate(prompts, temperature=0, max_tokens=3, ignore_eos=True)
        with ThreadPoolExecutor(3) as pool:
            for outputs in pool.map(ask, range(3)):
                assert [len(only([output]).token_ids) for output in outputs] == [3] * 40


def test_stream_closed_early_frees_its_blocks(tiny_llm):
    for leave in (lambda stream: stream.close(), lambda stream: None):
        stream = tiny_llm.generate([TEXT, TEXT], stream=True, max_tokens=1500, ignore_eos=True)
        next(stream)
        assert used_blocks(tiny_llm) > 0
        before = aborted(tiny_llm)
        leave(stream)
        del stream
        wait_until(lambda: aborted(tiny_llm) == before + 2)
        assert used_blocks(tiny_llm) == 0


def test_stream_never_read_starts_nothing(tiny_llm):
    stream = tiny_llm.generate(TEXT, stream=True, max_tokens=500)
    assert tiny_llm.engine.snapshot()["num_requests_running"] == 0
    stream.close()


def test_closing_while_others_generate_gives_them_an_error():
    llm, caught = LLM(REFERENCES / "llama3-tied", device="cpu"), []

    def ask():
        try:
            llm.generate(TEXT, max_tokens=1900, ignore_eos=True)
        except RustinferError as error:
            caught.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: llm.engine.snapshot()["num_requests_running"] == 3)
    llm.close()
    for thread in threads:
        thread.join(20)
    assert len(caught) == 3 and all("shutting down" in text for text in caught)


def test_two_models_in_one_process_answer_as_each_alone(tiny_llm):
    expected = text_of(tiny_llm)
    with LLM(REFERENCES / "smollm2", device="cpu") as other:
        alone = text_of(other)
    with LLM(REFERENCES / "smollm2", device="cpu") as other, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(text_of, [tiny_llm, other] * 8))
    assert texts == [expected, alone] * 8


# -- a library leaves no traces


def resources():
    gc.collect()
    process = psutil.Process()
    return {thread.name for thread in threading.enumerate()}, process.num_fds(), process.memory_info().rss


def test_opening_and_closing_many_times_leaves_nothing():
    def use():
        with LLM(REFERENCES / "sharded-biased", device="cpu") as llm:
            llm.generate([TEXT] * 3, max_tokens=4)

    for _ in range(4):
        use()
    threads, files, memory = resources()
    for _ in range(20):
        use()
    threads_after, files_after, memory_after = resources()
    assert threads_after == threads and files_after <= files
    assert memory_after - memory < 6 << 20


def test_model_that_cannot_be_served_leaves_no_thread(tmp_path):
    shutil.copytree(REFERENCES / "llama3-tied", tmp_path / "model")
    spec = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**spec, "num_hidden_layers": 3}))
    before = resources()[:2]
    with pytest.raises(rustinfer.CheckpointError, match="missing"):
        LLM(tmp_path / "model", device="cpu")
    assert resources()[:2] == before


def run_python(code, cwd=ROOT, *args):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_has_no_side_effects():
    out = run_python("""
import sys, threading, logging, signal, locale
import numpy, threadpoolctl, psutil
blas = lambda: [item["num_threads"] for item in threadpoolctl.threadpool_info()]
state = lambda: (blas(), threading.active_count(), logging.getLogger().handlers[:], logging.getLogger().level,
                 signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), locale.setlocale(locale.LC_ALL),
                 psutil.Process().num_fds(), sys.stdout, sys.excepthook, threading.excepthook)
before = state()
import rustinfer
assert state() == before, (before, state())
assert not logging.getLogger("rustinfer").handlers
assert not {"cupy", "pynvml", "torch", "huggingface_hub"} & set(sys.modules)
print("ok")
""")
    assert out == "ok\n"


def test_blas_threads_are_restored_after_the_last_close():
    out = run_python("""
import sys, threadpoolctl, rustinfer
blas = lambda: [item["num_threads"] for item in threadpoolctl.threadpool_info() if item["user_api"] == "blas"]
threadpoolctl.threadpool_limits(limits=2)
before = blas()
first, second = (rustinfer.LLM(sys.argv[1], device="cpu") for _ in range(2))
assert set(blas()) == {1}
first.close(); first.close()
assert set(blas()) == {1}
second.close()
assert blas() == before, (blas(), before)
third = rustinfer.LLM(sys.argv[1], device="cpu", cpu_kernels="off", no_batch_invariant=True)
assert blas() == before
third.close()
print("ok")
""", ROOT, REFERENCES / "llama3-tied")
    assert out == "ok\n"


def test_the_file_alone_serves_a_model_folder(tmp_path, tiny_llm):
    shutil.copy(ROOT / "rustinfer.py", tmp_path)
    out = run_python("""
import json, sys
from rustinfer import LLM

with LLM(sys.argv[1], device="cpu") as llm:
    (output,) = llm.generate("The river runs down to the sea", temperature=0, max_tokens=24, ignore_eos=True)
    text = "".join(llm.chat([{"role": "user", "content": "Where does the river run?"}], stream=True, max_tokens=5))
    print(json.dumps([output.outputs[0].text, text]))
""", tmp_path, REFERENCES / "llama3-tied")
    assert json.loads(out) == [text_of(tiny_llm), only(tiny_llm.chat(MESSAGES, max_tokens=5)).text]


def test_a_folder_may_have_any_name_in_any_locale(tmp_path, tiny_llm):
    code = """
import os, sys
from rustinfer import LLM

with LLM(sys.argv[1], device="cpu") as llm:
    os.write(1, llm.name.encode() + b" %d" % llm.generate("a", max_tokens=1, temperature=0)[0].outputs[0].token_ids[0])
"""
    wanted = only(tiny_llm.generate("a", max_tokens=1, temperature=0)).token_ids[0]
    for name, shown, utf8 in (("mod\u00e8le un", "mod\u00e8le un", "0"), ("mod\udce8le", "mod\ufffdle", "1")):
        folder = shutil.copytree(REFERENCES / "llama3-tied", tmp_path / name)
        env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, "-c", code, os.fsencode(folder)], cwd=ROOT, env=env, capture_output=True,
                              timeout=60)
        assert done.stdout.decode() == f"{shown} {wanted}", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_that_the_engine_is_not_there_and_may_have_its_own():
    code = """
import multiprocessing, sys
import rustinfer

def ask(llm):
    return llm.generate("a", max_tokens=3, temperature=0)[0].outputs[0].token_ids

def in_child(answers, llm):
    try:
        ask(llm)
    except rustinfer.EngineError as error:
        answers.put(str(error))
    llm.close()
    with rustinfer.LLM(sys.argv[1], device="cpu", threads=2) as own:
        answers.put(ask(own))

with rustinfer.LLM(sys.argv[1], device="cpu", threads=2) as llm:
    expected, context = ask(llm), multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=in_child, args=(answers, llm), daemon=True)
    child.start()
    print(answers.get(timeout=20), answers.get(timeout=20) == expected == ask(llm))
    child.join(20)
    print(child.exitcode)
"""
    done = run_python(code, ROOT, str(REFERENCES / "llama3-tied"))
    assert "from which this one was forked" in done and done.split()[-2:] == ["True", "0"]


def test_a_forgotten_stream_may_be_collected_in_the_middle_of_anything():
    out = run_python("""
import gc, sys, time, rustinfer
with rustinfer.LLM(sys.argv[1], device="cpu") as llm:
    held = [llm.generate("The river", stream=True, max_tokens=1500, ignore_eos=True)]
    next(held[0])
    held.append(held)
    with llm.engine._lock:  # as on a thread that allocates while it holds this
        del held
        gc.collect()
    while llm.engine.snapshot()["kv_blocks_used"]:
        time.sleep(0.01)
    print(llm.engine.snapshot()["requests"])
""", ROOT, REFERENCES / "llama3-tied")
    assert out == "{'abort': 1}\n"


def test_program_that_forgets_to_close_still_ends():
    run_python("""
import sys, rustinfer
llm = rustinfer.LLM(sys.argv[1], device="cpu")
next(llm.generate("The river", stream=True, max_tokens=500, ignore_eos=True))
""", ROOT, REFERENCES / "llama3-tied")
