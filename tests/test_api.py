"""API: JSON to typed requests and results to OpenAI objects, without a socket."""
import dataclasses
import json
import time
import urllib.parse

import pytest
import rustinfer
from hypothesis import given, settings, strategies
from rustinfer import (CHAT_FIELDS, MAX_JSON_DEPTH, MAX_MESSAGES, MAX_STOP_LENGTH, MAX_STOPS, APIError, ChatReply,
                       Group, InvalidTypeError, SamplingParams, UnsupportedError, parse_chat, parse_json, parse_query)

USER = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return parse_chat({"messages": USER, **fields}, SamplingParams())


def error_of(call, *args, **kwargs) -> APIError:
    with pytest.raises(APIError) as caught:
        call(*args, **kwargs)
    return caught.value


def nested(depth: int) -> bytes:
    """An object with `depth` levels in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


class TestParseJSON:
    def test_reads_an_object(self):
        assert parse_json(b' {"a": [1, 2.5, null, true, "\xc3\xa9 \\ud83d\\ude00"]} ') == {"a": [1, 2.5, None, True,
                                                                                                 "é 😀"]}

    @pytest.mark.parametrize("body", [
        b"", b"{", b"nope", b'{"a":1}x', b"{'a':1}", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}', b'{"a":1,"a":2}', b'{"b":{"a":1,"a":1}}', b'{"a":"\\ud800"}', b'{"\\udfff":1}',
        b'{"a":["\\ud83d x"]}',
        b'{"a":"\xff"}', b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32"), b'{"a":"\n"}',
        b'{"a":' + b"9" * 5000 + b"}", b'{"a":' + b"9" * 401 + b"}", b'{"a":01}', b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\xc0\x80"}',
        nested(MAX_JSON_DEPTH + 1), b"[" * 100_000, b'{"a":' * 100_000])
    def test_refuses_what_is_not_strict_json(self, body):
        error = error_of(parse_json, body)
        assert (error.status, error.code) == (400, "invalid_json")
        assert len(str(error)) < 300

    @pytest.mark.parametrize("body, kind", [(b"[]", "array"), (b'"x"', "string"), (b"1", "integer"), (b"1.5", "number"),
                                            (b"null", "null"), (b"true", "boolean")])
    def test_names_the_type_of_what_is_not_an_object(self, body, kind):
        error = error_of(parse_json, body)
        assert error.code == "invalid_type" and kind in str(error)

    def test_allows_the_documented_depth(self):
        assert parse_json(nested(MAX_JSON_DEPTH))

    def test_names_the_duplicate_key(self):
        assert "'twice'" in str(error_of(parse_json, b'{"once":1,"twice":1,"twice":2}'))

    def test_hides_how_the_server_reads_numbers(self):
        assert "sys." not in str(error_of(parse_json, b'{"a":' + b"9" * 5000 + b"}"))

    def test_finds_a_duplicate_among_many_keys_in_linear_time(self):
        keys = ",".join(f'"{number}":0' for number in range(200_000))
        started = time.monotonic()
        error_of(parse_json, f'{{{keys},"199999":1}}'.encode())
        assert time.monotonic() - started < 5


class TestParseQuery:
    def test_reads_what_event_source_sends(self):
        query = ("model=m&messages=%5B%7B%22role%22%3A%22user%22%2C%22content%22%3A%22a+b%22%7D%5D&stream=true"
                 "&max_tokens=5&temperature=0.5&stop=END&user=1")
        assert parse_query(query, CHAT_FIELDS) == {
            "model": "m", "messages": [{"role": "user", "content": "a b"}], "stream": True, "max_tokens": 5,
            "temperature": 0.5, "stop": "END", "user": "1"}

    def test_an_empty_query_is_an_empty_object(self):
        assert parse_query("", CHAT_FIELDS) == {}

    def test_what_may_be_of_several_types_is_text_or_json(self):
        assert parse_query("stop=%5B%22a%22%2C%22b%22%5D", CHAT_FIELDS) == {"stop": ["a", "b"]}
        assert parse_query("stop=5", CHAT_FIELDS) == {"stop": "5"}
        assert parse_query("stop=", CHAT_FIELDS) == {"stop": ""}
        named = {"type": "function", "function": {"name": "f"}}
        query = urllib.parse.urlencode({"tool_choice": json.dumps(named)})
        assert parse_query(query, CHAT_FIELDS) == {"tool_choice": named}

    def test_python_spellings_of_booleans_are_read(self):
        assert parse_query("stream=True&ignore_eos=False", CHAT_FIELDS) == {"stream": True, "ignore_eos": False}

    @pytest.mark.parametrize("query, param", [
        ("max_tokens=x", "max_tokens"), ("max_tokens=", "max_tokens"), ("messages=hello", "messages"),
        ("temperature=NaN", "temperature"),
        ("temperature=1e999", "temperature"), ('max_tokens=1,"x":2', "max_tokens"), ("max_tokens=1}", "max_tokens"),
        ("max_tokens=1&max_tokens=2", "max_tokens"), ("user=%ff", None), ("user", None),
        ("&".join(f"a{i}=1" for i in range(200)), None)])
    def test_refuses_what_it_cannot_read(self, query, param):
        error = error_of(parse_query, query, CHAT_FIELDS)
        assert error.status == 400 and error.param == param


class TestFields:
    @pytest.mark.parametrize("name, value", [
        ("max_tokens", 1), ("max_tokens", 1 << 31), ("max_completion_tokens", 7), ("temperature", 0),
        ("temperature", 2), ("temperature", 0.3),
        ("top_p", 1), ("top_p", 0.0001), ("top_k", -1), ("top_k", 0), ("top_k", 50), ("min_p", 0), ("min_p", 1),
        ("seed", 0), ("min_tokens", 0), ("min_tokens", 9),
        ("frequency_penalty", -2), ("frequency_penalty", 0.5), ("presence_penalty", 2),
        ("repetition_penalty", 0.1), ("repetition_penalty", 10),
        ("seed", -(1 << 63)), ("seed", (1 << 64) - 1), ("ignore_eos", True), ("ignore_eos", False)])
    def test_values_in_range_reach_the_sampling_params(self, name, value):
        params = chat(**{name: value}).params
        assert getattr(params, "max_tokens" if name == "max_completion_tokens" else name) == value

    @pytest.mark.parametrize("name, value", [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1 << 40), ("max_completion_tokens", 0),
        ("temperature", -0.1), ("temperature", 2.1),
        ("temperature", 10**400), ("top_p", 0), ("top_p", 0.0), ("top_p", -1), ("top_p", 1.01), ("top_k", -2),
        ("min_p", 1.5), ("min_p", -1), ("min_tokens", -1), ("n", 0), ("n", 9), ("n", 10**6), ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1), ("repetition_penalty", 0), ("repetition_penalty", 10.1),
        ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": 1, "01": 2}),
        ("top_logprobs", 21), ("top_logprobs", 1), ("metadata", {str(i): "" for i in range(17)}),
        ("metadata", {"k" * 65: ""}), ("metadata", {"k": "v" * 513}), ("stop_token_ids", [1] * 257),
        ("seed", 1 << 64), ("seed", -(1 << 63) - 1), ("messages", []), ("messages", USER * (MAX_MESSAGES + 1)),
        ("stop", ""), ("stop", ["a", ""]),
        ("stop", ["x"] * (MAX_STOPS + 1)), ("stop", "x" * (MAX_STOP_LENGTH + 1))])
    def test_values_out_of_range_are_refused_by_name(self, name, value):
        error = error_of(chat, **{name: value})
        assert (error.status, error.code, error.param) == (400, "invalid_value", name)

    @pytest.mark.parametrize("name, value", [
        ("model", 5), ("model", ["m"]), ("messages", {}), ("messages", "hi"), ("messages", None), ("stream", 1),
        ("stream", "true"),
        ("stream_options", []), ("max_tokens", 1.0), ("max_tokens", "5"), ("max_tokens", True),
        ("max_completion_tokens", False),
        ("temperature", "1"), ("temperature", True), ("top_p", []), ("top_k", 1.5), ("top_k", True), ("min_p", {}),
        ("seed", 1.5), ("seed", False),
        ("stop", 5), ("stop", 0), ("stop", False), ("stop", {}), ("stop", [1]), ("stop", [None]),
        ("stop", ["a", ["b"]]), ("ignore_eos", 0),
        ("n", True), ("n", 1.5), ("frequency_penalty", False), ("logit_bias", []), ("logit_bias", {"1": "2"}),
        ("logprobs", 0), ("logprobs", 5), ("top_logprobs", False), ("metadata", []), ("metadata", {"a": 1}),
        ("stop_token_ids", 5), ("stop_token_ids", ["a"]), ("stop_token_ids", [True]),
        ("user", 7)])
    def test_wrong_types_are_refused_by_name(self, name, value):
        error = error_of(chat, **{name: value})
        assert (error.status, error.code, error.param) == (400, "invalid_type", name)

    @pytest.mark.parametrize("name", sorted(set(CHAT_FIELDS) - {"messages"}))
    def test_null_is_the_same_as_absent(self, name):
        assert chat(**{name: None}) == chat()

    @pytest.mark.parametrize("name, value", [
        ("n", 1), ("frequency_penalty", 0), ("frequency_penalty", 0.0), ("presence_penalty", 0),
        ("repetition_penalty", 1.0), ("logit_bias", {}),
        ("logprobs", False), ("top_logprobs", 0), ("response_format", {"type": "text"}), ("store", False),
        ("tools", []), ("tool_choice", "none"),
        ("metadata", {}), ("service_tier", "auto"), ("stop", [])])
    def test_values_that_ask_for_nothing_are_accepted(self, name, value):
        assert chat(**{name: value}) == chat()

    @pytest.mark.parametrize("name, value", [
        ("store", True),
        ("reasoning_effort", "low"), ("best_of", 2), ("no_such_field", 1),
        ("Temperature", 1), ("", 1)])
    def test_what_is_not_supported_is_refused_never_ignored(self, name, value):
        error = error_of(chat, **{name: value})
        assert isinstance(error, UnsupportedError)
        assert (error.status, error.code, error.param) == (400, "unsupported_parameter", name)

    def test_an_unknown_field_with_null_is_still_unknown(self):
        assert error_of(chat, no_such_field=None).code == "unsupported_parameter"

    def test_every_sampling_field_of_the_api_is_one_of_sampling_params(self):
        names = {item.name for item in dataclasses.fields(SamplingParams)}
        known = {name for name, field in CHAT_FIELDS.items() if field.kind != "unsupported"}
        assert known - names == {"model", "messages", "stream", "stream_options", "max_completion_tokens", "user", "n",
                                 "top_logprobs", "metadata", "tools", "tool_choice", "parallel_tool_calls",
                                 "response_format", "structured_outputs", "add_generation_prompt",
                                 "continue_final_message", "chat_template_kwargs"}

    def test_two_equal_limits_agree_and_different_ones_do_not(self):
        assert chat(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5
        assert error_of(chat, max_tokens=5, max_completion_tokens=6).param == "max_completion_tokens"

    def test_fields_left_out_take_the_models_defaults(self):
        defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
        request = parse_chat({"messages": USER, "top_p": 0.5}, defaults)
        assert request.params == dataclasses.replace(defaults, top_p=0.5)
        assert (request.model, request.stream, request.include_usage, request.user) == (None, False, False, "")

    def test_messages_are_required(self):
        error = error_of(parse_chat, {"model": "m"}, SamplingParams())
        assert (error.param, error.code) == ("messages", "invalid_value")

    @pytest.mark.parametrize("value", ["a", ["a"]])
    def test_one_stop_string_is_a_list_of_one(self, value):
        assert chat(stop=value).params.stop == ("a",)


class TestStreamOptions:
    def test_include_usage_is_read(self):
        assert chat(stream=True, stream_options={"include_usage": True}).include_usage is True
        assert chat(stream=True, stream_options={"include_usage": False}).include_usage is False
        assert chat(stream=True, stream_options={}).include_usage is False

    @pytest.mark.parametrize("fields, param", [
        ({"stream_options": {}}, "stream_options"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}},
         "stream_options.continuous_usage_stats")])
    def test_anything_else_is_refused_by_name(self, fields, param):
        assert error_of(chat, **fields).param == param


class TestMessages:
    def test_roles_are_those_of_the_template(self):
        roles = ["system", "developer", "user", "assistant"]
        request = chat(messages=[{"role": role, "content": role} for role in roles])
        parsed = request.conversation["messages"]
        assert [message["role"] for message in parsed] == ["system", "system", "user", "assistant"]

    def test_text_parts_become_one_string(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        request = chat(messages=[{"role": "user", "content": parts}])
        assert request.conversation["messages"] == [{"role": "user", "content": "a\nb"}]

    def test_an_answer_of_the_openai_client_may_be_sent_back(self):
        message = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": None, "audio": None,
                   "function_call": None, "tool_calls": None}
        assert chat(messages=[*USER, message]).conversation["messages"][1] == {"role": "assistant", "content": "Hi"}

    @pytest.mark.parametrize("message, where, code", [
        ("hi", "", "invalid_type"), (None, "", "invalid_type"), ([], "", "invalid_type"),
        ({}, ".role", "invalid_value"),
        ({"content": "x"}, ".role", "invalid_value"), ({"role": "bot", "content": "x"}, ".role", "invalid_value"),
        ({"role": None, "content": "x"}, ".role", "invalid_type"),
        ({"role": 1, "content": "x"}, ".role", "invalid_type"),
        ({"role": "function", "content": "x"}, ".role", "unsupported_value"),
        ({"role": "user"}, ".content", "invalid_type"),
        ({"role": "user", "content": None}, ".content", "invalid_type"),
        ({"role": "user", "content": 5}, ".content", "invalid_type"),
        ({"role": "user", "content": []}, ".content", "invalid_type"),
        ({"role": "user", "content": ["x"]}, ".content[0].type", "unsupported_value"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, ".content[1].type",
         "unsupported_value"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, ".content[0].type", "unsupported_value"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", "invalid_type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, ".content[0].text", "invalid_type"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}, ".content[0].cache",
         "unsupported_parameter"),
        ({"role": "user", "content": "x", "name": "Ann Lee"}, ".name", "invalid_value"),
        ({"role": "user", "content": "x", "name": "a" * 65}, ".name", "invalid_value"),
        ({"role": "user", "content": "x", "name": 5}, ".name", "invalid_type"),
        ({"role": "user", "content": "x", "weight": 1}, ".weight", "unsupported_parameter"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ".tool_calls[0]", "invalid_type")])
    def test_errors_name_the_message_and_its_field(self, message, where, code):
        error = error_of(chat, messages=[*USER, message])
        assert (error.status, error.param, error.code) == (400, "messages[1]" + where, code)


class TestErrors:
    @pytest.mark.parametrize("fields", [
        {"x" * 5000: 1}, {"model": ["x" * 5000]}, {"n": "x" * 5000}, {"logit_bias": {"y": "x" * 5000}},
        {"temperature": "x" * 5000},
        {"temperature": 10**390}, {"messages": [{"role": "x" * 5000, "content": ""}]},
        {"messages": [{"role": "user", "x" * 5000: ""}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]}, {"stop": ["x" * 5000]},
        {"stream": True, "stream_options": {"x" * 5000: 1}}])
    def test_echo_at_most_200_characters_of_the_value(self, fields):
        error = error_of(chat, **fields)
        assert max(str(error).count("x"), str(error).count("0")) <= 202
        assert len(error.param) <= 240

    def test_body_is_what_clients_parse(self):
        body = InvalidTypeError("m", "p").body()
        assert body == {"error": {"message": "m", "type": "invalid_request_error", "param": "p",
                                  "code": "invalid_type"}}


ANYTHING = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats(allow_nan=False)
    | strategies.text(max_size=20) | strategies.sampled_from(["user", "text", "stop", "tool"]),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(
        strategies.sampled_from(["role", "content", "type", "text", "name", "include_usage", "x"]), inner, max_size=4),
    max_leaves=8)


class TestAnyInput:
    """Whatever comes, the answer is a request or an APIError with a status from 400 to 499."""

    @staticmethod
    def attempt(call, *args) -> None:
        try:
            call(*args)
        except APIError as error:
            assert 400 <= error.status < 500 and len(str(error)) < 1000 and json.dumps(error.body())

    @settings(max_examples=150, deadline=None)
    @given(strategies.dictionaries(strategies.sampled_from(sorted(CHAT_FIELDS)), ANYTHING))
    def test_any_field_values(self, fields):
        self.attempt(parse_chat, fields, SamplingParams())
        self.attempt(parse_chat, {"messages": USER, **fields}, SamplingParams())

    @settings(max_examples=200, deadline=None)
    @given(strategies.lists(ANYTHING, max_size=3))
    def test_any_messages(self, messages):
        self.attempt(parse_chat, {"messages": messages}, SamplingParams())

    @settings(max_examples=300, deadline=None)
    @given(strategies.binary(max_size=60) | strategies.text(max_size=40).map(str.encode))
    def test_any_body(self, body):
        self.attempt(parse_json, body)

    @settings(max_examples=300, deadline=None)
    @given(strategies.text(strategies.sampled_from("ab=&%+[]{}\",:019e.-ntrue\x00é"), max_size=40),
           strategies.sampled_from(sorted(CHAT_FIELDS)))
    def test_any_query(self, text, name):
        self.attempt(parse_query, text, CHAT_FIELDS)
        self.attempt(parse_query, f"{name}={text}", CHAT_FIELDS)


class TestChatReply:
    @pytest.fixture
    def group(self, tiny_llm):
        """A finished answer of five tokens."""
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        group = Group(tiny_llm, ["Hello"], params)
        while not group.is_finished:
            group.advance()
        return group

    @staticmethod
    def payload(event: bytes) -> dict:
        assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
        return json.loads(event[6:])

    def test_completion_has_the_documented_shape(self, group):
        body = ChatReply(group, "m").whole()
        assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "m"
        assert abs(body["created"] - time.time()) < 60 and body["system_fingerprint"].startswith("rustinfer-")
        assert body["choices"] == [{"index": 0,
                                    "message": {"role": "assistant", "content": group.answers[0].text, "refusal": None},
                                    "logprobs": None, "finish_reason": "length"}]

    def test_usage_counts_and_times(self, group):
        usage, seq = ChatReply(group, "m").whole()["usage"], group.answers[0].handle.seq
        performance = usage.pop("performance")
        prompt = seq.num_prompt_tokens
        assert usage == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5,
                         "prompt_tokens_details": {"cached_tokens": seq.num_cached_tokens}}
        assert performance["decode_iterations"] == 4
        seconds = (performance["prefill_ms"] + performance["decode_ms"]) / 1000
        assert performance["tokens_per_second"] == pytest.approx(5 / seconds, rel=0.01)
        assert performance["time_to_first_token_ms"] >= performance["prefill_ms"] > 0

    def test_events_share_id_created_and_model(self, group):
        chat = ChatReply(group, "m")
        first, text = self.payload(chat.first_events()), self.payload(chat.text_event(0, 'a"\u2028\n'))
        last = self.payload(chat.end_events(0))
        assert chat.last_events() == b"data: [DONE]\n\n"
        for chunk in (first, text, last):
            assert {key: chunk[key] for key in ("id", "created", "model", "object")} == {
                "id": chat.id, "created": first["created"], "model": "m", "object": "chat.completion.chunk"}
            assert "usage" not in chunk
        assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                     "finish_reason": None}]
        assert text["choices"] == [{"index": 0, "delta": {"content": 'a"\u2028\n'}, "logprobs": None,
                                    "finish_reason": None}]
        assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]

    def test_usage_comes_last_and_is_null_elsewhere(self, group):
        chat = ChatReply(group, "m", True)
        usage, done, _ = chat.last_events().split(b"\n\n")
        for chunk in (chat.first_events(), chat.text_event(0, "x"), chat.end_events(0)):
            assert self.payload(chunk)["usage"] is None
        assert json.loads(usage[6:])["choices"] == [] and json.loads(usage[6:])["usage"]["completion_tokens"] == 5

    @pytest.mark.parametrize("name", ["@", '"@"', 'a"@"b', "model/with/slash"])
    def test_any_model_name_leaves_the_events_whole(self, group, name):
        chunk = self.payload(ChatReply(group, name, True).text_event(0, "@"))
        assert chunk["model"] == name and chunk["choices"][0]["delta"] == {"content": "@"}


def test_shorten_keeps_the_limit():
    assert rustinfer.shorten("x" * 200) == "x" * 200
    assert len(rustinfer.shorten("x" * 201)) == 200 and len(rustinfer.shorten(["x" * 500])) == 200
