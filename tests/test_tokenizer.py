"""Tokenizer: the reference's ids and texts, streams that never show half a character, stop strings in any pieces."""
import json
import shutil

import numpy as np
import pytest
from harness import REFERENCE_NAMES, REFERENCES, reference_answers
from hypothesis import given, settings, strategies as st
from rustinfer import CheckpointError, StopMatcher, StreamDecoder, Tokenizer

ANSWERS = {name: reference_answers(name)[0] for name in REFERENCE_NAMES}
TOKENIZERS = {name: Tokenizer(REFERENCES / name) for name in REFERENCE_NAMES}
every_model = pytest.mark.parametrize("name", REFERENCE_NAMES)


def changed_tokenizer(tmp_path, name, change=None, **config):
    """A copy of a reference's tokenizer; `change` edits tokenizer.json, `config` is laid over tokenizer_config.json."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCES / name / file, tmp_path)
    for file, edit in (("tokenizer.json", change or (lambda spec: None)),
                       ("tokenizer_config.json", lambda s: s.update(config))):
        spec = json.loads((tmp_path / file).read_text(encoding="utf-8"))
        edit(spec)
        (tmp_path / file).write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer(tmp_path)


def streamed(tokenizer, token_ids):
    """What a client sees, piece by piece."""
    stream = StreamDecoder(tokenizer)
    return [stream.push(token_id) for token_id in token_ids] + [stream.finish()]


@every_model
def test_texts_have_the_reference_ids(name):
    for answer in ANSWERS[name]["texts"]:
        assert TOKENIZERS[name].encode(answer["text"]) == answer["ids"], answer["text"]


@every_model
def test_ids_have_the_reference_text(name):
    for answer in ANSWERS[name]["texts"]:
        assert TOKENIZERS[name].decode(answer["ids"]) == answer["decoded"]
    for answer in ANSWERS[name]["decodes"]:
        assert TOKENIZERS[name].decode(answer["ids"]) == answer["text"]


@every_model
def test_a_prompt_begins_as_the_post_processor_says(name):
    tokenizer, added = TOKENIZERS[name], ANSWERS[name]["added_ids"]
    for answer in ANSWERS[name]["texts"]:
        assert tokenizer.encode_prompt(answer["text"]) == added + answer["ids"]


@every_model
def test_spelled_special_tokens_stay_text(name):
    tokenizer = TOKENIZERS[name]
    for special in tokenizer.specials:
        for text in (special, f"a{special}b", special * 2, f" {special}\n"):
            assert not tokenizer.special_ids & set(tokenizer.encode(text))
            assert tokenizer.decode(tokenizer.encode(text)) == text


@every_model
def test_rendered_specials_are_tokens_and_the_rest_is_one_piece_each(name):
    tokenizer = TOKENIZERS[name]
    for answer in ANSWERS[name]["texts"]:
        assert tokenizer.encode_rendered(answer["text"], "\ufdd0") == answer["special_ids"], answer["text"]


@every_model
def test_broken_spellings_are_mended_to_plain_text(name):
    tokenizer = TOKENIZERS[name]
    for answer in ANSWERS[name]["texts"]:
        broken = tokenizer.break_specials(answer["text"], "\ufdd0")
        assert not any(special in broken for special in tokenizer.specials)
        assert tokenizer.encode_rendered(broken, "\ufdd0") == answer["ids"]


@every_model
def test_streams_equal_the_whole_decode_for_random_ids(name):
    """Valid and invalid UTF-8, byte tokens, special tokens, ids without a token; the library decodes the same."""
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(11)
    rare = [i for i in range(tokenizer.inner.get_vocab_size()) if len(tokenizer.token_bytes(i)) == 1
            and tokenizer.token_bytes(i)[0] > 127]
    for round in range(600):
        pool = rare if round % 3 == 0 else tokenizer.inner.get_vocab_size()
        token_ids = rng.choice(pool, rng.integers(1, 16)).tolist()
        expected = tokenizer.inner.decode(token_ids, skip_special_tokens=True)
        assert tokenizer.decode(token_ids) == "".join(streamed(tokenizer, token_ids)) == expected
    assert tokenizer.decode([tokenizer.inner.get_vocab_size() + 5]) == ""


@every_model
def test_streams_show_whole_characters_only(name):
    """A piece, once shown, is the beginning of the final text; no U+FFFD that the final text does not have."""
    tokenizer = TOKENIZERS[name]
    for text in ("👩‍👩‍👧‍👦 👍🏽 é", "川は海へ流れる", "नमस्ते", "a𝔘b\U0010fffd", "x\u0000y\u007f"):
        token_ids, shown = tokenizer.encode(text), ""
        for piece in streamed(tokenizer, token_ids):
            shown += piece
            assert "\ufffd" not in piece and tokenizer.decode(token_ids).startswith(shown)
        assert shown == text


@every_model
def test_a_cut_character_becomes_a_replacement_only_at_the_end(name):
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode("a👍")[:-1]
    *pieces, last = streamed(tokenizer, token_ids)
    assert "\ufffd" not in "".join(pieces) and last.strip("\ufffd") == "" and last
    assert "".join(pieces) + last == tokenizer.inner.decode(token_ids, skip_special_tokens=True)


@every_model
def test_every_text_survives_a_round_trip(name):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == (text if tokenizer.byte_level else text.replace("▁", " "))

    check()


def test_special_tokens_between_tokens_add_nothing():
    for name, tokenizer in TOKENIZERS.items():
        special = min(tokenizer.special_ids)
        for text in ("the sea", "川"):
            ids = tokenizer.encode(text)
            mixed = [special] + [i for token_id in ids for i in (token_id, special)]
            assert tokenizer.decode(mixed) == text, name


def test_settings_may_spell_tokens_as_objects():
    assert TOKENIZERS["llama2-untied"].special_text("bos_token") == "<s>"
    assert TOKENIZERS["llama3-tied"].special_text("eos_token") == "<|eot_id|>"
    assert TOKENIZERS["llama3-tied"].special_text("pad_token") == ""


def test_unmarked_control_tokens_are_control_tokens(tmp_path):
    def unmark(spec):
        for token in spec["added_tokens"]:
            token["special"] = False

    tokenizer, original = changed_tokenizer(tmp_path, "llama3-tied", unmark), TOKENIZERS["llama3-tied"]
    assert tokenizer.special_ids == original.special_ids
    for answer in ANSWERS["llama3-tied"]["texts"]:
        assert tokenizer.encode(answer["text"]) == answer["ids"]
    for answer in ANSWERS["llama3-tied"]["decodes"]:
        assert tokenizer.decode(answer["ids"]) == answer["text"]


def test_a_named_end_token_is_a_control_token_even_if_only_the_vocabulary_has_it(tmp_path):
    def forget(spec):
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "</s>"]

    tokenizer = changed_tokenizer(tmp_path, "llama2-untied", forget)
    assert tokenizer.token_to_id("</s>") in tokenizer.special_ids
    assert tokenizer.decode([tokenizer.token_to_id("</s>")]) == "" and 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode_rendered("a</s>", "\ufdd0")[-1] == 2


def test_a_word_that_serves_as_padding_stays_a_word(tmp_path):
    tokenizer = changed_tokenizer(tmp_path, "smollm2", pad_token="!")
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"


def test_added_tokens_that_are_not_special_are_text_and_tokens(tmp_path):
    def add(spec):
        spec["added_tokens"].append({"id": 304, "content": "<tool>", "single_word": False, "lstrip": False,
                                     "rstrip": False,
                                     "normalized": False, "special": False})

    tokenizer = changed_tokenizer(tmp_path, "llama3-tied", add)
    assert 304 in tokenizer.encode("a<tool>b") and tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"
    assert tokenizer.inner.get_vocab_size() == 305


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_prepends_only_where_its_scheme_says(tmp_path, scheme):
    part = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = changed_tokenizer(
        tmp_path, "llama2-untied", lambda spec: spec.update(normalizer=None, pre_tokenizer=part, decoder=part))
    for text in ("the sea", "<s>the sea</s> in the<s>sea", "the<s>the", "<s>", "<s><s>the", " <s> the", ""):
        expected = tokenizer.inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_rendered(text, "\ufdd0") == expected, text
    for text in ("the sea", "a<s>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_rendered_specials_swallow_the_spaces_they_say(tmp_path, left, right):
    def swallow(spec):
        for token in spec["added_tokens"][1:3]:
            token.update(lstrip=left, rstrip=right)

    tokenizer = changed_tokenizer(tmp_path, "smollm2", swallow)
    for text in ("a \n<|im_start|> \tb", " <|im_start|> <|im_end|> ", "<repo_name> <|im_end|> x", "a   b  <|im_start|>",
                 "  "):
        expected = tokenizer.inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_rendered(text, "\ufdd0") == expected, text


def test_special_tokens_may_be_marked_as_normalized(tmp_path):
    def mark(spec):  # as the files of Llama 1 and of its kin have them
        for token in spec["added_tokens"]:
            token["normalized"] = True

    tokenizer, original = changed_tokenizer(tmp_path, "llama2-untied", mark), TOKENIZERS["llama2-untied"]
    text = "<s>the sea </s> and <s> the river"
    assert tokenizer.specials == original.specials
    assert tokenizer.encode_rendered(text, "\ufdd0") == original.encode_rendered(text, "\ufdd0")
    assert tokenizer.encode(text) == original.encode(text) and tokenizer.shown_bytes(1) == b"<s>"


def test_an_added_token_without_text_is_none(tmp_path):
    def add(spec):
        spec["added_tokens"].append({**spec["added_tokens"][0], "id": 9999, "content": ""})

    tokenizer, original = changed_tokenizer(tmp_path, "smollm2", add), TOKENIZERS["smollm2"]
    assert tokenizer.special_ids == original.special_ids and tokenizer.encode("the sea") == original.encode("the sea")


def test_long_runs_of_spaces_cost_linear_time(tmp_path):
    def swallow(spec):
        for token in spec["added_tokens"]:
            token.update(lstrip=True, rstrip=True)

    tokenizer = changed_tokenizer(tmp_path, "smollm2", swallow)
    assert len(tokenizer.encode_rendered(" " * 200_000 + "<|im_end|>", "\ufdd0")) == 1  # quadratic would take minutes


def test_parts_of_a_broken_spelling_are_broken_too(tmp_path):
    def nest(spec):
        for i, content in enumerate(("<<s>>", "<s>", ">x")):
            spec["added_tokens"].append(dict(spec["added_tokens"][0], id=288 + i, content=content))

    tokenizer = changed_tokenizer(tmp_path, "smollm2", nest)
    for text in ("<<s>>", "<s>x", "<<<s>>x>", "<s><s>"):
        token_ids = tokenizer.encode_rendered(tokenizer.break_specials(text, "\ufdd0"), "\ufdd0")
        assert not tokenizer.special_ids & set(token_ids) and tokenizer.decode(token_ids) == text


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0,
               "pad_token": "x"}
    tokenizer = changed_tokenizer(tmp_path, "smollm2", lambda spec: spec.update(truncation=truncation, padding=padding))
    for text in ("a", "The river runs down to the sea."):
        assert tokenizer.encode(text) == TOKENIZERS["smollm2"].encode(text)


def test_a_folder_without_a_tokenizer_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content",
                         [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100_000])
def test_a_broken_tokenizer_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as caught:
        Tokenizer(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}])
def test_an_unknown_decoder_is_an_error_that_names_it(tmp_path, decoder):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: decoder is .*; ByteLevel and Metaspace/ByteFallback"):
        changed_tokenizer(tmp_path, "smollm2", lambda spec: spec.update(decoder=decoder))


@pytest.mark.parametrize("value", [5, ["<s>"], {"content": 5}, {"text": "<s>"}, True])
def test_a_token_that_is_no_text_is_an_error_that_names_it(tmp_path, value):
    with pytest.raises(CheckpointError, match="bos_token"):
        changed_tokenizer(tmp_path, "smollm2", bos_token=value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"5"])
def test_broken_tokenizer_settings_are_an_error_that_names_the_file(tmp_path, content):
    shutil.copy(REFERENCES / "smollm2" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: "):
        Tokenizer(tmp_path)


def test_the_settings_file_may_be_missing(tmp_path):
    shutil.copy(REFERENCES / "smollm2" / "tokenizer.json", tmp_path)
    assert Tokenizer(tmp_path).encode("the sea") == TOKENIZERS["smollm2"].encode("the sea")


def first_stop(text, stops):
    """(text before it, the stop) of the occurrence that is complete first, of several the longest; or (text, None)."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - len(max(done, key=len))], max(done, key=len)
    return text, None


def cut(text, sizes):
    """The text in pieces of the given sizes, the rest as one."""
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return pieces + [text]


@settings(max_examples=400, deadline=None)
@given(st.text("abc", max_size=24), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
       st.lists(st.integers(0, 6), max_size=12))
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, sizes):
    matcher, shown = StopMatcher(stops), ""
    expected, stop = first_stop(text, stops)
    for piece in cut(text, sizes):
        shown += matcher.push(piece)
        assert expected.startswith(shown)
    assert (shown + matcher.finish(), matcher.matched) == (expected, stop)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=24), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4))
def test_only_what_may_begin_a_stop_string_is_held_back(text, stops):
    matcher, shown = StopMatcher(stops), ""
    for end, char in enumerate(text, 1):
        shown += matcher.push(char)
        if matcher.matched:
            break
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_flows_freely_without_stop_strings():
    matcher = StopMatcher(())
    assert matcher.push("anything") == "anything" and matcher.finish() == "" and matcher.matched is None


def test_nothing_comes_after_a_match():
    matcher = StopMatcher(["\n\n"])
    assert [matcher.push(piece) for piece in ("a\n", "b\n", "\nc", "d")] == ["a", "\nb", "", ""]
    assert matcher.matched == "\n\n" and matcher.finish() == ""


def test_a_stop_string_that_does_not_come_is_shown_at_the_end():
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the " and matcher.finish() == "EN" and matcher.matched is None
