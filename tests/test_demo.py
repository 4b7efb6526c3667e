"""The demo model: what it is made of, that it is served as transformers would, and that its answers make sense."""
import json

import numpy as np
import pytest

import rustinfer
from harness import DEMO, parse_events, reference_answers, streamed_text


@pytest.fixture(scope="module")
def demo():
    with rustinfer.LLM(None, device="cpu") as llm:
        yield llm


def ask(llm, *turns: str, system: str | None = None, **options) -> str:
    """The answer to the last of the user's turns; the assistant's earlier ones are its own."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": llm.chat(messages, **options)[0].outputs[0].text})
    return messages[-1]["content"]


def test_demo_is_small_and_a_llama_3():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 8 << 20
    config = rustinfer.ModelConfig.load(DEMO)
    assert config.rope_scaling["rope_type"] == "llama3" and config.tie_word_embeddings
    assert config.num_kv_heads < config.num_attention_heads and config.max_position_embeddings == 4096
    assert 1024 <= config.vocab_size <= 4096


def test_demo_has_one_to_four_million_parameters(demo):
    assert 1e6 <= demo.num_parameters <= 4e6


@pytest.mark.parametrize("cpu_kernels", ["float32", "off"])
@pytest.mark.parametrize("index", range(3))
def test_demo_gives_the_tokens_and_logits_of_transformers(index, cpu_kernels):
    _, arrays = reference_answers("demo")
    prompt, expected = (arrays[f"{name}_token_ids_{index}"].tolist() for name in ("prompt", "output"))
    with rustinfer.LLM(None, device="cpu", cpu_kernels=cpu_kernels) as llm:
        output = llm.generate([prompt], temperature=0, max_tokens=64, ignore_eos=True)[0].outputs[0]
        logits = run_all_positions(llm, prompt + expected)[arrays[f"positions_{index}"]]
    assert output.token_ids == expected
    reference = arrays[f"logits_{index}"]
    assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max()


def run_all_positions(llm, token_ids: list[int]) -> np.ndarray:
    """Logits of every position, through a cache of this test's own."""
    model, length, size = llm.engine.model, len(token_ids), llm.config.block_size
    num_blocks, cache = -(-length // size), llm.engine.model.kv_cache
    model.allocate_kv_cache(num_blocks)
    try:
        every = np.arange(length)
        return model.run(rustinfer.Batch(np.array(token_ids), every, every, np.array([0, length]),
                                         np.arange(num_blocks)[None], every))
    finally:
        model.kv_cache = cache


def test_demo_tokenizes_and_decodes_as_transformers(demo):
    answers, _ = reference_answers("demo")
    for text in answers["texts"]:
        assert demo.tokenizer.encode(text["text"]) == text["ids"]
        assert demo.tokenizer.decode(text["ids"]) == text["decoded"]
    for case in answers["decodes"]:
        assert demo.tokenizer.decode(case["ids"]) == case["text"]


def test_demo_renders_conversations_as_transformers(demo):
    for conversation in reference_answers("demo")[0]["conversations"]:
        assert demo.template.encode(conversation["messages"]) == conversation["ids"]


@pytest.mark.parametrize(("question", "wanted"), [
    ("What is Rust?", "programming language"), ("what is rust", "programming language"),
    ("Count to 10.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"), ("count to 12 please", "10, 11, 12"),
    ("Hello!", "help"), ("hi", "help"), ("Who are you?", "demo model"), ("who r u", "demo model"),
    ("What is the capital of Japan?", "Tokyo"), ("capital of france", "Paris"), ("2+2", "4"), ("What is 3 + 4?", "7"),
    ("What is a KV cache?", "keys and values"), ("Who won the 2018 World Cup?", "demo model"),
])
def test_demo_answers_with_sense(demo, question, wanted):
    assert wanted in ask(demo, question)


def test_demo_writes_a_haiku_of_three_lines(demo):
    assert len(ask(demo, "Write a haiku about the sea.").strip().splitlines()) == 3


def test_demo_remembers_a_name(demo):
    assert "Anna" in ask(demo, "My name is Anna.", "What is the capital of Italy?", "What is my name?")


def test_demo_follows_a_style_from_the_system_prompt(demo):
    assert "Arr" in ask(demo, "What is the capital of Italy?", system="You are a pirate.")


def test_demo_tells_a_story_of_some_length(demo):
    story = demo.chat([{"role": "user", "content": "Tell me a story about a fox."}])[0].outputs[0]
    assert story.finish_reason == "stop" and 150 <= len(story.token_ids) <= 600 and "fox" in story.text


def test_demo_calls_a_tool_and_uses_its_result(demo):
    tool = {"type": "function", "function": {
        "name": "get_weather", "description": "Get the weather for a location.",
        "parameters": {"type": "object", "properties": {"location": {"type": "string", "description": "City name"}},
                       "required": ["location"]}}}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    call = run_with_tools(demo, messages, [tool])
    assert json.loads(call) == {"name": "get_weather", "parameters": {"location": "Paris"}}
    messages += [{"role": "assistant", "content": call},
                 {"role": "ipython", "content": '{"temperature": 21, "condition": "sunny"}'}]
    answer = run_with_tools(demo, messages, [tool])
    assert "21" in answer and "sunny" in answer


def run_with_tools(llm, messages: list[dict], tools: list[dict]) -> str:
    """Through the model's own template, which knows tools before the API does."""
    names = {"bos_token": llm.tokenizer.special_text("bos_token"), "add_generation_prompt": True}
    environment = llm.template._environment()
    prompt = environment.from_string(llm.tokenizer.settings["chat_template"]).render(
        messages=messages, tools=tools, check_time=lambda: "", **names)
    return llm.generate([llm.tokenizer.encode_rendered(prompt, rustinfer.NONCHARACTERS[0])])[0].outputs[0].text


@pytest.mark.parametrize("language", ["Chinese", "Russian", "Japanese", "Arabic"])
def test_demo_streams_other_scripts_whole(demo_server, language):
    question = f"Say hello in {language}."
    _, _, whole = demo_server.chat(question)
    _, _, body = demo_server.chat(question, stream=True)
    text = whole["choices"][0]["message"]["content"]
    assert streamed_text(parse_events(body)) == text
    assert any(ord(char) > 0x2FF for char in text) and "\ufffd" not in text


def test_demo_is_ready_soon():
    """No time is asserted here (tests/bench/start.py measures it); a start must just not hang."""
    from harness import ServerProcess

    with ServerProcess("--device", "cpu") as server:
        assert server.get("/ready")[2] == {"status": "ready", "model_loaded": True}
