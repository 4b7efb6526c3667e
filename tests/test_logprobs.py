"""Log-probabilities over HTTP are those that transformers gives, on every reference model and the demo."""
import json

import numpy as np
import pytest
from harness import DEMO, REFERENCE_NAMES, REFERENCES, ServerProcess, reference_answers
from make_references import DEMO_QUESTIONS

MODELS = {**{name: REFERENCES / name for name in REFERENCE_NAMES}, "demo": DEMO}
OPTIONS = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    """(name, a server of it, as it comes)."""
    with ServerProcess("--device", "cpu", model=MODELS[request.param]) as server:
        yield request.param, server


def post(server, path, **fields):
    status, _, body = server.request("POST", path, fields)
    assert status == 200, body
    return body


def complete(server, prompt, count):
    """What the completions route tells of the greedy tokens after a prompt of token ids."""
    answer = post(server, "/v1/completions", prompt=prompt, max_tokens=count, logprobs=0, **OPTIONS)
    return answer["choices"][0]["logprobs"]


@pytest.mark.parametrize("index", range(3))
def test_completions_give_the_logprobs_of_transformers(served, index):
    name, server = served
    _, arrays = reference_answers(name)
    prompt, output, expected = (arrays[f"{what}_{index}"] for what in (
        "prompt_token_ids", "output_token_ids", "logprobs"))
    shown = complete(server, prompt.tolist(), len(output))
    spelled = post(server, "/v1/completions", prompt=output.tolist(), max_tokens=1, echo=True, logprobs=0, **OPTIONS)
    assert shown["tokens"] == spelled["choices"][0]["logprobs"]["tokens"][:-1]
    assert np.abs(np.array(shown["token_logprobs"]) - expected).max() < 1e-3


@pytest.mark.parametrize("index", range(3))
def test_an_echoed_text_has_the_logprobs_of_transformers(served, index):
    """The same tokens as a prompt, so the whole of them at once."""
    name, server = served
    _, arrays = reference_answers(name)
    prompt, output = arrays[f"prompt_token_ids_{index}"].tolist(), arrays[f"output_token_ids_{index}"].tolist()
    answer = post(server, "/v1/completions", prompt=prompt + output, max_tokens=1, echo=True, logprobs=0, **OPTIONS)
    shown = answer["choices"][0]["logprobs"]["token_logprobs"][len(prompt) : -1]
    assert np.abs(np.array(shown) - arrays[f"logprobs_{index}"]).max() < 1e-3


def test_chat_gives_the_logprobs_of_completions(served):
    """Of the reference's first conversation, whose prompt has the ids that transformers gives."""
    name, server = served
    conversation = reference_answers(name)[0]["conversations"][0]
    entries = post(server, "/v1/chat/completions", messages=conversation["messages"], logprobs=True, max_tokens=40,
                   **OPTIONS)["choices"][0]["logprobs"]["content"]
    shown = complete(server, conversation["ids"], 40)
    assert [entry["token"] for entry in entries] == shown["tokens"] and len(entries) == 40
    assert [entry["logprob"] for entry in entries] == pytest.approx(shown["token_logprobs"], abs=1e-6)


@pytest.mark.parametrize("served", ["demo"], indirect=True)
def test_chat_gives_the_logprobs_of_transformers(served):
    """The demo's reference prompts are questions."""
    _, server = served
    _, arrays = reference_answers("demo")
    known = {tuple(arrays[f"prompt_token_ids_{index}"].tolist()): arrays[f"logprobs_{index}"] for index in range(3)}
    for question in DEMO_QUESTIONS[:3]:
        messages = [{"role": "user", "content": question}]
        expected = known.pop(tuple(post(server, "/tokenize", messages=messages)["tokens"]))
        answer = post(server, "/v1/chat/completions", messages=messages, logprobs=True, max_tokens=64, **OPTIONS)
        shown = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
        assert len(shown) == 64 and np.abs(np.array(shown) - expected).max() < 1e-3, json.dumps(question)
    assert not known
