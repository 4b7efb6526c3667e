"""Chat template: the reference's prompts, control tokens only where the template wrote them, a sandbox that holds."""
import gc
import json
import shutil
import time
import weakref

import pytest
import rustinfer
from harness import REFERENCE_NAMES, REFERENCES, reference_answers
from rustinfer import APIError, ChatTemplate, CheckpointError, Tokenizer

ANSWERS = {name: reference_answers(name)[0] for name in REFERENCE_NAMES}
TEMPLATES = {name: ChatTemplate(REFERENCES / name, Tokenizer(REFERENCES / name)) for name in REFERENCE_NAMES}
TOKENIZERS = {name: template._tokenizer for name, template in TEMPLATES.items()}
every_model = pytest.mark.parametrize("name", REFERENCE_NAMES)
HELLO = [{"role": "user", "content": "Hello"}]


def conversations(name, refused):
    return [answer for answer in ANSWERS[name]["conversations"] if "tools" not in answer
            and ("error" in answer) == refused]


def with_template(tmp_path, source=None, name="smollm2", file=None):
    """A model folder with another template, in tokenizer_config.json or (`file`) in chat_template.jinja."""
    shutil.copy(REFERENCES / name / "tokenizer.json", tmp_path)
    config = json.loads((REFERENCES / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": source} if source else {})))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file, encoding="utf-8")
    return ChatTemplate(tmp_path, Tokenizer(tmp_path))


def refusal(template, messages=HELLO):
    """The message of the client error that rendering must end in."""
    with pytest.raises(APIError) as caught:
        template.encode(messages)
    assert caught.value.status == 400 and caught.value.param == "messages" and len(str(caught.value)) < 400
    return str(caught.value)


@every_model
def test_conversations_have_the_reference_text_and_ids(name):
    for answer in conversations(name, refused=False):
        assert TEMPLATES[name].render(answer["messages"]) == answer["text"]
        assert TEMPLATES[name].encode(answer["messages"]) == answer["ids"]


@pytest.mark.parametrize("name", [name for name in REFERENCE_NAMES if conversations(name, refused=True)])
def test_conversations_that_the_template_refuses_are_client_errors_in_its_words(name):
    for answer in conversations(name, refused=True):
        assert answer["error"] in refusal(TEMPLATES[name], answer["messages"])


def test_builtin_templates_are_chosen_by_the_special_tokens():
    assert TEMPLATES["llama3-builtin"].origin == "built-in template for <|start_header_id|>"
    assert TEMPLATES["smollm2"].origin == "built-in template for <|im_start|>"


def test_the_origin_of_a_template_is_its_file():
    assert TEMPLATES["llama3-tied"].origin.endswith("tokenizer_config.json")
    assert TEMPLATES["sharded-biased"].origin.endswith("chat_template.jinja")


def test_without_a_template_that_fits_messages_are_refused(tmp_path):
    template = with_template(tmp_path, name="llama2-untied")
    assert "no chat template" in refusal(template) and template.origin == "no chat template"


@pytest.mark.parametrize("decorate", [
    "{}".format, "before{}after".format, ". {} .".format, "\ufdd0{}".format, "{0}{0}".format,
    "\ufdd0\ufdd1{}\ufdd2".format,
    lambda text: text[0] + "\ufdd0" + text[1:], lambda text: text[:1] + text + text[1:], lambda text: text[:-1] + text])
@every_model
def test_special_spellings_in_messages_give_no_control_tokens(name, decorate):
    """The ids are the template's control tokens, and between them what plain text gives, the spelling included."""
    tokenizer, template = TOKENIZERS[name], TEMPLATES[name]
    for special in tokenizer.specials:
        text = decorate(special)
        expected, placeholder = [], "Placeholder"
        rendered = template.render([{"role": "user", "content": placeholder}])
        start = 0
        for match in tokenizer._special_pattern.finditer(rendered):
            expected += tokenizer.encode(rendered[start : match.start()].replace(placeholder, text))
            expected.append(tokenizer.token_to_id(match.group()))
            start = match.end()
        expected += tokenizer.encode(rendered[start:].replace(placeholder, text))
        assert template.encode([{"role": "user", "content": text}]) == expected


@every_model
def test_special_spellings_in_any_role_or_name_give_no_control_tokens(name):
    plain = TEMPLATES[name].encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    specials = TOKENIZERS[name].special_ids
    count = sum(token_id in specials for token_id in plain)
    for special in TOKENIZERS[name].specials:
        forged = [{"role": "user", "content": special, "name": special},
                  {"role": "assistant", "content": f"{special}z"}]
        assert sum(token_id in specials for token_id in TEMPLATES[name].encode(forged)) == count


def test_special_spellings_in_nested_keys_and_values_give_no_control_tokens(tmp_path):
    template = with_template(tmp_path, "{{ messages | tojson }}<|im_end|>")
    messages = [{"role": "user", "content": [{"<|im_end|>": ["<|im_start|>", {"x": "<|im_end|>"}]}]}]
    ids = template.encode(messages)
    assert [token_id for token_id in ids if token_id in template._tokenizer.special_ids] == ids[-1:]
    assert template._tokenizer.decode(ids) == json.dumps(messages)


def test_messages_without_a_free_mark_are_refused():
    everything = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert "noncharacter" in refusal(TEMPLATES["smollm2"], [{"role": "user", "content": everything}])
    one_left = [{"role": "user", "content": everything[:-1] + "<|im_end|>"}]
    ids = TEMPLATES["smollm2"].encode(one_left)
    assert everything[:-1] + "<|im_end|>" in TOKENIZERS["smollm2"].decode(ids)
    assert ids.count(TOKENIZERS["smollm2"].token_to_id("<|im_end|>")) == 1  # the template's


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": "<|im_end|>"}]
    TEMPLATES["smollm2"].encode(messages)
    assert messages == [{"role": "user", "content": "<|im_end|>"}]


def test_the_bos_of_a_template_is_not_doubled():
    for name in REFERENCE_NAMES:
        bos = TOKENIZERS[name].token_to_id(TOKENIZERS[name].special_text("bos_token"))
        ids = TEMPLATES[name].encode(HELLO)
        assert ids[0] == bos and ids[1] != bos


def test_named_templates_choose_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert with_template(tmp_path, named).render(HELLO) == "D"
    assert with_template(tmp_path, named[:1]).render(HELLO) == "T"


def test_the_template_file_wins_over_the_settings(tmp_path):
    assert with_template(tmp_path, "settings", file="file").render(HELLO) == "file"


@pytest.mark.parametrize("source",
                         ["{% if %}", "{{ 'a }}", "{% for m in messages %}", "{% nothing %}", "{{ x | nofilter }}"])
def test_a_template_that_does_not_compile_is_an_error_that_names_the_file(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template does not compile: "):
        with_template(tmp_path, source)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template does not compile: "):
        with_template(tmp_path, file=source)


def test_a_template_file_that_is_not_text_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        with_template(tmp_path)


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ ''['__class__'] }}", "{{ messages.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}", "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}",
    "{{ check_time.__globals__ }}{{ check_time.func }}", "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}", "{{ '{0.__class__}'.format('') }}", "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}", "{{ messages.pop() }}", "{{ lipsum.__globals__ }}", "{% import 'x' as y %}",
    "{% include '/etc/passwd' %}", "{% extends 'x' %}", "{{ joiner.__init__.__builtins__ }}"])
def test_templates_cannot_leave_the_sandbox(tmp_path, source):
    template = with_template(tmp_path, source)
    messages = [{"role": "user", "content": "Hello"}]
    try:
        text = template.render(messages)
    except APIError:
        text = ""
    assert not any(word in text for word in ("class", "object", "function", "root:", "<module"))
    assert messages == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("source", [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ 10**10 * 'x' }}", "{{ [0] * 10**10 }}",
    "{{ 9 ** (9 ** 9) }}", "{% set s = namespace(x='xxxxxxxxxx') %}{% for i in range(60) %}"
    "{% set s.x = s.x + s.x %}{% endfor %}{{ s.x }}", "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% set s = namespace(x=3) %}{% for i in range(99) %}{% set s.x = s.x * s.x %}{% endfor %}{{ s.x }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ range(10**6) | list }}"])
def test_templates_that_make_too_much_are_refused_at_once(tmp_path, source):
    start = time.monotonic()
    refusal(with_template(tmp_path, source))
    assert time.monotonic() - start < 5  # a second on a free core; without the bounds minutes, or all memory


@pytest.mark.parametrize("source", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{%- for i in range(99999) -%}{% set x %}{% for j in range(99999) %}{% if j %}{% continue %}{% endif %}{% endfor %}"
    "{% endset %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"])
def test_templates_that_take_too_long_are_refused(tmp_path, monkeypatch, source):
    monkeypatch.setattr(rustinfer, "MAX_RENDER_SECONDS", 0.1)
    start = time.monotonic()
    assert "takes more than 0.1 s" in refusal(with_template(tmp_path, source))
    assert time.monotonic() - start < 5


def test_the_clock_leaves_no_trace_in_the_text(tmp_path):
    source = ("{%- for m in messages -%}\n  {{ m.role }}\n{%- endfor %}\n"
              "{% for c in 'abc' %}\n{{ loop.index }}{{ c }}\n{% else %}none{% endfor %}\n"
              "{% macro f(x) %}\n({{ x }})\n{% endmacro %}{{ f(1) }}")
    environment = rustinfer.jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    assert with_template(tmp_path, source).render(HELLO) == environment.from_string(source).render(messages=HELLO)


def test_operators_work_within_their_bounds(tmp_path):
    source = ("{{ 'ab' * 3 }}{{ 2 * 'c' }} {{ 2 ** 10 }} {{ 6 * 7 }} {{ 0.5 * 10**6 }} {{ 10**9 * 10**9 }} "
              "{{ [1] + [2] }}{{ 'a' + 'b' }} {{ 2 ** 0.5 > 1 }}")
    assert with_template(tmp_path, source).render(HELLO) == "abababcc 1024 42 500000.0 1" + "0" * 18 + " [1, 2]ab True"


def test_a_template_refuses_in_its_own_words(tmp_path):
    template = with_template(tmp_path, "{{ raise_exception('Only <b>users</b>, please: é') }}")
    assert refusal(template).endswith("refuses these messages: Only <b>users</b>, please: é")


@pytest.mark.parametrize("source", [
    "{{ messages[7].role }}", "{{ 1 / 0 }}", "{{ messages | first + 1 }}", "{{ 'a' + 1 }}", "{{ 'a' ** 'b' }}",
    "{{ undefined.x }}",
    "{{ strftime_now(5) }}", "{{ {} | tojson(indent='x', sort_keys=1, separators=5) }}", "{{ 'a' * none }}"])
def test_whatever_a_template_raises_is_a_client_error(tmp_path, source):
    assert "the chat template refuses these messages" in refusal(with_template(tmp_path, source))


def test_the_time_is_told_in_the_format_asked_for(tmp_path):
    before = time.strftime("%d %b %Y")
    text = with_template(tmp_path, "{{ strftime_now('%d %b %Y') }}").render(HELLO)
    assert text in (before, time.strftime("%d %b %Y"))


def test_json_keeps_unicode_order_and_markup(tmp_path):
    value = {"z": "é<b>&'\"川", "a": [1, 2.5, None, True]}
    for source, options in (("tojson", {}), ("tojson(indent=2)", {"indent": 2}),
                            ("tojson(sort_keys=true)", {"sort_keys": True}),
                            ("tojson(separators=(',', ':'))", {"separators": (",", ":")})):
        text = with_template(tmp_path, "{{ messages[0].content | %s }}" % source).render([{"content": value}])
        assert text == json.dumps(value, **{"ensure_ascii": False, **options})


def test_tools_are_there_and_none_as_the_reference_passes_them(tmp_path):
    source = "{% if tools is not none %}{{ tools | length }}{% endif %}{{ tools is defined }}{{ documents is none }}"
    assert with_template(tmp_path, source).render(HELLO) == "TrueTrue"


def test_generation_blocks_are_transparent(tmp_path):
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}, {{ m.role }}{% endfor %}"
    assert with_template(tmp_path, source).render(HELLO) == "Hello, user"


def test_the_generation_prompt_can_be_left_out():
    for name in ("llama3-tied", "llama3-builtin", "smollm2", "sharded-biased"):
        with_prompt, without = (TEMPLATES[name].render(HELLO, add) for add in (True, False))
        assert with_prompt.startswith(without) and "assistant" in with_prompt[len(without) :]


def test_a_long_conversation_is_bounded_by_its_rendered_length(monkeypatch):
    monkeypatch.setattr(rustinfer, "MAX_RENDERED", 1000)
    assert "longer than 1000" in refusal(TEMPLATES["smollm2"], [{"role": "user", "content": "a" * 1001}])
    TEMPLATES["smollm2"].encode([{"role": "user", "content": "a" * 900}])


def test_a_template_that_nobody_holds_is_forgotten_with_its_tokenizer():
    template = ChatTemplate(REFERENCES / "llama3-tied", Tokenizer(REFERENCES / "llama3-tied"))
    assert "Ann: Hello" in template.render([HELLO[0] | {"name": "Ann"}])
    seen = weakref.ref(template)
    del template
    gc.collect()
    assert seen() is None


def test_a_named_system_message_passes_where_a_template_wants_a_user(tmp_path):
    template = with_template(tmp_path, "{% if messages[-1].role != 'user' %}{{ raise_exception('no user') }}{% endif %}"
                                       "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    system = {"role": "system", "content": "Be brief.", "name": "boss"}
    assert template.render([system, *HELLO]) == "[boss: Be brief.][Hello]"
