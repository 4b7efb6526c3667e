"""litellm and a server with the demo model, as an OpenAI server and as a vLLM server: what its users call and catch."""
import asyncio
import json
import os

import openai
import pytest
from harness import need_client, num_running, wait_for
from pydantic import BaseModel, Field

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import asks the network for prices
litellm = need_client("litellm")
pytestmark = pytest.mark.clients
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather for a location.",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}}}
WEATHER_QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
HELLO = [{"role": "user", "content": "Hello"}]


class City(BaseModel):
    name: str = Field(max_length=20)
    big: bool


@pytest.fixture(scope="module", params=["openai", "hosted_vllm"])
def options(request, demo_server):
    """How litellm finds the server, by the names of two of its providers."""
    return options_of(demo_server, request.param)


def options_of(server, provider: str = "openai") -> dict:
    return {"model": f"{provider}/demo", "api_base": server.url + "/v1", "api_key": "unused", "temperature": 0,
            "max_tokens": 80, "num_retries": 0}


def ask(options, messages=HELLO, **fields):
    return litellm.completion(**{**options, "messages": messages, **fields})


def joined(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_an_answer_comes_with_its_usage(options):
    answer = ask(options)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.completion_tokens > 0


def test_a_stream_says_the_same_with_the_same_usage(options):
    whole = ask(options)
    *chunks, last = ask(options, stream=True, stream_options={"include_usage": True})
    assert joined(chunks) == whole.choices[0].message.content and len(chunks) > 2
    count = lambda usage: (usage.prompt_tokens, usage.completion_tokens)
    assert count(last.usage) == count(whole.usage)


def test_async_answers_and_streams(options):
    async def ask_twice():
        fields = {**options, "messages": HELLO}
        whole, stream = await asyncio.gather(litellm.acompletion(**fields), litellm.acompletion(stream=True, **fields))
        return whole.choices[0].message.content, joined([chunk async for chunk in stream])

    whole, streamed = asyncio.run(ask_twice())
    assert whole and whole == streamed


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_used(options, streamed):
    answer = ask(options, WEATHER_QUESTION, tools=[WEATHER], stream=streamed)
    called = (litellm.stream_chunk_builder(list(answer)) if streamed else answer).choices[0]
    call, = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"location": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather",
              "content": '{"temperature": 21, "condition": "sunny"}'}
    answer = ask(options, [*WEATHER_QUESTION, called.message, result], tools=[WEATHER])
    assert "21" in answer.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_is_made_where_one_is_wanted(options, choice):
    call, = ask(options, tools=[WEATHER], tool_choice=choice).choices[0].message.tool_calls
    assert call.function.name == "get_weather" and list(json.loads(call.function.arguments)) == ["location"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_response_format_holds(options, streamed):
    answer = ask(options, response_format=City, stream=streamed)
    City.model_validate_json(joined(answer) if streamed else answer.choices[0].message.content)
    answer = ask(options, response_format={"type": "json_object"}, stream=streamed)
    assert isinstance(json.loads(joined(answer) if streamed else answer.choices[0].message.content), dict)


def test_fields_beyond_openais_reach_the_server(options):
    assert ask(options, top_k=1, temperature=2, seed=1).choices[0].message == ask(options).choices[0].message
    with pytest.raises(litellm.BadRequestError, match="top_k"):
        ask(options, top_k=-5)


@pytest.mark.parametrize("fields, kind, part", [
    ({"temperature": 5}, litellm.BadRequestError, "temperature is 5"),
    ({"max_tokens": 5000}, litellm.ContextWindowExceededError, "4096 tokens"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, litellm.ContextWindowExceededError, "4096 tokens")])
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_the_classes_that_programs_catch(options, fields, kind, part, streamed):
    with pytest.raises(kind, match=part):
        ask(options, stream=streamed, **fields)


def test_what_is_not_served_is_a_clean_error(options):
    with pytest.raises(litellm.NotFoundError, match="'demo' is served"):
        ask(options, model=options["model"].replace("demo", "gpt-4"))
    with pytest.raises(litellm.NotFoundError, match="no /v1/embeddings here"):
        litellm.embedding(model=options["model"], api_base=options["api_base"], api_key="unused", input=["Hello"])


def test_a_router_balances_over_its_deployments(demo_server):
    deployment = {"model_name": "any", "litellm_params": options_of(demo_server)}
    router = litellm.Router(model_list=[deployment, deployment], num_retries=0)
    assert router.completion("any", HELLO).choices[0].message == ask(options_of(demo_server)).choices[0].message


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_completions_whole_and_streamed(demo_server, provider):
    fields = {**options_of(demo_server, provider), "prompt": "Rust is", "max_tokens": 8}
    whole = litellm.text_completion(**fields)
    assert whole.choices[0].text and whole.usage.completion_tokens == 8
    chunks = litellm.text_completion(stream=True, **fields)
    assert "".join(choice.text or "" for chunk in chunks for choice in chunk.choices) == whole.choices[0].text


def test_the_served_model_is_found(demo_server):
    found = litellm.get_valid_models(check_provider_endpoint=True, custom_llm_provider="openai", api_key="unused",
                                     api_base=demo_server.url + "/v1")
    assert found == ["demo"]


def test_what_is_left_ends_on_the_server(slow_demo):
    llm, server = slow_demo
    fields = {**options_of(server), "messages": HELLO, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    with pytest.raises(litellm.Timeout) as caught:
        litellm.completion(timeout=1, **fields)
    assert isinstance(caught.value, openai.APITimeoutError)
    wait_for(lambda: num_running(llm) == 0)

    async def leave():
        stream = await litellm.acompletion(stream=True, **fields)
        await anext(stream)
        assert num_running(llm) == 1
        await stream.aclose()
        await asyncio.to_thread(wait_for, lambda: num_running(llm) == 0)
        task = asyncio.create_task(litellm.acompletion(**fields))
        await asyncio.to_thread(wait_for, lambda: num_running(llm) == 1)
        task.cancel()
        await asyncio.to_thread(wait_for, lambda: num_running(llm) == 0)

    asyncio.run(leave())
