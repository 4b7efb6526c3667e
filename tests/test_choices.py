"""Several answers of one request, log-probabilities, penalties, the completions route and the utilities, over HTTP."""
import json
import math
import shutil

import openai
import pytest
from harness import REFERENCES, RawConnection, ask, client_of, local_server, num_running, slowed, wait_for

import rustinfer

MESSAGES = [{"role": "user", "content": "The river runs down to the sea. " * 12}]


@pytest.fixture(scope="module")
def client(tiny_server):
    with client_of(tiny_server) as client:
        yield client


@pytest.fixture(scope="module")
def name(client):
    return client.models.list().data[0].id


def post(server, path, fields):
    """(status, body) of a POST."""
    return server.request("POST", path, fields)[::2]


def streamed(events):
    """[(index, text, logprob entries, finish reason)] of each choice, put together from a chat stream."""
    texts, entries, reasons, order = {}, {}, {}, []
    for chunk in events:
        for choice in chunk.choices:
            order.append(choice.index)
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            entries.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [index for index in dict.fromkeys(order)] == sorted(texts)
    return [(index, texts[index], entries[index], reasons[index]) for index in sorted(texts)]


@pytest.mark.parametrize("options", [
    dict(n=1), dict(n=4, temperature=1.0), dict(n=3, temperature=0),
    dict(n=2, logprobs=True, top_logprobs=3, temperature=1.3),
    dict(frequency_penalty=1.5, presence_penalty=-1), dict(logit_bias={"40": 100}, n=2),
    dict(stop=["e"], n=3, temperature=1)])
def test_streamed_and_whole_answers_are_equal(client, name, options):
    options = dict(model=name, messages=MESSAGES, seed=11, max_tokens=12, **options)
    whole = client.chat.completions.create(**options)
    parts = streamed(client.chat.completions.create(stream=True, **options))
    assert [(c.index, c.message.content, (c.logprobs.content if c.logprobs else []), c.finish_reason)
            for c in whole.choices] == parts
    assert len(parts) == options.get("n", 1)


def test_the_token_that_ends_an_answer_has_no_logprobs_streamed_or_not(client, name, tiny_llm):
    end = min(tiny_llm.engine.eos_token_ids)
    options = dict(model=name, messages=MESSAGES, logit_bias={str(end): 100}, logprobs=True, max_tokens=9,
                   temperature=0, extra_body={"min_tokens": 3})
    whole = client.chat.completions.create(**options).choices[0]
    (_, text, entries, reason), = streamed(client.chat.completions.create(stream=True, **options))
    assert len(whole.logprobs.content) == 3 and whole.finish_reason == reason == "stop"
    assert (text, entries) == (whole.message.content, whole.logprobs.content)


def test_choices_differ_by_their_number_alone(client, name):
    options = dict(model=name, messages=MESSAGES, temperature=1.0, max_tokens=10, seed=3,
                   extra_body={"ignore_eos": True})
    texts = [choice.message.content for choice in client.chat.completions.create(n=5, **options).choices]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in client.chat.completions.create(n=5, **options).choices] == texts
    assert client.chat.completions.create(**options).choices[0].message.content == texts[0]


def test_eight_choices_compute_the_prompt_once():
    """The blocks of the prompt are shared: of eight answers only the first has computed them."""
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        prompt = [(7 * i) % 300 for i in range(400)]
        params, most = rustinfer.SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True), 0
        group = rustinfer.Group(llm, [prompt], params, 8)
        while not group.is_finished:
            group.advance()
            if all(group.places):
                most = max(most, llm.engine.snapshot()["kv_blocks_used"])
        assert [answer.handle.seq.num_cached_tokens for answer in group.answers] == [0] + 7 * [384]
        assert most <= 25 + 8 * 3
        usage = rustinfer.ChatReply(group, "m").whole()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (400, 160)


@pytest.mark.parametrize("num_others", [0, 3])
def test_a_full_queue_changes_no_choices_of_a_begun_request(tiny_llm, num_others):
    params = rustinfer.SamplingParams(temperature=1.0, max_tokens=1 if num_others else 5, seed=3, ignore_eos=True)
    long = rustinfer.SamplingParams(max_tokens=40, ignore_eos=True)

    def texts(llm):
        group = rustinfer.Group(llm, [[5, 6], [7]], params, 4)
        others = [llm.engine.submit([8], long) for _ in range(num_others)]
        while not group.is_finished:
            group.advance()
        assert all(len(list(other)) == 40 for other in others)
        return [answer.text for answer in group.answers]

    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", max_num_seqs=1, max_queue=2 + num_others) as llm:
        assert texts(llm) == texts(tiny_llm)


def test_blocks_that_choices_share_count_once_in_the_queue():
    body = {"prompt": [(7 * i) % 300 for i in range(400)], "n": 8, "max_tokens": 200, "ignore_eos": True}
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm, slowed(llm, 0.01), local_server(llm) as server:
        with RawConnection(server.port) as raw:
            raw.send_request("POST", "/v1/completions", body)
            runs = lambda: ask(server, "GET", "/v1/queue")[2]["requests"]
            wait_for(lambda: any(entry["completion_tokens"] >= 16 for entry in runs()))
            entry, = runs()
        assert 25 <= entry["kv_blocks"] <= 25 + 8 * 3 + entry["completion_tokens"] / 16 < 8 * 25


def test_every_prompt_counts_once_in_the_queue_and_in_the_log(caplog):
    body = {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 10, "ignore_eos": True}
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", max_num_seqs=1) as llm:
        with caplog.at_level("INFO", "rustinfer"), slowed(llm, 0.01), local_server(llm) as server:
            with RawConnection(server.port) as other, RawConnection(server.port) as raw:
                other.send_request("POST", "/v1/completions", {"prompt": [8], "max_tokens": 200, "ignore_eos": True})
                wait_for(lambda: num_running(llm) == 1)
                raw.send_request("POST", "/v1/completions", body)
                listed = lambda: ask(server, "GET", "/v1/queue")[2]["requests"]
                wait_for(lambda: len(listed()) == 2)
                assert [entry["prompt_tokens"] for entry in listed()] == [1, 5]  # no second choice has begun
                other.socket.close()
                assert raw.read_response()[2]["usage"]["prompt_tokens"] == 5
            wait_for(lambda: "completion=40" in caplog.text)
    assert "prompt=5 cached=0 completion=40" in caplog.text


def test_logprobs_are_those_of_the_engine(client, name, tiny_llm):
    choice = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True,
                                            top_logprobs=5, extra_body={"ignore_eos": True}).choices[0]
    expected = tiny_llm.chat(MESSAGES, temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)[0].outputs[0]
    assert len(choice.logprobs.content) == 6
    for entry, token_id, table in zip(choice.logprobs.content, expected.token_ids, expected.logprobs):
        assert entry.logprob == pytest.approx(table[token_id].logprob, abs=1e-9) and len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].token == entry.token and bytes(entry.bytes).decode(errors="replace") == entry.token
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True) and math.fsum(map(math.exp, values)) <= 1 + 1e-6
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace").startswith(
        choice.message.content[:3])


def test_logit_bias_and_stop_token_ids_have_their_effect(client, name, tiny_llm):
    token = tiny_llm.tokenizer.encode("a")[0]
    options = dict(model=name, messages=MESSAGES, max_tokens=4, temperature=0)
    assert client.chat.completions.create(logit_bias={str(token): 100}, **options).choices[0].message.content == "aaaa"
    choice = client.chat.completions.create(logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]},
                                            **options).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "stop")
    repeated = client.chat.completions.create(logit_bias={str(token): 8}, **options).choices[0].message.content
    penalties = dict(frequency_penalty=2, presence_penalty=2, extra_body={"repetition_penalty": 9})
    punished = client.chat.completions.create(logit_bias={str(token): 8}, **penalties, **options)
    assert punished.choices[0].message.content != repeated


def test_no_answer_ends_before_min_tokens(client, name, tiny_llm):
    end = min(tiny_llm.engine.eos_token_ids)
    options = dict(model=name, messages=MESSAGES, logit_bias={str(end): 100}, max_tokens=9, temperature=0)
    at_once = client.chat.completions.create(**options)
    later = client.chat.completions.create(extra_body={"min_tokens": 5}, **options)
    assert at_once.usage.completion_tokens == 1 and at_once.choices[0].finish_reason == "stop"
    assert later.usage.completion_tokens == 6 and later.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(extra_body={"min_tokens": 10}, **options)
    assert caught.value.param == "min_tokens"


class TestCompletions:
    def test_prompts_of_every_form(self, client, name, tiny_llm):
        ids = tiny_llm.tokenizer.encode_prompt("Once upon")
        options = dict(model=name, max_tokens=5, temperature=0, extra_body={"ignore_eos": True})
        by_text, by_ids = (client.completions.create(prompt=prompt, **options) for prompt in ("Once upon", ids))
        both = client.completions.create(prompt=["Once upon", "The sea"], n=2, **options)
        assert by_text.choices[0].text == by_ids.choices[0].text == both.choices[0].text == both.choices[1].text
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.object == "text_completion"
        assert both.usage.completion_tokens == 20
        lists = client.completions.create(prompt=[ids, ids], **options)
        assert [choice.text for choice in lists.choices] == [by_text.choices[0].text] * 2
        assert by_text.choices[0].text == tiny_llm.generate("Once upon", temperature=0, max_tokens=5,
                                                            ignore_eos=True)[0].outputs[0].text

    def test_max_tokens_is_16_unless_given(self, client, name):
        answer = client.completions.create(model=name, prompt="a", temperature=0, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"

    @pytest.mark.parametrize("options", [dict(), dict(n=3, temperature=1.0), dict(logprobs=2), dict(logprobs=0),
                                         dict(echo=True), dict(echo=True, n=2), dict(stop="e", temperature=1.2),
                                         dict(echo=True, logprobs=2), dict(echo=True, logprobs=0, n=3)])
    def test_streams_equal_whole_answers(self, client, name, options):
        options = dict(model=name, prompt=["Once upon", "The sea"], seed=5, max_tokens=7, **options)
        whole = client.completions.create(**options)
        texts, logprobs = {}, {}
        for chunk in client.completions.create(stream=True, **options):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                if choice.logprobs:
                    for key, value in choice.logprobs.model_dump().items():
                        logprobs.setdefault(choice.index, {}).setdefault(key, []).extend(value)
        assert [choice.text for choice in whole.choices] == [texts[index] for index in sorted(texts)]
        assert [choice.logprobs.model_dump() if choice.logprobs else None for choice in whole.choices] == [
            logprobs.get(index) for index in sorted(texts)]
        if options.get("echo"):
            assert all(choice.text.startswith(("Once upon", "The sea")) for choice in whole.choices)

    def test_logprobs_name_tokens_and_their_places(self, client, name):
        options = dict(model=name, prompt="Once", max_tokens=6, logprobs=3, temperature=0)
        logprobs = client.completions.create(**options).choices[0].logprobs
        assert len({len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)}) == 1
        assert all(len(table) >= 3 or table for table in logprobs.top_logprobs)
        assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)

    def test_an_echoed_prompt_is_scored_as_if_it_had_been_generated(self, client, name, tiny_llm):
        options = dict(model=name, max_tokens=9, temperature=0, logprobs=3, extra_body={"ignore_eos": True})
        ids = tiny_llm.tokenizer.encode_prompt("Once upon a time \U0001f642 ")
        plain = client.completions.create(prompt=ids, **options).choices[0].logprobs
        answer = tiny_llm.generate(ids, temperature=0, max_tokens=9, ignore_eos=True)[0].outputs[0]
        longer = ids + answer.token_ids[:-1]
        for _ in range(2):  # the second time every block is cached
            choice = client.completions.create(prompt=longer, echo=True, n=2, **{**options, "max_tokens": 1}).choices[1]
            shown = tiny_llm.tokenizer.decode(longer)
            assert choice.text.startswith(shown)
            scored = choice.logprobs
            assert scored.tokens[-9:] == plain.tokens and len(scored.tokens) == len(longer) + 1
            assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
            assert scored.token_logprobs[-9:] == pytest.approx(plain.token_logprobs, abs=1e-5)
            for found, expected in zip(scored.top_logprobs[-9:], plain.top_logprobs):
                assert found == pytest.approx(expected, abs=1e-5)
            assert scored.text_offset[:2] == [0, 0] and scored.text_offset == sorted(scored.text_offset)
            assert choice.text[scored.text_offset[9] :].startswith(scored.tokens[9])

    @pytest.mark.parametrize("length, num_tokens", [(2031, 16), (2040, 8), (2047, 1)])
    def test_an_answer_of_no_given_length_takes_what_room_is_left(self, tiny_server, length, num_tokens):
        fields = {"prompt": [[5] * length, [6, 7]], "ignore_eos": True}
        status, body = post(tiny_server, "/v1/completions", fields)
        assert status == 200 and body["usage"]["completion_tokens"] == num_tokens + 16
        status, body = post(tiny_server, "/v1/completions", {**fields, "max_tokens": 2048 - length + 1})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")

    def test_prompts_are_scored_alike_in_pieces_among_others_and_after_preemption(self, tiny_llm):
        prompt = tiny_llm.tokenizer.encode_prompt("The river runs down to the sea. " * 3)
        scores = lambda llm, **options: [
            next(iter(entries.values())).logprob if entries else None
            for entries in llm.generate(prompt, prompt_logprobs=0, max_tokens=1, **options)[0].prompt_logprobs]
        expected = scores(tiny_llm)
        assert len(expected) == len(prompt) and expected[0] is None and max(expected[1:]) < 0
        with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", max_num_batched_tokens=7) as llm:
            assert scores(llm) == expected
        with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu", max_num_batched_tokens=16, max_model_len=128,
                           kv_cache_memory=tiny_llm.engine.model.kv_block_bytes() * 10) as llm:
            outputs = llm.generate([prompt, prompt[:9], prompt, "x" * 30], prompt_logprobs=0, max_tokens=60,
                                   ignore_eos=True)
            assert llm.engine.snapshot()["num_preemptions"] > 0
            for output in (outputs[0], outputs[2]):
                assert [next(iter(e.values())).logprob if e else None for e in output.prompt_logprobs] == expected

    @pytest.mark.parametrize("fields, param", [
        ({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"), ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "a", "echo": 1}, "echo"), ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages")])
    def test_errors_name_the_field(self, tiny_server, fields, param):
        status, body = post(tiny_server, "/v1/completions", fields)
        assert (status, body["error"]["param"]) == (400, param)


class TestUtilities:
    def test_tokenize_and_back(self, tiny_server, tiny_llm):
        status, body = post(tiny_server, "/tokenize", {"prompt": "Hello <|eot_id|>", "return_token_strs": True})
        assert status == 200 and body["tokens"] == tiny_llm.tokenizer.encode_prompt("Hello <|eot_id|>")
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == tiny_llm.max_model_len
        plain = post(tiny_server, "/tokenize", {"prompt": "Hello", "add_special_tokens": False})[1]["tokens"]
        assert plain == tiny_llm.tokenizer.encode("Hello")
        alone = {"prompt": "Hello", "messages": None, "tools": None, "add_special_tokens": False}
        assert post(tiny_server, "/tokenize", alone)[1].get("tokens") == plain
        assert post(tiny_server, "/detokenize", {"tokens": plain})[1] == {"prompt": "Hello"}

    def test_messages_are_tokenized_as_the_chat_route_does(self, tiny_server, tiny_llm):
        messages = [{"role": "user", "content": "Hi"}]
        ids = post(tiny_server, "/tokenize", {"messages": messages})[1]["tokens"]
        assert ids == tiny_llm.template.encode(messages)
        assert post(tiny_server, "/tokenize", {"messages": messages, "prompt": None})[1]["tokens"] == ids
        text = post(tiny_server, "/apply-template", {"messages": messages, "add_generation_prompt": False})[1]["prompt"]
        assert text == tiny_llm.template.render(messages, False)

    @pytest.mark.parametrize("path, fields, param", [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"), ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"), ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": [{"role": "x"}]}, "messages[0].role")])
    def test_errors_name_the_field(self, tiny_server, path, fields, param):
        status, body = post(tiny_server, path, fields)
        assert (status, body["error"]["param"]) == (400, param)

    def test_capabilities_name_every_field_and_its_range(self, tiny_server, tiny_llm):
        status, _, body = tiny_server.get("/v1/capabilities")
        chat, completions = (body["routes"][path] for path in ("/v1/chat/completions", "/v1/completions"))
        assert status == 200 and body["max_model_len"] == tiny_llm.max_model_len
        assert chat["temperature"] == {"type": "number", "supported": True, "minimum": 0, "maximum": 2}
        assert chat["functions"] == {"supported": False}
        assert completions["prompt"] == {"type": "any", "supported": True}
        assert set(chat) == set(rustinfer.CHAT_FIELDS) and set(completions) == set(rustinfer.COMPLETION_FIELDS)

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
    def test_capabilities_tell_the_least_value_of_a_field(self, tiny_server, path):
        fields = tiny_server.get("/v1/capabilities")[2]["routes"][path]
        body = {"prompt": "x"} if path == "/v1/completions" else {"messages": MESSAGES}
        seen = set()
        for name, field in fields.items():
            for limit, expected in (("minimum", 200), ("exclusiveMinimum", 400)):
                if limit in field:
                    seen.add(limit)
                    status, answer = post(tiny_server, path, {"max_tokens": 1, **body, name: field[limit]})
                    assert status == expected, (name, answer)
        assert seen == {"minimum", "exclusiveMinimum"}

    def test_capabilities_tell_what_a_request_gets_that_names_nothing(self, demo_server, tmp_path):
        shutil.copytree(REFERENCES / "llama3-tied", tmp_path / "model")
        (tmp_path / "model" / "generation_config.json").write_text(
            '{"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}')
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
                   "frequency_penalty": 0.0, "repetition_penalty": 1.0, "max_tokens": 1024}
        assert demo_server.get("/v1/capabilities")[2]["defaults"] == neutral  # the demo model says do_sample: false
        with rustinfer.LLM(tmp_path / "model", device="cpu", max_tokens=9) as llm:
            recommended = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "max_tokens": 9}
            assert llm.describe_defaults() == {**neutral, **recommended}
        (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.1}')
        greedy = rustinfer.default_sampling_params(tmp_path / "model")
        assert greedy == rustinfer.SamplingParams(temperature=0, repetition_penalty=1.1)

    def test_version(self, tiny_server):
        assert tiny_server.get("/version")[::2] == (200, {"version": rustinfer.__version__})

    def test_whole_answers_carry_their_timing(self, client, name):
        raw = client.chat.completions.with_raw_response.create(model=name, messages=MESSAGES, max_tokens=2)
        parts = dict(part.split(";dur=") for part in raw.headers["server-timing"].split(", "))
        performance = json.loads(raw.content)["usage"]["performance"]
        assert {key: float(value) for key, value in parts.items()} == {
            key: performance[f"{key}_ms"] for key in ("queue", "prefill", "decode")}
