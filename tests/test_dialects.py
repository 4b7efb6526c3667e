"""The three dialects say the same: one conversation through chat, responses and messages, streamed and not."""
import asyncio
import json
import typing

import anthropic
import openai
import pydantic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from harness import ask, client_of, local_server, parse_events, slowed, wait_for
from openai.types.responses import response_create_params

import rustinfer
from rustinfer import COUNT_FIELDS, MESSAGES_FIELDS, RESPONSE_FIELDS

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
           "additionalProperties": False}
ABOUT = "Get the weather of a city."
CHAT_TOOL = {"type": "function", "function": {"name": "get_weather", "description": ABOUT, "parameters": WEATHER}}
RESPONSE_TOOL = {"type": "function", "strict": False, **CHAT_TOOL["function"]}
MESSAGE_TOOL = {"name": "get_weather", "description": ABOUT, "input_schema": WEATHER}
RAIN = '{"weather": "rainy", "degrees": 9}'


@pytest.fixture(scope="module")
def chats(demo_server):
    with client_of(demo_server) as client:
        yield client


@pytest.fixture(scope="module")
def messages(demo_server):
    with anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as client:
        yield client


def post(server, path, body, **headers):
    """(status, body) of a POST."""
    return server.request("POST", path, body, headers)[::2]


def by_response(client, stream, **fields):
    """(text, calls, token counts, how it ended) of a response."""
    if stream:
        with client.responses.stream(**fields) as events:
            listed = list(events)
        kinds, found = [event.type for event in listed], listed[-1].response
        if found.status == "completed":
            assert events.get_final_response() == found
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == f"response.{found.status}"
    else:
        found = client.responses.create(**fields)
    calls = [(item.name, json.loads(item.arguments)) for item in found.output if item.type == "function_call"]
    usage = found.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    text = "".join(part.text for item in found.output if item.type == "message" for part in item.content)
    return text, calls, (usage.input_tokens, usage.output_tokens), found.status, found


def by_message(client, stream, **fields):
    if stream:
        with client.messages.stream(**fields) as events:
            found = events.get_final_message()
    else:
        found = client.messages.create(**fields)
    text = "".join(block.text for block in found.content if block.type == "text")
    calls = [(block.name, block.input) for block in found.content if block.type == "tool_use"]
    counts = found.usage.input_tokens + found.usage.cache_read_input_tokens, found.usage.output_tokens
    return text, calls, counts, found.stop_reason, found


def by_chat(client, **fields):
    found = client.chat.completions.create(**fields)
    choice = found.choices[0]
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
    counts = found.usage.prompt_tokens, found.usage.completion_tokens
    return choice.message.content or "", calls, counts, choice.finish_reason, choice.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", ["What is Rust?", "What is the weather in Paris?", "Count to ten.", "Hello!"])
@pytest.mark.parametrize("tools", [False, True])
def test_one_question_has_one_answer(chats, messages, question, stream, tools):
    asked = [{"role": "user", "content": question}]
    offer = lambda tool: {"tools": [tool]} if tools else {}
    chat = by_chat(chats, model="demo", messages=asked, temperature=0, max_tokens=60, **offer(CHAT_TOOL))
    response = by_response(chats, stream, model="demo", input=question, temperature=0, max_output_tokens=60,
                           **offer(RESPONSE_TOOL))
    message = by_message(messages, stream, model="demo", messages=asked, max_tokens=60,
                         extra_body={"temperature": 0}, **offer(MESSAGE_TOOL))
    assert chat[:3] == response[:3] == message[:3]
    ends = {"stop": ("completed", "end_turn"), "length": ("incomplete", "max_tokens"),
            "tool_calls": ("completed", "tool_use")}
    assert (response[3], message[3]) == ends[chat[3]]
    assert bool(chat[1]) == tools or "weather" not in question


@pytest.mark.parametrize("stream", [False, True])
def test_a_round_trip_with_a_tool_goes_alike(chats, messages, stream):
    asked = {"role": "user", "content": "What is the weather in Paris?"}
    told = {"role": "system", "content": "You are a helpful assistant."}
    options = dict(model="demo", temperature=0)
    call = by_chat(chats, messages=[told, asked], tools=[CHAT_TOOL], **options)[4]
    chat = by_chat(chats, tools=[CHAT_TOOL], **options, messages=[
        told, asked, call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": RAIN}])
    given = dict(**options, instructions=told["content"], tools=[RESPONSE_TOOL])
    first = by_response(chats, stream, input=[asked], **given)[4]
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": RAIN}
    response = by_response(chats, stream, input=[asked, *first.output, result], **given)
    given = dict(model="demo", max_tokens=99, system=told["content"], tools=[MESSAGE_TOOL],
                 extra_body={"temperature": 0})
    first = by_message(messages, stream, messages=[asked], **given)[4]
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": [{"type": "text", "text": RAIN}]}
    message = by_message(messages, stream, **given, messages=[
        asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}])
    assert chat[:3] == response[:3] == message[:3] and "rainy" in chat[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_of_the_sdk_needs_no_thread(messages, stream):
    @anthropic.beta_tool(name="get_weather", description=ABOUT, input_schema=WEATHER)
    def get_weather(city):
        return RAIN

    turns = messages.beta.messages.tool_runner(
        model="demo", max_tokens=99, extra_body={"temperature": 0}, tools=[get_weather], stream=stream,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}])
    found = [turn.get_final_message() if stream else turn for turn in turns]
    assert [turn.stop_reason for turn in found] == ["tool_use", "end_turn"] and "rainy" in found[1].content[0].text


def test_a_turn_of_text_and_calls_is_one_in_each(chats, messages):
    told, rain = "Let me look.", [{"weather": "rainy"}, {"weather": "dry"}]
    asked = {"role": "user", "content": "What is the weather in Paris and in Rome?"}
    calls = [{"name": "get_weather", "arguments": json.dumps({"city": city})} for city in ("Paris", "Rome")]
    options = dict(model="demo", temperature=0)
    chat = by_chat(chats, **options, messages=[
        asked, {"role": "assistant", "content": told, "tool_calls": [
            {"id": f"call_{at}", "type": "function", "function": call} for at, call in enumerate(calls)]},
        *({"role": "tool", "tool_call_id": f"call_{at}", "content": json.dumps(seen)} for at, seen in enumerate(rain))])
    response = by_response(chats, False, **options, input=[
        asked, {"role": "assistant", "content": told},
        *({"type": "function_call", "call_id": f"call_{at}", **call} for at, call in enumerate(calls)),
        *({"type": "function_call_output", "call_id": f"call_{at}", "output": json.dumps(seen)}
          for at, seen in enumerate(rain))])
    message = by_message(messages, False, model="demo", max_tokens=99, extra_body={"temperature": 0}, messages=[
        asked, {"role": "assistant", "content": [{"type": "text", "text": told}, *(
            {"type": "tool_use", "id": f"call_{at}", "name": call["name"], "input": json.loads(call["arguments"])}
            for at, call in enumerate(calls))]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"call_{at}", "content": json.dumps(seen)}
                                     for at, seen in enumerate(rain)]}])
    assert chat[:3] == response[:3] == message[:3]


def test_forced_calls_and_formats_are_guaranteed_in_each(chats, messages, tiny_server):
    with client_of(tiny_server) as client:
        calls = [by_response(client, stream, model="llama3-tied", input="Hi", temperature=1.5, max_output_tokens=400,
                             tools=[RESPONSE_TOOL | {"parameters": {**WEATHER, "properties": {
                                 "city": {"type": "string", "maxLength": 5}}}}], tool_choice=choice)[1]
                 for stream in (False, True)
                 for choice in ("required", {"type": "function", "name": "get_weather"}, {
                     "type": "allowed_tools", "mode": "required", "tools": [
                         {"type": "function", "name": "get_weather"}]})]
    assert all(name == "get_weather" and set(arguments) == {"city"} for (name, arguments), in calls)
    with anthropic.Anthropic(base_url=tiny_server.url, api_key="none", max_retries=0) as client:
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}):
            (name, arguments), = by_message(
                client, False, model="llama3-tied", max_tokens=400, tool_choice=choice,
                messages=[{"role": "user", "content": "Hi"}], tools=[MESSAGE_TOOL | {"input_schema": {
                    **WEATHER, "properties": {"city": {"enum": ["Rome", "Oslo"]}}}}])[1]
            assert name == "get_weather" and arguments["city"] in ("Rome", "Oslo")

    class Answer(pydantic.BaseModel):
        city: typing.Literal["Paris", "Rome"]

    options = dict(model="demo", temperature=0)
    assert chats.responses.parse(input="Hi", text_format=Answer, **options).output_parsed.city in ("Paris", "Rome")
    with chats.responses.stream(input="Hi", text_format=Answer, **options) as stream:
        assert stream.get_final_response().output_parsed.city in ("Paris", "Rome")
    found = by_message(messages, False, model="demo", max_tokens=40, messages=[{"role": "user", "content": "Hi"}],
                       output_config={"format": {"type": "json_schema", "schema": Answer.model_json_schema()}})
    assert Answer.model_validate_json(found[0])


def test_async_clients_stream_too(demo_server):
    async def run():
        async with openai.AsyncOpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as client:
            parts = [event.delta async for event in await client.responses.create(
                model="demo", input="What is Rust?", temperature=0, stream=True)
                if event.type == "response.output_text.delta"]
        async with anthropic.AsyncAnthropic(base_url=demo_server.url, api_key="none", max_retries=0) as client:
            async with client.messages.stream(model="demo", max_tokens=99, extra_body={"temperature": 0},
                                              messages=[{"role": "user", "content": "What is Rust?"}]) as stream:
                texts = [text async for text in stream.text_stream]
        return "".join(parts), "".join(texts)

    first, second = asyncio.run(run())
    assert first == second and first.startswith("Rust is a")


def test_what_ends_an_answer_is_told(chats, messages):
    cut = by_response(chats, True, model="demo", input="What is Rust?", temperature=0, max_output_tokens=4)[4]
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"
    asked = dict(model="demo", messages=[{"role": "user", "content": "What is Rust?"}], extra_body={"temperature": 0})
    assert by_message(messages, False, max_tokens=4, **asked)[3] == "max_tokens"
    stopped = by_message(messages, True, max_tokens=60, stop_sequences=["programming"], **asked)[4]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "programming")
    assert stopped.content[0].text == "Rust is a systems "


def test_a_last_turn_of_the_assistant_is_gone_on_with(messages):
    asked = {"role": "user", "content": "What is Rust?"}
    found = by_message(messages, False, model="demo", max_tokens=60, extra_body={"temperature": 0}, messages=[
        asked, {"role": "assistant", "content": "Rust is a systems"}])
    assert found[0].startswith(" programming language")


def test_turns_of_one_role_in_a_row_are_one(messages, demo_server):
    def prompt(*turns):
        return post(demo_server, "/v1/messages/count_tokens", {"messages": list(turns)})[1]["input_tokens"]

    hello = lambda text: {"role": "user", "content": text}
    assert prompt(hello("a"), hello("b")) == prompt(hello("a\nb"))
    blocks = [{"type": "text", "text": text} for text in "ab"]
    assert prompt({"role": "user", "content": blocks}) == prompt(hello("a\nb"))
    assert messages.messages.count_tokens(model="demo", system="Be kind.", tools=[MESSAGE_TOOL], messages=[
        hello("a")]).input_tokens > prompt(hello("a"))


def test_logprobs_of_a_response_are_those_of_the_chat(chats):
    options = dict(model="demo", temperature=0)
    chat = chats.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2,
                                         **options).choices[0].logprobs.content
    given = dict(input="Hi", include=["message.output_text.logprobs"], top_logprobs=2, **options)
    whole = chats.responses.create(**given).output[0].content[0].logprobs
    streamed = [entry for event in chats.responses.create(stream=True, **given)
                if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.logprob for entry in chat] == [entry.logprob for entry in whole] == [
        entry.logprob for entry in streamed]
    assert [top.logprob for top in whole[0].top_logprobs] == [top.logprob for top in chat[0].top_logprobs]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_call_are_no_message(chats, stream):
    found = by_response(chats, stream, model="demo", input="What is the weather in Paris?", temperature=0,
                        tools=[RESPONSE_TOOL], include=["message.output_text.logprobs"])[4]
    assert [item.type for item in found.output] == ["function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_held_text_come_with_it(chats, stream):
    options = dict(model="demo", temperature=0, tools=[RESPONSE_TOOL], include=["message.output_text.logprobs"])
    cut = by_response(chats, stream, input="What is the weather in Paris?", max_output_tokens=8, **options)[4]
    (part,), = [item.content for item in cut.output]
    assert part.text.startswith('{"name"') and "".join(entry.token for entry in part.logprobs) == part.text


def test_sequence_numbers_count_and_ids_stay(demo_server):
    status, body = post(demo_server, "/v1/responses", {"input": "What is the weather in Paris?", "stream": True,
                                                       "temperature": 0, "tools": [RESPONSE_TOOL]})
    blocks = body.decode().split("\n\n")[:-1]
    events = [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]
    assert all(block.startswith(f"event: {event['type']}\n") for block, event in zip(blocks, events))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in final["output"]]


# -- every field


RESPONSE_REFUSED = {
    "background": True, "background_options": {}, "context_management": [], "conversation": "c", "image": {},
    "include": ["reasoning.encrypted_content"], "max_tool_calls": 1, "moderation": {"model": "m"},
    "previous_response_id": "r", "prompt": {"id": "p"}, "prompt_cache_key": "k", "prompt_cache_options": {"x": 1},
    "prompt_cache_retention": "24h", "reasoning": {"effort": "low"}, "safety_identifier": "s",
    "service_tier": "flex", "store": True, "truncation": "auto", "access_programs": {"cyber": "standard"},
    "stream_options": {"include_obfuscation": True}, "text": {"verbosity": "low"}, "input": [{"type": "reasoning"}],
    "prompt_cache_diagnostics": {"x": 1}, "tools": [{"type": "web_search"}], "tool_choice": "some",
    "instructions": 5, "max_output_tokens": 0, "metadata": {"a": 5}, "model": "other", "temperature": 3,
    "parallel_tool_calls": 1, "stream": 1, "top_logprobs": 3, "top_p": 2, "user": 5}
MESSAGE_REFUSED = {
    "cache_control": {"type": "forever"}, "container": "c", "diagnostics": {"x": 1}, "inference_geo": "eu",
    "metadata": {"user_id": 5}, "output_config": {"effort": "low"}, "service_tier": "priority", "speed": "fast",
    "thinking": {"type": "enabled", "budget_tokens": 1024}, "user_profile_id": "u", "workspace_id": "w",
    "max_tokens": 0, "messages": [], "model": "other", "stop_sequences": [5], "system": 5, "stream": 1,
    "tool_choice": {"type": "some"}, "tools": [{"type": "bash_20250124", "name": "bash"}], "temperature": 1.5,
    "top_k": -1, "top_p": 2, "mcp_servers": [{}], "context_management": {"edits": []}, "thread": {"type": "create"}}
HELLO = {"role": "user", "content": "Hi"}
NAMED = {"type": "function", "name": "get_weather"}
ALLOWED = {"type": "allowed_tools", "mode": "auto"}


def names_of(module, name):
    """The fields of a request in an SDK."""
    return {key for kind in (f"{name}Base", f"{name}NonStreaming", f"{name}Streaming", name)
            for key in getattr(getattr(module, kind, None), "__annotations__", {})}


def test_every_field_of_the_sdks_stands_in_the_tables():
    response = names_of(response_create_params, "ResponseCreateParams")
    message = names_of(message_create_params, "MessageCreateParams")
    count = names_of(message_count_tokens_params, "MessageCountTokensParams")
    assert len(response) > 20 and response <= set(RESPONSE_FIELDS), response - set(RESPONSE_FIELDS)
    assert len(message) > 10 and message <= set(MESSAGES_FIELDS), message - set(MESSAGES_FIELDS)
    assert len(count) > 5 and count <= set(COUNT_FIELDS), count - set(COUNT_FIELDS)
    assert set(RESPONSE_REFUSED) >= response and set(MESSAGE_REFUSED) >= message


@pytest.mark.parametrize("name", RESPONSE_REFUSED)
def test_a_value_of_a_response_that_is_not_kept_is_refused_by_name(demo_server, name):
    value = RESPONSE_REFUSED[name]
    status, body = post(demo_server, "/v1/responses", {"input": "Hi", name: value})
    assert status in (400, 404) and body["error"]["param"].split(".")[0].split("[")[0] == name
    if value == {} or value == []:
        assert post(demo_server, "/v1/responses", {"input": "Hi", "max_output_tokens": 1, name: None})[0] == 200


def test_values_that_ask_for_nothing_are_taken_within_a_response(demo_server):
    nothing = {"prompt_cache_breakpoint": None, "annotations": [], "logprobs": None}
    tool = {**RESPONSE_TOOL, "async": False, "defer_loading": False, "allowed_callers": ["direct"]}
    status, body = post(demo_server, "/v1/responses", {"max_output_tokens": 1, "tools": [tool], "reasoning": {
        "effort": None, "summary": None}, "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi", **nothing}]}]})
    assert status == 200, body


@pytest.mark.parametrize("name", MESSAGE_REFUSED)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_a_value_of_a_message_that_is_not_kept_is_refused_by_name(demo_server, name, path):
    given = {"messages": [HELLO], **({} if "count" in path else {"max_tokens": 1}), name: MESSAGE_REFUSED[name]}
    status, body = post(demo_server, path, given)
    assert status in (400, 404) and body["type"] == "error" and body["request_id"]
    assert body["error"]["param"].split(".")[0].split("[")[0] == name


@pytest.mark.parametrize("fields, param", [
    ({}, "input"), ({"input": []}, "input"), ({"input": [5]}, "input[0].type"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [HELLO, {"role": "robot", "content": "x"}]}, "input[1].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "more": 1}]}]},
     "input[0].content[0].more"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "prompt_cache_breakpoint": {
        "mode": "explicit"}}]}]}, "input[0].content[0].prompt_cache_breakpoint"),
    ({"input": [HELLO, {"type": "function_call_output", "call_id": "a"}]}, "input[1].output"),
    ({"input": [HELLO, {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_file"}]}]},
     "input[1].output[0].type"),
    ({"instructions": "Be kind.", "input": [{"type": "function_call", "name": "f", "arguments": "["}]},
     "input[0].arguments"),
    ({"input": [HELLO, {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "b", "arguments": "{}"}]}, "input[2].name"),
    ({"input": "Hi", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools[0].parameters"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {**NAMED, "more": 1}}, "tool_choice.more"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {**ALLOWED, "tools": [NAMED], "more": 1}},
     "tool_choice.more"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {**ALLOWED, "tools": [{**NAMED, "more": 1}]}},
     "tool_choice.tools[0].more"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"input": "Hi", "tools": [RESPONSE_TOOL], "tool_choice": {**ALLOWED, "tools": "all"}}, "tool_choice.tools"),
    ({"input": "Hi", "reasoning": {"effort": None, "summary": "auto"}}, "reasoning"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"input": "Hi", "text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"input": "Hi", "text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
    ({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}},
     "text.format.schema"),
    ({"input": "Hi " * 9000}, "input"), ({"input": "Hi", "max_output_tokens": 10**6}, "input"),
    ({"input": "Hi", "no_such": None}, "no_such")])
def test_errors_about_a_response_name_its_own_fields(demo_server, fields, param):
    status, body = post(demo_server, "/v1/responses", fields)
    assert (status, body["error"]["param"]) == (400, param), body


@pytest.mark.parametrize("fields, param", [
    ({"messages": [5]}, "messages[0]"), ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "x"}}]}]},
     "messages[0].content[0].cache_control"),
    ({"messages": [HELLO, {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "input": {}}]}]},
     "messages[1].content[0].name"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
    ({"tools": [MESSAGE_TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tools": [MESSAGE_TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"max_tokens": None}, "max_tokens"), ({"messages": None}, "messages")])
def test_errors_about_a_message_name_its_own_fields(demo_server, fields, param):
    status, body = post(demo_server, "/v1/messages", {"messages": [HELLO], "max_tokens": 2, **fields})
    assert (status, body["error"]["param"]) == (400, param), body


@pytest.mark.parametrize("path, fields, text", [
    ("/v1/responses", {"top_logprobs": 2}, "top_logprobs is allowed only with include: message.output_text.logprobs"),
    ("/v1/responses", {"min_tokens": 3, "max_output_tokens": 2}, "min_tokens is 3; it must not be more than the 2 tok"),
    ("/v1/responses", {"tools": [RESPONSE_TOOL], "tool_choice": "required", "text": {
        "format": {"type": "json_object"}}}, "tool_choice is not allowed together with text.format"),
    ("/v1/messages", {"tools": [MESSAGE_TOOL], "tool_choice": {"type": "any"}, "output_config": {"format": {
        "type": "json_schema", "schema": {}}}}, "tool_choice is not allowed together with output_config.format"),
    ("/v1/responses", {"tools": [RESPONSE_TOOL], "tool_choice": {"type": "function", "name": "g"}},
     "tool_choice names g, which is none of the tools"),
    ("/v1/messages", {"tools": [MESSAGE_TOOL], "tool_choice": {"type": "tool", "name": "g"}},
     "tool_choice names g, which is none of the tools"),
    ("/v1/messages", {"output_config": {"format": {"type": "json_object"}}},
     "output_config.format.type is json_object; json_schema is supported"),
    ("/v1/messages", {"stop_sequences": [""]}, "stop_sequences may hold 16 strings"),
    ("/v1/responses", {"input": [HELLO, {"type": "function_call", "name": "f", "arguments": "["}]},
     "input[1].arguments is not valid JSON: "),
    ("/v1/responses", {"input": [HELLO, {"type": "function_call", "name": "f", "arguments": "[1]"}]},
     "input[1].arguments is a JSON array; an object is expected"),
    ("/v1/responses", {"input": 5}, "input must be text or a list"),
])
def test_errors_speak_of_no_field_that_the_dialect_lacks(demo_server, path, fields, text):
    asked = {"input": "Hi"} if path == "/v1/responses" else {"messages": [HELLO], "max_tokens": 2}
    status, body = post(demo_server, path, {**asked, **fields})
    assert status == 400 and body["error"]["message"].startswith(text), body


@pytest.mark.parametrize("path, body, param", [
    ("/v1/responses", {"input": [HELLO, *[{"type": "function_call", "name": "f", "arguments": "{}"}] * 2]}, "input"),
    ("/v1/messages/count_tokens", {"messages": [HELLO, {"role": "assistant", "content": [
        {"type": "tool_use", "id": id_, "name": "f", "input": {}} for id_ in "ab"]}]}, "messages")])
def test_what_the_template_refuses_is_named_as_the_dialect_does(tiny_server, path, body, param):
    status, body = post(tiny_server, path, body)
    assert status == 400 and body["error"]["param"] == param and "one tool call at a time" in body["error"]["message"]


@pytest.mark.parametrize("fields", [
    {"max_output_tokens": 10**6}, {"input": "Hi " * 9000}, {"input": "Hi " * 9000, "max_output_tokens": 1},
    {"min_tokens": 9999}])
def test_errors_about_the_length_of_a_response_speak_of_no_max_tokens(demo_server, fields):
    status, body = post(demo_server, "/v1/responses", {"input": "Hi", **fields})
    assert status == 400 and "max_tokens" not in body["error"]["message"], body


# -- errors


def test_errors_are_the_sdks_own_classes(demo_server, messages):
    options = dict(model="demo", max_tokens=4, messages=[HELLO])
    for fields, kind, name in (
            ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
            ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error")):
        with pytest.raises(kind) as caught:
            messages.messages.create(**{**options, **fields})
        assert caught.value.body["error"]["type"] == name
        assert caught.value.request_id == caught.value.body["request_id"]
    assert messages.messages.create(**options)._request_id and messages.messages.count_tokens(
        model="demo", messages=[HELLO])._request_id
    with pytest.raises(anthropic.BadRequestError):
        with messages.messages.stream(**{**options, "messages": []}) as stream:
            stream.get_final_message()
    assert demo_server.request("POST", "/v1/messages", {**options}, {"anthropic-version": "old"})[0] == 400


def test_keys_and_limits_hold_for_each_dialect(tiny_llm):
    with local_server(tiny_llm, api_key=("the-right-key",), requests_per_minute=3) as server:
        options = dict(model="llama3-tied", max_tokens=2, messages=[HELLO])
        with anthropic.Anthropic(base_url=server.url, api_key="the-wrong-key", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError):
                client.messages.create(**options)
        with anthropic.Anthropic(base_url=server.url, api_key="the-right-key", max_retries=0) as client:
            client.messages.create(**options)
            client.messages.count_tokens(model="llama3-tied", messages=[HELLO])
            with client_of(server, api_key="the-right-key") as other:
                other.responses.create(model="llama3-tied", input="Hi", max_output_tokens=2)
                with pytest.raises(openai.RateLimitError):
                    other.responses.create(model="llama3-tied", input="Hi", max_output_tokens=2)
            with pytest.raises(anthropic.RateLimitError):
                client.messages.create(**options)


@pytest.mark.parametrize("path, body", [("/v1/responses", {"input": "Hi", "max_output_tokens": 200}),
                                        ("/v1/messages", {"messages": [HELLO], "max_tokens": 200})])
def test_a_stream_that_fails_ends_with_the_dialects_own_error_event(tiny_llm, path, body):
    with slowed(tiny_llm, 0.02), local_server(tiny_llm, request_timeout=0.4) as server:
        status, _, body = ask(server, "POST", path, {**body, "stream": True})
        name, data = body.decode().strip().split("\n\n")[-1].split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert status == 200 and name == "event: error" and value["type"] == "error"
        if path == "/v1/messages":
            assert value["error"]["type"] == "timeout_error"
        else:
            assert value["code"] == "request_timeout" and value["sequence_number"] > 2
        wait_for(lambda: not tiny_llm.engine.scheduler.has_work)


def test_events_of_the_chat_route_are_unchanged(demo_server):
    status, body = post(demo_server, "/v1/chat/completions", {"messages": [HELLO], "stream": True})
    assert status == 200 and parse_events(body)[-1] == "[DONE]" and b"event:" not in body


def test_the_library_has_the_sections_apart():
    assert rustinfer.parse_response({"input": "Hi"}, rustinfer.SamplingParams()).conversation["messages"] == [HELLO]
