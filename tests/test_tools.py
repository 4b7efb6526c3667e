"""Tools: what the model is told, what counts as a call, and that streaming changes nothing."""
import json
import sys

import pytest
from harness import client_of
from hypothesis import given, settings, strategies

import rustinfer
from rustinfer import CallRules, ToolCall, ToolStream, read_calls

NAMES = ["get_weather", "add", "ns.f", "g"]
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALLS = [
    ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [("add", {"a": 1, "b": 2})]),
    ('{"name": "add", "arguments": {"a": [1, {"x": null}]}}', [("add", {"a": [1, {"x": None}]})]),
    ('{"type": "function", "name": "g", "parameters": {}}', [("g", {})]),
    ('{"name": "g"}', [("g", {})]),
    ('{"name": "g", "arguments": "{\\"q\\": \\"é\\"}"}', [("g", {"q": "é"})]),
    ('{"name": "g", "arguments": "{\\"q\\": 1e400}"}', [("g", {"q": sys.float_info.max})]),
    ('{"name": "add", "parameters": {"a": -2E+3333, "b": 1.0}}', [("add", {"a": -sys.float_info.max, "b": 1.0})]),
    (' \n{"name": "g", "parameters": {}}\n', [("g", {})]),
    ('{"name": "g", "parameters": {}}; {"name": "add", "parameters": {"a": 2}}', [("g", {}), ("add", {"a": 2})]),
    ('[{"name": "g", "parameters": {}}, {"name": "g", "parameters": {"n": 1}}]', [("g", {}), ("g", {"n": 1})]),
    ('[get_weather(city="New York"), add(a=1, b=-2.5)]',
     [("get_weather", {"city": "New York"}), ("add", {"a": 1, "b": -2.5})]),
    ("[ns.f(x=True, y=None, z=[1, 'a'])]", [("ns.f", {"x": True, "y": None, "z": [1, "a"]})]),
]
TEXTS = ["", "Hello", "{", "[", "[1, 2]", "{}", '{"name": "unknown", "parameters": {}}',
         '{"name": "g", "parameters": [1]}', '{"name": "g", "other": 1}', '{"name": "g"} and so on', "[unknown(a=1)]",
         "[g(1)]", "[g(**x)]", "[g(a=open('x'))]", '{"name": "g", "parameters": {"a": NaN}}',
         '{"name": "g", "parameters": {"a": "\\ud83d"}}', '[g(a="\\ud83d")]',
         "see [g](http://x) and {y}", '{"name": "g", "parameters": {"a": 1}',
         "[" * 5000, '{"name":' * 3000, "[g(a=" + "(" * 3000]


def read(pieces, parallel=True):
    """(content, calls) of a text that comes in pieces."""
    stream = ToolStream(CallRules(frozenset(NAMES), parallel))
    text = "".join(map(stream.push, pieces))
    rest, calls = stream.finish()
    return text + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("text, calls", CALLS)
def test_every_form_of_a_call_is_read(text, calls):
    assert read([text]) == ("", calls)
    assert read(["Let me look. \n" + text]) == ("Let me look.", calls)
    assert read(list(text)) == ("", calls)


@pytest.mark.parametrize("text", TEXTS)
def test_anything_else_is_text(text):
    assert read([text]) == read(list(text)) == (text, [])


def test_only_the_first_of_several_calls_counts_where_one_is_wanted():
    assert read(["[g(), add(a=1)]"], parallel=False) == ("", [("g", {})])


def test_there_is_an_end_to_what_is_read_as_calls():
    assert read_calls(json.dumps([{"name": "g"}] * 65), NAMES) == []
    assert read_calls(json.dumps([{"name": "g"}] * 64), NAMES) == [ToolCall("g", "{}")] * 64
    long = '{"name": "g", "parameters": {"a": "' + "x" * (1 << 16) + '"}}'
    assert read([long]) == (long, [])


PARTS = strategies.sampled_from([text for text, _ in CALLS] + TEXTS[:20] + [
    "Well, ", " ", "\n", "{ ", "[ ", '"name"', '{"na', 'me": "g"}', "[g", "(", ")]", "}", "]", "a" * 100, " " * 20,
    "é🙂", ";"])


@settings(max_examples=400, deadline=None)
@given(strategies.lists(PARTS, max_size=6).map("".join), strategies.randoms(use_true_random=False))
def test_any_chunking_gives_the_same_calls(text, rng):
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)])]
    whole = read([text])
    assert read(pieces) == whole == read(list(text))
    assert whole[1] or whole[0] == text


@pytest.fixture(scope="module")
def client(demo_server):
    with client_of(demo_server) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_the_demo_model_makes_a_round_trip(client, stream):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = dict(model="demo", tools=[WEATHER], temperature=0, max_tokens=80)
    if stream:
        message = {"role": "assistant", "content": "", "tool_calls": []}
        for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
            choice = chunk.choices[0]
            message["content"] += choice.delta.content or ""
            for delta in choice.delta.tool_calls or ():
                if delta.id:
                    assert delta.index == len(message["tool_calls"]) and delta.function.arguments == ""
                    message["tool_calls"].append({"id": delta.id, "type": delta.type, "function": {
                        "name": delta.function.name, "arguments": ""}})
                else:
                    assert delta.function.name is None
                    message["tool_calls"][delta.index]["function"]["arguments"] += delta.function.arguments
        reason = choice.finish_reason
        assert message["content"] == ""
    else:
        choice = client.chat.completions.create(messages=messages, **options).choices[0]
        assert choice.message.content is None
        message, reason = choice.message.model_dump(exclude_none=True), choice.finish_reason
    call, = message["tool_calls"]
    assert reason == "tool_calls" and call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"weather": "sunny", "degrees": 21}'}
    messages += [message, result]
    answer = client.chat.completions.create(messages=messages, **options).choices[0]
    assert answer.finish_reason == "stop" and ("sunny" in answer.message.content or "21" in answer.message.content)


def test_without_a_need_for_tools_the_answer_is_text(client):
    options = dict(model="demo", temperature=0, max_tokens=60, messages=[{"role": "user", "content": "What is Rust?"}])
    offered = client.chat.completions.create(tools=[WEATHER], **options).choices[0]
    declined = client.chat.completions.create(tools=[WEATHER], tool_choice="none", **options).choices[0]
    plain = client.chat.completions.create(**options).choices[0]
    assert offered.message.tool_calls is None and offered.message.content and offered.finish_reason == "stop"
    assert declined.message.content == plain.message.content


def test_tools_are_rendered_by_the_models_template(demo_server):
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER]}
    text = demo_server.request("POST", "/apply-template", body)[2]["prompt"]
    assert "Environment: ipython" in text and json.dumps(WEATHER) in text
    ids = demo_server.request("POST", "/tokenize", body)[2]["tokens"]
    with rustinfer.LLM(None, device="cpu") as llm:
        assert ids == llm.template.encode(body["messages"], tools=[WEATHER])


@pytest.mark.parametrize("fields, param", [
    ({"tools": {}}, "tools"), ({"tools": [5]}, "tools[0]"), ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "x"}}}]},
     "tools[0].function.strict"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": 1.5}}, "tool_choice.allowed_tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": []}}, "tool_choice.allowed_tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "other"}}]}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "maybe", "tools": [
        {"type": "function", "function": {"name": "get_weather"}}]}}}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        {"id": "c1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "name": "g", "content": "1"}]}, "messages[2].name"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"), ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"), ({"tool_choice": "auto"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
     "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content")])
def test_errors_name_the_field(demo_server, fields, param):
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    status, _, body = demo_server.request("POST", "/v1/chat/completions", body)
    assert (status, body["error"]["param"]) == (400, param)
