"""Every field that openai-python knows, and every field of ours: honoured by its effect, or refused by its name.

The fields are read from the client's own types, down to each documented value, so one that a new release brings fails
here until the server deals with it. No parameter is accepted and ignored.
"""
import json
import re
import shutil
import types
import typing

import pytest
import typing_extensions
from harness import REFERENCES, ServerProcess, parse_events, wait_for
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from test_tools import WEATHER

import rustinfer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FIELDS = {CHAT: rustinfer.CHAT_FIELDS, COMPLETIONS: rustinfer.COMPLETION_FIELDS}
TYPES = {CHAT: chat_create_params, COMPLETIONS: completion_create_params}
USER = {"role": "user", "content": "Hello"}
BASE = {CHAT: {"messages": [USER]}, COMPLETIONS: {"prompt": "Hello"}}


# ---- what the client knows ------------------------------------------------------------------------------------------


def label_of(kind) -> str:
    """[user], [image_url], ...: what tells a typed dictionary from the others of its place."""
    hints = typing_extensions.get_type_hints(kind)
    tags = [typing.get_args(hints[name]) for name in ("role", "type") if name in hints]
    return f"[{tags[0][0]}]" if tags and len(tags[0]) == 1 else ""


def leaves(kind):
    """(path, value) of everything that a value of this type may hold: one value for each leaf and literal."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if typing_extensions.is_typeddict(kind):
        hints = typing_extensions.get_type_hints(kind)
        marked = typing_extensions.get_type_hints(kind, include_extras=True)
        needed = {name: next(leaves(hint))[1] for name, hint in hints.items()
                  if typing.get_origin(marked[name]) is typing_extensions.Required}
        for name, hint in hints.items():
            for path, value in leaves(hint):
                yield f"{label_of(kind)}.{name}{path}", {**needed, name: value}
    elif origin in (typing.Literal, typing_extensions.Literal):
        yield from ((f"={value}", value) for value in args)
    elif origin in (typing.Union, types.UnionType):
        for arg in args:
            if arg is not type(None):
                yield from leaves(arg)
    elif origin is dict:
        yield "", {}
    elif args:  # lists, by several names
        yield from (("[]" + path, [value]) for path, value in leaves(args[0]))
    else:
        yield from {bool: [("=False", False), ("=True", True)], int: [("", 2)], float: [("", 0.5)],
                    str: [("", "x")]}[kind]


def top_fields(route: str) -> dict:
    """{name: its type} of a route's request."""
    hints = typing_extensions.get_type_hints(TYPES[route].CompletionCreateParamsNonStreaming)
    return {**hints, "stream": typing.Optional[bool]}


def known_leaves(route: str) -> dict[str, dict]:
    """{path: a request's field with that leaf}."""
    return {name + path: {name: value} for name, kind in top_fields(route).items() if name != "model"
            for path, value in leaves(kind)}


LEAVES = {route: known_leaves(route) for route in TYPES}

# ---- what the server says -------------------------------------------------------------------------------------------

# Refused: what stands under these paths -> the param of the error.
REFUSED = {CHAT: {
    r"audio|functions|moderation|prediction|prompt_cache_key|prompt_cache_retention|prompt_cache_options"
    r"|safety_identifier|verbosity(?!=medium)|web_search_options|function_call(?!=none)|modalities\[\]=audio|store=True"
    r"|reasoning_effort(?!=none)|service_tier(?!=auto|=default)": r"\g<0>",
    r"messages\[\]\[\w+\]\.content\[\]\[text\]\.prompt_cache_breakpoint":
        "messages[0].content[0].prompt_cache_breakpoint",
    r"messages\[\]\[\w+\]\.content\[\]\[(image_url|input_audio|file|refusal)\]": "messages[0].content[0].type",
    r"messages\[\]\[assistant\]\.(audio|function_call|refusal)\b": r"messages[0].\1",
    r"messages\[\]\[assistant\]\.tool_calls\[\]\[custom\]": "messages[0].tool_calls[0].type",
    r"messages\[\]\[function\]": "messages[0].role",
    r"stream_options\.include_obfuscation=True": "stream_options.include_obfuscation",
    r"tools\[\]\[custom\]": "tools[0].type",
    r"tool_choice\[custom\]": "tool_choice.type",
}, COMPLETIONS: {
    r"best_of|suffix": r"\g<0>",
    r"stream_options\.include_obfuscation=True": "stream_options.include_obfuscation",
}}
# They ask for what happens without them; the answer is the same.
NEUTRAL = {CHAT: [
    {"function_call": "none"}, {"functions": []}, {"modalities": ["text"]}, {"store": False}, {"service_tier": "auto"},
    {"service_tier": "default"}, {"reasoning_effort": "none"}, {"verbosity": "medium"}, {"prompt_cache_options": {}},
    {"logprobs": False}, {"top_logprobs": 0}, {"tools": []}, {"tool_choice": "none"}, {"metadata": {}},
    {"response_format": {"type": "text"}}, {"response_format": {"type": "text", "json_schema": None}},
    {"parallel_tool_calls": True}, {"add_generation_prompt": True},
    {"chat_template_kwargs": {}}, {"continue_final_message": False}],
    COMPLETIONS: [{"best_of": 1}, {"suffix": ""}, {"echo": False}]}
NEUTRAL_EVERYWHERE = [
    {"n": 1}, {"stream": False}, {"frequency_penalty": 0}, {"presence_penalty": 0}, {"repetition_penalty": 1},
    {"logit_bias": {}}, {"stop": []}, {"stop_token_ids": []}, {"top_p": 1}, {"top_k": 0}, {"top_k": -1}, {"min_p": 0},
    {"min_tokens": 0}, {"user": ""}, {"structured_outputs": None}]


def refusal_of(route: str, path: str) -> str | None:
    """The param of the error that a leaf gets; None if it is honoured."""
    for pattern, param in REFUSED[route].items():
        if match := re.match(pattern, path):
            return match.expand(param).split("=")[0].removesuffix("[]") if "\\" in param else param
    return None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A random model with a template that shows all that it is given."""
    folder = tmp_path_factory.mktemp("every") / "shown"
    shutil.copytree(REFERENCES / "llama3-tied", folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ tools | tojson }}{{ date_string }}{% for message in messages %}<{{ message | tojson }}>"
        "{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}", encoding="utf-8")
    with ServerProcess("--device", "cpu", model=folder) as server:
        yield server


class Asker:
    """Sends requests to one route; the answers must be 200."""

    def __init__(self, server: ServerProcess, route: str):
        self.server, self.route = server, route

    def send(self, **fields):
        """(status, body), a stream's events parsed."""
        body = {**BASE[self.route], "temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields}
        status, _, body = self.server.request("POST", self.route, {k: v for k, v in body.items() if v != "LEFT OUT"})
        return status, parse_events(body) if isinstance(body, bytes) else body

    def __call__(self, **fields):
        status, body = self.send(**fields)
        assert status == 200, body
        return body

    def refused(self, param: str, **fields) -> None:
        status, body = self.send(**fields)
        assert (status, body["error"]["param"]) == (400, param), body
        assert body["error"]["code"] in ("unsupported_parameter", "unsupported_value"), body

    def choices(self, **fields) -> list[dict]:
        return self(**fields)["choices"]

    def text(self, **fields) -> str:
        choice = self.choices(**fields)[0]
        return choice["text"] if self.route == COMPLETIONS else choice["message"]["content"]

    def calls(self, **fields) -> list[dict]:
        calls = self.choices(max_tokens=200, **fields)[0]["message"].get("tool_calls", [])
        return [json.loads(call["function"]["arguments"]) | {"called": call["function"]["name"]} for call in calls]

    def logged(self, text: str) -> None:
        wait_for(lambda: text in self.server.read_log())

    def prompt(self, **fields) -> str:
        """What the model is shown, which is what it is asked to continue."""
        status, _, body = self.server.request("POST", "/apply-template", {**BASE[CHAT], **fields})
        tokens = self.server.request("POST", "/tokenize", {**BASE[CHAT], **fields})[2]
        assert status == 200, body
        assert self(**fields)["usage"]["prompt_tokens"] == tokens["count"]
        return body["prompt"]


EFFECTS: dict[tuple[str, str], typing.Callable] = {}  # (route, path of a leaf) -> what shows that it is honoured
HONOURED = []  # (name, route, function)


def honours(*paths: str, routes=(CHAT, COMPLETIONS)):
    """The function shows that these leaves have their effect."""
    def register(function):
        for route in routes:
            EFFECTS.update(((route, path), function) for path in paths)
            HONOURED.append(pytest.param(route, function, id=f"{route[4:]}-{function.__name__}"))
        return function
    return register


def token_of(ask: Asker, text: str) -> int:
    """The id of a text of one token."""
    ids = ask.server.request("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})[2]["tokens"]
    assert len(ids) == 1
    return ids[0]


# ---- effects: sampling ----------------------------------------------------------------------------------------------


def near_tie(ask: Asker) -> dict[str, int]:
    """Biases with which greedy answers are "aaaa", and "b" is next."""
    return {str(token_of(ask, "a")): 100, str(token_of(ask, "b")): 99}


@honours("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias")
def penalties_and_biases(ask):
    a, b = (str(token_of(ask, text)) for text in "ab")
    assert ask.text() != "a" * 12 == ask.text(logit_bias={a: 100, b: 50})
    for name, *values in (("frequency_penalty", -2, 2), ("presence_penalty", -2, 2), ("repetition_penalty", 0.1, 9)):
        variety = [len(set(ask.text(max_tokens=40, **{name: value}))) for value in values]
        assert variety[0] < variety[1], name


@honours("temperature", "seed")
def temperature_and_seed(ask):
    hot = lambda seed: ask.text(temperature=1.5, seed=seed)
    assert len({hot(seed) for seed in range(4)}) == 4 and hot(3) == hot(3)
    assert len({ask.text(temperature=0, seed=seed) for seed in range(3)}) == 1


@honours("top_p", "top_k", "min_p")
def filters(ask):
    for narrow in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1}):
        assert ask.text(temperature=2, seed=5, **narrow) == ask.text() != ask.text(temperature=2, seed=5)


@honours("n")
def several_choices(ask):
    choices = ask.choices(n=3, temperature=1.5)
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({json.dumps(choice.get("message", choice.get("text"))) for choice in choices}) == 3


@honours("max_tokens")
def limit(ask):
    for count in (1, 7):
        answer = ask(max_tokens=count)
        assert answer["usage"]["completion_tokens"] == count and answer["choices"][0]["finish_reason"] == "length"


@honours("max_completion_tokens", routes=[CHAT])
def newer_limit(ask):
    assert ask(max_tokens="LEFT OUT", max_completion_tokens=5)["usage"]["completion_tokens"] == 5


@honours("stop", "stop[]", "stop_token_ids")
def stops(ask):
    bias = {"logit_bias": near_tie(ask), "frequency_penalty": 2}
    plain = ask.text(**bias)
    before = plain[: plain.index("ba")]
    for stop in ("ba", ["zz", "ba"]):
        choice = ask.choices(stop=stop, **bias)[0]
        assert (choice.get("text") or choice["message"]["content"], choice["finish_reason"]) == (before, "stop")
    assert ask.text(stop_token_ids=[token_of(ask, "b")], **bias) == plain[: plain.index("b")]


@honours("ignore_eos", "min_tokens")
def ends(ask):
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm:
        bias = {str(min(llm.engine.eos_token_ids)): 100}
    count = lambda **fields: ask(logit_bias=bias, **fields)["usage"]["completion_tokens"]
    assert (count(ignore_eos=False), count(ignore_eos=True), count(ignore_eos=False, min_tokens=5)) == (1, 12, 6)


@honours("user")
def user(ask):
    ask(user="Ann 4711")
    ask.logged("Ann 4711")


@honours("metadata", routes=[CHAT])
def metadata(ask):
    ask(metadata={"ticket": "4712"})
    ask.logged("4712")


# ---- effects: the answer's form -------------------------------------------------------------------------------------


@honours("stream=True", "stream=False", "stream_options.include_usage=True", "stream_options.include_usage=False",
         "stream_options.include_obfuscation=False")
def streams(ask):
    whole, events = ask(stream=False), ask(stream=True)
    assert whole["object"] in ("chat.completion", "text_completion") and events[-1] == "[DONE]" and len(events) > 2
    for wanted in (True, False):
        last = ask(stream=True, stream_options={"include_usage": wanted, "include_obfuscation": False})[-2]
        assert ("usage" in last) == wanted
    assert ask.send(stream=False, stream_options={"include_usage": True})[1]["error"]["param"] == "stream_options"


@honours("logprobs=True", "logprobs=False", "top_logprobs", routes=[CHAT])
def chat_logprobs(ask):
    shown = lambda **fields: ask.choices(**fields)[0]["logprobs"]
    assert shown() is shown(logprobs=False) is None
    for fields, count in (({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 4}, 4)):
        entries = shown(logprobs=True, **fields)["content"]
        assert len(entries) == 12 and all(len(entry["top_logprobs"]) == count for entry in entries)
    assert ask.send(top_logprobs=1)[1]["error"]["param"] == "top_logprobs"


@honours("logprobs", "echo=True", "echo=False", routes=[COMPLETIONS])
def completion_logprobs(ask):
    for count in (0, 3):
        logprobs = ask.choices(logprobs=count)[0]["logprobs"]
        assert len(logprobs["tokens"]) == 12 and {len(table) for table in logprobs["top_logprobs"]} <= {1, 2, 3}
        assert max(map(len, logprobs["top_logprobs"])) == max(1, count)
    plain = ask.text(echo=False)
    assert ask.text(echo=True) == "Hello" + plain
    entries = ask.choices(echo=True, logprobs=1)[0]["logprobs"]["token_logprobs"]
    assert entries[0] is None and len(entries) > 13 and None not in entries[1:]


@honours("prompt", "prompt[]", "prompt[][]", routes=[COMPLETIONS])
def prompts(ask):
    ids = ask.server.request("POST", "/tokenize", {"prompt": "Hello"})[2]["tokens"]
    texts = [[choice["text"] for choice in ask.choices(prompt=prompt)] for prompt in (
        "Hello", ["Hello"], ids, [ids, ids], ["Hello", "Bye"])]
    assert texts[0] == texts[1] == texts[2] == texts[3][:1] == texts[3][1:] == texts[4][:1]
    assert texts[4][1] != texts[4][0]


SCHEMA = {"enum": ["yes"]}


@honours("response_format[text].type=text", "response_format[json_object].type=json_object",
         "response_format[json_schema].type=json_schema", "response_format[json_schema].json_schema.name",
         "response_format[json_schema].json_schema.description", "response_format[json_schema].json_schema.schema",
         "response_format[json_schema].json_schema.strict=True",
         "response_format[json_schema].json_schema.strict=False", routes=[CHAT])
def response_format(ask):
    assert not ask.text(response_format={"type": "text"}).startswith("{")
    assert ask.text(response_format={"type": "json_object"}).startswith("{")
    for strict in (True, False):
        form = {"name": "form4713", "description": "says 4714", "schema": SCHEMA, "strict": strict}
        assert ask.text(response_format={"type": "json_schema", "json_schema": form}) == '"yes"'
    ask.logged("form4713: says 4714")
    for wrong, param in (({"type": "json_schema", "json_schema": {**form, "name": "no good name"}}, "json_schema.name"),
                         ({"type": "json_schema"}, "json_schema.schema"), ({}, "type"),
                         ({"type": "text", "json_schema": form}, "json_schema"),
                         ({"type": "json_object", "json_schema": form}, "json_schema"), ({"type": "xml"}, "type")):
        status, body = ask.send(response_format=wrong)
        assert (status, body["error"]["param"]) == (400, f"response_format.{param}")


@honours("structured_outputs")
def structured_outputs(ask):
    text = lambda **fields: ask.text(max_tokens=60, structured_outputs=fields)
    assert text(json=SCHEMA) == text(json=json.dumps(SCHEMA)) == '"yes"'
    assert re.fullmatch("[xyz]{5}", text(regex="[xyz]{5}")) and text(choice=["left", "right"]) in ("left", "right")
    assert set(text(grammar='start: "u"{3}')) == {"u"} and text(json_object=True).startswith("{")
    ask.refused("structured_outputs.whitespace_pattern", structured_outputs={"json": {}, "whitespace_pattern": " "})


# ---- effects: tools -------------------------------------------------------------------------------------------------

ADD = {"type": "function", "function": {"name": "add", "description": "Adds 4715.", "parameters": {
    "type": "object", "properties": {"n": {"enum": [4716]}}, "required": ["n"], "additionalProperties": False}}}
TWO = {"tools": [WEATHER, ADD]}
NAMED = {"type": "function", "function": {"name": "add"}}
SPOKEN = {"structured_outputs": {"choice": ['[get_weather(city="A"), add(n=1)]']}}  # what the model is made to say


@honours("tools[][function].type=function", "tools[][function].function.name", "tools[][function].function.description",
         "tools[][function].function.parameters", routes=[CHAT])
def tools(ask):
    shown = ask.prompt(**TWO)
    assert all(json.dumps(tool) in shown for tool in TWO["tools"]) and "4715" not in ask.prompt()
    assert ask.calls(tools=[ADD], tool_choice="required") == [{"n": 4716, "called": "add"}]


@honours("tool_choice=none", "tool_choice=auto", "tool_choice=required", "tool_choice[function].type=function",
         "tool_choice[function].function.name", "tool_choice[allowed_tools].type=allowed_tools",
         "tool_choice[allowed_tools].allowed_tools.mode=auto", "tool_choice[allowed_tools].allowed_tools.mode=required",
         "tool_choice[allowed_tools].allowed_tools.tools[]", "parallel_tool_calls=True", "parallel_tool_calls=False",
         routes=[CHAT])
def tool_choice(ask):
    called = lambda **fields: [call["called"] for call in ask.calls(**TWO, **fields)]
    allowed = lambda mode: {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}
    assert called(**SPOKEN) == called(tool_choice="auto", **SPOKEN) == ["get_weather", "add"]
    assert called(parallel_tool_calls=True, **SPOKEN) == ["get_weather", "add"]
    assert called(parallel_tool_calls=False, **SPOKEN) == ["get_weather"]
    assert called(tool_choice="none", **SPOKEN) == called(tool_choice=allowed("auto"), **SPOKEN) == []
    assert len(called(tool_choice="required")) == 1
    assert called(tool_choice=NAMED) == called(tool_choice=allowed("required")) == ["add"]
    alone = {"structured_outputs": {"choice": ["[add(n=1)]"]}}
    assert called(tool_choice=allowed("auto"), **alone) == ["add"]


# ---- effects: messages ----------------------------------------------------------------------------------------------

CALL = {"id": "call_4721", "type": "function", "function": {"name": "f4722", "arguments": '{"a": 4723}'}}
ROLES = ("developer", "system", "user", "assistant", "tool")


@honours(*(f"messages[][{role}].{leaf}" for role in ROLES for leaf in (
             f"role={role}", "content", "content[][text].text", "content[][text].type=text", "name")),
         "messages[][tool].tool_call_id", *(f"messages[][assistant].tool_calls[][function].{leaf}" for leaf in (
             "id", "type=function", "function.name", "function.arguments")), routes=[CHAT])
def messages(ask):
    for role in ROLES:
        needed = {"tool_call_id": "call_4720"} if role == "tool" else {}
        for content in ("text 4717", [{"type": "text", "text": "text"}, {"type": "text", "text": "4717"}]):
            shown = ask.prompt(messages=[{"role": role, "content": content, "name": "Ann4718", **needed}])
            role_shown = {"developer": "system"}.get(role, role)
            assert all(mark in shown for mark in ("4717", "Ann4718", f'"role": "{role_shown}"', *needed.values()))
    shown = ask.prompt(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}])
    twice = {**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {"a": 4723}}}
    assert ask.prompt(messages=[USER, {"role": "assistant", "tool_calls": [twice]}]) == shown  # as clients send it back
    assert '"id": "call_4721"' in shown and '{"name": "f4722", "arguments": {"a": 4723}}' in shown


@honours("add_generation_prompt", "continue_final_message", "chat_template_kwargs", routes=[CHAT])
def rendering(ask):
    assert ask.prompt().endswith("ANSWER") and not ask.prompt(add_generation_prompt=False).endswith("ANSWER")
    spoken = [USER, {"role": "assistant", "content": "I say"}]
    assert ask.prompt(messages=spoken, continue_final_message=True).endswith("I say")
    assert "26 Jul" in ask.prompt(chat_template_kwargs={"date_string": "26 Jul"})
    ask.refused("chat_template_kwargs.nothing", chat_template_kwargs={"nothing": 1})
    ask.refused("chat_template_kwargs.thinking", chat_template_kwargs={"thinking": True})  # this template has it not


@honours("model")
def model(ask):
    assert ask(model="shown") and ask(model=None)
    assert ask.send(model="gpt-5")[0] == 404


@honours("tools[][function].function.strict=False", "tools[][function].function.strict=True", routes=[CHAT])
def strict(ask):
    cities = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    function = {**WEATHER["function"], "parameters": cities}
    tool = lambda strict: {"type": "function", "function": {**function, "strict": strict}}
    with ServerProcess("--device", "cpu") as server:  # the demo model, which makes calls by itself
        ask = Asker(server, ask.route)
        asked = {"messages": [{"role": "user", "content": "What is the weather in Paris?"}], "ignore_eos": False}
        assert [ask.calls(tools=[tool(strict)], **asked)[0]["city"] for strict in (False, True)] == ["Paris", "Rome"]


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route, function", HONOURED)
def test_a_field_that_is_accepted_has_its_effect(server, route, function):
    function(Asker(server, route))


@pytest.mark.parametrize("route, path", [(route, path) for route in LEAVES for path in LEAVES[route]
                                         if refusal_of(route, path)])
def test_what_is_not_supported_is_refused_by_name(server, route, path):
    fields = LEAVES[route][path]
    streams = {"stream": True} if path.startswith("stream_options") else {}
    tools = {"tools": [WEATHER]} if path.startswith("tool_choice") else {}
    Asker(server, route).refused(refusal_of(route, path), **streams, **tools, **fields)


@pytest.mark.parametrize("route", TYPES)
def test_every_value_that_the_client_documents_is_honoured_or_refused(route):
    known = {path for of_route, path in EFFECTS if of_route == route}
    asking_nothing = {path for path, fields in LEAVES[route].items() if fields in NEUTRAL[route]}
    assert not [path for path in LEAVES[route] if path not in known | asking_nothing and not refusal_of(route, path)]


@pytest.mark.parametrize("route", TYPES)
def test_every_field_of_our_own_is_honoured_refused_or_asks_for_nothing(route):
    known = {re.match(r"\w+", path)[0] for of_route, path in EFFECTS if of_route == route}
    refused = {name for name, field in FIELDS[route].items() if field.kind == "unsupported"}
    assert set(FIELDS[route]) == known | refused


@pytest.mark.parametrize("route, fields", [(route, fields) for route in TYPES
                                           for fields in NEUTRAL[route] + NEUTRAL_EVERYWHERE])
def test_a_value_that_asks_for_nothing_changes_nothing(server, route, fields):
    ask = Asker(server, route)
    with_logprobs = {"logprobs": True} if "top_logprobs" in fields else {}
    assert ask.choices(**fields, **with_logprobs) == ask.choices(**with_logprobs)


@pytest.mark.parametrize("route, name", [(route, name) for route in TYPES for name in sorted(
    set(FIELDS[route]) | set(top_fields(route))) if name not in BASE[route]])
def test_null_is_the_same_as_absent(server, route, name):
    ask = Asker(server, route)
    fields = {} if name not in ("temperature", "max_tokens", "ignore_eos") else {name: "LEFT OUT"}
    assert ask.choices(**{name: None}) == ask.choices(**fields)


@pytest.mark.parametrize("route", TYPES)
def test_a_field_that_nobody_knows_is_refused(server, route):
    for name in ("no_such_field", "Temperature", "top_a", "guided_json", "cache_prompt", ""):
        Asker(server, route).refused(name, **{name: 1})


@pytest.mark.parametrize("fields, param", [
    ({"messages": [{**USER, "x": 1}]}, "messages[0].x"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content[0].x"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "x": 1}]}]}, "messages[0].tool_calls[0].x"),
    ({"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {**CALL["function"], "x": 1}}]}]},
     "messages[0].tool_calls[0].function.x"),
    ({"tools": [{**ADD, "x": 1}]}, "tools[0].x"),
    ({"tools": [{"type": "function", "function": {**ADD["function"], "x": 1}}]}, "tools[0].function.x"),
    ({**TWO, "tool_choice": {**NAMED, "x": 1}}, "tool_choice.x"),
    ({**TWO, "tool_choice": {"type": "function", "function": {"name": "add", "x": 1}}}, "tool_choice.function.x"),
    ({**TWO, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}, "x": 1}},
     "tool_choice.x"),
    ({**TWO, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED], "x": 1}}},
     "tool_choice.allowed_tools.x"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "x": 1}}},
     "response_format.json_schema.x"),
    ({"structured_outputs": {"regex": "a", "x": 1}}, "structured_outputs.x"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x")])
def test_nothing_unknown_hides_inside_a_field(server, fields, param):
    Asker(server, CHAT).refused(param, **fields)


@pytest.mark.parametrize("fields, param", [
    ({"prompt": "a", "tools": [ADD]}, "tools"), ({"prompt": "a", "add_generation_prompt": False},
                                                 "add_generation_prompt"),
    ({"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
    ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"), ({"prompt": "a", "x": 1}, "x")])
def test_tokenize_refuses_what_does_not_belong_to_its_input(server, fields, param):
    status, _, body = server.request("POST", "/tokenize", fields)
    assert (status, body["error"]["param"]) == (400, param)
