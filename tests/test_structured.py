"""Structured output: an answer that ends by itself has the shape that was asked for, or the request is refused."""
import json
import random
import re
import string
from typing import Literal

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from harness import REFERENCES, ROOT, RawConnection, client_of, local_server

import rustinfer
from rustinfer import CallRules, Structure
from test_tools import WEATHER

MESSAGES = [{"role": "user", "content": "Tell me something."}]
HOT = dict(messages=MESSAGES, temperature=1.5, max_tokens=400)


@pytest.fixture(scope="module")
def llm():
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm):
    with local_server(llm) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def random_schema(rng, depth=0):
    """A schema whose values have a bounded size."""
    kinds = ["string", "integer", "boolean", "enum", "null"] + (["object", "array"] * 2 if depth < 2 else [])
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "maxLength": rng.randrange(1, 9)}
    if kind == "integer":
        return {"type": "integer", "minimum": -rng.randrange(50), "maximum": rng.randrange(1000)}
    if kind == "enum":
        return {"enum": [rng.choice(string.ascii_lowercase) * rng.randrange(1, 5) for _ in range(3)]}
    if kind == "object":
        names = rng.sample(["a", "b", "name", "value", "x_y"], rng.randrange(1, 4))
        return {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names},
                "required": names, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randrange(1, 4)}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(60))
def test_answers_that_stop_are_valid(client, llm, seed):
    schema = random_schema(random.Random(seed))
    choice = client.chat.completions.create(model=llm.name, seed=seed, response_format=schema_format(schema),
                                            **HOT).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), schema)


def test_every_way_of_asking_has_its_shape(client, llm):
    warm = dict(HOT, model=llm.name, temperature=1.0)
    ask = lambda **fields: client.chat.completions.create(**warm, **fields).choices[0]
    outputs = lambda **fields: ask(extra_body={"structured_outputs": fields}).message.content
    assert re.fullmatch(r"[a-f]{3}-\d\d", outputs(regex=r"[a-f]{3}-[0-9][0-9]"))
    assert outputs(choice=["red", "green.", "(blue)"]) in ("red", "green.", "(blue)")
    assert re.fullmatch(r"(yes|no)!{1,3}", outputs(grammar='start: ("yes" | "no") "!"{1,3}'))
    assert json.loads(outputs(json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}))
    text = ask(response_format={"type": "json_object"}).message.content
    assert text.startswith("{")


def test_completions_are_shaped_too_and_every_choice_by_itself(client, llm):
    answer = client.completions.create(model=llm.name, prompt=["a", "b"], n=3, temperature=1.4, max_tokens=50, seed=1,
                                       extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    texts = [choice.text for choice in answer.choices]
    assert len(texts) == 6 and all(re.fullmatch("[0-9]{4}", text) for text in texts) and len(set(texts)) > 1
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_streams_equal_whole_answers(client, llm):
    schema = {"type": "object", "additionalProperties": False, "required": ["a", "b"],
              "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": "integer"}}}
    options = dict(model=llm.name, seed=4, response_format=schema_format(schema), **HOT)
    whole = client.chat.completions.create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **options)]
    assert "".join(part.delta.content or "" for part in parts) == whole.message.content
    assert parts[-1].finish_reason == whole.finish_reason


def test_constrained_and_free_requests_run_side_by_side(llm):
    """A constrained request has the tokens that it has alone, and so have the others."""
    constraint = llm.grammars.compile(Structure("regex", "[a-z]{12}", "x"))
    free = rustinfer.SamplingParams(temperature=1.0, seed=2, max_tokens=12, ignore_eos=True, logprobs=1)
    alone = [token.token_id for token in llm.engine.submit([5, 6, 7], free, constraint=constraint.copy())]
    others = [llm.engine.submit([9, 10 + number], free) for number in range(6)]
    again = llm.engine.submit([5, 6, 7], free, constraint=constraint.copy())
    assert [token.token_id for token in again] == alone
    expected = [[token.token_id for token in llm.engine.submit([9, 10 + number], free)] for number in range(6)]
    assert [[token.token_id for token in handle] for handle in others] == expected


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_are_calls(client, llm, choice, stream):
    other = {"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "properties": {"n": {"$ref": "#/$defs/small"}}, "required": ["n"],
        "additionalProperties": False, "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}}}}}
    weather = json.loads(json.dumps(WEATHER))
    weather["function"]["parameters"] |= {"additionalProperties": False}
    weather["function"]["parameters"]["properties"]["city"]["maxLength"] = 8
    options = dict(model=llm.name, tools=[other, weather], tool_choice=choice, **HOT)
    seen = set()
    for seed in range(6):
        if stream:
            chunks = list(client.chat.completions.create(stream=True, seed=seed, **options))
            deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
            name, text = deltas[0].function.name, "".join(delta.function.arguments for delta in deltas)
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
            assert not any(chunk.choices[0].delta.content for chunk in chunks)
        else:
            answer = client.chat.completions.create(seed=seed, **options).choices[0]
            call, = answer.message.tool_calls
            name, text = call.function.name, call.function.arguments
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
        seen.add(name)
        tool = {"add": other, "get_weather": weather}[name]
        jsonschema.validate(json.loads(text), tool["function"]["parameters"])
    assert seen <= {"add", "get_weather"} if choice == "required" else seen == {"get_weather"}


DIGIT = {"properties": {"a": {"$ref": "#/$defs/digit"}}, "required": ["a"], "additionalProperties": False,
         "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}}


@pytest.mark.parametrize("parameters", [DIGIT, {"type": ["null", "object"], **DIGIT}, {
    "anyOf": [{"type": "string"}, {"$ref": "#/$defs/x"}], "$defs": {**DIGIT["$defs"], "x": DIGIT}}])
def test_arguments_are_an_object_also_where_the_parameters_leave_it_open(client, llm, parameters):
    function = {"name": "add", "parameters": parameters}
    options = dict(model=llm.name, tools=[{"type": "function", "function": function}], n=8, seed=1, **HOT)
    for choice in client.chat.completions.create(tool_choice="required", **options).choices:
        call, = choice.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), {**parameters, "type": "object"})
    strict = rustinfer.parse_structure({}, [{"type": "function", "function": {**function, "strict": True}}])
    for arguments, allowed in (('{"a": 7}', True), ("true", False), ('"x"', False), ("null", False)):
        text = f'{{"name": "add", "parameters": {arguments}}}'
        assert accepts(llm.grammars.compile(strict), llm.tokenizer, text) is allowed


@pytest.mark.parametrize("function", [{"name": "now"}, {"name": "now", "parameters": None}])
def test_a_forced_call_of_a_tool_that_names_no_parameters_has_no_arguments(llm, function):
    tools = [{"type": "function", "function": function}]
    constraint = llm.grammars.compile(rustinfer.parse_structure({}, tools, tools))
    for arguments, allowed in (("{}", True), ('{"a": 1}', False)):
        text = f'{{"name": "now", "parameters": {arguments}}}'
        assert accepts(constraint.copy(), llm.tokenizer, text) is allowed


@pytest.mark.parametrize("fields, param", [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
      "tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
    ({"response_format": schema_format({"type": "strange"})}, "response_format.json_schema.schema"),
    ({"response_format": schema_format({"type": "string", "pattern": "[a-"})}, "response_format.json_schema.schema"),
    ({"response_format": schema_format({"enum": ["x" * (1 << 16)]})}, "response_format.json_schema.schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "[a-"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"xml": 5}}, "structured_outputs.xml"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice")])
def test_what_cannot_be_enforced_is_refused_by_name(server, fields, param):
    from harness import RawConnection

    with RawConnection(server.port) as connection:
        status, _, body = connection.request("POST", "/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert (status, body["error"]["param"]) == (400, param)


DEEP = {"$ref": "#/$defs/a0", "$defs": {**{f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(1200)},
                                        "a1200": {}}}
LONG = "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(4000)) + 'a4000: "x"'


@pytest.mark.parametrize("asked, words", [
    ({"json": {"type": "integer", "minimum": -1 << 63, "maximum": -1 << 63}}, "dies of it"),
    ({"json": DEEP}, "dies of it"), ({"json": json.dumps(DEEP)}, "dies of it"), ({"grammar": LONG}, "dies of it"),
    ({"json": {"type": "integer", "multipleOf": 1 << 31}}, "more than 1 s"),
    ({"json": {"type": "number", "multipleOf": -1 << 31}}, "more than 1 s"),
    ({"json": {"anyOf": [{"type": "integer", "multipleOf": 99991}, {"type": "integer", "multipleOf": 98999}]}},
     "more than 1 s"),
    ({"grammar": 'start: x\nx: %json {"multipleOf": 2147483648}'}, "more than 1 s")])
def test_what_its_compiler_does_not_survive_is_refused_and_the_server_goes_on(server, monkeypatch, asked, words):
    """Each of these ended the process, or kept a thread busy for hours."""
    monkeypatch.setattr(rustinfer.GrammarTrial, "SECONDS", 1)
    with RawConnection(server.port) as connection:
        for _ in range(2):  # the second time it is known
            status, _, body = connection.request(
                "POST", "/v1/chat/completions", {"messages": MESSAGES, "structured_outputs": asked})
            assert status == 400 and words in body["error"]["message"], body
        assert body["error"]["param"].startswith("structured_outputs.")


def test_a_grammar_is_tried_once(llm, monkeypatch):
    trials = []
    monkeypatch.setattr(rustinfer.GrammarTrial, "_run", lambda trial, grammar: trials.append(grammar) or "")
    for _ in range(3):
        llm.grammars.compile(Structure("regex", "once|and no more", "x"))
    assert len(trials) == 1


def test_where_no_process_can_be_started_grammars_are_compiled_all_the_same(llm, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert accepts(llm.grammars.compile(Structure("regex", "no python", "x")), llm.tokenizer, "no python")


@pytest.mark.parametrize("schema, number", [
    ({"const": 123456789012345678}, "123456789012345678"), ({"enum": ["a", [-(1 << 53) - 1]]}, "-9007199254740993"),
    ({"properties": {"id": {"enum": [1, 1 << 60]}}}, str(1 << 60)), ({"const": 10**300}, "1000000")])
def test_integers_that_would_be_rounded_are_refused(client, llm, schema, number):
    with pytest.raises(openai.BadRequestError, match=f"asks for the integer {number}"):
        client.chat.completions.create(model=llm.name, messages=MESSAGES, response_format=schema_format(schema))


@pytest.mark.parametrize("schema, text", [
    ({"const": 1 << 53}, str(1 << 53)), ({"enum": [-(1 << 53)]}, str(-(1 << 53))), ({"const": 0.1}, "0.1"),
    ({"type": "object", "properties": {"const": {"type": "integer", "maximum": (1 << 63) - 1}}, "required": ["const"],
      "additionalProperties": False}, '{"const": 7}')])
def test_integers_that_a_double_holds_are_kept(llm, schema, text):
    assert accepts(llm.grammars.compile(Structure("json", schema, "x")), llm.tokenizer, text)


def test_without_llguidance_the_request_is_refused_with_what_to_install(client, llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    needed = re.search(r"^structured =\n +(\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)[1]
    with pytest.raises(openai.BadRequestError, match=re.escape(f"pip install '{needed}'")) as caught:
        client.chat.completions.create(model=llm.name, messages=MESSAGES, response_format={"type": "json_object"})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "response_format")


class Matcher:
    """One that always allows the same tokens, and says so with a number of words of its own."""

    def __init__(self, allowed, num_words):
        words = np.zeros(num_words, np.uint32)
        for token_id in allowed:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._bits = words.tobytes()

    def compute_bitmask(self):
        return self._bits


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("more", [-1, 0, 2])
def test_bits_are_the_matchers_within_the_vocabulary(vocab_size, more):
    num_words = max(-(-vocab_size // 32) + more, 0)
    allowed = [token_id for token_id in range(32 * num_words) if token_id % 3 == 0]
    bits = rustinfer.Constraint(Matcher(allowed, num_words), vocab_size).bits()
    assert bits.dtype == np.uint32 and bits.tolist() == rustinfer.pack_bits(
        np.isin(np.arange(vocab_size), allowed)).tolist()
    assert sum(int(word) << 32 * place for place, word in enumerate(bits)) == sum(
        1 << token_id for token_id in allowed if token_id < vocab_size)


def test_no_end_may_come_before_its_time_unless_the_grammar_has_come_to_its_own():
    seq = rustinfer.Sequence(0, [5, 6], rustinfer.SamplingParams(min_tokens=2), seed=0)
    seq.end_token_ids = frozenset({3, 39})
    tokens = lambda: np.flatnonzero(np.unpackbits(
        rustinfer.allowed_tokens(seq, 40).view(np.uint8), bitorder="little")).tolist()
    assert tokens() == [token_id for token_id in range(40) if token_id not in (3, 39)]
    for allowed, expected in (([3, 7, 39], [7]), ([3, 39], [3, 39])):
        seq.constraint = rustinfer.Constraint(Matcher(allowed, 2), 40)
        assert tokens() == expected
    seq.constraint = None
    seq.token_ids += [7, rustinfer.PENDING]  # a pending token counts
    assert not seq.needs_mask and tokens() == list(range(40))


def test_a_mask_leaves_broken_logits_broken(llm):
    sampler = rustinfer.Sampler(rustinfer.ArrayBackend())
    mask = np.array([False, True, False])
    params = [rustinfer.SamplingParams(temperature=0)]
    for logits, token, finite in (([9, 1, 5], 1, True), ([9, -np.inf, 5], None, False), ([np.nan, 1, 5], 0, False)):
        drawn = sampler.sample(np.array([logits], np.float32), params, [1], [0], [0], masks=[mask])[0]
        assert drawn.finite == finite and (token is None or drawn.token_id == token)


def test_a_grammar_that_fails_takes_nobody_along(llm):
    class Broken:
        def copy(self):
            return self

        def compute_bitmask(self):
            raise ValueError("too complex")

    params = rustinfer.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = [token.token_id for token in llm.engine.submit([5, 6], params)]
    other = llm.engine.submit([5, 6], params)
    constraint = rustinfer.Constraint(Broken(), llm.model_config.vocab_size)
    broken = llm.engine.submit([5, 6, 7], params, constraint=constraint)
    with pytest.raises(rustinfer.EngineError, match="grammar"):
        list(broken)
    assert [token.token_id for token in other] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_shows_itself_beyond_the_limits_only_in_use_is_refused(llm, stream):
    deep = {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9}
    body = {"prompt": "a", "max_tokens": 6, "stream": stream, "structured_outputs": {"json": deep}}
    with local_server(llm) as server, RawConnection(server.port) as raw:
        status, _, answer = raw.request("POST", "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_value")
        assert answer["error"]["param"] == "structured_outputs.json"


def test_the_demo_model_fills_a_schema():
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
              "additionalProperties": False}
    with rustinfer.LLM(None, device="cpu") as llm, local_server(llm) as server, client_of(server) as client:
        answer = client.chat.completions.create(
            model="demo", temperature=0, max_tokens=60, response_format=schema_format(schema),
            messages=[{"role": "user", "content": "What is the capital of France?"}]).choices[0]
    jsonschema.validate(json.loads(answer.message.content), schema)


class Point(pydantic.BaseModel):
    """What openai-python's helpers make a strict schema of."""
    x: int = pydantic.Field(ge=0, le=99)
    label: Literal["north", "south"]


def test_the_sdks_parse_returns_objects(client, llm):
    answer = client.chat.completions.parse(model=llm.name, response_format=Point, seed=2, **HOT).choices[0]
    assert isinstance(answer.message.parsed, Point) and answer.finish_reason == "stop"


def test_the_sdks_stream_accumulates_what_create_returns(client, llm):
    options = dict(model=llm.name, response_format=Point, seed=3, **HOT)
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == client.chat.completions.parse(**options).choices[0].message.content
    assert isinstance(final.choices[0].message.parsed, Point)


def test_the_sdks_tool_helpers_read_our_calls(client, llm):
    tool = openai.pydantic_function_tool(Point, name="mark")
    assert tool["function"]["strict"]
    options = dict(model=llm.name, tools=[tool], tool_choice="required", seed=5, **HOT)
    with client.chat.completions.stream(**options) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        call, = stream.get_final_completion().choices[0].message.tool_calls
    assert names == ["mark"] and Point.model_validate_json(call.function.arguments)


STRICT_ADD = {"type": "function", "function": {"name": "add", "strict": True, "parameters": {
    "type": "object", "required": ["a", "sign"], "additionalProperties": False,
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "sign": {"enum": ["+", "-"]}}}}}


def accepts(constraint, tokenizer, text):
    """True when the whole text may come, token by token, and then be the end."""
    for token_id in tokenizer.encode(text):
        bits = constraint.bits()
        if not bits[token_id // 32] >> (token_id % 32) & 1 or not constraint.accept(token_id):
            return False
    return True


@pytest.mark.parametrize("text, allowed", [
    ("Just text, {with} [brackets] and {\"name\": \"Bob\"}.", True), ("", True),
    ('{"name": "add", "parameters": {"a": 5, "sign": "+"}}', True),
    ('Well: {"name": "add", "arguments": {"a": 5, "sign": "-"}}', True),
    ('{"name": "add", "parameters": {"a": 5, "sign": "+"}}; {"name": "add", "arguments": {"a": 6, "sign": "+"}}',
     True),
    ('{"name": "get_weather", "parameters": {"anything": [1, {"x": null}]}}', True),  # it is not strict
    ('{"name": "add", "parameters": {"a": 100, "sign": "+"}}', False),
    ('{"name": "add", "parameters": {"a": 5}}', False), ('{"name": "add", "parameters": []}', False),
    ('{"name": "add", "arguments": {"a": 5, "sign": "*"}}', False),
    ('Well: {"name": "add", "parameters": {"a": 5, "sign": "+", "b": 1}}', False)])
def test_strict_calls_are_watched_over_wherever_they_begin(llm, text, allowed):
    tools = [STRICT_ADD, WEATHER]
    structure = rustinfer.parse_structure({}, tools)
    assert structure.param == "tools[0].function.strict"
    assert accepts(llm.grammars.compile(structure), llm.tokenizer, text) is allowed
    stream = rustinfer.ToolStream(CallRules(frozenset({"add", "get_weather"}), strict=True))
    shown = "".join(map(stream.push, text))
    rest, calls = stream.finish()
    if allowed:
        assert len(calls) == text.count('"parameters"') + text.count('"arguments"') and (calls or shown + rest == text)


@pytest.mark.parametrize("text", ['{ "name": "add", "parameters": {"a": 100}}', '[add(a=100)]',
                                  '{"type": "function", "name": "add", "parameters": {"a": "x"}}', '{"name": "add"}'])
def test_a_call_that_no_grammar_watched_over_is_text_where_tools_are_strict(text):
    stream = rustinfer.ToolStream(CallRules(frozenset({"add"}), strict=True))
    assert "".join(map(stream.push, text)) + stream.finish()[0] == text


def test_forced_calls_keep_their_schema_at_any_temperature(client, llm):
    start = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    options = dict(model=llm.name, tools=[STRICT_ADD], temperature=1.5, max_tokens=120, messages=start, n=8)
    forced = client.chat.completions.create(tool_choice="required", **options)
    for choice in forced.choices:
        call, = choice.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), STRICT_ADD["function"]["parameters"])


def test_the_demo_model_makes_a_strict_call_or_answers(demo_server):
    class get_weather(pydantic.BaseModel):
        """Get the weather of a city."""

        city: str

    with client_of(demo_server) as client:
        options = dict(model="demo", tools=[openai.pydantic_function_tool(get_weather)], temperature=0, max_tokens=80)
        question = [{"role": "user", "content": "What is the weather in Paris?"}]
        call, = client.chat.completions.parse(messages=question, **options).choices[0].message.tool_calls
        assert call.function.parsed_arguments == get_weather(city="Paris")
        with client.chat.completions.stream(messages=question, **options) as stream:
            call, = stream.get_final_completion().choices[0].message.tool_calls
            assert call.function.parsed_arguments == get_weather(city="Paris")
        text = client.chat.completions.parse(messages=[{"role": "user", "content": "What is Rust?"}], **options)
        assert text.choices[0].message.tool_calls is None and text.choices[0].message.content


def test_an_answer_in_a_format_may_be_a_call_instead(llm):
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/digit"}}, "required": ["x"],
              "additionalProperties": False, "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}}
    structure = rustinfer.parse_structure({"response_format": schema_format(schema)}, [STRICT_ADD])
    for text, allowed in (('{"x": 7}', True), ('{"name": "add", "parameters": {"a": 5, "sign": "+"}}', True),
                          ('{"x": 10}', False), ('{"name": "add", "parameters": {"a": 5}}', False), ("Hello", False)):
        assert accepts(llm.grammars.compile(structure), llm.tokenizer, text) is allowed


def test_allowed_tools_are_the_ones_offered(client, llm):
    allowed = lambda mode: {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [
        {"type": "function", "function": {"name": "add"}}]}}
    options = dict(model=llm.name, tools=[WEATHER, STRICT_ADD], temperature=1.5, max_tokens=120, messages=MESSAGES)
    forced = client.chat.completions.create(tool_choice=allowed("required"), seed=3, **options)
    call, = forced.choices[0].message.tool_calls
    assert call.function.name == "add"
    only_add = client.chat.completions.create(**{**options, "tools": [STRICT_ADD]}, seed=3)
    assert client.chat.completions.create(tool_choice=allowed("auto"), seed=3, **options).choices[0].message == (
        only_add.choices[0].message)
