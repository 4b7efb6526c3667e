"""langchain-openai and a server with the demo model: what its users call, and what they catch."""
import asyncio

import openai
import pytest
from harness import need_client, num_running, wait_for
from pydantic import BaseModel, Field

core, langchain = need_client("langchain_core"), need_client("langchain_openai")
pytestmark = pytest.mark.clients
WEATHER_QUESTION = "What is the weather in Paris?"


class City(BaseModel):
    """A city and whether it is big."""
    name: str = Field(max_length=20)
    big: bool


def get_weather(location: str) -> str:
    """Get the weather for a location."""
    return '{"temperature": 21, "condition": "sunny"}'


def chat_of(server, **options):
    options = {"model": "demo", "temperature": 0, "max_tokens": 80, "max_retries": 0, **options}
    return langchain.ChatOpenAI(base_url=server.url + "/v1", api_key="unused", **options)


@pytest.fixture(scope="module")
def chat(demo_server):
    return chat_of(demo_server)


def test_an_answer_comes_with_its_usage(chat):
    answer = chat.invoke([("system", "You are a pirate."), ("human", "What is the capital of Italy?")])
    assert answer.content.startswith("Arr") and answer.response_metadata["finish_reason"] == "stop"
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > usage["output_tokens"] > 0


def test_a_stream_says_the_same_with_the_same_usage(demo_server, chat):
    whole = chat.invoke("What is Rust?")
    chunks = list(chat_of(demo_server, stream_usage=True).stream("What is Rust?"))
    assert "".join(chunk.content for chunk in chunks) == whole.content and len(chunks) > 2
    count = lambda message: {name: message.usage_metadata[name] for name in ("input_tokens", "output_tokens")}
    assert [count(chunk) for chunk in chunks if chunk.usage_metadata] == [count(whole)]


def test_many_are_asked_at_once(chat):
    questions = [f"What is {number} + 4?" for number in range(1, 9)]
    together = [answer.content for answer in chat.batch(questions)]
    assert together == [chat.invoke(question).content for question in questions]

    async def ask_all():  # in one event loop, since the client keeps connections beyond it
        with pytest.raises(core.exceptions.ContextOverflowError, match="4096 tokens"):
            await chat.ainvoke("word " * 5000)
        streamed = "".join([chunk.content async for chunk in chat.astream(questions[0])])
        return streamed, [answer.content for answer in await asyncio.gather(*map(chat.ainvoke, questions))]

    assert asyncio.run(ask_all()) == (together[0], together)


def test_log_probabilities_and_several_answers_are_read(demo_server, chat):
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("Hello")
    entries = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == answer.content
    assert {len(entry["top_logprobs"]) for entry in entries} == {2}
    joke = [core.messages.HumanMessage("Tell me a joke.")]
    generations, = chat_of(demo_server, n=2, temperature=1).generate([joke]).generations
    assert len(generations) == 2 and all(one.text for one in generations)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_used(chat, streamed):
    tool = core.tools.tool(get_weather)
    caller, messages = chat.bind_tools([tool]), [core.messages.HumanMessage(WEATHER_QUESTION)]
    if streamed:
        first, *rest = caller.stream(messages)
        called = sum(rest, first)
    else:
        called = caller.invoke(messages)
    call, = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"location": "Paris"})
    answer = caller.invoke([*messages, called, tool.invoke(call)])
    assert "21" in answer.content and not answer.tool_calls


@pytest.mark.parametrize("choice", ["required", "any", "get_weather"])
def test_a_call_is_made_where_one_is_wanted(chat, choice):
    caller = chat.bind_tools([get_weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
    call, = caller.invoke("What is Rust?").tool_calls
    assert call["name"] == "get_weather" and isinstance(call["args"]["location"], str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_the_class(chat, method):
    reader = chat.with_structured_output(City, method=method)
    whole = reader.invoke("What is the capital of France?")
    assert isinstance(whole, City) and list(reader.stream("What is the capital of France?"))[-1] == whole


def test_json_mode_is_json(chat):
    assert isinstance(chat.with_structured_output(None, method="json_mode").invoke("Hello"), dict)


@pytest.mark.parametrize("fields, kind, part", [
    ({"temperature": 5}, openai.BadRequestError, "temperature is 5"),
    ({"model": "gpt-4"}, openai.NotFoundError, "'demo' is served"),
    ({"reasoning_effort": "low"}, openai.BadRequestError, "reasoning_effort"),
    ({"max_tokens": 5000}, core.exceptions.ContextOverflowError, "4096 tokens")])
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_are_the_classes_that_programs_catch(demo_server, fields, kind, part, streamed):
    chat = chat_of(demo_server, **fields)
    with pytest.raises(kind, match=part):
        list(chat.stream("Hello")) if streamed else chat.invoke("Hello")


def test_the_responses_route_answers_alike(demo_server, chat):
    answer = chat_of(demo_server, use_responses_api=True).invoke("What is Rust?")
    assert "".join(block["text"] for block in answer.content) == chat.invoke("What is Rust?").content
    parts = chat_of(demo_server, use_responses_api=True).stream("What is Rust?")
    assert "".join(block.get("text", "") for part in parts for block in part.content) == answer.content[0]["text"]


def test_what_is_not_served_is_a_clean_error(demo_server, chat):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(openai.BadRequestError, match="image_url; text is supported"):
        chat.invoke([core.messages.HumanMessage([image])])
    embeddings = langchain.OpenAIEmbeddings(model="demo", base_url=demo_server.url + "/v1", api_key="unused",
                                            check_embedding_ctx_length=False)
    with pytest.raises(openai.NotFoundError, match="no /v1/embeddings here"):
        embeddings.embed_query("Hello")


def test_completions_whole_and_streamed(demo_server):
    model = langchain.OpenAI(model="demo", base_url=demo_server.url + "/v1", api_key="unused", max_tokens=8,
                             temperature=0)
    whole = model.invoke("Rust is")
    assert whole and "".join(model.stream("Rust is")) == whole


def test_a_stream_that_is_left_ends_on_the_server(slow_demo):
    llm, server = slow_demo
    stream = chat_of(server, max_tokens=3000, extra_body={"ignore_eos": True}).stream("Hello")
    next(stream)
    assert num_running(llm) == 1
    stream.close()
    wait_for(lambda: num_running(llm) == 0)


def test_a_cancelled_task_ends_on_the_server(slow_demo):
    llm, server = slow_demo
    chat = chat_of(server, max_tokens=3000, extra_body={"ignore_eos": True})

    async def ask():
        task = asyncio.create_task(chat.ainvoke("Hello"))
        await asyncio.to_thread(wait_for, lambda: num_running(llm) == 1)
        task.cancel()
        await asyncio.to_thread(wait_for, lambda: num_running(llm) == 0)

    asyncio.run(ask())
