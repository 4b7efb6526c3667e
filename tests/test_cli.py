"""CLI: flags, environment variables, --help, the lines it prints and the codes it exits with."""
import os
import re
import socket
import subprocess
import sys

import pytest
import rustinfer
from harness import REFERENCES, ROOT, ServerProcess
from rustinfer import SETTINGS, SettingsError, build_parser, read_settings

MODEL = REFERENCES / "llama3-tied"
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("RUSTINFER_")
         and key not in {s.variable for s in SETTINGS}}
REFUSED = {  # a value that each setting refuses, and what the message says is allowed
    "model": ("no/such/model", "a folder that exists or a Hub id such as "),
    "served_model_name": (" ", "text that is not empty"),
    "host": ("", "text that is not empty"),
    "port": ("65536", "a whole number from 0 to 65535"), "device": ("gpu", "auto, cpu or cuda:N"),
    "max_tokens": ("0", "a whole number of at least 1"),
    "max_model_len": ("-5", "a whole number of at least 1"), "max_num_seqs": ("1e3", "a whole number from 1 to 4096"),
    "max_num_batched_tokens": ("many", "a whole number from 1 to 1048576"),
    "block_size": ("12", "one of 8, 16, 32, 64, 128"),
    "kv_cache_memory": ("4 giga", "a number of bytes such as 4GiB or 500MB"),
    "gpu_memory_utilization": ("1.5", "a number from 0.05 to 1"),
    "max_queue": ("0", "a whole number from 1"), "max_connections": ("0", "a whole number from 1"),
    "api_key": ("secret", "8 to 512 printable ASCII characters"), "api_key_file": ("no/such", "a file that exists"),
    "requests_per_minute": ("0", "a whole number from 1"), "tokens_per_minute": ("-1", "a whole number from 1"),
    "max_concurrent_requests": ("x", "a whole number from 1"), "request_timeout": ("0", "a number from 0.001"),
    "write_timeout": ("inf", "a number from 0.001"), "allowed_hosts": ("a:80", "* or names such as example.org"),
    "ssl_certfile": ("no/such", "a file that exists"), "ssl_keyfile": ("no/such", "a file that exists"),
    "log_format": ("xml", "one of text, json"),
    "stream_interval": ("nan", "a number from 0 to 10"),
    "drain_timeout": ("-1", "a number from 0"),
    "cors_origins": ("example.org", "* or origins such as https://example.org"),
    "log_level": ("trace", "one of debug, info, warning, error"),
    "no_prefix_caching": ("maybe", "1 or 0, true or false"),
    "cpu_kernels": ("on", "one of auto, float32, off"), "weights": ("int8", "one of mmap, copy"),
    "threads": ("0", "a whole number from 1 to 1024"),
    "no_batch_invariant": ("2", "1 or 0, true or false"),
    "enforce_eager": ("si", "1 or 0, true or false"), "no_pdl": ("never", "1 or 0, true or false")}
FILES = (str(ROOT / "setup.cfg"), str(ROOT / "README.md"))
SWITCHES = [setting for setting in SETTINGS if setting.parse is rustinfer.parse_switch]
VALUED = [setting for setting in SETTINGS if setting.parse is not rustinfer.parse_switch]


def run(*flags: str, **env: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that ends by itself."""
    done = subprocess.run([sys.executable, str(ROOT / "rustinfer.py"), *flags], env={**CLEAN, **env},
                          capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def one_line(text: str) -> str:
    """The only line that is no log line."""
    [line] = [line for line in text.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    return line


class TestSettings:
    def test_every_setting_has_a_refused_value_here(self):
        assert set(REFUSED) == {setting.name for setting in SETTINGS}

    @pytest.mark.parametrize("setting", VALUED, ids=lambda setting: setting.name)
    def test_a_bad_flag_is_named_with_its_value_and_what_is_allowed(self, setting):
        value, allowed = REFUSED[setting.name]
        with pytest.raises(SettingsError) as caught:
            read_settings([f"{setting.flag}={value}"], {})
        assert str(caught.value).startswith(f"{setting.flag}: {value!r} is not allowed; it takes {allowed}")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("setting", [setting for setting in SETTINGS if REFUSED[setting.name][0]],
                             ids=lambda setting: setting.name)
    def test_a_bad_variable_is_named_itself(self, setting):
        value, allowed = REFUSED[setting.name]
        with pytest.raises(SettingsError) as caught:
            read_settings([], {setting.variable: value})
        assert str(caught.value).startswith(f"{setting.variable}: {value!r} is not allowed; it takes {allowed}")

    def test_defaults_hold_where_nothing_is_given(self):
        assert read_settings([], {}) == {setting.name: setting.default for setting in SETTINGS}

    @pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
    def test_the_variable_is_read_and_the_flag_beats_it(self, setting):
        switch = setting in SWITCHES
        values = {
            "model": ("owner/first", "owner/second"), "device": ("cpu", "cuda:1"), "block_size": ("8", "32"),
            "cors_origins": ("*", "https://a.example"), "log_level": ("debug", "error"),
            "cpu_kernels": ("off", "auto"), "weights": ("copy", "mmap"),
            "api_key": ("key-one-1", "key-two-2"), "log_format": ("json", "text"), "api_key_file": FILES,
            "ssl_certfile": FILES, "ssl_keyfile": FILES, "kv_cache_memory": ("1GiB", "2GiB"),
            "gpu_memory_utilization": ("1", "1")}
        first, second = ("1", "1") if switch else values.get(setting.name, ("5", "6"))
        kept = lambda text: (setting.parse(text),) if setting.repeatable else setting.parse(text)
        assert read_settings([], {setting.variable: first})[setting.name] == kept(first)
        flag = [setting.flag] if switch else [setting.flag, second]
        assert read_settings(flag, {setting.variable: first})[setting.name] == kept(second)

    @pytest.mark.parametrize("setting", SWITCHES, ids=lambda setting: setting.name)
    def test_a_variable_may_turn_a_switch_off(self, setting):
        assert read_settings([], {setting.variable: "0"})[setting.name] is False

    def test_an_empty_variable_is_the_same_as_none(self):
        assert read_settings([], {"PORT": "", "MODEL_PATH": ""}) == read_settings([], {})

    def test_variables_have_the_names_of_the_seed_or_the_prefix(self):
        names = {setting.name: setting.variable for setting in SETTINGS}
        assert (names.pop("model"), names.pop("host"), names.pop("port"), names.pop("device"),
                names.pop("max_tokens")) == (
            "MODEL_PATH", "HOST", "PORT", "DEVICE", "MAX_TOKENS")
        assert all(variable == "RUSTINFER_" + name.upper() for name, variable in names.items())

    def test_help_names_every_flag_variable_and_default(self):
        text = re.sub(r"\s+", " ", build_parser().format_help())
        for setting in SETTINGS:
            assert f"{setting.flag} " in text and f"[{setting.variable}]" in text and re.sub(r"\s+", " ",
                                                                                             setting.help) in text
            if setting.default not in (None, ()) and setting not in SWITCHES:
                assert f"(default: {setting.default}) [{setting.variable}]" in text


class TestExitCodes:
    def test_version(self):
        assert run("--version") == (0, f"rustinfer {rustinfer.__version__}\n", "")

    def test_help(self):
        code, out, err = run("--help")
        assert code == 0 and err == "" and max(map(len, out.splitlines())) <= 120
        assert "--max-num-batched-tokens" in out and "RUSTINFER_MAX_NUM_BATCHED_TOKENS" in out

    @pytest.mark.parametrize("flags, env, words", [
        (["--port", "http"], {}, "--port 'http' 0 65535"), (["--max-num-seqs", "0"], {}, "--max-num-seqs '0' 1 4096"),
        ([], {"PORT": "x"}, "PORT 'x' 0 65535"), ([], {"RUSTINFER_BLOCK_SIZE": "7"}, "RUSTINFER_BLOCK_SIZE '7' 8 128"),
        (["--no-such-flag"], {}, "--no-such-flag"), (["--port"], {}, "--port"), (["--max-tok", "5"], {}, "--max-tok"),
        (["stray"], {}, "stray")])
    def test_a_bad_value_is_one_line_and_2(self, flags, env, words):
        code, out, err = run(*flags, **env)
        assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("rustinfer: ")
        assert all(word in err for word in words.split())

    def test_a_long_value_is_cut(self):
        assert len(run("--port", "x" * 5000)[2]) < 400

    @pytest.mark.parametrize("flags, words", [
        (["--max-model-len", "100000"], "--max-model-len 100000 2048"),
        (["--kv-cache-memory", "10"], "--kv-cache-memory 16"),
        (["--kv-cache-memory", "999TB"], "--kv-cache-memory 999"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--device", "cuda:7"], "--device cuda:7")])
    def test_a_value_that_only_the_model_or_machine_can_refuse_is_one_line_and_2(self, flags, words):
        code, out, err = run("--model", str(MODEL), "--port", "0",
                             *([] if "--device" in flags else ["--device", "cpu"]), *flags)
        assert code == 2 and out == "" and "Traceback" not in err
        assert all(word in one_line(err) for word in words.split())

    @pytest.mark.parametrize("flags", [("--model", "nowhere/at/all"), ("--model", ""), ("--device", "cuda:7"),
                                       ("--port", "-1"), ("--kv-cache-memory", "1000TB")])
    def test_a_bad_value_is_the_only_line_and_2(self, flags):
        code, out, err = run(*flags, HF_HUB_OFFLINE="1")
        assert code == 2 and out == "" and len(err.splitlines()) == 1
        assert flags[0] in err and flags[1] in err

    def test_a_model_name_that_is_too_long_for_a_path_is_cut(self):
        code, _, err = run("--model", "x" * 5000)
        assert code == 2 and err.startswith("rustinfer: --model: ") and len(err) < 400

    def test_a_hub_model_that_cannot_be_had_is_one_line_and_1(self):
        code, out, err = run("--model", "owner/none", "--port", "0", "--device", "cpu", HF_HUB_OFFLINE="1")
        assert code == 1 and out == "" and "Traceback" not in err
        assert "owner/none" in one_line(err)

    def test_a_folder_without_a_model_is_one_line_and_1(self, tmp_path):
        code, _, err = run("--model", str(tmp_path), "--port", "0", "--device", "cpu")
        assert code == 1 and "config.json" in one_line(err)

    def test_a_port_in_use_is_one_line_and_1(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, out, err = run("--model", str(MODEL), "--port", str(port), "--device", "cpu")
        assert code == 1 and out == "" and "Traceback" not in err
        assert str(port) in one_line(err) and "127.0.0.1" in one_line(err) and "in use" in one_line(err)

    def test_an_address_of_another_machine_is_one_line_and_1(self):
        code, _, err = run("--model", str(MODEL), "--host", "192.0.2.1", "--port", "0", "--device", "cpu")
        assert code == 1 and "192.0.2.1" in one_line(err) and "Traceback" not in err

    def test_the_file_alone_says_what_to_pass(self, tmp_path):
        (tmp_path / "rustinfer.py").write_bytes((ROOT / "rustinfer.py").read_bytes())
        done = subprocess.run([sys.executable, "rustinfer.py", "--port", "0"], cwd=tmp_path, env=CLEAN,
                              capture_output=True, text=True, timeout=30)
        assert done.returncode == 2 and "--model" in one_line(done.stderr)


class TestStart:
    def test_the_last_line_says_what_is_served_where_and_on_what(self):
        flags = ("--device", "cpu", "--served-model-name", "my/model", "--kv-cache-memory", "1MiB", "--max-model-len",
                 "512")
        with ServerProcess(*flags, model=MODEL) as server:
            assert server.get("/v1/models")[2]["data"][0]["id"] == "my/model"
            assert server.stop() == 0
            [line] = server.process.stdout.read().splitlines()
            on_what = r"(.+ \(--device cpu\)|NumPy \(--device cpu; no C kernels: there is no C compiler .+\))"
            assert re.fullmatch(rf"rustinfer \S+ serves my/model \(0\.1M parameters\) on {on_what}, "
                                rf"KV cache \d+ tokens, context 512, at http://127\.0\.0\.1:{server.port}", line)
            assert re.search(r"INFO listening on .*loading the model\n.*INFO loading 100%\n", server.log)
            assert server.log.splitlines()[-1].endswith("INFO stopped")

    def test_variables_alone_are_enough(self):
        env = {"MODEL_PATH": str(MODEL), "DEVICE": "cpu", "MAX_TOKENS": "3", "HOST": "0.0.0.0",
               "RUSTINFER_LOG_LEVEL": "info"}
        with ServerProcess(env=env) as server:
            assert server.chat(ignore_eos=True)[2]["usage"]["completion_tokens"] == 3

    def test_a_quiet_log_still_prints_the_address(self):
        command = [sys.executable, str(ROOT / "rustinfer.py"), "--model", str(MODEL), "--port", "0", "--device", "cpu",
                   "--log-level", "error"]
        process = subprocess.Popen(command, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert re.search(r"http://127\.0\.0\.1:[1-9]\d*$", process.stdout.readline().strip())
        process.terminate()
        assert process.communicate(timeout=10)[1] == "" and process.returncode == 0

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
    def test_ipv6_addresses_work(self, tiny_llm):
        try:
            server = rustinfer.Server(tiny_llm, host="::1", port=0)
        except OSError:
            pytest.skip("no IPv6 loopback here")
        with server:
            assert server.url == f"http://[::1]:{server.port}"
            with socket.create_connection(("::1", server.port), 5) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")

    def test_importing_has_no_side_effects(self):
        code = ("import sys, threading, logging, signal\n"
                "def state(): return signal.getsignal(signal.SIGTERM), threading.active_count()\n"
                "before = state()\n"
                "import rustinfer\n"
                "assert state() == before\n"
                "assert not logging.getLogger('rustinfer').handlers and not logging.getLogger().handlers\n"
                "assert not {'cupy', 'pynvml', 'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_the_file_limit_fits_the_connections(self):
        resource = pytest.importorskip("resource")
        code = ("import resource, rustinfer\n"
                "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
                "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
                "rustinfer.raise_file_limit(500)\n"
                "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert int(done.stdout) == min(500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), done.stderr
