"""A streamed answer, put together as OpenAI's clients do, is the answer that comes whole: 500 generated requests."""
import collections
import concurrent.futures
import json
import random

import pytest
from harness import RawConnection, parse_events
from test_tools import WEATHER

TEXTS = ["Hello", "", "What is Rust?", "The river runs down to the sea.", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 🙂",
         "مرحبا", "a\n\n\tb ", "<|eot_id|>", "\u2028 \x00", "What is the weather in Paris?", "Count to 10."]
STOPS = ["e", "a", " ", "the", [" the", "\n"], ["ü", "xyz", "in"], ["."], [], "Rust"]
CALLS = ['{"name": "get_weather", "parameters": {"city": "Paris"}}', "[get_weather(city='A'), add(n=1)]", "Hm {x}. [1]",
         'Well. \n{"name": "add", "arguments": {"n": 2}}; {"name": "add"}', "[add(n=", "é 🙂", "Yes: [add(n=7)]"]
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
    "additionalProperties": False}}}
STRICT = {"type": "function", "function": {**ADD["function"], "strict": True}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": [1, "é", None]}},
          "required": ["b"], "additionalProperties": False}
STRUCTURES = [{"structured_outputs": {"choice": CALLS}}, {"structured_outputs": {"regex": "[a-zé ]{3,9}[.!]"}},
              {"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"grammar": 'start: ("ab" | "🙂")+'}}]
FORMATS = [{"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}},
           {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}]
NAMED = {"type": "function", "function": {"name": "add"}}
CHOICES = ["auto", "auto", "none", "required", NAMED,
           {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}]
WRONG = [("temperature", 3), ("n", 0), ("max_tokens", 10**6), ("stop", [""]), ("logit_bias", {"999999": 1}),
         ("no_such_field", 1), ("model", "other"), ("top_p", "x"), ("stop_token_ids", [-1]), ("user", 5),
         ("seed", 1.5), ("min_tokens", 99), ("structured_outputs", {"regex": "("}), ("logprobs", "yes")]


def shared_fields(rng: random.Random, ends: list[int]) -> dict:
    """Fields of both routes: each is there or not by itself."""
    hot = rng.choice([0, 0, 0.4, 0.8, 1, 1.3, 2])
    fields = {"temperature": hot, "max_tokens": rng.randrange(1, 20), **({"seed": rng.getrandbits(60)} if hot else {})}
    optional = {
        "n": rng.choice([1, 2, 3, 5]), "stop": rng.choice(STOPS), "top_p": rng.choice([0.5, 0.9, 1]),
        "top_k": rng.choice([-1, 0, 1, 20]), "min_p": rng.choice([0, 0.1]), "frequency_penalty": rng.uniform(-2, 2),
        "presence_penalty": rng.uniform(-2, 2), "repetition_penalty": rng.choice([0.7, 1, 1.4]),
        "logit_bias": {str(rng.choice(ends + list(range(250)))): rng.choice([-100, 4, 9]) for _ in range(4)},
        "stop_token_ids": [rng.randrange(250) for _ in range(9)], "ignore_eos": rng.random() < 0.7,
        "min_tokens": rng.randrange(fields["max_tokens"] + 1), "user": "Ann"}
    return fields | {name: value for name, value in optional.items() if rng.random() < 0.25}


def chat_request(rng: random.Random, ends: list[int]) -> dict:
    text = lambda: rng.choice(TEXTS)
    parts = lambda: [{"type": "text", "text": text()} for _ in range(2)]
    messages = [{"role": role, "content": rng.choice([text, parts])(), "name": rng.choice([None, "Ann"])}
                for role in rng.choice([["user"], ["system", "user"], ["developer", "user", "assistant", "user"],
                                        ["user", "assistant"]])]
    fields = {"messages": messages, **shared_fields(rng, ends)}
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = rng.random() < 0.8
    if rng.random() < 0.5:
        fields |= {"logprobs": True, **({"top_logprobs": rng.randrange(6)} if rng.random() < 0.7 else {})}
    if rng.random() < 0.35:
        fields |= {"tools": [WEATHER, rng.choice([ADD, STRICT])], "tool_choice": rng.choice(CHOICES),
                   "parallel_tool_calls": rng.random() < 0.7}
        if fields["tool_choice"] in ("auto", "none"):
            fields |= rng.choice([{"structured_outputs": {"choice": rng.sample(CALLS, 2)}}, {}])
        fields["max_tokens"] = 70
    elif rng.random() < 0.4:
        fields |= rng.choice(STRUCTURES + FORMATS)
    if rng.random() < 0.1:
        fields["add_generation_prompt"] = False
    if rng.random() < 0.2:
        fields["max_completion_tokens"] = fields.pop("max_tokens")
    return fields


def completion_request(rng: random.Random, ends: list[int]) -> dict:
    ids = lambda: [rng.randrange(250) for _ in range(rng.randrange(1, 30))]
    text = lambda: rng.choice([text for text in TEXTS if text])
    prompt = rng.choice([text, ids, lambda: [text(), text()], lambda: [ids(), ids(), ids()]])()
    fields = {"prompt": prompt, **shared_fields(rng, ends)}
    optional = {"logprobs": rng.randrange(6), "echo": True, **rng.choice(STRUCTURES)}
    return fields | {name: value for name, value in optional.items() if rng.random() < 0.35}


def request_of(seed: int, ends: list[int]) -> tuple[str, dict]:
    """(path, body) of a request that `seed` determines; one in 12 is wrong somewhere."""
    rng = random.Random(seed)
    chat = rng.random() < 0.65
    fields = (chat_request if chat else completion_request)(rng, ends)
    if rng.random() < 1 / 12:
        fields |= dict([rng.choice(WRONG)])
    return "/v1/chat/completions" if chat else "/v1/completions", fields


def add_call(calls: list[dict], delta: dict) -> None:
    """A tool call begins with its id, type and name; only pieces of the arguments follow."""
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", "function"} and delta["function"]["arguments"] == ""
        calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
    else:
        assert set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"}
        calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


def add_logprobs(choice: dict, logprobs: dict | None) -> None:
    """Lists grow; what stays null is null."""
    if logprobs is not None:
        known = choice["logprobs"] = choice["logprobs"] or {key: [] if value is not None else None
                                                            for key, value in logprobs.items()}
        for key, value in logprobs.items():
            known[key] = None if value is None else known[key] + value


def add_choice(choices: dict[int, dict], part: dict) -> None:
    """One event's choice; texts are put together, the role comes once and first, the reason once and last."""
    index, chat = part["index"], "delta" in part
    assert set(part) == {"index", "delta" if chat else "text", "logprobs", "finish_reason"}
    if index not in choices:
        assert index == len(choices)
        begin = {"message": {"content": "", "refusal": None}} if chat else {"text": ""}
        choices[index] = {"index": index, **begin, "logprobs": None, "finish_reason": None}
        assert not chat or part["delta"].get("role") == "assistant"
    choice = choices[index]
    assert choice["finish_reason"] is None
    choice["finish_reason"] = part["finish_reason"]
    if not chat:
        choice["text"] += part["text"]
    else:
        message, delta = choice["message"], part["delta"]
        assert set(delta) <= {"role", "content", "tool_calls"} and ("role" in delta) == ("role" not in message)
        message |= {"role": "assistant", "content": message["content"] + (delta.get("content") or "")}
        for call in delta.get("tool_calls", ()):
            add_call(message.setdefault("tool_calls", []), call)
    add_logprobs(choice, part["logprobs"])


def put_together(events: list, wants_usage: bool) -> dict:
    """The answer that a stream's events make."""
    assert events.pop() == "[DONE]"
    heads = {json.dumps({key: chunk[key] for key in chunk if key not in ("choices", "usage")}) for chunk in events}
    assert len(heads) == 1
    answer, choices = json.loads(heads.pop()), {}
    if wants_usage:
        last = events.pop()
        assert last["choices"] == []
        answer["usage"] = last["usage"]
    for chunk in events:
        assert chunk.get("usage") is None and ("usage" in chunk) == wants_usage and len(chunk["choices"]) == 1
        add_choice(choices, chunk["choices"][0])
    return {**answer, "choices": list(choices.values())}


def comparable(answer: dict) -> dict:
    """An answer without what must differ: ids, times, how much of the prompt was in the cache; both spellings of
    nothing are one."""
    answer = json.loads(json.dumps(answer))
    assert answer.pop("id").startswith(("chatcmpl-", "cmpl-")) and answer.pop("created") > 0
    answer["object"] = answer["object"].removesuffix(".chunk")
    if "usage" in answer:
        usage = answer["usage"]
        assert len(usage["performance"]) == 6
        usage["performance"] = {"decode_iterations": usage["performance"]["decode_iterations"]}
        assert 0 <= usage["prompt_tokens_details"].pop("cached_tokens") <= usage["prompt_tokens"]
    for choice in answer["choices"]:
        calls = choice.get("message", {}).get("tool_calls", ())
        assert len({call["id"] for call in calls}) == len(calls)
        if calls:
            choice["message"]["content"] = choice["message"]["content"] or None
        for call in calls:
            assert call.pop("id").startswith("call_")
        if choice["logprobs"] and not any(choice["logprobs"].values()):
            choice["logprobs"] = None
    return answer


def ask_both_ways(server, seed: int, ends: list[int]) -> tuple[dict, dict, dict]:
    """(the request, the whole answer or error, the streamed one)."""
    path, body = request_of(seed, ends)
    wants_usage, found = seed % 3 > 0, []
    options = {"stream_options": {"include_usage": wants_usage}} if seed % 3 else {}
    with RawConnection(server.port) as connection:
        for fields in ({**body, "stream": False}, {**body, "stream": True, **options}):
            status, headers, answer = connection.request("POST", path, fields)
            if headers["content-type"].startswith("text/event-stream"):
                answer = put_together(parse_events(answer), wants_usage)
            found.append({"status": status, **(comparable(answer) if status == 200 else answer)})
    if not wants_usage:
        found[0].pop("usage", None)
    return body, *found


GENERATED = {"demo_server": (range(250), [1529, 1533, 1534]), "tiny_server": (range(250, 500), [296, 301, 302])}


@pytest.mark.parametrize("name", GENERATED)
def test_streamed_answers_equal_whole_ones(name, request):
    server, (seeds, ends) = request.getfixturevalue(name), GENERATED[name]
    seen = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for body, whole, streamed in pool.map(lambda seed: ask_both_ways(server, seed, ends), seeds):
            assert streamed == whole, body
            seen[whole["status"]] += 1
            for choice in whole.get("choices", ()):
                seen[choice["finish_reason"]] += 1
                seen["logprobs"] += choice["logprobs"] is not None
                seen["prose before calls"] += bool("tool_calls" in choice.get("message", ())
                                                   and choice["message"]["content"])
                seen["text"] += bool(choice.get("text") or choice.get("message", {}).get("content"))
    assert min(seen[what] for what in (200, "length", "logprobs", "text")) > 100, seen
    assert min(seen[what] for what in ("stop", "tool_calls")) > 10 and seen[400] and seen["prose before calls"], seen
