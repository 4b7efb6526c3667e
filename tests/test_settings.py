"""Settings: what each takes, what each refuses, and the words in which it does."""
import dataclasses
import re

import pytest
from rustinfer import SETTINGS, APIError, EngineConfig, RustinferError, SamplingParams, SettingsError
from rustinfer import check_setting, number, one_of, parse_bytes, parse_device, parse_file, parse_switch, whole

BY_NAME = {setting.name: setting for setting in SETTINGS}


@pytest.mark.parametrize("text, expected", [
    ("0", 0), ("1024", 1024), (4096, 4096), ("7b", 7), ("1k", 1024), ("1K", 1024), ("1kb", 1000), ("1KiB", 1024),
    ("512MiB", 512 << 20), ("4GB", 4 * 10**9), ("4GiB", 4 << 30), ("4Gi", 4 << 30), ("2g", 2 << 30), ("1.5G", 3 << 29),
    (" 1 TB ", 10**12), ("0.5k", 512), ("1TiB", 1 << 40)])
def test_bytes_are_read_with_decimal_and_binary_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", [
    "", " ", "-1", "+1", "1e9", "1_000", "4 giga", "4GBB", "4iB", "GiB", ".5", "1.", "0x10", "nan", "inf", "١",
    "9" * 16, "1000TB", "99999T",
    "1G1", "1,5G", None, True, [1]])
def test_other_spellings_of_bytes_are_refused(text):
    with pytest.raises(ValueError):
        parse_bytes(text)


@pytest.mark.parametrize("low, high, inside, outside", [
    (1, None, ["1", 5, "10", 10**17], ["0", "-1", "1.0", "", " 1", "1e3", "٣", "1_0", 10**19, None, 1.0, True]),
    (0, 65535, [0, "65535"], [65536, -1, "-0x1"]),
    (-1, 1, ["-1", 1], ["-2", 2])])
def test_whole_numbers_keep_their_bounds(low, high, inside, outside):
    for value in inside:
        assert whole(low, high)(value) == int(value)
    for value in outside:
        with pytest.raises(ValueError, match="a whole number"):
            whole(low, high)(value)


def test_numbers_are_finite_and_within_bounds():
    assert number(0, 10)("2.5") == 2.5 and number(0, 10)(10) == 10 and number(0, 10)("0") == 0
    for value in ("nan", "inf", "-0.1", "10.1", "", "x", None, True, [1], {}):
        with pytest.raises(ValueError, match="a number from 0 to 10"):
            number(0, 10)(value)


def test_a_file_is_found_at_home_and_one_that_cannot_be_looked_up_is_none(tmp_path, monkeypatch):
    (tmp_path / "keys").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_file("~/keys") == str(tmp_path / "keys")
    for path in ("", "~", "~/key", "x" * 5000):
        with pytest.raises(ValueError, match="a file that exists"):
            parse_file(path)


def test_choices_keep_their_type():
    assert one_of(8, 16)("16") == 16 and one_of(8, 16)(8) == 8 and one_of("a", "b")("a") == "a"
    with pytest.raises(ValueError, match="one of 8, 16"):
        one_of(8, 16)(12)


def test_devices_and_switches():
    assert [parse_device(text) for text in ("auto", "cpu", "cuda", "cuda:3")] == ["auto", "cpu", "cuda:0", "cuda:3"]
    assert [parse_switch(value) for value in ("1", "off", True, "FALSE", "Yes")] == [True, False, True, False, True]
    for value in ("gpu", "cuda:", "cuda:-1", "cuda:0,1", "CPU", ""):
        with pytest.raises(ValueError, match="auto, cpu or cuda:N"):
            parse_device(value)
    for value in ("2", "", "maybe", None):
        with pytest.raises(ValueError):
            parse_switch(value)


def test_flags_and_variables_are_unique():
    for names in ([setting.flag for setting in SETTINGS], [setting.variable for setting in SETTINGS]):
        assert len(set(names)) == len(names)
    for setting in SETTINGS:
        assert re.fullmatch(r"--[a-z]+(-[a-z]+)*", setting.flag) and re.fullmatch(r"[A-Z]+(_[A-Z]+)*", setting.variable)
        assert setting.help.strip() and "%" not in setting.help


def test_every_default_is_a_value_its_setting_takes():
    for setting in SETTINGS:
        assert setting.default in (None, ()) or setting.parse(str(setting.default)) == setting.default, setting.name


def test_engine_defaults_are_the_settings_defaults():
    for field in dataclasses.fields(EngineConfig):
        assert field.default == BY_NAME[field.name].default and type(field.default) is type(BY_NAME[field.name].default)


@pytest.mark.parametrize("name, value, limit", [
    ("max_num_seqs", 0, "from 1 to 4096"), ("max_num_seqs", 4097, "from 1 to 4096"),
    ("block_size", 12, "8, 16, 32, 64, 128"),
    ("gpu_memory_utilization", 1.5, "from 0.05 to 1"), ("gpu_memory_utilization", float("nan"), "from 0.05 to 1"),
    ("max_tokens", -3, "at least 1"), ("max_model_len", "long", "at least 1"), ("stream_interval", [1], "from 0 to 10"),
    ("device", "tpu", "auto, cpu or cuda:N"), ("kv_cache_memory", "lots", "4GiB"), ("max_queue", None, "from 1"),
    ("max_num_seqs", None, "from 1"), ("no_prefix_caching", "perhaps", "true or false"),
    ("max_tokens", True, "at least 1")])
def test_a_refused_setting_is_one_line_with_name_value_and_limit(name, value, limit):
    with pytest.raises(SettingsError) as caught:
        EngineConfig(**{name: value})
    message = str(caught.value)
    assert name in message and str(value) in message and limit in message and "\n" not in message
    assert isinstance(caught.value, RustinferError)


def test_a_refused_setting_names_where_it_came_from():
    with pytest.raises(SettingsError,
                       match=r"^--port: 'http' is not allowed; it takes a whole number from 0 to 65535$"):
        check_setting(BY_NAME["port"], "http")
    with pytest.raises(SettingsError, match="^PORT: "):
        check_setting(BY_NAME["port"], "http", "PORT")


def test_a_refused_setting_is_shown_shortened():
    with pytest.raises(SettingsError) as caught:
        check_setting(BY_NAME["port"], "9" * 100_000)
    assert len(str(caught.value)) < 400


def test_origins_are_urls_without_paths():
    for value in ("*", "https://a.example", "http://localhost:3000, https://b.example"):
        assert check_setting(BY_NAME["cors_origins"], value) == value
    for value in ("a.example", "https://a.example/path", "", "https://a.example,", "ftp://x",
                  "https://x\nSet-Cookie: a"):
        with pytest.raises(SettingsError):
            check_setting(BY_NAME["cors_origins"], value)


def test_text_settings_become_numbers_in_the_config():
    config = EngineConfig(max_num_seqs="8", kv_cache_memory="1MiB", block_size="32", device="cuda")
    assert (config.max_num_seqs, config.kv_cache_memory, config.block_size, config.device) == (8, 1 << 20, 32, "cuda:0")


def test_settings_and_params_cannot_change_later():
    for value in (EngineConfig(), SamplingParams()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.max_tokens = 5


@pytest.mark.parametrize("fields", [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1e-9}, {"top_k": -1}, {"top_k": 1 << 31}, {"min_p": 1},
    {"seed": -(1 << 63)},
    {"seed": (1 << 64) - 1}, {"max_tokens": 1}, {"logprobs": 0}, {"logprobs": 20}, {"stop": "end"}, {"stop": None},
    {"stop": ["a", "b"], "stop_token_ids": [1, 2]}, {"ignore_eos": True},
    {"presence_penalty": -2, "frequency_penalty": 2}, {"repetition_penalty": 1e-9}, {"repetition_penalty": 10},
    {"logit_bias": {0: -100, 128255: 100.0}}, {"logit_bias": dict.fromkeys(range(300), 1)}, {"logit_bias": None}])
def test_sampling_params_take_their_whole_range(fields):
    SamplingParams(**fields)


@pytest.mark.parametrize("name, value, limit", [
    ("temperature", -0.1, "from 0 to 2"), ("temperature", 2.1, "from 0 to 2"),
    ("temperature", float("nan"), "from 0 to 2"),
    ("temperature", float("inf"), "from 0 to 2"), ("temperature", True, "a number"),
    ("temperature", "1", "'1'; it must be a number"),
    ("temperature", None, "a number"), ("top_p", 0, "above 0"), ("top_p", 1.01, "from 0 to 1"),
    ("min_p", -1, "from 0 to 1"),
    ("top_k", -2, "from -1"), ("top_k", 1.5, "a whole number"),
    ("seed", 1 << 64, "from -"), ("seed", 1.0, "a whole number"),
    ("max_tokens", 0, "from 1"), ("max_tokens", False, "a whole number"), ("logprobs", 21, "from 0 to 20"),
    ("stop", [""], "not empty"), ("stop", 5, "strings"), ("stop", ["a", 5], "strings"), ("stop", {"a": 1}, "list"),
    ("stop_token_ids", 5, "token ids"), ("stop_token_ids", ["a"], "token ids"), ("stop_token_ids", [True], "token ids"),
    ("ignore_eos", "no", "true or false"),
    ("presence_penalty", 2.1, "from -2 to 2"), ("frequency_penalty", -2.1, "from -2 to 2"),
    ("frequency_penalty", True, "a number"), ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", -1, "from 0 to 10"), ("repetition_penalty", 10.1, "from 0 to 10"),
    ("repetition_penalty", float("nan"), "from 0 to 10"),
    ("logit_bias", 5, "token ids to numbers"), ("logit_bias", [5], "token ids to numbers"),
    ("logit_bias", {"5": 1}, "token ids to numbers"), ("logit_bias", {5: "1"}, "token ids to numbers"),
    ("logit_bias", {True: 1}, "token ids to numbers"), ("logit_bias", {5: True}, "token ids to numbers"),
    ("logit_bias", {-1: 1}, "at least 0"), ("logit_bias", {1: 101}, "from -100 to 100"),
    ("logit_bias", {1: float("nan")}, "from -100 to 100")])
def test_a_refused_param_is_a_client_error_with_name_value_and_limit(name, value, limit):
    with pytest.raises(APIError) as caught:
        SamplingParams(**{name: value})
    error = caught.value
    assert error.param == name and error.status == 400 and "\n" not in str(error)
    assert name in str(error) and str(value) in str(error) and limit in str(error)


def test_lists_become_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
    assert hash(params) == hash(dataclasses.replace(params))


def test_too_many_biases_are_counted():
    with pytest.raises(APIError, match="logit_bias has 301 entries; it must have at most 300"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1))


def test_a_bias_becomes_sorted_pairs_and_may_be_given_as_such():
    params = SamplingParams(logit_bias={7: 1, 2: -3.5})
    assert params.logit_bias == ((2, -3.5), (7, 1.0)) and hash(params) == hash(dataclasses.replace(params))
    assert SamplingParams(logit_bias=None).logit_bias == SamplingParams(logit_bias={}).logit_bias == ()


def test_penalties_are_told_from_their_neutral_values():
    assert not SamplingParams(logit_bias={1: 1}, repetition_penalty=1).has_penalties
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties
