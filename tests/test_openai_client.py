"""The openai SDK, sync and async, against a real server: what it parses, raises and retries."""
import asyncio
import time

import openai
import pytest
from harness import RawConnection, chat_body, client_of, local_server, slowed

HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS = {"model": "llama3-tied", "messages": HELLO, "max_tokens": 8, "temperature": 0,
           "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(tiny_server):
    with client_of(tiny_server) as client:
        yield client


@pytest.fixture(scope="module")
def whole(client):
    """The unstreamed greedy answer that streamed ones must repeat."""
    return client.chat.completions.create(**OPTIONS)


class TestAnswers:
    def test_a_chat_answer_is_parsed(self, whole):
        assert whole.id.startswith("chatcmpl-") and whole.object == "chat.completion" and whole.model == "llama3-tied"
        [choice] = whole.choices
        assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
        assert choice.message.role == "assistant" and choice.message.content and choice.message.refusal is None
        assert choice.message.tool_calls is None

    def test_usage_is_parsed(self, whole):
        usage = whole.usage
        assert usage.completion_tokens == 8 and usage.total_tokens == usage.prompt_tokens + 8
        assert usage.prompt_tokens_details.cached_tokens >= 0
        assert usage.performance["decode_iterations"] == 7

    def test_a_stream_says_the_same(self, client, whole):
        chunks = list(client.chat.completions.create(stream=True, **OPTIONS))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert all(chunk.usage is None for chunk in chunks)

    def test_a_stream_with_usage_ends_with_it(self, client):
        *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **OPTIONS)
        assert last.choices == [] and last.usage.completion_tokens == 8
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)

    def test_the_stream_helper_accumulates_the_answer(self, client, whole):
        with client.chat.completions.stream(**OPTIONS) as stream:
            for _ in stream:
                pass
            final = stream.current_completion_snapshot
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.choices[0].finish_reason == "length"

    def test_an_answer_goes_back_into_the_conversation(self, client, whole):
        messages = [*HELLO, whole.choices[0].message.model_dump(),
                    {"role": "user", "content": [{"type": "text", "text": "More"}]}]
        answer = client.chat.completions.create(**{**OPTIONS, "messages": messages})
        assert answer.usage.prompt_tokens > whole.usage.prompt_tokens

    def test_a_prompt_asked_twice_comes_from_the_cache(self, client):
        messages = [{"role": "user", "content": "one two three " * 10}]
        first, second = (client.chat.completions.create(**{**OPTIONS, "messages": messages}) for _ in range(2))
        assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens // 2
        assert second.choices == first.choices

    def test_stop_seed_and_limits_are_honoured(self, client):
        fields = {**OPTIONS, "temperature": 1, "seed": 4, "max_tokens": 40}
        first, second = (client.chat.completions.create(**fields).choices[0].message.content for _ in range(2))
        assert first == second
        stopped = client.chat.completions.create(**fields, stop=[first[5:8]]).choices[0]
        assert stopped.finish_reason == "stop" and stopped.message.content == first[: first.index(first[5:8])]
        assert client.chat.completions.create(**{**fields, "max_tokens": openai.NOT_GIVEN},
                                              max_completion_tokens=3).usage.completion_tokens == 3

    def test_leaving_a_stream_early_frees_its_blocks(self, client, tiny_server):
        with client.chat.completions.create(stream=True, **{**OPTIONS, "max_tokens": 1500}) as stream:
            next(iter(stream))
        deadline = time.monotonic() + 5
        while tiny_server.get("/v1/metrics")[2]["engine"]["kv_blocks_used"]:
            assert time.monotonic() < deadline
        assert client.chat.completions.create(**OPTIONS).choices

    def test_the_demo_model_greets(self, demo_server):
        with client_of(demo_server) as client:
            answer = client.chat.completions.create(model="demo", messages=HELLO)
        assert answer.choices[0].message.content.strip() and answer.choices[0].finish_reason == "stop"


class TestModels:
    def test_list_and_retrieve(self, client):
        [model] = client.models.list().data
        assert (model.id, model.object, model.max_model_len) == ("llama3-tied", "model", 2048)
        assert client.models.retrieve("llama3-tied") == model

    def test_an_unknown_model_is_not_found(self, client):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("gpt-4")
        assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model",
                                                                              "invalid_request_error")


class TestErrors:
    @pytest.mark.parametrize("fields, kind, code, param", [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"n": 9}, openai.BadRequestError, "invalid_value", "n"),
        ({"max_tokens": "many"}, openai.BadRequestError, "invalid_type", "max_tokens"),
        ({"messages": [*HELLO, {"role": "bot", "content": ""}]}, openai.BadRequestError, "invalid_value",
         "messages[1].role"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded", "messages"),
        ({"store": True}, openai.BadRequestError, "unsupported_parameter", "store")])
    @pytest.mark.parametrize("stream", [False, True])
    def test_errors_are_the_classes_that_programs_catch(self, client, stream, fields, kind, code, param):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(stream=stream, **{**OPTIONS, **fields})
        assert (caught.value.code, caught.value.param) == (code, param)
        assert caught.value.request_id and caught.value.body["message"]

    def test_an_error_in_a_stream_is_raised_from_the_iterator(self, tiny_llm):
        runner, steps = tiny_llm.engine._runner, iter(range(100))
        run = runner.launch
        with slowed(tiny_llm, 0.03), local_server(tiny_llm) as server, client_of(server) as client:
            runner.launch = lambda step: run(step) if next(steps) < 4 and not time.sleep(0.03) else 1 // 0
            with pytest.raises(openai.APIError) as caught:
                list(client.chat.completions.create(stream=True, **OPTIONS))
            assert "the model failed" in str(caught.value)

    def test_a_wrong_path_is_not_found(self, client):
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="llama3-tied", input="x")

    def test_a_dead_address_is_a_connection_error(self):
        with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(openai.APIConnectionError):
                client.models.list()


class TestRetries:
    def count_requests(self, monkeypatch, server) -> list:
        calls, route = [], type(server).route
        monkeypatch.setattr(type(server), "route", lambda self,
                            handler: (calls.append(handler.http.path), route(self, handler)))
        return calls

    def test_a_loading_server_is_asked_again_after_retry_after(self, tiny_llm, monkeypatch):
        with local_server(None) as server, client_of(server, max_retries=2) as client:
            calls = self.count_requests(monkeypatch, server)
            unavailable = type(server)._ready_llm

            def attach_after_the_first(self):
                if len(calls) == 2:
                    server.attach(tiny_llm)
                return unavailable(self)

            monkeypatch.setattr(type(server), "_ready_llm", attach_after_the_first)
            started = time.monotonic()
            assert client.chat.completions.create(**OPTIONS).choices
            assert len(calls) == 2 and time.monotonic() - started >= 2

    def test_an_internal_error_is_not_asked_again(self, tiny_llm, monkeypatch):
        with local_server(tiny_llm) as server, client_of(server, max_retries=2) as client:
            calls = self.count_requests(monkeypatch, server)
            tiny_llm.engine._runner.launch = lambda step: 1 // 0
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(**OPTIONS)
            del tiny_llm.engine._runner.launch
            assert len(calls) == 1

    def test_a_bad_request_is_not_asked_again(self, tiny_llm, monkeypatch):
        with local_server(tiny_llm) as server, client_of(server, max_retries=2) as client:
            calls = self.count_requests(monkeypatch, server)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**{**OPTIONS, "n": 30})
            assert len(calls) == 1


class TestAsync:
    def run(self, server, job):
        async def with_client():
            async with client_of(server, "AsyncOpenAI") as client:
                return await job(client)

        return asyncio.run(with_client())

    def test_chat_and_models(self, tiny_server, whole):
        async def job(client):
            assert (await client.models.list()).data[0].id == "llama3-tied"
            return await client.chat.completions.create(**OPTIONS)

        assert self.run(tiny_server, job).choices == whole.choices

    def test_20_streams_at_once_say_what_one_says_alone(self, tiny_server, client):
        async def stream(client, seed: int) -> str:
            fields = {**OPTIONS, "temperature": 1, "seed": seed, "max_tokens": 30}
            return "".join([chunk.choices[0].delta.content or "" async
                            for chunk in await client.chat.completions.create(stream=True, **fields)])

        async def job(client):
            return await asyncio.gather(*(stream(client, seed) for seed in range(20)))

        together = self.run(tiny_server, job)
        for seed, text in enumerate(together):
            fields = {**OPTIONS, "temperature": 1, "seed": seed, "max_tokens": 30}
            assert client.chat.completions.create(**fields).choices[0].message.content == text
        assert len(set(together)) == 20

    def test_errors_have_their_classes(self, tiny_server):
        async def job(client):
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(**{**OPTIONS, "temperature": -1})
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(**{**OPTIONS, "model": "x"})

        self.run(tiny_server, job)

    def test_a_cancelled_request_frees_its_blocks(self, tiny_server):
        async def job(client):
            task = asyncio.create_task(client.chat.completions.create(**{**OPTIONS, "max_tokens": 1500}))
            await asyncio.sleep(0.2)
            task.cancel()

        self.run(tiny_server, job)
        deadline = time.monotonic() + 5
        while tiny_server.get("/v1/metrics")[2]["engine"]["num_requests_running"]:
            assert time.monotonic() < deadline


def test_two_answers_over_one_connection_and_a_raw_one_beside(client, tiny_server):
    with RawConnection(tiny_server.port) as raw:
        assert client.chat.completions.create(**OPTIONS).choices
        assert raw.request("POST", "/v1/chat/completions", chat_body(max_tokens=2))[0] == 200
        assert client.chat.completions.create(**OPTIONS).choices
