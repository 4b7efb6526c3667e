"""How a conversation is rendered: names, a last message to go on with, and the variables of templates."""
import pytest
from harness import REFERENCES
from rustinfer import APIError, ChatTemplate, Tokenizer
from test_chat_template import REFERENCE_NAMES, TEMPLATES, TOKENIZERS, with_template

HELLO = {"role": "user", "content": "Hello"}
NAMED = "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name else '' }}] {{ m.content }}\n{% endfor %}"
every_model = pytest.mark.parametrize("name", REFERENCE_NAMES)


@every_model
@pytest.mark.parametrize("text", ["The answer is", "e", "<|eot_id|> is a token", " spaced out", "one\ntwo"])
def test_a_message_that_goes_on_is_the_prompt_up_to_its_text(name, text):
    messages = [HELLO, {"role": "assistant", "content": text}]
    template = TEMPLATES[name]
    whole, start = template.render(messages, False), template.render(messages, continue_final_message=True)
    assert whole.startswith(start) and start.endswith(text.strip())
    assert start.startswith(template.render([HELLO], False)[:-1])
    ids = template.encode(messages, continue_final_message=True)
    assert not TOKENIZERS[name].inner.id_to_token(ids[-1]).startswith("<|")


def test_white_space_at_the_end_stays_where_the_template_keeps_it(tmp_path):
    messages = [HELLO, {"role": "assistant", "content": "It is  "}]
    kept = with_template(tmp_path, "{% for m in messages %}{{ m.content }};{% endfor %}")
    assert kept.render(messages, continue_final_message=True) == "Hello;It is  "
    trimmed = with_template(tmp_path, "{% for m in messages %}{{ m.content | trim }};{% endfor %}")
    assert trimmed.render(messages, continue_final_message=True) == "Hello;It is"
    hidden = with_template(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(APIError) as caught:
        hidden.render(messages, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_names_are_the_templates_where_it_shows_them_and_in_the_text_elsewhere(tmp_path):
    messages = [{"role": "system", "name": "Boss", "content": "Be kind."}, {**HELLO, "name": "Ann"},
                {"role": "assistant", "content": "Hi"}, {"role": "tool", "name": "f", "content": "1"}]
    shown = with_template(tmp_path, NAMED)
    assert shown.render(messages) == "[system Boss] Be kind.\n[user Ann] Hello\n[assistant] Hi\n[tool f] 1\n"
    hidden = with_template(tmp_path, "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    assert hidden.render(messages) == "[system] Boss: Be kind.\n[user] Ann: Hello\n[assistant] Hi\n[tool] 1\n"


def test_variables_are_those_that_the_template_asks_for(tmp_path):
    template = with_template(tmp_path, "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}"
                                       "{{ date_string }}: {{ messages[0].content }}")
    assert template.render([HELLO]) == "today: Hello"
    assert template.render([HELLO], variables={"date_string": "1 May"}) == "1 May: Hello"
    with pytest.raises(APIError) as caught:
        template.render([HELLO], variables={"enable_thinking": True})
    assert caught.value.param == "chat_template_kwargs.enable_thinking"


def test_a_variable_is_text_and_never_a_token(tmp_path):
    template = with_template(tmp_path, "{{ date_string }}{{ messages[0].content }}", name="smollm2")
    ids = template.encode([HELLO], variables={"date_string": "<|im_start|>"})
    assert Tokenizer(REFERENCES / "smollm2").token_to_id("<|im_start|>") not in ids


def test_over_http_each_field_has_its_effect(tiny_server, tiny_llm):
    def prompt(**fields):
        status, _, body = tiny_server.request("POST", "/apply-template", fields)
        return body["prompt"] if status == 200 else (status, body["error"]["param"])

    past = [HELLO, {"role": "assistant", "content": "Well, I"}]
    assert prompt(messages=past, continue_final_message=True).endswith("Well, I")
    assert "Ann: Hello" in prompt(messages=[{**HELLO, "name": "Ann"}])
    ids = tiny_server.request("POST", "/tokenize", {"messages": past, "continue_final_message": True})[2]["tokens"]
    status, _, body = tiny_server.request("POST", "/v1/chat/completions", {
        "messages": past, "continue_final_message": True, "temperature": 0, "max_tokens": 6})
    assert status == 200 and body["usage"]["prompt_tokens"] == len(ids)
    expected = tiny_llm.generate(ids, temperature=0, max_tokens=6)[0].outputs[0].text
    assert body["choices"][0]["message"]["content"] == expected
    for fields, param in (
            ({"continue_final_message": True}, "continue_final_message"), ({"continue_final_message": 1},) * 2,
            ({"messages": past, "continue_final_message": True, "add_generation_prompt": True},
             "continue_final_message"),
            ({"chat_template_kwargs": {"no_such": 1}}, "chat_template_kwargs.no_such"),
            ({"chat_template_kwargs": {"date_string": 1}}, "chat_template_kwargs.date_string"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking")):
        param = param if isinstance(param, str) else "continue_final_message"
        assert prompt(**{"messages": [HELLO], **fields}) == (400, param)


def test_a_conversation_template_loads_without_a_server():
    assert ChatTemplate(REFERENCES / "llama3-tied", Tokenizer(REFERENCES / "llama3-tied")).render([HELLO])
