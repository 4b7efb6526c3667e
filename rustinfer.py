#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "numpy>=1.26", "safetensors>=0.4.3", "tokenizers>=0.21", "jinja2>=3.1", "psutil>=5.9", "threadpoolctl>=3.2",
#   "prometheus-client>=0.20",
# ]
# ///
"""rustinfer -- an OpenAI-compatible inference server for Llama-3 models, in one file.

    python rustinfer.py --model DIR|HUB_ID --port 8000        serve a model (no --model: the demo model)
    from rustinfer import LLM, Server                          or use it as a library

Life of a request
  1. A connection thread reads and checks the request (Server, API): every field is honoured or refused.
  2. Messages become token ids (Chat template, Tokenizer) on that thread.
  3. Engine.submit takes the lock for a moment: admission, then a handle to wait on.
  4. The engine thread, the only one that touches the model, loops: schedule, run, update.
  5. The scheduler picks sequences and how many tokens of each; the block manager finds KV blocks,
     reusing those whose prefix is cached.
  6. The model runs the whole mixed batch once; the sampler draws one token for each complete sequence.
  7. `update` appends the tokens, detects stops, frees blocks, wakes handles.
  8. The connection thread turns tokens into text and writes the answer or its events.

Sections, each using only the ones above it
  Errors, Settings
  I.   from text to the next token:  Tokenizer, Chat template, Checkpoint, Backend, CUDA, CPU, Model, Sampler, Grammar
  II.  many requests at once:        KV cache, Scheduler, Metrics, Runner, Engine
  III. the wire:                     API, Responses, Messages, Access, LLM, Server, CLI

Letters: T tokens in the step, B sequences, H query heads, K KV heads, D head_dim, C hidden_size,
F intermediate_size (or any output width), V vocab, L layers, N blocks, S block size.
"""
from __future__ import annotations

import argparse
import ast
import atexit
import base64
import codecs
import contextlib
import ctypes
import dataclasses
import datetime
import email.utils
import errno
import functools
import hashlib
import hmac
import http
import http.server
import importlib
import json
import logging
import logging.handlers
import math
import mmap
import os
import queue
import re
import secrets
import select
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence as Seq

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import numpy as np
import prometheus_client
import prometheus_client.core
import psutil
import safetensors
import threadpoolctl
import tokenizers
from numpy.random import default_rng  # now: imported while a model loads it would swallow what a signal raises

__version__ = "0.1.0"
__all__ = ["LLM", "Server", "SamplingParams", "EngineConfig", "RustinferError", "main"]

log = logging.getLogger("rustinfer")
HERE = Path(__file__).resolve().parent


# ==============================================================================
# Errors -- one tree; an API error knows its HTTP status, type and code
# uses: nothing
# ==============================================================================


class RustinferError(Exception):
    """Base of every error this file raises on purpose; the text is meant for the user."""


class SettingsError(RustinferError, ValueError):
    """A setting has a value that is not allowed."""


class CheckpointError(RustinferError):
    """A model folder cannot be served: a file, tensor or config entry is missing or wrong."""


class DeviceError(RustinferError):
    """The card or its driver failed; the process should be restarted."""


class EngineError(RustinferError):
    """The engine could not finish a request."""


class APIError(RustinferError):
    """An error that is an HTTP answer: raise it anywhere in a request, one place turns it into a response."""

    status, type, code = 400, "invalid_request_error", "invalid_value"

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None, **override):
        super().__init__(message)
        self.param, self.headers = param, headers or {}
        self.__dict__.update(override)  # status=, type=, code= of this one error

    def body(self) -> dict:
        """The JSON body that OpenAI's clients parse."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidTypeError(APIError):
    """A field has the wrong JSON type."""

    code = "invalid_type"


class UnsupportedError(APIError):
    """A field or a value that this server does not support."""

    code = "unsupported_parameter"


class ContextLengthError(APIError):
    """Prompt and output do not fit in the model's context."""

    code = "context_length_exceeded"


class QueueFullError(APIError):
    """As many requests wait as may wait."""

    status, type, code = 429, "rate_limit_error", "queue_full"


class AuthenticationError(APIError):
    """A key is needed and was not given, or is none of ours."""

    status, code = 401, "invalid_api_key"


class RateLimitError(APIError):
    """A client has used what it may use for now."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class UnavailableError(APIError):
    """The server is loading, draining or broken."""

    status, type, code = 503, "server_error", "model_loading"


def retry_after(seconds: float) -> dict[str, str]:
    """The header that tells a client when to come back."""
    return {"Retry-After": str(max(1, math.ceil(min(seconds, 3600))))}


def shorten(value: Any, limit: int = 200) -> str:
    """The value as an error may show it: at most `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ==============================================================================
# Settings -- every flag, environment variable, default and check, once, in one table
# uses: Errors
# ==============================================================================


def parse_bytes(text: str | int) -> int:
    """`512MiB`, `4GB`, `2g` or a plain number of bytes."""
    text = str(text)
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(?:([kmgt])(i?))?b?\s*", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise ValueError("a number of bytes such as 4GiB or 500MB")
    amount, unit, binary = match.groups()
    base = 1000 if unit and not binary and text.strip()[-1] in "bB" else 1024  # GB is decimal; GiB and G are binary
    size = int(float(amount) * base ** " kmgt".index((unit or " ").lower()))
    if size >= 10**15:
        raise ValueError("less than 1000TB")
    return size


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""
    wanted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", str(text), re.ASCII) or not low <= int(text) <= (high or 10**18):
            raise ValueError(wanted)
        return int(text)

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of finite numbers within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(str(text))  # not of True or a list
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def one_of(*allowed: Any) -> Callable[[str], Any]:
    """A parser of a fixed set of values, compared as text."""
    table = {str(value): value for value in allowed}

    def parse(text: str) -> Any:
        if str(text) not in table:
            raise ValueError("one of " + ", ".join(table))
        return table[str(text)]

    return parse


def parse_model(text: str) -> str:
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", text := str(text), re.ASCII) and not os.path.exists(text)
    if not hub_id and not os.path.isdir(os.path.expanduser(text)):  # unlike Path's, false for '' and on errors
        raise ValueError("a folder that exists or a Hub id such as meta-llama/Llama-3.2-1B-Instruct")
    return text


def parse_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", str(text), re.ASCII):
        raise ValueError("auto, cpu or cuda:N")
    return "cuda:0" if text == "cuda" else text


def parse_text(text: str) -> str:
    if not str(text).strip():
        raise ValueError("text that is not empty")
    return str(text)


def parse_origins(text: str) -> str:
    for origin in str(text).split(","):
        if origin.strip() != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin.strip(), re.ASCII):
            raise ValueError("* or origins such as https://example.org, separated by commas")
    return str(text)


def parse_switch(text: str | bool) -> bool:
    table = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(text).lower() not in table:
        raise ValueError("1 or 0, true or false")
    return table[str(text).lower()]


def parse_key(text: str) -> str:
    if not re.fullmatch(r"[!-~]{8,512}", str(text), re.ASCII):
        raise ValueError("8 to 512 printable ASCII characters without spaces")
    return str(text)


def parse_file(text: str) -> str:
    if not os.path.isfile(path := os.path.expanduser(str(text))):
        raise ValueError("a file that exists")
    return path


def parse_hosts(text: str) -> str:
    for host in str(text).split(","):
        if not re.fullmatch(r"\*|[A-Za-z0-9.\-_]+|\[[0-9A-Fa-f:.]+\]", host.strip(), re.ASCII):
            raise ValueError("* or names such as example.org, without ports, separated by commas")
    return str(text)


class Setting(NamedTuple):
    """One setting: its flag, its environment variable and its field of a config follow from the name."""

    name: str
    default: Any
    parse: Callable[[str], Any]
    help: str
    metavar: str = "N"
    env: str = ""
    repeatable: bool = False  # its value is a tuple

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return self.env or "RUSTINFER_" + self.name.upper()


SETTINGS = (
    Setting("model", None, parse_model, "model folder or Hugging Face Hub id (default: the demo model)", "DIR|HUB_ID",
            "MODEL_PATH"),
    Setting("served_model_name", None, parse_text, "model id in the API (default: the folder's name or the Hub id)",
            "NAME"),
    Setting("host", "127.0.0.1", parse_text, "address to listen on; 0.0.0.0 is every address", "ADDRESS", "HOST"),
    Setting("port", 8000, whole(0, 65535), "port to listen on; 0 picks a free one and prints it", "PORT", "PORT"),
    Setting("device", "auto", parse_device, "auto, cpu or cuda:N", "DEVICE", "DEVICE"),
    Setting("max_tokens", 1024, whole(1), "tokens to generate when a request names no limit", env="MAX_TOKENS"),
    Setting("max_model_len", None, whole(1), "longest prompt plus output, in tokens (default: the model's own)"),
    Setting("max_num_seqs", 64, whole(1, 4096), "sequences that may run at once"),
    Setting("max_num_batched_tokens", None, whole(1, 1 << 20),
            "tokens that one step may compute (default: 2048 with CUDA kernels, else 512)"),
    Setting("block_size", 16, one_of(8, 16, 32, 64, 128), "tokens in one KV block: 8, 16, 32, 64 or 128"),
    Setting("kv_cache_memory", None, parse_bytes, "KV cache size, such as 4GiB (default: from free memory)", "BYTES"),
    Setting("gpu_memory_utilization", 0.9, number(0.05, 1.0), "part of the card's memory to use", "PART"),
    Setting("no_prefix_caching", False, parse_switch, "never reuse the KV blocks of an equal prompt beginning", ""),
    Setting("cpu_kernels", "auto", one_of("auto", "float32", "off"),
            "C kernels, compiled at first use; float32 never rounds activations to bfloat16; off is NumPy", "MODE"),
    Setting("weights", "mmap", one_of("mmap", "copy"), "C kernels read the mapped file, or a copy in huge pages",
            "MODE"),
    Setting("threads", None, whole(1, 1024), "threads for arithmetic on the CPU (default: its physical cores)"),
    Setting("no_batch_invariant", False, parse_switch, "faster products whose last bits may depend on the batch", ""),
    Setting("enforce_eager", False, parse_switch, "launch CUDA kernels one by one instead of captured graphs", ""),
    Setting("no_pdl", False, parse_switch, "no programmatic dependent launch (compute capability 9.0 and later)", ""),
    Setting("max_queue", 256, whole(1, 1 << 20), "requests that may wait; more are answered 429"),
    Setting("api_key", (), parse_key, "key that clients must send; may be given several times", "KEY", repeatable=True),
    Setting("api_key_file", None, parse_file, "JSON file of keys with names and limits (README)", "FILE"),
    Setting("requests_per_minute", None, whole(1, 10**9), "of each key, or address without keys (default: no limit)"),
    Setting("tokens_per_minute", None, whole(1, 10**12), "of prompts and answers, likewise (default: no limit)"),
    Setting("max_concurrent_requests", None, whole(1, 10**6), "at once, likewise (default: no limit)"),
    Setting("request_timeout", None, number(0.001, 1e6), "time of a request, queue included (default: no limit)",
            "SECONDS"),
    Setting("write_timeout", 20.0, number(0.001, 1e6), "time that a client may take to read what is sent", "SECONDS"),
    Setting("max_connections", 400, whole(1, 1 << 16), "open connections; more are answered 503"),
    Setting("stream_interval", 0.02, number(0, 10), "least time between two writes of one stream", "SECONDS"),
    Setting("drain_timeout", 30.0, number(0, 86400), "time that running requests get at shutdown", "SECONDS"),
    Setting("allowed_hosts", None, parse_hosts,
            "more names that requests may be for, or * (checked on loopback without keys)", "NAMES"),
    Setting("ssl_certfile", None, parse_file, "serve HTTPS with this certificate chain (PEM)", "FILE"),
    Setting("ssl_keyfile", None, parse_file, "its private key, where it is not in the same file", "FILE"),
    Setting("cors_origins", "*", parse_origins, "origins that browsers may call from, separated by commas", "ORIGINS"),
    Setting("log_format", "text", one_of("text", "json"), "text or json, a line a request", "FORMAT"),
    Setting("log_level", "info", one_of("debug", "info", "warning", "error"), "debug, info, warning or error", "LEVEL"),
)


def check_setting(setting: Setting, value: Any, origin: str | None = None) -> Any:
    """The parsed value, or a SettingsError that names the flag, the value and what is allowed."""
    if setting.repeatable and not isinstance(value, str):
        return tuple(check_setting(setting._replace(repeatable=False), one, origin) for one in value)
    try:
        return (setting.parse(value),) if setting.repeatable else setting.parse(value)
    except ValueError as error:
        raise SettingsError(f"{origin or setting.flag}: {shorten(value)!r} is not allowed; it takes {error}") from None


class CheckedConfig:
    """A dataclass whose fields are settings: each value is checked as its flag would be."""

    def __post_init__(self):
        for setting in SETTINGS:
            value = getattr(self, setting.name, setting.default)
            if value is not setting.default:  # a default of None is "find out"; None is not a value of the others
                object.__setattr__(self, setting.name, check_setting(setting, value, setting.name))


@dataclass(frozen=True)
class EngineConfig(CheckedConfig):
    """Limits and choices of one engine; the defaults are the server's."""

    device: str = "auto"
    max_tokens: int = 1024
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None  # bytes
    gpu_memory_utilization: float = 0.9
    no_prefix_caching: bool = False
    cpu_kernels: str = "auto"
    weights: str = "mmap"
    threads: int | None = None
    no_batch_invariant: bool = False
    enforce_eager: bool = False
    no_pdl: bool = False
    max_queue: int = 256
    stream_interval: float = 0.02  # seconds


@dataclass(frozen=True)
class ServerConfig(CheckedConfig):
    """Limits and choices of one HTTP server; the defaults are the command line's."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    request_timeout: float | None = None  # seconds
    write_timeout: float = 20.0  # seconds
    max_connections: int = 400
    allowed_hosts: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    cors_origins: str = "*"


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """As isinstance, but True and False are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens; names and meaning as in vLLM.

    temperature 0 is greedy; top_k 0 or -1 and top_p 1 switch the filters off; seed None draws a random one;
    max_tokens None takes default_max_tokens (None: the server's), or what room there is; logprobs k returns the chosen
    token's and the k likeliest tokens' log-probabilities (natural log, of the unfiltered distribution at temperature
    1), prompt_logprobs k the same of the prompt's tokens; before min_tokens no token comes that would end the answer.

    These change the logits, in this order, before anything is chosen: repetition_penalty divides the positive and
    multiplies the negative ones of tokens in the prompt or the output; frequency_penalty times a token's count in the
    output, and presence_penalty where it occurs there, are subtracted; logit_bias, a mapping from token id to number
    (kept as sorted pairs), is added. logprobs are those of the logits before.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    MAX_LOGIT_BIAS = 300  # entries, as in kernels/sample.cu

    def __post_init__(self):
        self._freeze_bias(self.logit_bias)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._freeze("stop", stop, str, "strings that are not empty")
        self._freeze("stop_token_ids", self.stop_token_ids, int, "token ids")
        for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", -1, 1 << 31),
                                ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
                                ("repetition_penalty", 0, 10), ("seed", -(1 << 63), (1 << 64) - 1),
                                ("max_tokens", 1, 1 << 31), ("default_max_tokens", 1, 1 << 31),
                                ("min_tokens", 0, 1 << 31), ("logprobs", 0, 20), ("prompt_logprobs", 0, 20)):
            value, default = getattr(self, name), getattr(SamplingParams, name)  # which says what kind a value is of
            if value is None and default is None:
                continue
            fraction = isinstance(default, float)
            if not is_a(value, (int, float) if fraction else int):
                wanted = "a number" if fraction else "a whole number"
                raise InvalidTypeError(f"{name} is {shorten(repr(value))}; it must be {wanted}", name)
            if not low <= value <= high:  # also refuses NaN
                raise APIError(f"{name} is {shorten(value)}; it must be from {low} to {high}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise APIError(f"min_tokens is {self.min_tokens}; it must not be more than the {self.max_tokens} tokens of "
                           "output that are allowed", "min_tokens")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise APIError(f"{name} is 0; it must be above 0", name)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidTypeError(f"ignore_eos is {shorten(self.ignore_eos)}; it must be true or false", "ignore_eos")

    def _freeze(self, name: str, values: Any, kind: type, wanted: str) -> None:
        """Keep a list as a tuple, once each element is of its kind."""
        values = () if values is None else values
        if not isinstance(values, (list, tuple)) or not all(is_a(value, kind) and value != "" for value in values):
            raise InvalidTypeError(f"{name} is {shorten(values)}; it must be a list of {wanted}", name)
        object.__setattr__(self, name, tuple(values))

    def _freeze_bias(self, bias: Any) -> None:
        """Keep a mapping, or the pairs that an earlier one became, as pairs sorted by token id."""
        try:
            table = dict(() if bias is None else bias)
        except (TypeError, ValueError):
            table = {None: None}
        if not all(is_a(token_id, int) and is_a(value, (int, float)) for token_id, value in table.items()):
            raise InvalidTypeError(f"logit_bias is {shorten(bias)}; it must map token ids to numbers", "logit_bias")
        if len(table) > self.MAX_LOGIT_BIAS:
            raise APIError(f"logit_bias has {len(table)} entries; it must have at most {self.MAX_LOGIT_BIAS}",
                           "logit_bias")
        if not all(token_id >= 0 and -100 <= value <= 100 for token_id, value in table.items()):  # also refuses NaN
            raise APIError(f"logit_bias is {shorten(bias)}; it must map ids of at least 0 to numbers from -100 to 100",
                           "logit_bias")
        object.__setattr__(self, "logit_bias", tuple((key, float(table[key])) for key in sorted(table)))

    @property
    def has_penalties(self) -> bool:
        """True when the choice depends on the tokens so far."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


# ==============================================================================
# I. FROM TEXT TO THE NEXT TOKEN
# ==============================================================================
# Tokenizer -- text to token ids and back, whole or token by token
# uses: Errors
# ==============================================================================

BYTES_OF_UNICODE = {  # the printable stand-ins of byte-level BPE (GPT-2), backwards
    **{chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))},
    **{chr(256 + i): b for i, b in enumerate((*range(0, 33), *range(127, 161), 173))},
}
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never part of interchanged text


def read_json(path: Path, default: Any = None) -> Any:
    """A JSON file of a model folder; a missing one is `default`, or an error where there is none."""
    if not path.is_file() and default is not None:
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {shorten(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}; a JSON object is expected")
    return value


class StreamDecoder:
    """Tokens in, text out; half a character waits for its other half.

    Byte-level models: text is the UTF-8 of all bytes. SentencePiece models: a run of byte tokens is text once it
    ends, and one U+FFFD a byte if it is not UTF-8, which only its end can tell.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()
        self._strip = tokenizer.strip_start  # leading spaces that SentencePiece models add to a text

    def push(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        if self._tokenizer.byte_level:
            return self._utf8.decode(data)
        if self._tokenizer.is_byte(token_id):
            self._run += data
            return ""
        return self._stripped(self._end_run() + data.decode()) if data else ""

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            text, self._strip = (text[1:], self._strip - 1) if text[0] == " " else (text, 0)
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", True) if self._tokenizer.byte_level else self._stripped(self._end_run())


class StopMatcher:
    """Finds stop strings in streamed text and holds back what may be the start of one.

    The first to be complete wins (of several, the longest), so that the answer does not depend on the pieces.
    """

    def __init__(self, stops: Seq[str]):
        self._stops, self._held = tuple(stops), ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show; after a match, `matched` is set and nothing more comes."""
        if self.matched is not None:
            return ""
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return held[:at]
        safe = len(held) - max((self._overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[safe:]
        return held[:safe]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class Tokenizer:
    """tokenizer.json, read so that a token is bytes and text is the UTF-8 of those bytes.

    Special tokens are control tokens only where a template wrote them: `encode` reads their spellings as plain
    text, `encode_rendered` as tokens.
    """

    def __init__(self, folder: Path):
        path, self._folder = folder / "tokenizer.json", folder
        if not path.is_file():
            raise CheckpointError(f"{path}: not found; a model folder needs tokenizer.json")
        try:
            source = path.read_text(encoding="utf-8")
            self.inner, spec = tokenizers.Tokenizer.from_str(source), json.loads(source)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {shorten(error)}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        self.settings = read_json(folder / "tokenizer_config.json", {})
        self._promote_controls(spec)
        source = self.inner.to_str()
        self._plain = self._inside = self._read_plain(source)
        if (first := '"prepend_scheme":"first"') in source:  # a space before the text, but none after a special token
            self._inside = self._read_plain(source.replace(first, '"prepend_scheme":"never"'))
        self._read_decoder(path, spec.get("decoder") or {})
        self._bytes: dict[int, bytes] = {}

    @staticmethod
    def _read_plain(source: str) -> tokenizers.Tokenizer:
        """The tokenizer, to which the spellings of special tokens are text."""
        plain = tokenizers.Tokenizer.from_str(source)
        plain.encode_special_tokens = True
        return plain

    def _promote_controls(self, spec: dict) -> None:
        """Some files leave end-of-turn tokens unmarked: bos, eos and <|...|> spellings are always control tokens."""
        added = {token["content"]: token for token in spec.get("added_tokens") or []}
        named = {self.special_text(name) for name in ("bos_token", "eos_token", "pad_token")}
        ends = (self.special_text("bos_token"), self.special_text("eos_token"))  # these may be in the vocabulary only
        known = {text: added.get(text, {}) for text in (*added, *ends) if self.inner.token_to_id(text) is not None}
        unmarked = [text for text, token in known.items()
                    if not token.get("special") and (text in named or re.fullmatch(r"<\|.*\|>", text))]
        self.inner.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in unmarked])
        self.specials = sorted((text for text, token in known.items() if token.get("special") or text in unmarked),
                               key=len, reverse=True)
        self.special_ids = {self.inner.token_to_id(text) for text in self.specials}
        self._added = {self.inner.token_to_id(text): text for text in known}  # the library may tell them normalized
        self._special_pattern = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        beside = lambda text, side, spaces: spaces if known[text].get(side) else ""  # a token may swallow them
        self._rendered_pattern = re.compile("|".join(
            beside(text, "lstrip", r"(?:(?<!\s)\s+)?") + f"({re.escape(text)})" + beside(text, "rstrip", r"\s*")
            for text in self.specials) or r"(?!)")

    def _read_decoder(self, path: Path, decoder: dict) -> None:
        parts = decoder.get("decoders", [decoder])
        kinds = {part.get("type") for part in parts}
        if not kinds & {"ByteLevel", "Metaspace", "ByteFallback", "Replace"}:
            found = ", ".join(sorted(map(str, kinds)))
            raise CheckpointError(f"{path}: decoder is {found}; ByteLevel and Metaspace/ByteFallback are supported")
        self.byte_level = "ByteLevel" in kinds
        strips = [part.get("start", 0) for part in parts if part.get("type") == "Strip"]
        strips += [int(part.get("prepend_scheme") != "never") for part in parts if part.get("type") == "Metaspace"]
        self.strip_start = strips[0] if strips else 0  # spaces; of no use to byte-level models

    def special_text(self, name: str) -> str:
        """The text of `bos_token` and the like in tokenizer_config.json, or ''."""
        value = self.settings.get(name) or ""
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str):
            path, found = self._folder / "tokenizer_config.json", shorten(self.settings[name])
            raise CheckpointError(f"{path}: {name} is {found}; a token's text is expected")
        return value

    def token_to_id(self, text: str) -> int | None:
        return self.inner.token_to_id(text)

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
        """Unlike `encode`, the library's batch call lets other threads run, which a long text would freeze."""
        try:
            return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            raise APIError("the text holds half of a surrogate pair, which is not Unicode") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, spellings of special tokens are only text."""
        return self._ids(self._plain, text)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued: with the BOS that the tokenizer adds, spellings are only text."""
        return self._ids(self._plain, text, add_special_tokens=True)

    def encode_rendered(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered template: specials are tokens, except where `mark` broke their spelling.

        Text between two specials is encoded as one piece, as the reference does.
        """
        encode = lambda start, end: self._ids(self._inside if start else self._plain, text[start:end].replace(mark, ""))
        ids, start = [], 0
        for match in self._rendered_pattern.finditer(text):
            ids += encode(start, match.start())
            ids.append(self.inner.token_to_id(match[match.lastindex]))
            start = match.end()
        return ids + encode(start, len(text))

    def break_specials(self, text: str, mark: str) -> str:
        """The text with `mark` all through every spelling of a special token, so that no part of it is one either."""
        return self._special_pattern.sub(lambda match: mark.join(match.group()) + mark, text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; special tokens add none."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self.inner.id_to_token(token_id)
        if piece is None or token_id in self.special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self.byte_level:
            known = [BYTES_OF_UNICODE.get(char) for char in piece]
            return piece.encode() if None in known else bytes(known)
        return bytes([int(piece[3:5], 16)]) if self.is_byte(token_id) else piece.replace("\u2581", " ").encode()

    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but of a special token its spelling."""
        if token_id in self.special_ids:
            return self._added[token_id].encode()
        return self.token_bytes(token_id)

    def is_byte(self, token_id: int) -> bool:
        """True for SentencePiece's byte tokens, <0x00> to <0xFF>."""
        return bool(re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self.inner.id_to_token(token_id) or ""))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of all the tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()


# ==============================================================================
# Chat template -- messages to prompt ids, by the model's own template or a built-in one
# uses: Errors, Tokenizer
# ==============================================================================

BUILTIN_TEMPLATES = (  # (a special token that gives the family away, its template); the first that fits is taken
    ("<|start_header_id|>",
     "{{ '<|begin_of_text|>' }}{% for m in messages %}"
     "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
     "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    ("<|im_start|>",
     "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
     "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"),
)
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>")
MAX_RENDERED = 8 << 20  # characters; a template that makes more is refused
MAX_RENDER_SECONDS = 10.0


class TemplateTags(jinja2.ext.Extension):
    """{% generation %}, which transformers uses for training and is nothing here, and a clock in loops and macros."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def filter_stream(self, stream: Any) -> Iterator:
        """Write {{ check_time() }} after each {% for %} and {% macro %}."""
        before, repeats = None, False
        for token in stream:
            yield token
            if before == "block_begin":
                repeats = token.value in ("for", "macro")
            if token.type == "block_end" and repeats:
                for kind, value in (("variable_begin", "{{"), ("name", "check_time"), ("lparen", "("), ("rparen", ")"),
                                    ("variable_end", "}}")):
                    yield jinja2.lexer.Token(token.lineno, kind, value)
            before = token.type


class TemplateSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds what one operator may make."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = lambda v: len(v) if hasattr(v, "__len__") else v.bit_length() if isinstance(v, int) else 64
        made = size(left) * abs(right) if operator == "**" else size(left) + size(right)
        for sequence, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(sequence, "__len__") and isinstance(times, int):
                made = len(sequence) * times
        if made > MAX_RENDERED:
            raise jinja2.TemplateError(f"{operator} makes a value longer than {MAX_RENDERED}")
        return super().call_binop(context, operator, left, right)


def shown_tools(tools: Iterable[dict]) -> list[dict]:
    """Tools as the model is told of them: whether calls are watched over is none of its business."""
    return [{**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}
            for tool in tools]


class ChatTemplate:
    """The model's Jinja template in the immutable sandbox, as transformers runs it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._shows_names = functools.cache(self._find_names)  # a cache of the class would keep every template
        source, self.origin = self._find(folder, tokenizer)
        self._template, self._asked_for = None, frozenset()
        if source is not None:
            try:
                environment = self._environment()
                self._template = environment.from_string(source)
                self._asked_for = jinja2.meta.find_undeclared_variables(environment.parse(source))
            except jinja2.TemplateError as error:
                raise CheckpointError(f"{self.origin}: the chat template does not compile: {shorten(error)}") from None

    @staticmethod
    def _find(folder: Path, tokenizer: Tokenizer) -> tuple[str | None, str]:
        """The template's source and where it came from."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8"), str(path)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: cannot be read: {shorten(error)}") from None
        value, origin = tokenizer.settings.get("chat_template"), str(folder / "tokenizer_config.json")
        if isinstance(value, list):  # several named ones
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default") or next(iter(named.values()), None)
        if isinstance(value, str):
            return value, origin
        for token, source in BUILTIN_TEMPLATES:
            if token in tokenizer.specials:
                return source, f"built-in template for {token}"
        return None, "no chat template"

    @staticmethod
    def _environment() -> jinja2.Environment:
        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                              sort_keys=sort_keys)

        environment = TemplateSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", TemplateTags])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment

    def encode(self, messages: list[dict], add_generation_prompt: bool = True, tools: Seq[dict] = (),
               continue_final_message: bool = False, variables: dict[str, Any] | None = None) -> list[int]:
        """Prompt ids of a conversation, and of the tools that it offers; the rest as in `render`.

        Spellings of special tokens inside the messages are broken with a noncharacter that none of them contains
        before rendering, and mended after the rendered text is split at the real ones.
        """
        given = [messages, list(tools), variables or {}]
        mark = self._unused_mark(given)
        messages, tools, variables = self._map_strings(given, lambda text: self._tokenizer.break_specials(text, mark))
        rendered = self.render(messages, add_generation_prompt, tools, continue_final_message, variables)
        return self._tokenizer.encode_rendered(rendered, mark)

    @staticmethod
    def _unused_mark(given: list) -> str:
        """A noncharacter that no string of a request contains."""
        strings = json.dumps(given, ensure_ascii=False)
        mark = next((char for char in NONCHARACTERS if char not in strings), None)
        if mark is None:
            raise APIError("the messages use every Unicode noncharacter from U+FDD0 to U+FDEF", "messages")
        return mark

    def render(self, messages: list[dict], add_generation_prompt: bool = True, tools: Seq[dict] = (),
               continue_final_message: bool = False, variables: dict[str, Any] | None = None) -> str:
        """The prompt as text.

        continue_final_message leaves the last message open, for the model to go on with its text; variables are further
        names that the template may ask for. A message's `name` stands before its text where the template shows none.
        """
        for name in variables or ():
            if name not in self._asked_for:
                raise UnsupportedError(f"chat_template_kwargs.{name} is nothing that this model's chat template asks "
                                       "for", f"chat_template_kwargs.{name}")
        messages = [self._with_name(message) for message in messages]
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, tools, variables)
        *before, last = messages
        end = self._unused_mark([messages, tools, variables]) + " "
        rendered = self._render([*before, {**last, "content": last["content"] + end}], False, tools, variables)
        text, found, _ = rendered.rpartition(end)
        if found:  # the template keeps white space at a message's end
            return text
        text, found, _ = rendered.rpartition(end.rstrip())
        if not found:
            raise APIError("the chat template does not show the final message as it is", "continue_final_message")
        return text.rstrip()

    def _with_name(self, message: dict) -> dict:
        if "name" not in message or message["role"] == "tool" or self._shows_names(message["role"]):
            return message
        return {**message, "content": f"{message['name']}: {message['content']}"}

    def _find_names(self, role: str) -> bool:
        """True when the template makes something of a message's name."""
        named = {"role": role, "content": "text", "name": NONCHARACTERS[0]}
        user = {"role": "user", "content": "text"}  # some templates want one
        messages = {"system": [named, user], "user": [named]}.get(role, [user, named])
        return NONCHARACTERS[0] in self._render(messages)

    def _render(self, messages: list[dict], add_generation_prompt: bool = True, tools: Seq[dict] = (),
                variables: dict[str, Any] | None = None) -> str:
        if self._template is None:
            raise APIError("this model has no chat template, and no built-in one fits its vocabulary", "messages")
        names = {name: self._tokenizer.special_text(name)
                 for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        # as transformers: templates ask `is not none`
        names |= {"tools": shown_tools(tools) or None, "documents": None}
        names |= variables or {}
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        names["check_time"] = lambda: self._check_time(deadline)
        parts, size = [], 0
        try:
            for part in self._template.generate(
                    messages=messages, add_generation_prompt=add_generation_prompt, **names):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED:
                    raise APIError(f"the rendered prompt is longer than {MAX_RENDERED} characters", "messages")
        except (APIError, MemoryError):
            raise
        except Exception as error:  # a template is the model's own program: whatever it raises is about these messages
            reason = str(error) if isinstance(error, jinja2.TemplateError) else error
            raise APIError(f"the chat template refuses these messages: {shorten(reason)}", "messages") from None
        return "".join(parts)

    @staticmethod
    def _check_time(deadline: float) -> str:
        if time.monotonic() > deadline:
            raise APIError(f"the chat template takes more than {MAX_RENDER_SECONDS:g} s for these messages", "messages")
        return ""

    @classmethod
    def _map_strings(cls, value: Any, change: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [cls._map_strings(item, change) for item in value]
        if isinstance(value, dict):
            return {change(key): cls._map_strings(item, change) for key, item in value.items()}
        return value


# ==============================================================================
# Checkpoint -- config.json and safetensors by memory map, sharded, from a folder or the Hub
# uses: Errors, Settings, Tokenizer
# ==============================================================================


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says, with HF spellings mapped once, here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # {"rope_type": "linear"|"llama3", ...}; None is plain rope
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        path = folder / "config.json"
        spec = read_json(path)
        cls._check_kind(path, spec)
        get = functools.partial(cls._positive, path, spec)
        heads, hidden = get("num_attention_heads"), get("hidden_size")
        kv_heads = get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = get("head_dim", hidden // heads)
        if head_dim % 2:
            raise CheckpointError(f"{path}: head_dim is {head_dim}; an even number is expected")
        theta, scaling = cls._rope(path, spec)
        return cls(
            get("vocab_size"), hidden, get("intermediate_size"), get("num_hidden_layers"), heads, kv_heads, head_dim,
            get("max_position_embeddings", 2048), get("rms_norm_eps", 1e-6, (int, float)), theta, scaling,
            bool(spec.get("tie_word_embeddings", False)), bool(spec.get("attention_bias", False)),
            bool(spec.get("mlp_bias", False)), cls._eos(folder, spec))

    @staticmethod
    def _check_kind(path: Path, spec: dict) -> None:
        kinds = spec.get("architectures") or spec.get("model_type")
        if kinds not in (["LlamaForCausalLM"], "llama"):
            raise CheckpointError(f"{path}: architecture is {shorten(kinds)}; LlamaForCausalLM is supported")
        if spec.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{path}: hidden_act is {shorten(spec['hidden_act'])}; silu is supported")
        if spec.get("quantization_config"):
            raise CheckpointError(f"{path}: has a quantization_config; bf16, f16 and f32 weights are supported")

    @staticmethod
    def _positive(path: Path, spec: dict, name: str, default: Any = None, kind: Any = int) -> Any:
        value = spec.get(name)
        value = default if value is None else value
        if not is_a(value, kind) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{path}: {name} is {shorten(value)}; a positive number is expected")
        return value

    @classmethod
    def _rope(cls, path: Path, spec: dict) -> tuple[float, dict | None]:
        """rope_theta and scaling, spelled the old way (top level, rope_scaling) or the new (rope_parameters)."""
        scaling = spec.get("rope_scaling") or spec.get("rope_parameters") or {}
        if not isinstance(scaling, dict):
            raise CheckpointError(f"{path}: rope_scaling is {shorten(scaling)}; a JSON object is expected")
        theta = cls._positive(path, scaling if "rope_theta" in scaling else spec, "rope_theta", 10000.0, (int, float))
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        needed = {"default": (), "linear": ("factor",), "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if not isinstance(kind, str) or kind not in needed:
            raise CheckpointError(f"{path}: rope type is {shorten(kind)}; {', '.join(needed)} are supported")
        for name in needed[kind]:
            cls._positive(path, scaling, name, kind=(int, float))
        if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise CheckpointError(f"{path}: high_freq_factor is {scaling['high_freq_factor']}; "
                                  f"more than low_freq_factor {scaling['low_freq_factor']} is expected")
        return float(theta), {**scaling, "rope_type": kind} if kind != "default" else None

    @staticmethod
    def _eos(folder: Path, spec: dict) -> tuple[int, ...]:
        """End-of-sequence ids of generation_config.json, else config.json."""
        value = read_json(folder / "generation_config.json", {}).get("eos_token_id")
        value = spec.get("eos_token_id") if value is None else value
        ids = value if isinstance(value, list) else [value]
        return tuple(i for i in ids if isinstance(i, int))

    @property
    def group_size(self) -> int:
        return self.num_attention_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:  # H D
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:  # K D
        return self.num_kv_heads * self.head_dim

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of a layer's weights, as `Layer` stacks them: qkv, output, gate_up, down."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return [(self.q_size + 2 * self.kv_size, hidden), (hidden, self.q_size), (2 * inner, hidden), (hidden, inner)]

    @property
    def num_weights(self) -> int:
        """Elements of all matrices."""
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_layers * sum(map(math.prod, self.layer_shapes))


class RawTensor(NamedTuple):
    """A tensor as it lies in the file: `data` is memory-mapped, bf16 as uint16."""

    data: np.ndarray
    dtype: str  # safetensors' name: BF16, F16 or F32

    def to_float32(self) -> np.ndarray:
        if self.dtype == "BF16":  # a bfloat16 is the upper half of a float32
            wide = self.data.astype(np.uint32)
            return np.left_shift(wide, 16, out=wide).view(np.float32)
        return self.data.astype(np.float32)


class Checkpoint:
    """The tensors of a model folder by name; a file is mapped only while a tensor read from it lives."""

    DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}

    def __init__(self, folder: Path):
        self.folder = folder
        self._where: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}  # name -> file, dtype, shape, offset
        for path in self._files():
            self._read_header(path)

    def _files(self) -> list[Path]:
        whole_file, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if whole_file.is_file():
            return [whole_file]
        if not index.is_file():
            raise CheckpointError(f"{self.folder}: has neither model.safetensors nor model.safetensors.index.json")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is {shorten(weight_map)}; a JSON object is expected")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:  # a model may name only files inside its own folder
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: weight_map names {shorten(name)!r}; a .safetensors file beside it is expected")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name}: not found; {index.name} names it")
        return [self.folder / name for name in names]

    def _read_header(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                with safetensors.safe_open(path, framework="np"):  # the library checks lengths, offsets and overlaps
                    pass
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except PermissionError as error:  # the library would say that there is no such file
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            found = path.stat().st_size
            raise CheckpointError(f"{path}: not a whole safetensors file ({found} bytes): {shorten(error)}") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] in self.DTYPES:
                self._where[name] = (path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            elif name.endswith(("weight", "bias")):
                raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}; BF16, F16 and F32 are supported")

    def tensor(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        """The named tensor, whose shape must be `shape`."""
        if name not in self._where:
            raise CheckpointError(f"{self.folder}: tensor {name} {list(shape)} is missing")
        path, dtype, found, offset = self._where[name]
        if found != shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {list(found)}; config.json implies {list(shape)}")
        return RawTensor(np.memmap(path, self.DTYPES[dtype], "r", offset, shape), dtype)


def find_data(name: str) -> Path | None:
    """The project's `demo`, `kernels` or `web` folder: in the installed package, or beside this file."""
    return next((root / name for root in (HERE / "rustinfer_data", HERE) if (root / name).is_dir()), None)


def resolve_model(model: str | os.PathLike | None) -> Path:
    """The folder of a local model, or of a Hub model after its download (progress bars, HF_HUB_OFFLINE).

    None is the demo model, where this file has it beside itself or in its package. Raises SettingsError for what is
    neither, CheckpointError when the download fails.
    """
    if model is None:
        if (demo := find_data("demo")) is None:
            raise SettingsError("--model: there is no demo model beside this file; pass a model folder or a Hub id")
        return demo
    path = Path(check_setting(SETTINGS[0], os.fspath(model))).expanduser()
    if path.is_dir():
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            str(model), allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["original/*", "*/*"]))
    except Exception as error:  # the library's errors share no base
        raise CheckpointError(
            f"--model {model}: no such folder, and the Hub download failed: {shorten(error, 400)}") from None


# ==============================================================================
# Backend -- every op as array expressions, on NumPy or CuPy; backends with kernels override ops
# uses: Checkpoint
# ==============================================================================


@dataclass
class Batch:
    """The arrays of one step; a sequence runs its tokens [num_computed, num_computed + num_scheduled)."""

    input_ids: np.ndarray  # (T,) int64
    positions: np.ndarray  # (T,) int64
    slot_mapping: np.ndarray  # (T,) int64, where each token's key and value go: block_id * S + offset
    cu_seqlens_q: np.ndarray  # (B+1,) int64, sequence b owns tokens [cu[b], cu[b+1])
    block_tables: np.ndarray  # (B, max blocks) int64, padded with 0
    logits_indices: np.ndarray  # (R,) int64, the tokens whose logits are wanted


class Layer(NamedTuple):
    """One decoder layer's weights on the device; q, k, v and gate, up are stacked."""

    attention_norm: Any  # (C,)
    qkv: Any  # ((H + 2K) D, C)
    qkv_bias: Any  # ((H + 2K) D,) or None
    output: Any  # (C, H D)
    output_bias: Any
    mlp_norm: Any  # (C,)
    gate_up: Any  # (2F, C)
    gate_up_bias: Any
    down: Any  # (C, F)
    down_bias: Any


@dataclass
class AttentionGroup:
    """Pieces of one shape, attended together: n pieces of t queries over c chunks of keys."""

    tokens: Any  # (n, t) which tokens of the step
    block_tables: Any  # (n, c * KV_CHUNK / S)
    context_lens: list[int]  # (n,) keys that the last query of a piece may see
    mask: Any  # (n, c, 1, tiles, rows, KV_CHUNK) bool, True where a query may see a key


@dataclass
class DeviceBatch:
    """A step on the device, as the array expressions need it."""

    input_ids: Any  # (T,)
    slot_mapping: Any  # (T,)
    cos: Any  # (T, 1, D/2)
    sin: Any
    plan: list[AttentionGroup]
    logits_indices: Any  # (R,)


def rope_tables(config: ModelConfig, max_model_len: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (max_model_len, 1, D/2) in float32, with the float32 arithmetic of the reference.

    llama3 scaling stretches long wavelengths by `factor`, keeps short ones and blends between (Llama 3.1).
    """
    inverse = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)
    inverse = inverse.astype(np.float32)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        inverse = inverse / np.float32(scaling["factor"])
    elif scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inverse / (2 * np.float32(math.pi))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        inverse = ((1 - smooth) * inverse / scaling["factor"] + smooth * inverse).astype(np.float32)
    angles = np.arange(max_model_len, dtype=np.float32)[:, None, None] * inverse
    return np.cos(angles), np.sin(angles)


class BlasThreads:
    """Holds BLAS at one thread while any NumPy engine lives: its products then have one summation order.

    The thread count belongs to the process, so the count of holders does too.
    """

    _lock, _holders, _limiter = threading.Lock(), 0, None

    @classmethod
    def hold(cls) -> None:
        with cls._lock:
            cls._holders += 1
            if cls._holders == 1:
                cls._limiter = threadpoolctl.threadpool_limits(limits=1, user_api="blas")

    @classmethod
    def release(cls) -> None:
        with cls._lock:
            cls._holders -= 1
            if cls._holders == 0:
                cls._limiter.restore_original_limits()
                cls._limiter = None


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container's limit (cgroup v2)."""
    available, folder = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(parts["file"]))  # the kernel takes its file cache back
    return max(0, available)


class ArrayBackend:
    """Every op once, as array expressions: the specification, and what runs without kernels.

    Batch invariance. A BLAS picks its summation order by the shape of a product and by a row's place in it, so a
    row's bits would depend on the batch. Here every product runs in tiles of a fixed number of rows, each tile one
    call of the same shape. At load `calibrate` looks for the best tile within which a row's place does not matter
    either, and finds out whether the inner rows of one wide shape get the same bits; OpenBLAS differs by CPU.
    """

    TILES = (8, 4, 1)  # rows, best first: more speed prompts up and one stream down; 1 is a matrix-vector product
    WIDE, MARGIN = 112, 8  # rows of a wide product, and the unused ones before and after them, where edges differ
    WIDE_FROM = 48  # rows from which one wide product is cheaper than many tiles
    ATTENTION_TILES = (4, 8, 1)  # a decoding sequence has few rows a KV head: H / K
    KV_CHUNK = 128  # keys; attention sums within a chunk first, then over chunks in order
    QUERY_CHUNK = 128  # queries attended at once, which bounds the scores in memory
    DEFAULT_BATCHED_TOKENS = 512  # keeps streams smooth while a CPU works on a prompt
    PARALLEL_SIZE = 1 << 18  # weights with at least this many elements are split over the threads

    def __init__(self, xp: Any = np, threads: int = 1, batch_invariant: bool = True):
        self.xp, self.batch_invariant = xp, batch_invariant
        self.tile = self.attention_tile = 8
        self.wide = False
        self.on_host = xp is np
        card = None if self.on_host else xp.cuda.Device()
        self.device_index: int | None = card and card.id
        self.pci_bus_id: str | None = card and card.pci_bus_id  # other tools count the cards in another order
        self._pool = ThreadPoolExecutor(threads - 1, "rustinfer-blas") if threads > 1 and batch_invariant else None
        self.threads = threads if self._pool else 1
        self._holds_blas = self.on_host and batch_invariant
        if self._holds_blas:
            BlasThreads.hold()

    @property
    def name(self) -> str:
        return "NumPy" if self.on_host else "CuPy arrays"

    def on_device(self) -> contextlib.AbstractContextManager:
        """Direct this thread's array calls to the backend's card; CuPy keeps the choice per thread."""
        return contextlib.nullcontext() if self.on_host else self.xp.cuda.Device(self.device_index)

    def errors(self) -> contextlib.AbstractContextManager:
        """Turn the device's errors into ours."""
        return contextlib.nullcontext()

    def bytes_for_cache(self, gpu_memory_utilization: float) -> int:
        """Memory that the KV cache may take: a quarter of what the host has free, or the card's share."""
        if self.on_host:
            return available_memory() // 4
        free, total = self.xp.cuda.runtime.memGetInfo()
        return int(free - (1 - gpu_memory_utilization) * total)

    def close(self) -> None:
        """Give back threads and, on a card, memory; the model's arrays are dropped by now."""
        self.cos = self.sin = None
        if self._pool:
            self._pool.shutdown()
        if not self.on_host:
            self.xp.get_default_memory_pool().free_all_blocks()
        if self._holds_blas:
            self._holds_blas = False
            BlasThreads.release()

    def bind(self, config: ModelConfig, max_model_len: int, block_size: int) -> None:
        """Learn the model's shape; the ops below belong to one model from here on."""
        self.config, self.block_size, self.group_size = config, block_size, config.group_size
        self.cos, self.sin = map(self.to_device, rope_tables(config, max_model_len))

    def to_device(self, array: np.ndarray) -> Any:
        return array if self.on_host else self.xp.asarray(array)

    def to_host(self, array: Any) -> np.ndarray:
        return array if self.on_host else self.xp.asnumpy(array)

    def load_weight(self, parts: Seq[RawTensor]) -> Any:
        """A tensor, or several stacked along the first axis, on the device in the backend's own format."""
        wide = [part.to_float32() for part in parts]
        return self.to_device(np.ascontiguousarray(wide[0] if len(wide) == 1 else np.concatenate(wide)))

    def load_vector(self, parts: Seq[RawTensor]) -> Any:
        """As `load_weight`, for norms and biases: always float32."""
        return ArrayBackend.load_weight(self, parts)

    def kv_cache_shape(self, num_blocks: int) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of the KV cache; its first axes are (2, L, N)."""
        c = self.config
        return (2, c.num_layers, num_blocks, self.block_size, c.num_kv_heads, c.head_dim), np.float32

    def prepare(self, batch: Batch) -> DeviceBatch:
        """What the ops need of a step, on the device."""
        positions = self.to_device(batch.positions)
        return DeviceBatch(self.to_device(batch.input_ids), self.to_device(batch.slot_mapping), self.cos[positions],
                           self.sin[positions], self.attention_plan(batch), self.to_device(batch.logits_indices))

    def calibrate(self, shapes: Iterable[tuple[int, int]], head_dim: int) -> None:
        """Choose the tiles: the first whose rows keep their bits wherever they stand in the tile.

        shapes: (F, C) of the model's weights. A BLAS treats the last rows of a weight, which fill no whole register,
        in their own way: the probes are low, but leave the same remainders.
        """
        if not self.batch_invariant:
            return
        rng = default_rng(0)
        draw = lambda *shape: self.to_device(rng.standard_normal(shape, np.float32))
        probes = {(192 + (stop - start) % 192, width) for height, width in shapes
                  for start, stop in self._parts(height, width)}
        weights = [draw(*probe) for probe in sorted(probes)]
        keys, values = draw(self.KV_CHUNK, head_dim).T, draw(self.KV_CHUNK, head_dim)
        self.tile = next(r for r in self.TILES if all(
            self._keeps_bits(r, draw(r, w.shape[1]), lambda x, w=w: self._product(x[None], w)[0]) for w in weights))
        rows = [draw(self.WIDE, w.shape[1]) for w in weights]
        self.wide = all(bool((self._wide(x, w) == self._tiled(x, w)).all()) for x, w in zip(rows, weights))
        self.attention_tile = next(r for r in self.ATTENTION_TILES if
                                   self._keeps_bits(r, draw(r, head_dim), lambda x: x @ keys)
                                   and self._keeps_bits(r, draw(r, self.KV_CHUNK), lambda p: p @ values))

    def _keeps_bits(self, rows: int, x: Any, product: Callable[[Any], Any]) -> bool:
        expected = product(x)
        return all(bool((product(self.xp.roll(x, shift, 0)) == self.xp.roll(expected, shift, 0)).all())
                   for shift in range(1, rows))

    # -- a step's ops, which kernels replace

    def run_layers(self, x: Any, layers: Seq[Layer], kv_cache: Any, step: DeviceBatch) -> Any:
        """All decoder layers: x (T, C) -> (T, C); kv_cache (2, L, N, ...) gets the new tokens' keys and values."""
        for layer, layer_cache in zip(layers, kv_cache.swapaxes(0, 1)):
            q = self.qkv_rope(x, layer, layer_cache, step)
            x = self.add_linear(x, self.attention(q, layer_cache, step), layer.output, layer.output_bias)
            x = self.add_linear(x, self.gate_up(x, layer), layer.down, layer.down_bias)
        return x

    def embedding(self, step: DeviceBatch, table: Any) -> Any:
        """The residual stream's beginning: table (V, C) -> x (T, C)."""
        return table[step.input_ids]

    def qkv_rope(self, x: Any, layer: Layer, kv_cache: Any, step: DeviceBatch) -> Any:
        """Norm, projection and rotation; writes keys and values to kv_cache (2, N, ...) -> queries (T, H, D)."""
        c, heads = self.config, self.config.num_attention_heads + self.config.num_kv_heads  # values do not turn
        qkv = self.linear(self.rms_norm(x, layer.attention_norm, c.rms_norm_eps), layer.qkv, layer.qkv_bias)
        qkv = qkv.reshape(len(x), -1, c.head_dim)
        turned = self.rope(qkv[:, :heads], step.cos, step.sin)
        self.append_kv(kv_cache, turned[:, c.num_attention_heads :], qkv[:, heads:], step.slot_mapping)
        return turned[:, : c.num_attention_heads]

    def attention(self, q: Any, kv_cache: Any, step: DeviceBatch) -> Any:
        """Causal attention of the new queries: q (T, H, D) -> (T, H D)."""
        return self.paged_attention(q, kv_cache, step.plan, self.config.head_dim**-0.5).reshape(len(q), -1)

    def add_linear(self, x: Any, y: Any, weight: Any, bias: Any) -> Any:
        """The residual stream with a projection added: x (T, C), y (T, F), weight (C, F) -> (T, C)."""
        return x + self.linear(y, weight, bias)

    def gate_up(self, x: Any, layer: Layer) -> Any:
        """Norm, gate and up projection, SwiGLU: x (T, C) -> (T, F)."""
        normed = self.rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
        return self.silu_mul(self.linear(normed, layer.gate_up, layer.gate_up_bias))

    def lm_head(self, x: Any, norm: Any, head: Any, step: DeviceBatch) -> Any:
        """The wanted logits: x (T, C), norm (C,), head (V, C) -> (R, V) float32."""
        return self.linear(self.rms_norm(x[step.logits_indices], norm, self.config.rms_norm_eps), head)

    # -- the expressions they are made of

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        """y = x / sqrt(mean(x^2) + eps) * weight: x (T, C), weight (C,) (Zhang & Sennrich 2019, 1910.07467)."""
        return x / self.xp.sqrt((x * x).mean(-1, keepdims=True) + self.xp.float32(eps)) * weight

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """y = x @ weight.T + bias: x (T, C), weight (F, C), bias (F,) or None -> (T, F)."""
        if not self.batch_invariant:
            y = x @ weight.T
        else:
            y, done = self.xp.empty((len(x), len(weight)), np.float32), 0
            while done < len(x):  # wide products for many rows, tiles for the few that remain
                wide = self.wide and len(x) - done > self.WIDE_FROM
                stop = min(len(x), done + self.WIDE) if wide else len(x)
                y[done:stop] = (self._wide if wide else self._tiled)(x[done:stop], weight)
                done = stop
        return y if bias is None else y + bias

    def _padded(self, x: Any, num_rows: int, before: int = 0) -> Any:
        """x (T, C) with zeros around it -> (num_rows, C)."""
        padded = self.xp.zeros((num_rows, x.shape[1]), np.float32)
        padded[before : before + len(x)] = x
        return padded

    def _tiled(self, x: Any, weight: Any) -> Any:
        """x (T, C), weight (F, C) -> (T, F), tile by tile."""
        num_tiles = -(-len(x) // self.tile)
        tiles = self._padded(x, num_tiles * self.tile).reshape(num_tiles, self.tile, -1)
        return self._product(tiles, weight).reshape(-1, len(weight))[: len(x)]

    def _wide(self, x: Any, weight: Any) -> Any:
        """x (up to WIDE, C), weight (F, C) -> (T, F), in one product of WIDE + 2 MARGIN rows."""
        padded = self._padded(x, self.WIDE + 2 * self.MARGIN, self.MARGIN)
        return self._product(padded[None], weight)[0, self.MARGIN : self.MARGIN + len(x)]

    def _parts(self, height: int, width: int) -> list[tuple[int, int]]:
        """How the rows of a weight are shared out over the threads; depends on nothing but its shape."""
        count = self.threads if height * width >= self.PARALLEL_SIZE else 1
        return [(height * i // count, height * (i + 1) // count) for i in range(count)]

    def _product(self, tiles: Any, weight: Any) -> Any:
        """tiles (n, rows, C), weight (F, C) -> (n, rows, F), as weight @ tile.T: rows then share vector lanes."""
        first, *others = self._parts(*weight.shape)
        if not others:
            return self.xp.matmul(weight, tiles.swapaxes(1, 2)).swapaxes(1, 2)
        out = np.empty((len(tiles), len(weight), tiles.shape[1]), np.float32)
        run = lambda start, stop: np.matmul(weight[start:stop], tiles.swapaxes(1, 2), out=out[:, start:stop])
        futures = [self._pool.submit(run, *part) for part in others]
        run(*first)
        for future in futures:
            future.result()
        return out.swapaxes(1, 2)

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotate the halves of each head (Su et al. 2021, 2104.09864): x (T, heads, D), cos, sin (T, 1, D/2)."""
        half = x.shape[-1] // 2
        low, high = x[..., :half], x[..., half:]
        return self.xp.concatenate((low * cos - high * sin, high * cos + low * sin), -1)

    def append_kv(self, kv_cache: Any, k: Any, v: Any, slot_mapping: Any) -> None:
        """Write keys and values of new tokens: kv_cache (2, N, S, K, D), k, v (T, K, D), slot_mapping (T,)."""
        slots = kv_cache.reshape(2, -1, *kv_cache.shape[3:])  # a view: the cache is contiguous
        slots[0][slot_mapping] = k
        slots[1][slot_mapping] = v

    def attention_plan(self, batch: Batch) -> list[AttentionGroup]:
        """Split a batch into groups of like-shaped pieces; a piece is up to QUERY_CHUNK queries of one sequence."""
        pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for b, (start, stop) in enumerate(zip(batch.cu_seqlens_q[:-1].tolist(), batch.cu_seqlens_q[1:].tolist())):
            for first in range(start, stop, self.QUERY_CHUNK):
                last = min(first + self.QUERY_CHUNK, stop)
                context = int(batch.positions[last - 1]) + 1
                num_chunks = -(-context // self.KV_CHUNK)
                if last - first == 1:  # single queries of similar contexts go together
                    num_chunks = 1 << (num_chunks - 1).bit_length()
                pieces.setdefault((last - first, num_chunks), []).append((b, first, context))
        return [self._attention_group(batch, *shape, members) for shape, members in pieces.items()]

    def _attention_group(self, batch: Batch, t: int, num_chunks: int,
                         pieces: list[tuple[int, int, int]]) -> AttentionGroup:
        """pieces: (sequence, first token, keys that the last query may see), of t queries over num_chunks chunks."""
        n, length, rows = len(pieces), t * self.group_size, self.attention_tile
        tokens = np.array([first for _, first, _ in pieces])[:, None] + np.arange(t)
        num_blocks = num_chunks * self.KV_CHUNK // self.block_size
        tables = np.zeros((n, num_blocks), np.int64)
        for row, (b, _, _) in enumerate(pieces):
            known = batch.block_tables[b, :num_blocks]
            tables[row, : len(known)] = known
        seen = np.zeros((n, -(-length // rows) * rows), np.int64)  # padding sees key 0
        seen[:, :length] = np.repeat(batch.positions[tokens], self.group_size, axis=1)
        keys = np.arange(num_chunks * self.KV_CHUNK).reshape(1, num_chunks, 1, 1, 1, self.KV_CHUNK)
        mask = self.to_device(keys <= seen.reshape(n, 1, 1, -1, rows, 1))
        return AttentionGroup(
            self.to_device(tokens), self.to_device(tables), [context for _, _, context in pieces], mask)

    def paged_attention(self, q: Any, kv_cache: Any, plan: list[AttentionGroup], scale: float) -> Any:
        """Causal attention of new queries over all cached keys of their sequence (Kwon et al. 2023, 2309.06180).

        q (T, H, D), kv_cache (2, N, S, K, D) -> (T, H, D); scores and sums in float32.
        """
        out = self.xp.empty_like(q)
        for group in plan:
            out[group.tokens] = self._attend(q[group.tokens], kv_cache, group, scale)
        return out

    def _attend(self, q: Any, kv_cache: Any, group: AttentionGroup, scale: float) -> Any:
        """q (n, t, H, D) -> (n, t, H, D). Axes inside: piece n, KV chunk, KV head, row tile, row, then D or keys."""
        xp, (n, t, heads, dim), kv_heads, rows = self.xp, q.shape, kv_cache.shape[3], self.attention_tile
        length = t * heads // kv_heads
        tiles = -(-length // rows)
        padded = xp.zeros((n, 1, kv_heads, tiles * rows, dim), np.float32)
        by_head = q.reshape(n, t, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4)
        padded[:, 0, :, :length] = by_head.reshape(n, kv_heads, length, dim)
        padded = padded.reshape(n, 1, kv_heads, tiles, rows, dim)
        k, v = (self._gather(kv_cache[i], group) for i in (0, 1))  # (n, c, K, 1, keys, D)
        for piece, context in enumerate(group.context_lens):  # whatever lies behind the context must not reach a sum
            v[piece].swapaxes(1, 3).reshape(-1, kv_heads, dim)[context:] = 0
        scores = xp.matmul(padded, k.swapaxes(-1, -2)) * xp.float32(scale)
        scores = xp.where(group.mask, scores, xp.float32(-xp.inf))
        weights = xp.exp(scores - scores.max((1, -1), keepdims=True))
        total = self._sum_chunks(weights.sum(-1, keepdims=True))
        out = self._sum_chunks(xp.matmul(weights, v)) / total
        out = out.reshape(n, kv_heads, tiles * rows, dim)[:, :, :length].reshape(n, kv_heads, t, -1, dim)
        return out.transpose(0, 2, 1, 3, 4).reshape(n, t, heads, dim)

    def _gather(self, cache: Any, group: AttentionGroup) -> Any:
        """Blocks of each piece as chunks of keys: cache (N, S, K, D) -> (n, c, K, 1, KV_CHUNK, D), a private copy."""
        blocks = cache[group.block_tables]
        n, (kv_heads, dim) = len(blocks), cache.shape[2:]
        return blocks.reshape(n, -1, self.KV_CHUNK, 1, kv_heads, dim).transpose(0, 1, 4, 3, 2, 5)

    @staticmethod
    def _sum_chunks(parts: Any) -> Any:
        """Sum over the chunk axis in order: later, masked chunks add exact zeros and change no bit."""
        total = parts[:, 0].copy()
        for chunk in range(1, parts.shape[1]):
            total += parts[:, chunk]
        return total

    def silu_mul(self, gate_up: Any) -> Any:
        """silu(gate) * up (Shazeer 2020, 2002.05202): gate_up (T, 2F) -> (T, F)."""
        gate, up = self.xp.split(gate_up, 2, -1)
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite; silu is 0 then
            return gate / (1 + self.xp.exp(-gate)) * up

    def log_softmax(self, logits: Any) -> Any:
        """Log-probabilities (natural log) over the last axis."""
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - self.xp.log(self.xp.exp(shifted).sum(-1, keepdims=True))


# ==============================================================================
# CUDA -- the backend whose ops are kernels: kernels/*.cu, compiled for one model on one card
# uses: Errors, Settings, Checkpoint, Backend
# ==============================================================================


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_ubyte * 64)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(LaunchAttribute)),
                ("num_attributes", ctypes.c_uint)]


class KernelLauncher:
    """cuLaunchKernelEx, which CuPy does not offer: with it a kernel may start while the one before it ends.

    Programmatic dependent launch, compute capability 9.0 and later: the kernels wait by themselves (`pdl_wait`).
    """

    PROGRAMMATIC_STREAM_SERIALIZATION = 6
    PACKED = {np.int32: "i4x", np.float32: "f4x", np.uint64: "Q"}  # in cells of 8 bytes

    def __init__(self, library_path: str = "libcuda.so.1"):
        self._function = ctypes.CDLL(library_path).cuLaunchKernelEx
        self._attribute = LaunchAttribute(id=self.PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._cells: dict[int, tuple[Any, Any]] = {}

    def launch(self, function: int, grid: Seq[int], block: Seq[int], args: Seq[np.generic], shared_bytes: int,
               stream: int) -> None:
        """Start a kernel; args are int32, float32 and, for addresses, uint64."""
        if len(args) not in self._cells:
            self._cells[len(args)] = self._make_cells(len(args))
        cells, pointers = self._cells[len(args)]  # used again and again: the driver copies arguments at once
        struct.pack_into("=" + "".join(self.PACKED[type(arg)] for arg in args), cells, 0, *args)
        three = lambda sizes: (ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3])
        config = LaunchConfig(three(grid), three(block), shared_bytes, stream, ctypes.pointer(self._attribute), 1)
        result = self._function(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
        if result:
            raise DeviceError(f"cuLaunchKernelEx returned {result}")

    def _make_cells(self, count: int) -> tuple[Any, Any]:
        """Room for `count` arguments in cells of 8 bytes, and pointers to each."""
        cells = ctypes.create_string_buffer(8 * count)
        start = ctypes.addressof(cells)
        return cells, (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))


def to_bfloat16(part: RawTensor) -> np.ndarray:
    """A tensor's values as bf16 bits, rounded to the nearest, ties to even."""
    if part.dtype == "BF16":
        return part.data
    bits = part.to_float32().view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC0), rounded).astype(np.uint16)


class PinnedUpload:
    """Copies host memory to the card through two pinned buffers: one is filled while the other is on its way."""

    BUFFER_BYTES = 32 << 20

    def __init__(self, xp: Any, stream: Any):
        self._stream, self._turn = stream, 0
        self._memory = [xp.cuda.alloc_pinned_memory(self.BUFFER_BYTES) for _ in range(2)]
        self._sent = [xp.cuda.Event(disable_timing=True) for _ in range(2)]

    def copy(self, part: RawTensor, target: Any) -> None:
        """part: any shape and dtype; target: as many uint16 on the device, which get it as bf16."""
        source, step = part.data.reshape(-1), self.BUFFER_BYTES // 2
        for start in range(0, len(source), step):
            self._turn ^= 1
            self._sent[self._turn].synchronize()
            piece = to_bfloat16(RawTensor(source[start : start + step], part.dtype))
            buffer = np.frombuffer(self._memory[self._turn], np.uint16, len(piece))
            buffer[:] = piece
            target[start : start + len(piece)].set(buffer, stream=self._stream)
            self._sent[self._turn].record(self._stream)


@dataclass
class CudaStep:
    """A step as the kernels take it; arrays on the device. Tokens [0, num_decode) are alone in their sequence."""

    input_ids: Any  # (T,) int32, -1: the last token drawn on the seat
    positions: Any  # (T,) int32, -1: the seat's next position
    seats: Any  # (T,) int32
    num_tokens: int
    num_decode: int
    tiles: Any  # (num_tiles, 2) int32: first token and number of tokens of each piece of a prompt
    num_tiles: int
    rows: Any  # (R,) int32: the tokens whose logits are wanted; None: every token's
    row_seats: Any  # (R,) int32
    num_rows: int


class SeatMasks:
    """Which tokens may come next, a row of `pack_bits` for each seat: on the card, and pinned on the host.

    A copy takes its turn in the stream, like a kernel: what is launched behind it sees it, captured or not.
    """

    def __init__(self, xp: Any, stream: Any, num_seats: int, vocab_size: int):
        self._stream, shape = stream, (num_seats, -(-vocab_size // 32))
        self.array = xp.zeros(shape, np.uint32)
        self._memory = xp.cuda.alloc_pinned_memory(4 * math.prod(shape))
        self._rows = np.frombuffer(self._memory, np.uint32, math.prod(shape)).reshape(shape)
        self._sent = xp.cuda.Event(disable_timing=True)

    def send(self, masks: dict[int, np.ndarray]) -> None:
        """masks: {seat: (ceil(V / 32),) uint32}. Waits for earlier copies, which may still read what it writes to."""
        if not masks:
            return
        self._sent.synchronize()
        for seat, mask in masks.items():
            self._rows[seat] = mask
            self.array[seat].set(self._rows[seat], stream=self._stream)
        self._sent.record(self._stream)


class SeatState:
    """What the card knows of each seat, in one int32 array with named parts, so that one kernel changes any of it.

    A running sequence sits on a seat; the last seat is for the padding rows of captured steps.
    """

    def __init__(self, xp: Any, num_seats: int, max_blocks: int):
        self.num_seats, max_bias = num_seats, SamplingParams.MAX_LOGIT_BIAS
        shapes = dict(last_token=(num_seats,), next_position=(num_seats,), row_seats=(num_seats,),
                      block_tables=(num_seats, max_blocks), ints=(num_seats, 8), floats=(num_seats, 8),
                      bias_ids=(num_seats, max_bias), bias_values=(num_seats, max_bias))
        self._places, size = {}, 0
        for name, shape in shapes.items():
            self._places[name] = (size, shape)
            size += -(-math.prod(shape) // 4) * 4  # 16-byte aligned
        self.array = xp.zeros((size,), np.int32)
        self.parts = {  # views, made once: a step asks for some of them in every layer
            name: self.array[start : start + math.prod(shape)].reshape(shape).view(self._kind(name))
            for name, (start, shape) in self._places.items()}

    @staticmethod
    def _kind(name: str) -> Any:
        return np.float32 if name in ("floats", "bias_values") else np.int32

    def patch(self, name: str, seat: int, values: Iterable[int | float], column: int = 0) -> list[tuple[int, int]]:
        """(place, value) pairs that write `values` into the seat's row of a part, from `column` on."""
        start, shape = self._places[name]
        values = np.array(list(values), self._kind(name)).view(np.int32)
        first = start + seat * math.prod(shape[1:]) + column
        return list(zip(range(first, first + len(values)), values.tolist()))


class CudaBackend(ArrayBackend):
    """The ops as CUDA kernels: bf16 weights and cache, float32 residual stream, sampling on the card.

    A row's bits depend on nothing but its own request: every product sums in one order, whatever the kernel and the
    batch (kernels/linear.cuh), and so does attention. Everything is allocated before the first step and runs on one
    stream, so that a step can be captured in a graph.
    """

    BLOCK_SIZE, RING, RECORD = 16, 4, 44  # as in the kernels
    MAX_GROUP, MAX_HEAD_DIM, CHUNK = 16, 128, 128  # query heads a KV head; keys of one partial result of attention
    FUSED_ROWS, STREAM_ROWS = 4, 16  # rows up to which a product computes the norm itself, and streams its weights
    # of linear_tiled: rows up to which it is taken, rows and weight rows of a block, its threads and shared bytes
    TILES = ((32, 32, 64, 128, 75264), (256, 64, 64, 128, 83200), (math.inf, 128, 128, 256, 99072))
    DEFAULT_BATCHED_TOKENS = 2048
    FILES = ("patch_state", "embedding", "rms_norm", "qkv_rope", "attention", "gate_up", "lm_head", "sample")

    def __init__(self, xp: Any, config: EngineConfig, folder: Path):
        super().__init__(xp, batch_invariant=False)  # no tiles to find: the kernels' order of summation is their own
        self.engine_config, self.folder, self.last_kernel = config, folder, "none"
        with self.errors():
            self.stream = xp.cuda.Stream(non_blocking=True)
            self.capability = int(xp.cuda.Device(self.device_index).compute_capability)
            can_capture = xp.cuda.runtime.driverGetVersion() >= 12030  # programmatic launches
            programmatic = self.capability >= 90 and can_capture and not config.no_pdl
            self._launcher = KernelLauncher() if programmatic else None
            self.num_processors = xp.cuda.Device(self.device_index).attributes["MultiProcessorCount"]
            self._upload = PinnedUpload(xp, self.stream)

    @classmethod
    def why_not(cls, xp: Any, config: EngineConfig, model: ModelConfig, folder: Path | None) -> str | None:
        """What keeps this model from running on the kernels of this card, or None."""
        capability = int(xp.cuda.Device().compute_capability)
        limits = (
            (folder is None or not (folder / "ptx.cuh").is_file(), "there is no folder kernels/ beside rustinfer.py"),
            (capability < 80, f"compute capability is {capability / 10}; the kernels need 8.0"),
            (config.block_size != cls.BLOCK_SIZE, f"--block-size is {config.block_size}; the kernels need 16"),
            (model.hidden_size % 32 or model.intermediate_size % 32 or model.head_dim % 32
             or model.head_dim > cls.MAX_HEAD_DIM,
             f"hidden_size {model.hidden_size}, intermediate_size {model.intermediate_size} and head_dim "
             f"{model.head_dim} must be multiples of 32, head_dim at most 128"),
            (model.group_size > cls.MAX_GROUP, f"{model.group_size} query heads share a KV head; at most 16 may"),
            (model.attention_bias or model.mlp_bias, "the kernels have no biases"))
        return next((reason for hit, reason in limits if hit), None)

    @property
    def _num_slices(self) -> int:
        """Parts of the vocabulary that sample_scan looks at one by one."""
        size = 128 * -(-self.config.vocab_size // (1 << 17))
        return -(-self.config.vocab_size // size)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one block of attention_prefill: 8 warps, each with 16 rows of (token, head of the group)."""
        return 8 * (16 // self.group_size)

    @property
    def name(self) -> str:
        graphs = "eager" if self.engine_config.enforce_eager else "captured decode"
        return f"CUDA kernels (sm_{self.capability}, {graphs}{', programmatic launch' if self._launcher else ''})"

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        with self.xp.cuda.Device(self.device_index), self.stream:
            yield

    def close(self) -> None:
        """Wait for what still runs, then give the card its memory back."""
        with contextlib.suppress(Exception):  # a lost card cannot be waited for
            self.stream.synchronize()
        self._upload = self.buffers = self.state = self.cos_sin = self._modules = self._kernels = None
        self.records = self.scores = self.masks = self._step = None
        super().close()

    # -- before the first step

    def bind(self, config: ModelConfig, max_model_len: int, block_size: int) -> None:
        self.config, self.block_size, self.group_size = config, block_size, config.group_size
        self.max_blocks = -(-max_model_len // block_size)
        self._compile()
        self._allocate(max_model_len)

    def _compile(self) -> None:
        """Compile the kernels for this model; CuPy keeps the result on disk, under a name that our hash is part of."""
        c = self.config
        dims = dict(HIDDEN=c.hidden_size, INTER=c.intermediate_size, HEADS=c.num_attention_heads,
                    KV_HEADS=c.num_kv_heads, HEAD_DIM=c.head_dim, VOCAB=c.vocab_size, BLOCK_SIZE=self.block_size)
        headers = b"".join(path.read_bytes() for path in sorted(self.folder.glob("*.cuh")))
        dims["HEADERS_HASH"] = f"0x{hashlib.sha256(headers).hexdigest()[:8]}"  # CuPy does not look into headers
        self._modules = {name: self._compile_one(name, dims) for name in self.FILES}
        for name, width in dict(output=c.q_size, down=c.intermediate_size).items():
            self._modules[name] = self._compile_one("add_linear", dict(dims, WIDTH=width))
        self._kernels: dict[tuple[str, str], Any] = {}

    def _compile_one(self, name: str, dims: dict[str, Any]) -> Any:
        """-fmad=false: where a multiplication and an addition become one is written down (fmaf), not the compiler's."""
        source = (self.folder / f"{name}.cu").read_text(encoding="utf-8")
        macros = (f"-D{key}={value}" for key, value in dims.items())
        module = self.xp.RawModule(code=source, options=("-std=c++17", "-fmad=false", f"-I{self.folder}", *macros))
        try:
            module.compile()  # or CuPy would leave it to the first launch
        except Exception as error:
            raise DeviceError(
                f"kernels/{name}.cu cannot be compiled: {type(error).__name__}: {shorten(str(error).strip(), 2000)}; "
                "the compiler (NVRTC) comes with rustinfer[cuda12] and rustinfer[cuda13]") from error
        return module

    def _allocate(self, max_model_len: int) -> None:
        """Everything a step needs besides weights and KV cache."""
        c, limits = self.config, self.engine_config
        rows, seats = limits.max_num_seqs, limits.max_num_seqs + 1
        tokens = self.max_tokens = max(limits.max_num_batched_tokens or self.DEFAULT_BATCHED_TOKENS, rows)
        max_chunks = -(-max_model_len // self.CHUNK)
        f32, i32, u16, u32 = np.float32, np.int32, np.uint16, np.uint32
        shapes = dict(
            x=((tokens, c.hidden_size), f32), normed=((tokens, c.hidden_size), u16), scales=((tokens,), f32),
            q=((tokens, c.q_size), u16), attended=((tokens, c.q_size), u16), h=((tokens, c.intermediate_size), u16),
            logits=((rows, c.vocab_size), f32), positions=((tokens,), i32), slot_mapping=((tokens,), i32),
            partials=((rows, c.num_kv_heads, max_chunks, c.group_size, c.head_dim + 2), f32),
            split_sums=((4 * self.num_processors * 128 * 128,), f32), linear_tickets=((self.num_processors,), u32),
            attention_tickets=((rows, c.num_kv_heads), u32),
            counts=((seats, c.vocab_size), u16), slices=((rows, 4 * self._num_slices), u32), ring=((1,), i32),
            sample_ticket=((1,), u32), none_given=((rows,), i32))
        self.buffers = SimpleNamespace(**{name: self.xp.zeros(*shape) for name, shape in shapes.items()})
        self.buffers.none_given.fill(-1)
        self.state = SeatState(self.xp, seats, self.max_blocks)
        self.masks = SeatMasks(self.xp, self.stream, seats, c.vocab_size)
        self.records, self.scores = self._make_records(self.RING, rows), self._make_records(tokens)
        table = np.concatenate(rope_tables(c, max_model_len), 1).swapaxes(1, 2)  # (max_model_len, D/2, 2)
        self.cos_sin = self.xp.asarray(np.ascontiguousarray(table))

    def _make_records(self, *shape: int) -> np.ndarray:
        """Records of sample.cu in pinned memory, which kernels write to."""
        size = math.prod(shape) * self.RECORD
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(4 * size), np.int32, size).reshape(*shape, self.RECORD)

    def load_weight(self, parts: Seq[RawTensor]) -> Any:
        rows = [len(part.data) for part in parts]
        weight = self.xp.empty((sum(rows), parts[0].data.shape[1]), np.uint16)
        for part, stop in zip(parts, np.cumsum(rows).tolist()):
            self._upload.copy(part, weight[stop - len(part.data) : stop].reshape(-1))
        return weight

    def kv_cache_shape(self, num_blocks: int) -> tuple[tuple[int, ...], Any]:
        """Keys of a block are (K, S, D), values (K, D, S), bf16; the block behind the last is for padding rows."""
        c = self.config
        return (2, c.num_layers, num_blocks + 1, c.kv_size * self.block_size), np.uint16

    # -- a step

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever CuPy raises becomes a DeviceError, or a SettingsError when memory was short."""
        try:
            yield
        except (SettingsError, CheckpointError):
            raise
        except Exception as error:  # CuPy's errors share no base
            if isinstance(error, DeviceError) and error.__cause__:  # one of these within another
                raise
            # CuPy's pool has its own error; pinned memory, streams and graphs have the runtime's.
            if isinstance(error, self.xp.cuda.memory.OutOfMemoryError) or str(error).endswith(": out of memory"):
                raise SettingsError(
                    f"the card's memory is not enough: {error}; lower --max-num-seqs, --max-num-batched-tokens, "
                    "--max-model-len or --gpu-memory-utilization, or take a smaller model") from error
            raise DeviceError(f"{type(error).__name__}: {error} (last kernel launched: {self.last_kernel})") from error

    def _launch(self, module: str, entry: str, grid: tuple[int, ...], block: int, *args: Any, shared: int = 0) -> None:
        """Start a kernel; int and float arguments become int32 and float32, None a null pointer."""
        self.last_kernel = entry if entry.startswith(module) else f"{entry} ({module})"
        kernel = self._kernels.get((module, entry))
        if kernel is None:
            kernel = self._kernels[module, entry] = self._modules[module].get_function(entry)
            if shared > 48 << 10:
                kernel.max_dynamic_shared_size_bytes = shared
        kinds = {int: np.int32, float: np.float32, type(None): lambda _: np.uint64(0)}
        args = [kinds[type(arg)](arg) if type(arg) in kinds else arg for arg in args]
        if self._launcher is None:
            kernel(grid, (block,), args, shared_mem=shared)  # on the current stream, which is ours
            return
        plain = [arg if isinstance(arg, np.generic) else np.uint64(arg.data.ptr) for arg in args]
        self._launcher.launch(kernel.kernel.ptr, grid, (block,), plain, shared, self.stream.ptr)

    def _linear(self, module: str, op: str, tokens: int, units: int, tiles: int, args: Seq[Any]) -> None:
        """Launch a product on rows that are bf16 already: linear_stream for few rows, else linear_tiled.

        The weight's rows come in `units` of as many n8 `tiles`; where blocks are few, four share the work of one.
        """
        if tokens <= self.STREAM_ROWS:
            self._launch(module, f"{op}_stream", (units,), 128, *args, tokens)
            return
        _, rows, weight_rows, threads, shared = next(tile for tile in self.TILES if tokens <= tile[0])
        columns, blocks = -(-units // (weight_rows // 8 // tiles)), -(-tokens // rows)
        splits = 4 if columns * blocks < self.num_processors else 1
        self._launch(module, f"{op}_tiled_{rows}", (columns, blocks, splits), threads, *args, tokens,
                     self.buffers.split_sums, self.buffers.linear_tickets, shared=shared)

    def _normed(self, x: Any, weight: Any, tokens: int, rows: Any = None) -> tuple[Any, Any]:
        b = self.buffers
        self._launch("rms_norm", "rms_norm", (tokens,), 32, b.normed, b.scales, x, weight, rows,
                     self.config.rms_norm_eps)
        return b.normed, b.scales

    def prepare(self, step: CudaStep) -> CudaStep:
        self._step = step
        return step

    def embedding(self, step: CudaStep, table: Any) -> Any:
        b, state = self.buffers, self.state
        self._launch("embedding", "embedding", (step.num_tokens,), 128, b.x, b.positions, b.slot_mapping, table,
                     step.input_ids, step.positions, step.seats, state.parts["last_token"],
                     state.parts["next_position"], state.parts["block_tables"], self.max_blocks)
        return b.x

    def qkv_rope(self, x: Any, layer: Layer, kv_cache: Any, step: CudaStep) -> Any:
        c, b, tokens = self.config, self.buffers, step.num_tokens
        units = (c.q_size + 2 * c.kv_size) // 16
        out, place = (b.q, kv_cache[0], kv_cache[1]), (layer.qkv, self.cos_sin, b.positions, b.slot_mapping)
        if tokens <= self.FUSED_ROWS:
            self._launch("qkv_rope", "qkv_rope_fused", (units,), 128, *out, x, layer.attention_norm, *place, tokens,
                         c.rms_norm_eps)
        else:
            rows = self._normed(x, layer.attention_norm, tokens)
            self._linear("qkv_rope", "qkv_rope", tokens, units, 2, (*out, *rows, *place))
        return b.q

    def attention(self, q: Any, kv_cache: Any, step: CudaStep) -> Any:
        c, b = self.config, self.buffers
        args = (b.attended, q, kv_cache[0], kv_cache[1], b.positions, step.seats, self.state.parts["block_tables"],
                self.max_blocks)
        if step.num_decode:
            max_chunks = b.partials.shape[2]
            splits = -(-2 * self.num_processors // (c.num_kv_heads * step.num_decode))
            splits = min(splits, -(-max_chunks // 4))
            self._launch("attention", "attention_decode", (c.num_kv_heads, step.num_decode, splits), 128, *args,
                         b.partials, b.attention_tickets, max_chunks, c.head_dim**-0.5)
        if step.num_tiles:
            self._launch("attention", "attention_prefill", (step.num_tiles, c.num_kv_heads), 256, *args, step.tiles,
                         c.head_dim**-0.5, shared=512 * c.head_dim)
        return b.attended

    def add_linear(self, x: Any, y: Any, weight: Any, bias: Any) -> Any:
        module = "output" if y is self.buffers.attended else "down"
        self._linear(module, "add_linear", self._step.num_tokens, self.config.hidden_size // 8, 1, (x, y, weight))
        return x

    def gate_up(self, x: Any, layer: Layer) -> Any:
        c, b, tokens = self.config, self.buffers, self._step.num_tokens
        units = c.intermediate_size // 8
        if tokens <= self.FUSED_ROWS:
            self._launch("gate_up", "gate_up_fused", (units,), 128, b.h, x, layer.mlp_norm, layer.gate_up, tokens,
                         c.rms_norm_eps)
        else:
            rows = self._normed(x, layer.mlp_norm, tokens)
            self._linear("gate_up", "gate_up", tokens, units, 2, (b.h, *rows, layer.gate_up))
        return b.h

    def lm_head(self, x: Any, norm: Any, head: Any, step: CudaStep) -> Any:
        c, b, rows = self.config, self.buffers, step.num_rows
        units = -(-c.vocab_size // 16)
        if not rows:
            return b.logits
        if rows <= self.FUSED_ROWS and step.rows is None:
            self._launch("lm_head", "lm_head_fused", (units,), 128, b.logits, x, norm, head, rows, c.rms_norm_eps)
        else:
            normed = self._normed(x, norm, rows, step.rows)
            self._linear("lm_head", "lm_head", rows, units, 2, (b.logits, *normed, head))
        return b.logits

    # -- around the model, for CudaRunner

    def sample(self, step: CudaStep) -> None:
        """Draw a token for each row of the logits: to the seats, and to the next place of the ring (`records`)."""
        b, rows, state = self.buffers, step.num_rows, self.state
        parts = [state.parts[name] for name in ("floats", "ints", "bias_ids", "bias_values")]
        rows_of = (b.slices, b.logits, step.row_seats)
        self._launch("sample", "sample_scan", (-(-self._num_slices // 8), rows), 256, *rows_of, *parts, b.counts,
                     self.masks.array, state.num_seats)
        self._launch("sample", "sample_draw", (rows,), 512, np.uint64(self.records.ctypes.data), b.ring,
                     b.sample_ticket, state.parts["last_token"], state.parts["next_position"], b.counts, *rows_of,
                     step.rows, b.positions, *parts, self.masks.array, state.num_seats, self.records.shape[1])

    def score(self, token_ids: Any, num_top: Any, place: int) -> None:
        """Log-probabilities of given tokens, one a row of the logits, to `scores` from a place on; both (R,) int32."""
        records, b = np.uint64(self.scores[place:].ctypes.data), self.buffers
        self._launch("sample", "score", (len(token_ids),), 512, records, b.slices, b.logits, token_ids, num_top)

    def score_step(self, given: list[tuple[int, int, int]], norm: Any, head: Any) -> np.ndarray:
        """Records of tokens that stand behind tokens of the step that was launched last; waits for them.

        given: (which token of the step, the token behind it, how many to list); they take turns in the logits' memory.
        """
        b, lists = self.buffers, self._send(np.array(list(zip(*given)), np.int32))
        for start in range(0, len(given), len(b.logits)):
            rows, token_ids, num_top = (lists[i, start : start + len(b.logits)] for i in range(3))
            self.lm_head(b.x, norm, head, dataclasses.replace(self._step, rows=rows, num_rows=len(rows)))
            self.score(token_ids, num_top, start)
        self.stream.synchronize()
        return self.scores[: len(given)]

    def reset_counts(self, seat: int, prompt: list[int], output: list[int]) -> None:
        """Count a sequence's tokens anew, for its penalties."""
        self._launch("sample", "reset_counts", (-(-self.config.vocab_size // 2048),), 256, self.buffers.counts, seat,
                     self._send(np.array(prompt + output, np.int32)), len(prompt), len(prompt) + len(output))

    def patch_state(self, patches: list[tuple[int, int]]) -> None:
        """Write (place, value) pairs into the seats' state; the last of several to one place counts."""
        pairs = np.array(list(dict(patches).items()), np.int32)
        self._launch("patch_state", "patch_state", (-(-len(pairs) // 128),), 128, self.state.array,
                     self._send(pairs), len(pairs))

    def _send(self, array: np.ndarray) -> Any:
        """A copy on the device, made in the current stream's order, which is ours.

        From pageable memory a copy may wait for the stream, and nothing promises that it is over when the call returns:
        CuPy takes it from a pinned buffer, which it keeps as long as needed.
        """
        return self.xp.asarray(array)

    def decode_step(self, size: int) -> CudaStep:
        """The step that a graph holds: every row one token that the card knows, on the seat `row_seats` says."""
        none, seats = self.buffers.none_given[:size], self.state.parts["row_seats"][:size]
        return CudaStep(none, none, seats, size, size, None, 0, None, seats, size)

    def mixed_step(self, tokens: list[tuple[int, int, int]], num_decode: int, tiles: list[tuple[int, int]],
                   rows: list[int]) -> CudaStep:
        """A step from the host's lists; tokens: (id, position, seat), rows: the tokens whose logits are wanted."""
        ids, positions, seats = zip(*tokens)
        lists = (ids, positions, seats, rows, [seats[row] for row in rows], [n for tile in tiles for n in tile])
        starts = np.cumsum([0, *(-(-len(values) // 4) * 4 for values in lists)]).tolist()  # 16-byte aligned
        packed = np.zeros(starts[-1], np.int32)
        for start, values in zip(starts, lists):
            packed[start : start + len(values)] = values
        sent = self._send(packed)
        part = [sent[start : start + len(values)] for start, values in zip(starts, lists)]
        return CudaStep(*part[:3], len(tokens), num_decode, part[5], len(tiles), *part[3:5], len(rows))

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` launches."""
        self.stream.begin_capture()
        try:
            work()
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return graph


def find_card(wanted: str) -> tuple[Any, str]:
    """CuPy's device for `auto` or `cuda:N`, or None with the reason; `cuda:N` that cannot be had is an error."""
    index = 0 if wanted == "auto" else int(wanted.partition(":")[2])
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        if index >= count:
            raise ValueError(f"CuPy sees {count} card(s)")
        device = cupy.cuda.Device(index)
        device.use()  # fails where the card is taken, or has no memory left for a context
        return device, f"CuPy sees {count} card(s)"
    except Exception as error:  # CuPy's own errors cannot be named before it is imported
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
        cause = error.__cause__ or error  # a CuPy that cannot be loaded draws a box around what was wrong
        reason = "CuPy is not installed" if is_missing else shorten(str(cause).strip().split("\n")[0])
    if wanted != "auto":
        raise SettingsError(
            f"--device: {wanted!r} cannot be used: {reason}; install rustinfer[cuda12] or use --device cpu")
    return None, f"no card: {reason}"


def pick_card_backend(config: EngineConfig, model: ModelConfig, reason: str) -> tuple[ArrayBackend, str]:
    """The backend for the card in use, and in words why it was chosen."""
    import cupy

    folder = find_data("kernels")
    refusal = CudaBackend.why_not(cupy, config, model, folder)
    if refusal is None:
        return CudaBackend(cupy, config, folder), reason
    return ArrayBackend(cupy, batch_invariant=not config.no_batch_invariant), f"{reason}; no kernels: {refusal}"


# ==============================================================================
# CPU -- the backend whose ops are C: kernels/*.c, compiled at first use by the system's compiler
# uses: Errors, Settings, Checkpoint, Backend, CUDA
# ==============================================================================


def c_struct(name: str, **kinds: Any) -> type[ctypes.Structure]:
    """A struct as in kernels/*.h: keywords are fields, None stands for an int64 or an address."""
    return type(name, (ctypes.Structure,), {
        "_fields_": [(field, ctypes.c_int64 if kind is None else kind) for field, kind in kinds.items()]})


def words(names: str) -> dict[str, None]:
    return dict.fromkeys(names.split())


CWeight = c_struct("Weight", **words("data rows columns format"))
CStack = c_struct("Stack", **words("weights num_weights bias"))
CModel = c_struct("Model", **words("hidden_size intermediate_size num_heads num_kv_heads head_dim block_size"),
                  rms_norm_eps=ctypes.c_double, **words("cos sin arithmetic one_token"))
CLayer = c_struct("Layer", **words("attention_norm mlp_norm"), qkv=CStack, output=CStack, gate_up=CStack, down=CStack)
CBuffers = c_struct("Buffers", **words("normed qkv q attended gate_up h packed"))
CAttention = c_struct("AttentionShape", **words("num_sequences max_blocks num_heads num_kv_heads head_dim block_size "
                                                "cu_seqlens_q positions block_tables"))
CStep = c_struct("Step", **words("num_tokens positions slot_mapping"), attention=CAttention)
CLayers = c_struct("Layers", **words("x layers num_layers keys values layer_stride model step buffers"))
CEmbedding = c_struct("Embedding", x=None, table=CWeight, **words("input_ids num_tokens"))
CHead = c_struct("Head", **words("logits normed x rows num_rows norm"), head=CStack, **words("packed model"))
FLOAT32, PAIRS, TILED = range(3)  # enum Arithmetic of kernels/linear.h


class KernelError(RustinferError):
    """The CPU kernels cannot be built, loaded or trusted on this machine; NumPy does the work then."""


def usable_cores() -> int:
    """Physical cores that this process may keep busy: no more than its affinity and its container's quota allow."""
    limits = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limits.append(-(-int(quota) // int(period)))
    return max(1, min(limits))


class KernelCompiler:
    """Compiles kernels/*.c into a shared library, once for a state of sources, compiler and CPU."""

    # -ffp-contract=off: what is fused is spelled out (fma_vec), so that every sum has one result
    FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
    TIMEOUT = 300  # seconds
    _scratch: Path | None = None

    def __init__(self, folder: Path):
        self._sources = sorted(folder.glob("*.c"))
        headers = sorted(folder.glob("*.h"))
        if not self._sources:
            raise KernelError(f"{folder} has no C files")
        wanted = os.environ.get("CC", "")
        self.compiler = next(filter(None, map(shutil.which, [wanted] if wanted else ("cc", "gcc", "clang"))), None)
        if self.compiler is None:
            raise KernelError(f"there is no C compiler ({f'CC={wanted}' if wanted else 'cc, gcc or clang'})")
        self._native, self.macros = self._find_native()
        sources = b"".join(path.read_bytes() for path in self._sources + headers)
        recipe = " ".join((self.compiler, *self.FLAGS, self._native))
        self._key = hashlib.sha256(b"\0".join((sources, recipe.encode(), self.macros.encode()))).hexdigest()[:32]

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run([self.compiler, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  errors="replace", timeout=self.TIMEOUT)
        except subprocess.TimeoutExpired:
            raise KernelError(f"{self.compiler} took more than {self.TIMEOUT} s") from None
        except OSError as error:
            raise KernelError(f"{self.compiler}: {shorten(str(error))}") from None
        if done.returncode:
            said = " ".join(done.stderr.split()) or str(done.returncode)
            raise KernelError(f"{self.compiler} failed: {shorten(said, 400)}")
        return done.stdout

    def _find_native(self) -> tuple[str, str]:
        """The flag for this very CPU, and the macros that it sets: they name the compiler and the instructions."""
        error = None
        for flag in ("-march=native", "-mcpu=native"):
            try:
                return flag, self._run(flag, "-dM", "-E", "-x", "c", os.devnull)
            except KernelError as failed:
                error = error or failed
        raise error

    @property
    def description(self) -> str:
        """Such as "gcc 12.2, AVX2"."""
        macro = dict(re.findall(r"^#define (\w+) (.+)$", self.macros, re.MULTILINE))
        keys = ("__clang_major__", "__clang_minor__") if "__clang__" in macro else ("__GNUC__", "__GNUC_MINOR__")
        version = f"{'clang' if '__clang__' in macro else 'gcc'} {'.'.join(macro[key] for key in keys)}"
        names = {"__AMX_BF16__": "AMX", "__AVX512F__": "AVX-512", "__AVX2__": "AVX2", "__ARM_NEON": "NEON"}
        return f"{version}, {next((name for key, name in names.items() if key in macro), 'no vectors')}"

    def library(self) -> Path:
        """The path of the library, compiled unless an earlier start left it whole: its name ends in its digest."""
        try:
            folder = self._cache_folder()
            for path in folder.glob(f"kernels-{self._key}-*.so"):
                if path.name == self._name(path):
                    return path
                path.unlink(missing_ok=True)  # loaded, it could kill the process
            return self._compile(folder)
        except OSError as error:
            raise KernelError(f"there is no place to keep them: {shorten(str(error))}") from None

    def _name(self, path: Path) -> str:
        return f"kernels-{self._key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"

    def _compile(self, folder: Path) -> Path:
        log.info("compiling the CPU kernels with %s", self.compiler)
        partial = folder / f"kernels-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            self._run(*self.FLAGS, self._native, *map(str, self._sources), "-o", str(partial), "-lm")
            path = folder / self._name(partial)
            os.replace(partial, path)  # whole or not at all, whoever else compiles now
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def _cache_folder(cls) -> Path:
        """A folder that is ours alone: code is loaded from it. Without a home, one for this process."""
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rustinfer"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            if os.access(folder, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
                return folder
        except (OSError, RuntimeError):
            pass
        if cls._scratch is None or not cls._scratch.is_dir():  # a forked process removes it when it ends
            scratch = tempfile.TemporaryDirectory(prefix="rustinfer-")
            atexit.register(scratch.cleanup)
            cls._scratch = Path(scratch.name)
        return cls._scratch


def open_kernels(path: Path) -> ctypes.CDLL:
    """The library with the types of what we call."""
    address, number = ctypes.c_void_p, ctypes.c_int64
    try:
        kernels = ctypes.CDLL(str(path))
        kernels.team_create.restype = address
        kernels.team_free.argtypes = kernels.team_size.argtypes = (address,)
        for name in ("run_embedding", "run_layers", "run_lm_head"):
            getattr(kernels, name).argtypes = (address, address)
        kernels.fastest_arithmetic.restype = kernels.layout.restype = number
        kernels.sample_rows.argtypes = (address, address, address, number, number, address, address)
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path}: {shorten(str(error))}") from None
    layout = 0
    for kind in (CWeight, CStack, CModel, CLayer, CBuffers, CAttention, CStep, CLayers, CEmbedding, CHead):
        layout = 31 * layout + ctypes.sizeof(kind)
    if kernels.layout() != layout:
        raise KernelError("kernels/ belongs to another version of rustinfer.py")
    return kernels


class CpuWeight(NamedTuple):
    """A weight where the kernels read it: the tensors of a stack stay where they lie."""

    tensors: list[np.ndarray]  # (F, C) uint16 (the bits of bfloat16) or float32
    structs: Any  # an array of CWeight

    @classmethod
    def of(cls, tensors: list[np.ndarray]) -> CpuWeight:
        kinds = {np.dtype(np.uint16): 0, np.dtype(np.float32): 1}  # enum Format
        structs = [CWeight(t.ctypes.data, *t.shape, kinds[t.dtype]) for t in tensors]
        return cls(tensors, (CWeight * len(structs))(*structs))

    def stack(self, bias: np.ndarray | None = None) -> Any:
        return CStack(ctypes.addressof(self.structs), len(self.structs), 0 if bias is None else bias.ctypes.data)


class HugePages:
    """Memory for copied weights, in huge pages where the system has them: reading it misses the TLB less often."""

    ARENA, PAGE = 1 << 30, 1 << 21

    def __init__(self, threads: int = 1):
        self._left, self._threads = np.empty(0, np.uint8), threads

    def copy(self, array: np.ndarray) -> np.ndarray:
        if len(self._left) < array.nbytes + 64:
            self._left = self._arena(max(self.ARENA, array.nbytes + 64))
        stop = -(-array.nbytes // 64) * 64
        place, self._left = self._left[: array.nbytes], self._left[stop:]
        copied = place.view(array.dtype).reshape(array.shape)
        bounds = [len(array) * i // self._threads for i in range(self._threads + 1)]
        with ThreadPoolExecutor(self._threads) as pool:  # most of the time goes into the first touch of each page
            list(pool.map(lambda start, stop: np.copyto(copied[start:stop], array[start:stop]), bounds, bounds[1:]))
        return copied

    def _arena(self, size: int) -> np.ndarray:
        """Address space; memory comes when it is first written."""
        pages = mmap.mmap(-1, size + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, np.uint8)
        return memory[-memory.ctypes.data % self.PAGE :][:size]


class CpuStep(NamedTuple):
    """A step as the kernels need it."""

    batch: Batch
    struct: Any


class CpuBackend(ArrayBackend):
    """The ops as C: weights as they lie in the checkpoint, float32 elsewhere, a team of threads for a whole step.

    A row's bits depend on nothing but its own request: a product sums in one order for one token and for many
    (kernels/linear.c), and so does attention.
    """

    MAX_HEAD_DIM = 256  # as in attention.c
    SMALL_MODEL, SMALL_STEP = 1 << 24, 1 << 27  # bytes of weights; times tokens: less is not worth waking other threads
    EXACT_MODEL = 1 << 25  # weights: with fewer a step is quick enough in float32, and its answers are the reference's

    ROUNDINGS = ("", ", bfloat16 activations", ", bfloat16 activations in AMX tiles")  # by enum Arithmetic

    def __init__(self, kernels: ctypes.CDLL, description: str, config: EngineConfig, arithmetic: int = FLOAT32):
        self.kernels, self.engine_config, self.arithmetic = kernels, config, arithmetic
        self._description = description + self.ROUNDINGS[arithmetic]
        teams = [kernels.team_create(size) for size in (config.threads or usable_cores(), 1)]
        if None in teams:
            for team in filter(None, teams):
                kernels.team_free(team)
            raise KernelError("there is no memory for threads")
        self.team, self._alone = teams
        super().__init__(np)  # holds BLAS at one thread: its threads and ours would wait for each other
        self.threads = kernels.team_size(self.team)
        # tiles hold 16 tokens: for a single one vectors are faster, but give it other bits
        self._one_token = PAIRS if arithmetic == TILED and config.no_batch_invariant else arithmetic
        self._pages = HugePages(self.threads) if config.weights == "copy" else None
        self._weight_bytes = 0
        self._capacity = 0

    @classmethod
    def why_not(cls, model: ModelConfig) -> str | None:
        """What keeps this model from running on the kernels, or None."""
        c = model
        units = {"hidden_size": (c.hidden_size, 16), "intermediate_size": (c.intermediate_size, 16),
                 "num_attention_heads * head_dim": (c.q_size, 16), "head_dim": (c.head_dim, 8)}
        odd = next((name for name, (width, unit) in units.items() if width % unit), None)
        if odd:
            return f"{odd} is {units[odd][0]}; the kernels need a multiple of {units[odd][1]}"
        if c.head_dim > cls.MAX_HEAD_DIM:
            return f"head_dim is {c.head_dim}; the kernels have at most {cls.MAX_HEAD_DIM}"
        return None

    @property
    def name(self) -> str:
        return f"C kernels ({self._description}, {self.threads} thread{'s' * (self.threads > 1)})"

    def close(self) -> None:
        if self.team:
            self.kernels.team_free(self.team)
            self.kernels.team_free(self._alone)
            self.team = None
            super().close()
        self._buffers = self._pages = self._logits = None
        self._seen = (None, None)

    # -- before the first step

    def bind(self, config: ModelConfig, max_model_len: int, block_size: int) -> None:
        super().bind(config, max_model_len, block_size)
        c = config
        self._model = CModel(c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_kv_heads, c.head_dim,
                             block_size, c.rms_norm_eps, self.cos.ctypes.data, self.sin.ctypes.data, self.arithmetic,
                             self._one_token)
        self._seen: tuple[Any, Any] = (None, None)

    def calibrate(self, shapes: Iterable[tuple[int, int]], head_dim: int) -> None:
        """Nothing to find out: the kernels' order of summation is their own."""

    def load_weight(self, parts: Seq[RawTensor]) -> CpuWeight:
        self._weight_bytes += sum(part.data.nbytes for part in parts)
        return CpuWeight.of([self._place(part) for part in parts])

    def _place(self, part: RawTensor) -> np.ndarray:
        """The tensor where the file is mapped, or a copy; float16, which the kernels have not, becomes float32."""
        data = part.to_float32() if part.dtype == "F16" else part.data
        if self._pages is not None:
            return self._pages.copy(data)
        return data if data.ctypes.data % 4 == 0 else data.copy()  # a header may have an odd length

    def kv_cache_shape(self, num_blocks: int) -> tuple[tuple[int, ...], Any]:
        """Keys of a block are (K, D, S), values (K, S, D), so that attention reads both along its vectors."""
        c = self.config
        return (2, c.num_layers, num_blocks, c.kv_size * self.block_size), np.float32

    def _reserve(self, num_tokens: int, num_rows: int) -> None:
        """Buffers for as many tokens and rows of logits; pages come when they are first written."""
        if num_tokens <= self._capacity and num_rows <= len(self._logits):
            return
        c, limits = self.config, self.engine_config
        tokens = self._capacity = max(num_tokens, limits.max_num_batched_tokens or self.DEFAULT_BATCHED_TOKENS)
        widths = dict(x=c.hidden_size, normed=c.hidden_size, qkv=c.q_size + 2 * c.kv_size, q=c.q_size,
                      attended=c.q_size, gate_up=2 * c.intermediate_size, h=c.intermediate_size)
        self._buffers = {name: np.empty((tokens, width), np.float32) for name, width in widths.items()}
        self._logits = np.empty((max(num_rows, limits.max_num_seqs), c.vocab_size), np.float32)
        packed = np.empty(-(-tokens // 16) * 16 * max(c.q_size, c.hidden_size, c.intermediate_size) + 16, np.float32)
        self._buffers["packed"] = packed[-packed.ctypes.data % 64 // 4 :]
        self._buffer_struct = CBuffers(**{name: array.ctypes.data for name, array in self._buffers.items()
                                          if name != "x"})

    # -- a step

    def prepare(self, batch: Batch) -> CpuStep:
        self._reserve(len(batch.input_ids), len(batch.logits_indices))
        c, tables = self.config, np.ascontiguousarray(batch.block_tables)
        batch.block_tables = tables
        attention = CAttention(len(tables), tables.shape[1], c.num_attention_heads, c.num_kv_heads, c.head_dim,
                               self.block_size, batch.cu_seqlens_q.ctypes.data, batch.positions.ctypes.data,
                               tables.ctypes.data)
        return CpuStep(batch, CStep(len(batch.input_ids), batch.positions.ctypes.data, batch.slot_mapping.ctypes.data,
                                    attention))

    def embedding(self, step: CpuStep, table: CpuWeight) -> np.ndarray:
        ids, x = step.batch.input_ids, self._buffers["x"][: len(step.batch.input_ids)]
        size = len(ids)
        self._call("run_embedding", CEmbedding(x.ctypes.data, table.structs[0], ids.ctypes.data, size), size)
        return x

    def run_layers(self, x: np.ndarray, layers: list[Layer], kv_cache: np.ndarray, step: CpuStep) -> np.ndarray:
        self._call("run_layers", CLayers(
            x.ctypes.data, ctypes.addressof(self._structs(layers)), len(layers), kv_cache[0].ctypes.data,
            kv_cache[1].ctypes.data, math.prod(kv_cache.shape[2:]), ctypes.addressof(self._model),
            ctypes.addressof(step.struct), ctypes.addressof(self._buffer_struct)), len(x))
        return x

    def _structs(self, layers: list[Layer]) -> Any:
        """The layers as the kernels see them; made once."""
        if self._seen[0] is not layers:
            structs = (CLayer(layer.attention_norm.ctypes.data, layer.mlp_norm.ctypes.data,
                              layer.qkv.stack(layer.qkv_bias), layer.output.stack(layer.output_bias),
                              layer.gate_up.stack(layer.gate_up_bias), layer.down.stack(layer.down_bias))
                       for layer in layers)
            self._seen = layers, (CLayer * len(layers))(*structs)
        return self._seen[1]

    def lm_head(self, x: np.ndarray, norm: np.ndarray, head: CpuWeight, step: CpuStep) -> np.ndarray:
        rows, logits = step.batch.logits_indices, self._logits[: len(step.batch.logits_indices)]
        self._call("run_lm_head", CHead(
            logits.ctypes.data, self._buffers["normed"].ctypes.data, x.ctypes.data, rows.ctypes.data, len(rows),
            norm.ctypes.data, head.stack(), self._buffers["packed"].ctypes.data, ctypes.addressof(self._model)),
            len(rows))
        return logits

    def team_for(self, num_tokens: int) -> int:
        """The threads for so many tokens: where a step takes microseconds, one does not wait for another."""
        small = self._weight_bytes < self.SMALL_MODEL and self._weight_bytes * num_tokens < self.SMALL_STEP
        return self._alone if small else self.team

    def _call(self, name: str, argument: ctypes.Structure, num_tokens: int) -> None:
        getattr(self.kernels, name)(self.team_for(num_tokens), ctypes.byref(argument))


class RoundedBackend(ArrayBackend):
    """The array twin of products that round their activations: bfloat16 weights meet bfloat16 activations."""

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        rounded = RawTensor(to_bfloat16(RawTensor(np.ascontiguousarray(x), "F32")), "BF16").to_float32()
        is_bfloat16 = not (weight.view(np.uint32) & 0xFFFF).any()
        return super().linear(rounded if is_bfloat16 else x, weight, bias)


def probe_model(model: ModelConfig) -> ModelConfig:
    """Two small layers with the model's widths, where those are not large, and with biases."""
    return dataclasses.replace(
        model, num_layers=2, vocab_size=35, num_attention_heads=2 * model.group_size, num_kv_heads=2,
        intermediate_size=min(model.intermediate_size, 1216), attention_bias=True, mlp_bias=True)


def run_probe(backend: ArrayBackend, config: ModelConfig, block_size: int, pieces: list[tuple[int, int]]) -> np.ndarray:
    """The logits of a sequence that is computed in pieces [start, stop), with random weights."""
    rng, c = default_rng(0), config

    def weight(*heights: int, width: int = c.hidden_size) -> Any:  # bfloat16: either sign, 1/64 to 1/16
        draw = lambda height: np.frombuffer(rng.bytes(2 * height * width), np.uint16).reshape(height, width)
        bits = [(draw(height) & 0x80FF) + np.uint16(0x3C80) for height in heights]
        return backend.load_weight([RawTensor(part, "BF16") for part in bits])

    vector = lambda size: backend.load_vector([RawTensor(rng.random(size, np.float32), "F32")])
    wide = lambda height, width: backend.load_weight([RawTensor(rng.random((height, width), np.float32) - 0.5, "F32")])
    backend.bind(config, 64, block_size)
    inner, hidden = c.intermediate_size, c.hidden_size
    q, kv = c.q_size, c.kv_size
    layers = [Layer(vector(hidden), weight(q, kv, kv), vector(q + 2 * kv), output(hidden, width=q),
                    vector(hidden), vector(hidden), weight(inner, inner), vector(2 * inner),
                    weight(hidden, width=inner), vector(hidden)) for output in (weight, wide)]
    table, norm, outputs = weight(c.vocab_size), vector(c.hidden_size), []
    num_blocks = -(-pieces[-1][1] // block_size)
    shape, dtype = backend.kv_cache_shape(num_blocks + 1)
    kv_cache, tables = np.zeros(shape, dtype), np.arange(num_blocks, 0, -1)[None]
    for start, stop in pieces:
        at = np.arange(start, stop)
        step = backend.prepare(Batch(at, at, tables[0, at // block_size] * block_size + at % block_size,
                                     np.array([0, stop - start]), tables, at - start))
        x = backend.run_layers(backend.embedding(step, table), layers, kv_cache, step)
        outputs.append(backend.lm_head(x, norm, table, step).copy())
    return np.concatenate(outputs)


def check_kernels(kernels: ctypes.CDLL, config: EngineConfig, model: ModelConfig, arithmetic: int) -> None:
    """Compare the kernels with NumPy on this machine, at the model's widths; KernelError when they differ."""
    probe, size = probe_model(model), config.block_size
    whole, pieces = [(0, 25)], [(0, 17), *((at, at + 1) for at in range(17, 21)), (21, 25)]
    twin, allowed = (ArrayBackend, 1e-4) if arithmetic == FLOAT32 else (RoundedBackend, 4e-3)
    expected = run_probe(twin(batch_invariant=False), probe, size, whole)
    small = dataclasses.replace(config, weights="mmap", max_num_batched_tokens=None)
    backend = CpuBackend(kernels, "", small, arithmetic)
    backend.SMALL_MODEL = 0  # with all threads, although the probe is small
    try:
        found, again = (run_probe(backend, probe, size, tokens) for tokens in (whole, pieces))
    finally:
        backend.close()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error < allowed:
        raise KernelError(f"their results differ from NumPy's by {error:.1e} of the largest")
    if not config.no_batch_invariant and (found != again).any():
        raise KernelError("a token's bits depend on the tokens beside it")


def load_cpu_kernels(config: EngineConfig, model: ModelConfig) -> CpuBackend:
    """The backend with C kernels, as fast as they can be trusted; KernelError says why it cannot be had."""
    if config.cpu_kernels == "off":
        raise KernelError("--cpu-kernels off")
    folder = find_data("kernels")
    if folder is None:
        raise KernelError("there is no folder kernels/ beside rustinfer.py")
    if refusal := CpuBackend.why_not(model):
        raise KernelError(refusal)
    compiler = KernelCompiler(folder)
    kernels = open_kernels(compiler.library())
    exact = config.cpu_kernels == "float32" or model.num_weights < CpuBackend.EXACT_MODEL
    arithmetic = FLOAT32 if exact else kernels.fastest_arithmetic()
    while True:
        try:
            check_kernels(kernels, config, model, arithmetic)
            return CpuBackend(kernels, compiler.description, config, arithmetic)
        except KernelError as error:
            if arithmetic == FLOAT32:
                raise
            log.warning("the C kernels do without%s: %s", CpuBackend.ROUNDINGS[arithmetic][1:], error)
            arithmetic -= 1


def pick_backend(config: EngineConfig, model: ModelConfig) -> tuple[ArrayBackend, str]:
    """The backend for `config.device`, and in words why it was chosen."""
    reason = "--device cpu"
    if config.device != "cpu":
        device, reason = find_card(config.device)
        if device is not None:
            return pick_card_backend(config, model, reason)
    try:
        return load_cpu_kernels(config, model), reason
    except KernelError as error:
        return ArrayBackend(np, config.threads or min(usable_cores(), 16), not config.no_batch_invariant), (
            f"{reason}; no C kernels: {error}")


# ==============================================================================
# Model -- the Llama forward pass over one mixed batch
# uses: Checkpoint, Backend
# ==============================================================================


class Llama:
    """The model: weights on the device, and `run`, which computes one step."""

    def __init__(self, config: ModelConfig, backend: ArrayBackend, max_model_len: int, block_size: int):
        self.config, self.backend, self.block_size = config, backend, block_size
        backend.bind(config, max_model_len, block_size)
        self.kv_cache: Any = None  # as `kv_cache_shape` of the backend says
        self.num_parameters = 0

    def load(self, checkpoint: Checkpoint, progress: Callable[[float], None] = lambda part: None) -> None:
        """Read every weight into the backend's format."""
        c, table = self.config, (self.config.vocab_size, self.config.hidden_size)
        self.backend.calibrate([*c.layer_shapes, table], c.head_dim)
        self.embed = self._read(checkpoint, ["model.embed_tokens"], table)
        self.layers = []
        for index in range(c.num_layers):
            self.layers.append(self._read_layer(checkpoint, f"model.layers.{index}."))
            progress((index + 1) / (c.num_layers + 1))
        self.norm = self._read(checkpoint, ["model.norm"], (c.hidden_size,))
        self.head = self.embed if c.tie_word_embeddings else self._read(checkpoint, ["lm_head"], table)
        progress(1.0)

    def _read(self, checkpoint: Checkpoint, names: list[str], *shapes: tuple[int, ...], kind: str = "weight") -> Any:
        """One tensor, or several stacked along the first axis."""
        parts = [checkpoint.tensor(f"{name}.{kind}", shape) for name, shape in zip(names, shapes)]
        self.num_parameters += sum(part.data.size for part in parts)
        return (self.backend.load_weight if len(shapes[0]) == 2 else self.backend.load_vector)(parts)

    def _read_layer(self, checkpoint: Checkpoint, prefix: str) -> Layer:
        c = self.config
        q, kv, hidden, inner = c.q_size, c.kv_size, c.hidden_size, c.intermediate_size

        def read(biased: bool, names: str, width: int, *heights: int) -> tuple[Any, Any]:
            full = [prefix + name for name in names.split()]
            bias = self._read(checkpoint, full, *[(h,) for h in heights], kind="bias") if biased else None
            return self._read(checkpoint, full, *[(h, width) for h in heights]), bias

        return Layer(
            self._read(checkpoint, [prefix + "input_layernorm"], (hidden,)),
            *read(c.attention_bias, "self_attn.q_proj self_attn.k_proj self_attn.v_proj", hidden, q, kv, kv),
            *read(c.attention_bias, "self_attn.o_proj", q, hidden),
            self._read(checkpoint, [prefix + "post_attention_layernorm"], (hidden,)),
            *read(c.mlp_bias, "mlp.gate_proj mlp.up_proj", hidden, inner, inner),
            *read(c.mlp_bias, "mlp.down_proj", inner, hidden))

    def kv_block_bytes(self) -> int:
        """Bytes of one KV block over all layers."""
        (small, dtype), (large, _) = map(self.backend.kv_cache_shape, (1, 2))
        return (math.prod(large) - math.prod(small)) * np.dtype(dtype).itemsize

    def allocate_kv_cache(self, num_blocks: int) -> None:
        shape, dtype = self.backend.kv_cache_shape(num_blocks)
        self.kv_cache = self.backend.xp.zeros(shape, dtype)  # on the host the pages come when first written

    def run(self, batch: Batch) -> Any:
        """One step: writes the new tokens' keys and values, returns the wanted logits (R, V) in float32."""
        ops, step = self.backend, self.backend.prepare(batch)
        x = ops.embedding(step, self.embed)
        x = ops.run_layers(x, self.layers, self.kv_cache, step)
        return ops.lm_head(x, self.norm, self.head, step)

    def close(self) -> None:
        """Drop the weights and the cache, and give the device its memory back."""
        self.layers, self.embed, self.head, self.norm, self.kv_cache = [], None, None, None, None
        self.backend.close()


# ==============================================================================
# Sampler -- logits to token ids and log-probabilities
# uses: Settings, Backend, CPU
# ==============================================================================


def philox_uniform(xp: Any, seeds: Any, choices: Any, positions: Any) -> Any:
    """One number in (0, 1) for each row, a pure function of its seed, choice and position.

    Philox4x32-10 (Salmon et al. 2011): key = the seed's two words, counter = (position, choice, 0, 0).
    seeds (n,) uint64, choices, positions (n,) -> (n,) float64 with 32 random bits.
    """
    low, high = lambda x: x & xp.uint64(0xFFFFFFFF), lambda x: x >> xp.uint64(32)  # words
    keys = [low(seeds), high(seeds)]
    counter = [low(positions.astype(xp.uint64)), low(choices.astype(xp.uint64)),
               xp.zeros_like(seeds), xp.zeros_like(seeds)]
    for _ in range(10):
        first, second = counter[0] * xp.uint64(0xD2511F53), counter[2] * xp.uint64(0xCD9E8D57)
        counter = [high(second) ^ counter[1] ^ keys[0], low(second), high(first) ^ counter[3] ^ keys[1], low(first)]
        keys = [low(keys[0] + xp.uint64(0x9E3779B9)), low(keys[1] + xp.uint64(0xBB67AE85))]
    return (counter[0].astype(xp.float64) + 0.5) / 2.0**32


class Sampled(NamedTuple):
    """One drawn token; logprob and top are None unless asked for, `finite` is False when the logits were broken."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] | None  # likeliest first: (token id, logprob)
    finite: bool


class Sampler:
    """Draws one token a row; each row has its own parameters, and no row's draw depends on another row."""

    def __init__(self, backend: ArrayBackend):
        self._backend, self._xp = backend, backend.xp

    def sample(self, logits: Any, params: Seq[SamplingParams], seeds: Seq[int], choices: Seq[int], positions: Seq[int],
               histories: Seq[tuple[Seq[int], Seq[int]]] | None = None,
               masks: Seq[np.ndarray | None] | None = None) -> list[Sampled]:
        """logits (B, V) float32; row b is drawn with params[b] from (seeds[b], choices[b], positions[b]).

        histories[b] is (prompt token ids, output token ids); only a row with penalties needs it. masks[b] (V,) bool is
        True for the tokens that may come; None allows all.
        """
        xp, to_host = self._xp, self._backend.to_host
        raw, logits = logits, self._forbid(self._adjust(logits, params, histories), masks)
        likeliest = logits.argmax(-1)  # a NaN counts as the greatest
        finite = to_host(xp.isfinite(xp.take_along_axis(logits, likeliest[:, None], -1))[:, 0]).tolist()
        token_ids = likeliest.copy()
        filtered = lambda p: p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        for wanted in (False, True):  # only rows with a filter pay for sorting the vocabulary
            drawn = [row for row, p in enumerate(params) if p.temperature > 0 and filtered(p) == wanted]
            if not drawn:
                continue
            rows = self._backend.to_device(np.array(drawn))
            array = lambda values, kind: self._backend.to_device(np.array([values[row] for row in drawn], kind))
            uniform = philox_uniform(xp, array(seeds, np.uint64), array(choices, np.int64), array(positions, np.int64))
            draw = self._draw_filtered if wanted else self._draw
            token_ids[rows] = draw(logits[rows], [params[row] for row in drawn], uniform)
        logprobs = self._logprobs(raw, token_ids, [p.logprobs for p in params])
        return [Sampled(token, *logprobs.get(row, (None, None)), ok)
                for row, (token, ok) in enumerate(zip(to_host(token_ids).tolist(), finite))]

    def _adjust(self, logits: Any, params: Seq[SamplingParams], histories: Any) -> Any:
        """Penalties, then logit_bias, in float32; a logit that is not finite stays what it is, a finite one finite."""
        changed = [row for row, p in enumerate(params) if p.has_penalties or p.logit_bias]
        if not changed:
            return logits
        xp, adjusted, most = self._xp, logits.copy(), np.finfo(np.float32).max
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # the least repetition penalties; NaN
            for row in changed:
                if params[row].has_penalties:
                    self._penalise(adjusted[row], params[row], *histories[row])
                if params[row].logit_bias:
                    self._add_bias(adjusted[row], *zip(*params[row].logit_bias))
        return xp.where(xp.isfinite(logits), xp.clip(adjusted, -most, most), logits)

    def _forbid(self, logits: Any, masks: Seq[np.ndarray | None] | None) -> Any:
        """logits (B, V) with -inf for tokens that may not come; broken logits stay broken."""
        rows = [row for row, mask in enumerate(masks or ()) if mask is not None]
        if not rows:
            return logits
        logits = logits.copy()
        for row in rows:
            allowed = self._backend.to_device(masks[row]) | self._xp.isnan(logits[row])
            logits[row] = self._xp.where(allowed, logits[row], self._xp.float32(-self._xp.inf))
        return logits

    def _penalise(self, logits: Any, params: SamplingParams, prompt: Seq[int], output: Seq[int]) -> None:
        """Lower (or raise) the logits (V,) of the tokens so far, in place."""
        token_ids, places = np.unique(np.array([*prompt, *output], np.int64), return_inverse=True)
        counts = np.bincount(places[len(prompt) :], minlength=len(token_ids)).astype(np.float32)
        xp, token_ids, counts = self._xp, self._backend.to_device(token_ids), self._backend.to_device(counts)
        values, repetition = logits[token_ids], np.float32(params.repetition_penalty)
        values = xp.where(values > 0, values / repetition, values * repetition)
        values = values - np.float32(params.frequency_penalty) * counts
        logits[token_ids] = values - np.float32(params.presence_penalty) * xp.minimum(counts, 1)

    def _add_bias(self, logits: Any, token_ids: Seq[int], values: Seq[float]) -> None:
        """logits (V,), in place."""
        token_ids = self._backend.to_device(np.array(token_ids))
        logits[token_ids] = logits[token_ids] + self._backend.to_device(np.array(values, np.float32))

    def _column(self, params: list[SamplingParams], name: str) -> Any:
        return self._backend.to_device(np.array([getattr(p, name) for p in params], np.float64))[:, None]

    def _draw(self, logits: Any, params: list[SamplingParams], uniform: Any) -> Any:
        """Invert the distribution at `uniform`: logits (n, V), uniform (n,) -> token ids (n,)."""
        return self._invert(self._xp.exp(self._scale(logits, params)), uniform)

    def _scale(self, logits: Any, params: list[SamplingParams]) -> Any:
        """(logits - their maximum) / temperature in float64; the likeliest is 0 at any temperature."""
        wide = logits.astype(self._xp.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # -inf at the least temperatures, NaN from broken logits
            return (wide - wide.max(-1, keepdims=True)) / self._column(params, "temperature")

    def _invert(self, weights: Any, uniform: Any) -> Any:
        """The first place at which the running sum passes `uniform` of the whole."""
        sums = self._xp.cumsum(weights, -1)
        place = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)
        return self._xp.minimum(place, weights.shape[-1] - 1)

    def _draw_filtered(self, logits: Any, params: list[SamplingParams], uniform: Any) -> Any:
        """As `_draw`, among the tokens that top_k, min_p and top_p leave, likeliest first."""
        xp, column = self._xp, functools.partial(self._column, params)
        scaled = self._scale(logits, params)
        order = xp.argsort(-scaled, axis=-1, kind="stable")
        weights = xp.exp(xp.take_along_axis(scaled, order, -1))
        rank, top_k = xp.arange(weights.shape[-1]), column("top_k")
        weights = xp.where((rank < xp.where(top_k > 0, top_k, xp.inf)) & (weights >= column("min_p")), weights, 0.0)
        sums = xp.cumsum(weights, -1)
        in_top_p = sums - weights < column("top_p") * sums[:, -1:]  # with the token that reaches it
        weights = xp.where(in_top_p, weights, 0.0)
        return xp.take_along_axis(order, self._invert(weights, uniform)[:, None], -1)[:, 0]

    def score(self, logits: Any, token_ids: Seq[int], num_top: Seq[int]) -> list[Sampled]:
        """Tokens that were not drawn but given: logits (n, V), of each the token that followed and how many to list."""
        scores, size = [], 32  # rows at a time: a vocabulary's float64 are large
        for start in range(0, len(token_ids), size):
            given, wanted = token_ids[start : start + size], num_top[start : start + size]
            found = self._logprobs(logits[start : start + size], self._backend.to_device(np.array(given)), wanted)
            scores += [Sampled(token, *found[row], not math.isnan(found[row][0])) for row, token in enumerate(given)]
        return scores

    def _logprobs(self, logits: Any, token_ids: Any, num_top: Seq[int | None]) -> dict[int, tuple[float, tuple]]:
        """Row -> (the token's logprob, the likeliest tokens) for the rows that ask, with how many of these."""
        asked = [row for row, count in enumerate(num_top) if count is not None]
        if not asked:
            return {}
        xp, rows = self._xp, self._backend.to_device(np.array(asked))
        values = self._backend.log_softmax(logits[rows])
        chosen = self._backend.to_host(xp.take_along_axis(values, token_ids[rows][:, None], -1)[:, 0])
        values = self._backend.to_host(values)
        return {row: (float(chosen[i]), self._top(values[i], num_top[row])) for i, row in enumerate(asked)}

    @staticmethod
    def _top(values: np.ndarray, k: int) -> tuple[tuple[int, float], ...]:
        """The k likeliest, of equal ones those with the least ids."""
        k = min(k, len(values))
        best = np.flatnonzero(values >= np.partition(values, -k)[-k]) if k else np.empty(0, np.int64)
        ranked = best[np.lexsort((best, -values[best]))][:k]
        return tuple((int(token), float(values[token])) for token in ranked)


class CpuSampler(Sampler):
    """Sampler with kernels/sample.c; penalties and biases stay with the arrays."""

    DRAW = np.dtype([*((name, "f8") for name in ("temperature", "top_p", "min_p")),
                     *((name, "i8") for name in ("top_k", "num_top", "choice", "position")), ("seed", "u8")])
    DRAWN = np.dtype([("token_id", "i8"), ("finite", "i8"), ("num_top", "i8"), ("logprob", "f8"),
                      ("top_ids", "i8", 20), ("top_logprobs", "f8", 20)])

    def sample(self, logits: np.ndarray, params: Seq[SamplingParams], seeds: Seq[int], choices: Seq[int],
               positions: Seq[int], histories: Seq[tuple[Seq[int], Seq[int]]] | None = None,
               masks: Seq[np.ndarray | None] | None = None) -> list[Sampled]:
        raw = np.ascontiguousarray(logits, np.float32)
        adjusted = np.ascontiguousarray(self._forbid(self._adjust(raw, params, histories), masks), np.float32)
        draws = np.array([(p.temperature, p.top_p, p.min_p, p.top_k, -1 if p.logprobs is None else p.logprobs, *place)
                          for p, *place in zip(params, choices, positions, seeds)], self.DRAW)
        drawn = np.empty(len(draws), self.DRAWN)
        team = self._backend.team_for(len(raw))
        self._backend.kernels.sample_rows(team, adjusted.ctypes.data, raw.ctypes.data, *raw.shape,
                                          draws.ctypes.data, drawn.ctypes.data)
        columns = zip(*(drawn[name].tolist() for name in ("token_id", "finite", "num_top")))
        return [Sampled(token, *self._listed(drawn[row], count), bool(finite))
                for row, (token, finite, count) in enumerate(columns)]

    @staticmethod
    def _listed(record: np.void, count: int) -> tuple[float | None, tuple | None]:
        """The token's logprob and the likeliest tokens of a row that asked for them."""
        if count < 0:
            return None, None
        top = zip(record["top_ids"][:count].tolist(), record["top_logprobs"][:count].tolist())
        return float(record["logprob"]), tuple(top)


# ==============================================================================
# Grammar -- which tokens may come next, so that an answer has the shape that was asked for
# uses: Errors, Tokenizer
# ==============================================================================


class Structure(NamedTuple):
    """The shape that an answer must have, and the request field that asked for it."""

    kind: str  # json (a schema), regex, lark or calls (text with calls inside: the beginning and schema of each)
    source: Any
    param: str
    label: str = ""  # what the client calls it, for the log


def pack_bits(allowed: np.ndarray) -> np.ndarray:
    """(n,) bool -> (ceil(n / 32),) uint32, the lowest bit first; 0 behind the last."""
    bits, packed = np.zeros(-(-len(allowed) // 32), np.uint32), np.packbits(allowed, bitorder="little")
    bits.view(np.uint8)[: len(packed)] = packed
    return bits


class Constraint:
    """The state of one answer in its grammar. One thread at a time uses it."""

    def __init__(self, matcher: Any, vocab_size: int, param: str = "structured_outputs"):
        self._matcher, self._vocab_size, self._param, self._failed = matcher, vocab_size, param, False

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._param)

    def bits(self) -> np.ndarray:
        """The tokens that may come next, as `pack_bits`; all where the matcher fails: `accept` refuses any then."""
        mask = self._ask("compute_bitmask", otherwise=None)
        if mask is None:
            return pack_bits(np.ones(self._vocab_size, bool))
        found = np.frombuffer(mask, np.uint32)
        bits = np.zeros(-(-self._vocab_size // 32), np.uint32)
        bits[: len(found)] = found[: len(bits)]
        bits[-1] &= np.uint32(0xFFFFFFFF >> -self._vocab_size % 32)
        return bits

    def accept(self, token_id: int) -> bool:
        """Goes on behind a token; False when the grammar cannot."""
        return not self._failed and self._ask("consume_token", token_id, otherwise=False)

    @property
    def is_complete(self) -> bool:
        """True when nothing more may come."""
        return self._ask("is_stopped", otherwise=False) and not self._ask("is_error", otherwise=True)

    def problem(self) -> Exception:
        """Why `accept` refused: what was asked for is beyond the matcher's limits, or the matcher is broken."""
        found = self._ask("get_error", otherwise="") if self._ask("is_error", otherwise=False) else ""
        if found:
            return APIError(f"{self._param} cannot be enforced: {shorten(found)}", self._param)
        return EngineError("the grammar refused a token that it had allowed")

    def _ask(self, question: str, *arguments: Any, otherwise: Any) -> Any:
        """What the matcher says, or `otherwise` where it fails: that ends its request, and others in the step go on."""
        try:
            return getattr(self._matcher, question)(*arguments)
        except BaseException as error:  # a panic in Rust is no Exception
            log.error("a grammar failed: %s", shorten(error))
            self._failed = True
            return otherwise


def check_exact(value: Any, param: str, wanted: bool = False) -> None:
    """Raise APIError for an integer in `const` or `enum` that llguidance, which counts in doubles, would round."""
    if isinstance(value, dict):
        for key, item in value.items():  # a property may have that name: what it has is a schema
            check_exact(item, param, wanted or (key in ("const", "enum") and not isinstance(item, dict)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_exact(item, param, wanted)
    elif wanted and isinstance(value, int) and abs(value) > 1 << 53:
        raise APIError(f"{param} asks for the integer {shorten(str(value))}; from -2^53 to 2^53 it can be enforced",
                       param)


class GrammarTrial:
    """Compiles grammars in a process of its own before the server does: a few end it or never end.

    llguidance recurses as deep as references go, and counts with some numbers (`multipleOf`) for hours; neither can be
    caught in the process in which it happens. Needs about 50 ms, once for each grammar.
    """

    SECONDS, MAX_KNOWN = 5, 1 << 12
    CODE = """
import json, sys, threading
sys.path, grammar = json.load(sys.stdin)
from llguidance import LLMatcher, LLTokenizer
threading.stack_size(1 << 20)  # less than the server's threads have
thread = threading.Thread(target=LLMatcher, args=(LLTokenizer("byte"), grammar), kwargs={"log_level": 0})
thread.start()
thread.join()
"""

    def __init__(self):
        self._lock, self._known = threading.Lock(), {}  # what was found, by the grammar's hash

    def problem(self, grammar: str) -> str:
        """Why the grammar cannot be compiled, or ""."""
        key = hashlib.sha256(grammar.encode()).digest()
        found = self._known.get(key)
        if found is None:
            with self._lock:  # one trial at a time, and one of each grammar
                found = self._known.get(key)
                if found is None:
                    if len(self._known) >= self.MAX_KNOWN:
                        self._known.clear()
                    found = self._known[key] = self._run(grammar)
        return found

    def _run(self, grammar: str) -> str:
        if getattr(sys, "frozen", False):  # then sys.executable is the program and no Python
            return ""
        try:
            done = subprocess.run([sys.executable, "-P", "-c", self.CODE], timeout=self.SECONDS, start_new_session=True,
                                  input=json.dumps([list(map(str, sys.path)), grammar]).encode(),
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return f"compiling it takes more than {self.SECONDS} s"
        except OSError as error:
            log.warning("grammars are compiled without a trial: %s", shorten(str(error)))
            return ""
        return f"its compiler dies of it (signal {-done.returncode})" if done.returncode < 0 else ""


class GrammarCompiler:
    """Makes constraints with llguidance (the extra `structured`); any thread may call it."""

    MAX_SOURCE = 1 << 16  # characters
    SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._lock, self._inner, self._trial = threading.Lock(), None, GrammarTrial()

    def _load(self, param: str) -> Any:
        """(llguidance, its tokenizer), made at the first use."""
        try:
            llguidance = importlib.import_module("llguidance")
        except ImportError:
            raise UnsupportedError(f"{param} needs llguidance, which is not installed here: "
                                   "pip install 'llguidance>=1.9'", param) from None
        with self._lock:
            if self._inner is None:
                self._inner = llguidance.LLTokenizer(self._tokenizer.inner.to_str(), n_vocab=self._vocab_size,
                                                     eos_token=self._eos or None)
        return llguidance, self._inner

    def compile(self, structure: Structure) -> Constraint:
        """Raises APIError, naming the field, for what is not a schema or a grammar, or is too large."""
        text = structure.source if isinstance(structure.source, str) else json.dumps(structure.source)
        if len(text) > self.MAX_SOURCE:
            raise APIError(f"{structure.param} has {len(text)} characters; {self.MAX_SOURCE} are allowed",
                           structure.param)
        check_exact(structure.source, structure.param)
        try:
            llguidance, tokenizer = self._load(structure.param)
            grammar = self._grammar(llguidance, structure.kind, structure.source, text)
            problem = self._trial.problem(grammar)
            if not problem:
                found = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
                problem = found.get_error() if found.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            raise APIError(f"{structure.param} cannot be enforced: {shorten(problem)}", structure.param)
        return Constraint(found, self._vocab_size, structure.param)

    def _grammar(self, llguidance: Any, kind: str, source: Any, text: str) -> str:
        """llguidance's own form of the structure; text: the source as a string."""
        matcher = llguidance.LLMatcher
        if kind == "json":
            return matcher.grammar_from_json_schema(text, defaults=self.SPACING)
        if kind == "calls":
            tags = [llguidance.StructTag(trigger=begin, begin=begin, end="}",
                                         grammar={**schema, "x-guidance": self.SPACING}) for begin, schema in source]
            return llguidance.StructTag.to_grammar(tags, assume_special=False)
        return (matcher.grammar_from_regex if kind == "regex" else matcher.grammar_from_lark)(text)


# ==============================================================================
# II. MANY REQUESTS AT ONCE
# ==============================================================================
# KV cache -- blocks, reference counts, prefix hashes; no arrays
# uses: Errors, Settings, Sampler, Grammar
# ==============================================================================


class Tenant(NamedTuple):
    """Whose a request is: shares of the engine are per name, cached prefixes per salt."""

    name: str = ""
    salt: bytes = b""


PENDING = -1  # a token that a launched step draws and nobody has read yet; only the last two of a sequence can be


class Sequence:
    """One prompt and its growing answer: tokens, where their KV lies, and how it may end."""

    def __init__(self, seq_id: int, prompt_token_ids: Seq[int], params: SamplingParams, seed: int, salt: bytes = b"",
                 choice: int = 0, tenant: str = "", constraint: Constraint | None = None,
                 end_token_ids: Iterable[int] = ()):
        self.seq_id, self.params, self.seed, self.tenant, self.salt = seq_id, params, seed, tenant, salt
        self.choice = choice  # which of a request's n answers
        self.constraint, self.end_token_ids = constraint, frozenset(end_token_ids)  # its shape; tokens that end it
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = math.inf if params.max_tokens is None else self.num_prompt_tokens + params.max_tokens
        self.num_computed_tokens = 0  # tokens whose KV is written
        self.num_cached_tokens = 0  # prompt tokens taken from the prefix cache when first admitted
        self.num_preemptions = 0
        self.block_table: list[int] = []  # BlockManager fills it
        self.block_hashes: list[bytes] = []  # of this sequence's full blocks, as far as they were needed
        self.prompt_scores: list[Sampled] = []  # of the prompt's tokens from the second on, where they are asked for

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute before the next one can be drawn: 1 in decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probability is still to be found."""
        asked = self.params.prompt_logprobs is not None
        return self.num_prompt_tokens - 1 - len(self.prompt_scores) if asked else 0

    def places_to_score(self, count: int) -> range:
        """Of the next `count` tokens those whose logits score the prompt token behind them."""
        stop = min(self.num_computed_tokens + count, self.num_prompt_tokens - 1) if self.num_unscored else 0
        return range(max(self.num_computed_tokens, len(self.prompt_scores)), stop)

    @property
    def history(self) -> tuple[list[int], list[int]]:
        """Prompt token ids and output token ids."""
        return self.token_ids[: self.num_prompt_tokens], self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_mask(self) -> bool:
        """True when not every token may come next; a pending token counts as put out."""
        return self.constraint is not None or self.num_output_tokens < self.params.min_tokens

    @property
    def is_full(self) -> bool:
        """True when its last token is on its way and no further one may follow."""
        return len(self.token_ids) >= self.max_num_tokens


class Block:
    """A KV block: who uses it, and what its contents are called once it is full."""

    __slots__ = ("ref_count", "hash", "token_ids")

    def __init__(self):
        self.ref_count, self.hash, self.token_ids = 0, None, ()


class BlockManager:
    """Hands out KV blocks and shares the full ones of equal prefixes.

    Who owns block b (tokens [i * S, (i+1) * S) of each owner, at place i of its table):
        ref_count > 0   the sequences that list it; it is not in `free`
        ref_count = 0   nobody; it is in `free`, oldest first, and keeps its contents and its name until reused
    A block is named by SHA-256 of its parent's name and its tokens, starting from the tenant's salt; `named` maps a
    name to the one block that carries it. Only full blocks whose KV is written are named.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.named: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """The name of the sequence's full block `index`."""
        while len(seq.block_hashes) <= index:
            parent = seq.block_hashes[-1] if seq.block_hashes else hashlib.sha256(seq.salt).digest()
            tokens = self._tokens(seq, len(seq.block_hashes))
            seq.block_hashes.append(hashlib.sha256(parent + np.array(tokens, np.int64).tobytes()).digest())
        return seq.block_hashes[index]

    def _tokens(self, seq: Sequence, index: int) -> tuple[int, ...]:
        return tuple(seq.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def find_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that already hold the sequence's beginning; at least one token is left to compute.

        A prompt that is to be scored finds none: no logits are cached.
        """
        found = []
        if self.prefix_caching and not seq.num_unscored:
            for index in range((seq.num_tokens - 1) // self.block_size):
                block_id = self.named.get(self._hash(seq, index))
                if block_id is None or self.blocks[block_id].token_ids != self._tokens(seq, index):
                    break
                found.append(block_id)
        return found

    def blocks_needed(self, seq: Sequence, prefix: list[int]) -> int:
        """Free blocks that admitting the sequence takes: new ones, and shared ones nobody uses at present."""
        return self.blocks_for(seq.num_tokens) - sum(self.blocks[b].ref_count > 0 for b in prefix)

    def admit(self, seq: Sequence, prefix: list[int]) -> None:
        """Give the sequence its prefix and new blocks for the rest of its tokens."""
        for block_id in prefix:
            self.blocks[block_id].ref_count += 1
            self.free.pop(block_id, None)
        seq.block_table = list(prefix)
        seq.num_computed_tokens = len(prefix) * self.block_size
        self.grow(seq)

    def grow(self, seq: Sequence) -> None:
        """Extend the table to hold all of the sequence's tokens; the caller has checked `num_free`."""
        while len(seq.block_table) < self.blocks_for(seq.num_tokens):
            block_id, _ = self.free.popitem(last=False)
            block = self.blocks[block_id]
            self._unname(block)  # its contents are overwritten now
            block.ref_count = 1
            seq.block_table.append(block_id)

    def name_full_blocks(self, seq: Sequence, start: int, stop: int) -> None:
        """Name the blocks that became full when the sequence's tokens [start, stop) were computed."""
        if not self.prefix_caching:
            return
        for index in range(start // self.block_size, stop // self.block_size):
            name, block = self._hash(seq, index), self.blocks[seq.block_table[index]]
            if block.hash is None and name not in self.named:
                block.hash, block.token_ids = name, self._tokens(seq, index)
                self.named[name] = seq.block_table[index]

    def forget(self, seq: Sequence) -> None:
        """Take the names of the sequence's blocks away: what they hold is not to be shared any more."""
        for block_id in seq.block_table:
            self._unname(self.blocks[block_id])

    def _unname(self, block: Block) -> None:
        if block.hash is not None:
            del self.named[block.hash]
            block.hash, block.token_ids = None, ()

    def release(self, seq: Sequence) -> None:
        """Take the sequence's blocks back; the last of a prefix is the first to be reused."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free[block_id] = None
                if block.hash is None:
                    self.free.move_to_end(block_id, last=False)  # nothing worth keeping
        seq.block_table, seq.num_computed_tokens = [], 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise EngineError unless every block is owned as the class promises; `sequences` are all that own any."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            full = self.blocks_for(seq.num_tokens)  # the block of a token just drawn comes with the next step
            if seq.block_table and len(seq.block_table) not in (full, self.blocks_for(seq.num_tokens - 1)):
                raise EngineError(f"sequence {seq.seq_id}: {len(seq.block_table)} blocks for {seq.num_tokens} tokens")
            for index, block_id in enumerate(seq.block_table):
                counts[block_id] += 1
                if self.blocks[block_id].token_ids not in ((), self._tokens(seq, index)):
                    raise EngineError(f"block {block_id} holds other tokens than sequence {seq.seq_id} has there")
        for block_id, block in enumerate(self.blocks):
            is_free = block_id in self.free
            if block.ref_count != counts[block_id] or is_free != (block.ref_count == 0):
                raise EngineError(f"block {block_id}: ref_count {block.ref_count}, used by {counts[block_id]} "
                                  f"sequences, {'free' if is_free else 'not free'}")
            if block.hash is not None and self.named.get(block.hash) != block_id:
                raise EngineError(f"block {block_id} carries a name that belongs to another block")
        if len(self.named) != sum(block.hash is not None for block in self.blocks):
            raise EngineError("a name belongs to a block that does not carry it")


# ==============================================================================
# Scheduler -- which sequences run in the next step, and how many tokens of each
# uses: KV cache
# ==============================================================================


Step = dict[Sequence, int]  # what one step computes: each sequence with its num_scheduled_tokens


class FairQueue:
    """The sequences that wait: a line for each tenant, first come, first served.

    Next is the line of the tenant who was served the fewest tokens (of equal ones: who runs less, who came first). A
    tenant who comes back begins with the least count of those who are there: neither debts nor savings are kept. This
    is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
    """

    def __init__(self):
        self._lines: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}  # tokens, of tenants who wait or run

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for line in self._lines.values() for seq in line)

    def _line(self, tenant: str) -> deque[Sequence]:
        """The tenant's line, begun where there is none."""
        self._served.setdefault(tenant, min(self._served.values(), default=0))
        return self._lines.setdefault(tenant, deque())

    def append(self, seq: Sequence) -> None:
        self._line(seq.tenant).append(seq)

    def put_first(self, seq: Sequence) -> None:
        """Back to the head of its tenant's line."""
        self._line(seq.tenant).appendleft(seq)

    def remove(self, seq: Sequence) -> None:
        self._lines[seq.tenant].remove(seq)
        if not self._lines[seq.tenant]:
            del self._lines[seq.tenant]

    def next(self, running: Seq[Sequence]) -> Sequence:
        """Whose turn it is."""
        if len(self._lines) == 1:
            return next(iter(self._lines.values()))[0]
        counts = Counter(seq.tenant for seq in running)
        heads = [line[0] for line in self._lines.values()]
        return min(heads, key=lambda seq: (self._served[seq.tenant], counts[seq.tenant], seq.seq_id))

    def charge(self, step: Step) -> None:
        """A step's tokens were given to its sequences."""
        for seq, count in step.items():
            self._served[seq.tenant] += count

    def forget_idle(self, tenant: str, running: Iterable[Sequence]) -> None:
        """Keep no count of a tenant who has nothing left here."""
        if tenant not in self._lines and not any(seq.tenant == tenant for seq in running):
            self._served.pop(tenant, None)

    def lengths(self) -> dict[str, int]:
        """How many wait of each tenant."""
        return {tenant: len(line) for tenant, line in self._lines.items()}

    def position(self, seq: Sequence) -> int:
        """How many are before it when the lines take turns."""
        place = self._lines[seq.tenant].index(seq)
        others = (len(line) for tenant, line in self._lines.items() if tenant != seq.tenant)
        return place + sum(min(length, place + 1) for length in others)


class Scheduler:
    """Fair between tenants, first come, first served for each; at most max_num_seqs at once and max_num_batched_tokens
    a step.

    There is no prefill mode: a step runs decoding sequences first (one token each) and spends the rest of its budget
    on prompts. Of the prompts the oldest gets at least half, the others follow shortest first: a long prompt
    neither starves nor holds up a short one.

    A tenant whose turn it is and who runs less than an equal share does not wait for long: if PATIENCE steps admit
    nobody, be it for want of places or blocks, the newest sequences of the tenant most over that share are preempted.

    A sequence whose tokens nobody reads is put aside until somebody does: it has neither blocks nor a turn then.
    """

    PATIENCE = 4  # steps
    MAX_SCORED = 128  # tokens a step of a prompt that is to be scored: each makes a row of logits

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # as admitted; see `schedule`
        self.aside: set[Sequence] = set()  # they neither wait nor run
        self._asked: dict[Sequence, bool] = {}  # who shall be put aside, or go on
        self.num_preemptions = 0
        self._num_held = 0  # steps in a row in which the next in turn waited below its share

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._asked)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def is_full_for(self, tenant: str, most: int) -> bool:
        """True when `most` sequences wait, beside those that the next step admits, and the tenant has its part of them.

        So a line that one tenant filled is open to the others; all together are less than most * (1 + ln most).
        """
        if len(self.waiting) < most:
            return False
        lines = self.waiting.lengths()
        if lines.setdefault(tenant, 0) < most // len(lines):
            return False
        places = self.max_num_seqs - len(self.running) if self._can_admit() else 0
        return len(self.waiting) - places >= most

    def hold(self, seq: Sequence, on: bool) -> None:
        """Put a sequence aside, or let it go on, with the next step."""
        self._asked[seq] = on

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence in any state and free its blocks."""
        self._asked.pop(seq, None)
        self.aside.discard(seq)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self.waiting.forget_idle(seq.tenant, self.running)
        self.blocks.release(seq)

    def schedule(self) -> Step:
        """Choose the next step; every sequence in it has blocks for all of its tokens."""
        self._put_aside()
        self._make_room()
        self._admit()
        self._keep_shares()
        budget = self.max_num_batched_tokens
        decoding, prompts = [], []
        for seq in self.running:
            if len(seq.token_ids) - seq.num_computed_tokens > 1:
                prompts.append(seq)
            elif not seq.is_full and len(decoding) < budget:
                decoding.append(seq)
        step = dict.fromkeys(decoding, 1) | self._share(prompts, budget - len(decoding))
        if len(decoding) == budget:  # more decode than budget: whoever ran goes behind those who did not
            self.running.sort(key=lambda seq: seq in decoding)
        self.waiting.charge(step)
        return step

    def _put_aside(self) -> None:
        """Do what `hold` was asked; who goes on is the next of its tenant."""
        for seq, on in self._asked.items():
            if on and seq in self.running:
                self._take_back(seq)
            elif on and seq not in self.aside:
                self.waiting.remove(seq)
            elif not on and seq in self.aside:
                self.waiting.put_first(seq)
            (self.aside.add if on else self.aside.discard)(seq)
        self._asked.clear()

    def _make_room(self) -> None:
        """Give each running sequence the block its next token needs, preempting others where there is none."""
        for seq in list(filter(self._lacks_block, self.running)):
            while seq in self.running and self._lacks_block(seq):
                if self.blocks.num_free:
                    self.blocks.grow(seq)
                else:
                    self._preempt(self._newest())

    def _lacks_block(self, seq: Sequence) -> bool:
        """True when its newest token stands behind its last block."""
        return len(seq.token_ids) > len(seq.block_table) * self.blocks.block_size and not seq.is_full

    def can_look_ahead(self) -> bool:
        """True when the next step needs no token that is pending.

        Nobody can be admitted or must be preempted then, and no grammar is to go on behind such a token.
        """
        if self._asked or self.waiting and (self._can_admit() or self._num_held >= self.PATIENCE):
            return False
        if any(seq.constraint and seq.token_ids[-1] == PENDING and not seq.is_full for seq in self.running):
            return False
        return sum(map(self._lacks_block, self.running)) <= self.blocks.num_free

    def _newest(self) -> Sequence:
        """The newest sequence of the tenant who runs most."""
        counts = Counter(seq.tenant for seq in self.running)
        return max(self.running, key=lambda seq: (counts[seq.tenant], seq.seq_id))

    def _preempt(self, seq: Sequence) -> None:
        """Free its blocks; its tokens are computed again when it is next admitted, before any newcomer."""
        self._take_back(seq)
        self.waiting.put_first(seq)
        self.num_preemptions += 1

    def _take_back(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.release(seq)
        seq.num_preemptions += 1

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            seq = self.waiting.next(self.running)
            prefix = self._room_for(seq)
            if prefix is None:
                return
            self.waiting.remove(seq)
            self.blocks.admit(seq, prefix)
            self._num_held = 0
            if not seq.num_preemptions:
                seq.num_cached_tokens = seq.num_computed_tokens
            self.running.append(seq)

    def _can_admit(self) -> bool:
        """True when the next in turn of those who wait finds a place and its blocks."""
        return (len(self.running) < self.max_num_seqs
                and self._room_for(self.waiting.next(self.running)) is not None)

    def _room_for(self, seq: Sequence) -> list[int] | None:
        """The cached blocks that a sequence begins with; None if the others that it needs are not free."""
        prefix = self.blocks.find_prefix(seq)
        spare = len(self.running)  # a block for each running sequence, or it would soon preempt this one again
        return prefix if self.blocks.blocks_needed(seq, prefix) + spare <= self.blocks.num_free else None

    def _keep_shares(self) -> None:
        """Make room for the next in turn once it has waited long enough below its share."""
        if not self.waiting:
            self._num_held = 0
            return
        counts = Counter(seq.tenant for seq in self.running)
        seq = self.waiting.next(self.running)
        share = max(1, len(self.running) // len({seq.tenant for seq in self.waiting} | set(counts)))
        surplus = max(counts.values(), default=0) - share
        if counts[seq.tenant] >= share or surplus <= 0:
            self._num_held = 0
        elif self._num_held < self.PATIENCE:
            self._num_held += 1
        else:
            while seq in self.waiting and surplus > 0:  # its prompt may need the blocks of several
                self._preempt(self._newest())
                self._admit()
                surplus -= 1
            self._num_held = 0

    def _share(self, prompts: list[Sequence], budget: int) -> Step:
        """Tokens for the prompts, the oldest of which comes first; those that get none are left out."""
        if not prompts:
            return {}
        oldest, *others = prompts
        wanted = {seq: min(seq.num_remaining, self.MAX_SCORED) if seq.num_unscored else seq.num_remaining
                  for seq in prompts}
        reserved = min(wanted[oldest], -(-budget // 2))
        left, shares = budget - reserved, dict.fromkeys(prompts, 0)
        for seq in sorted(others, key=lambda seq: seq.num_remaining):
            shares[seq] = min(wanted[seq], left)
            left -= shares[seq]
        shares[oldest] = min(wanted[oldest], reserved + left)
        return {seq: share for seq, share in shares.items() if share}


# ==============================================================================
# Metrics -- counters, sums and a snapshot of the machine
# uses: Errors, KV cache
# ==============================================================================


class Timing:
    """When one request came, ran, spoke first and ended; seconds of a monotonic clock, and spans between them."""

    def __init__(self):
        self.arrived = time.monotonic()
        self.started = self.first_token = self.finished = None

    def _span(self, start: float | None, stop: float | None) -> float:
        now = self.finished or time.monotonic()
        return (now if stop is None else stop) - (now if start is None else start)

    @property
    def queue_s(self) -> float:
        return self._span(self.arrived, self.started)

    @property
    def prefill_s(self) -> float:
        return self._span(self.started, self.first_token)

    @property
    def decode_s(self) -> float:
        return self._span(self.first_token, self.finished)

    @property
    def ttft_s(self) -> float:
        return self._span(self.arrived, self.first_token)

    @property
    def e2e_s(self) -> float:
        return self._span(self.arrived, self.finished)


LATENCIES = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
HISTOGRAMS = {  # name in Prometheus: (what it is, upper bounds)
    "time_to_first_token_seconds": ("From arrival to the first token", LATENCIES),
    "time_per_output_token_seconds": ("Mean of a request's tokens after the first", LATENCIES),
    "e2e_request_latency_seconds": ("From arrival to the last token", LATENCIES),
    "request_queue_time_seconds": ("From arrival to the first step", LATENCIES),
    "request_prefill_time_seconds": ("From the first step to the first token", LATENCIES),
    "request_decode_time_seconds": ("From the first token to the last", LATENCIES),
    "request_prompt_tokens": ("Prompt tokens of a request", [1 << n for n in range(18)]),
    "request_generation_tokens": ("Output tokens of a request", [1 << n for n in range(18)]),
    "batch_size": ("Sequences in a step", [1 << n for n in range(11)])}
GAUGES = {"num_requests_running": "Sequences that run", "num_requests_waiting": "Sequences that wait",
          "kv_cache_usage_perc": "Part of the KV blocks in use, 0 to 1"}
COUNTERS = {"num_preemptions": "Sequences that were preempted", "steps": "Steps of the engine",
            "prompt_tokens": "Prompt tokens of finished requests that ran",
            "generation_tokens": "Output tokens",
            "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
            "prefix_cache_hits": "Prompt tokens found in the prefix cache"}
CARD_GAUGES = {"memory_used_bytes": "Memory in use on the card", "memory_total_bytes": "Memory of the card",
               "utilization_ratio": "Part of the time in which a kernel ran, 0 to 1",
               "temperature_celsius": "The card's temperature", "power_watts": "The card's power"}


class Metrics:
    """What the engine counted since it started; written under the engine's lock."""

    def __init__(self, model_name: str = ""):
        self.requests: Counter[str] = Counter()  # by finish reason
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.steps = 0
        self.ttft_s = self.queue_s = self.e2e_s = 0.0  # sums over finished requests
        self.registry = prometheus_client.CollectorRegistry()
        self._histograms = {name: prometheus_client.Histogram(
            f"rustinfer:{name}", text, ["model_name"], registry=self.registry, buckets=bounds).labels(model_name)
            for name, (text, bounds) in HISTOGRAMS.items()}
        self._served: deque[float] = deque(maxlen=32)  # seconds that the last requests ran

    def wait_s(self, position: int, num_running: int) -> float | None:
        """Seconds until a request with so many before it may start, if those that run take as long as the last ones.

        None if none has ended yet.
        """
        if not self._served:
            return None
        return (position + 1) * sum(self._served) / len(self._served) / max(1, num_running)

    def stepped(self, num_seqs: int) -> None:
        self.steps += 1
        self._histograms["batch_size"].observe(num_seqs)

    def finished(self, reason: str, seq: Sequence, timing: Timing) -> None:
        self.requests[reason] += 1
        self.ttft_s += timing.ttft_s
        self.queue_s += timing.queue_s
        self.e2e_s += timing.e2e_s
        if timing.started is not None:  # of one that only waited nothing was looked up or computed
            self.prompt_tokens += seq.num_prompt_tokens
            self.cached_tokens += seq.num_cached_tokens
            self._served.append(timing.e2e_s - timing.queue_s)
        if timing.first_token is not None:
            self._observe(seq, timing)

    def _observe(self, seq: Sequence, timing: Timing) -> None:
        for name, value in (
                ("time_to_first_token_seconds", timing.ttft_s), ("e2e_request_latency_seconds", timing.e2e_s),
                ("request_queue_time_seconds", timing.queue_s), ("request_prefill_time_seconds", timing.prefill_s),
                ("request_decode_time_seconds", timing.decode_s), ("request_prompt_tokens", seq.num_prompt_tokens),
                ("request_generation_tokens", seq.num_output_tokens)):
            self._histograms[name].observe(value)
        if seq.num_output_tokens > 1:
            self._histograms["time_per_output_token_seconds"].observe(timing.decode_s / (seq.num_output_tokens - 1))

    def snapshot(self) -> dict:
        return {"requests": dict(self.requests), "steps": self.steps, "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens, "completion_tokens": self.completion_tokens,
                "time_to_first_token_seconds": self.ttft_s, "queue_seconds": self.queue_s, "e2e_seconds": self.e2e_s}


class EngineCollector:
    """The engine's snapshot, the card's and the server's errors in Prometheus' terms."""

    def __init__(self, model_name: str, snapshot: Callable[[], dict], card: Callable[[], dict | None],
                 errors: dict[str, int]):
        self._model_name, self._snapshot, self._card, self._errors = model_name, snapshot, card, errors

    def collect(self) -> Iterator[Any]:
        """Called at each scrape."""
        core, engine, card = prometheus_client.core, self._snapshot(), self._card() or {}
        values = {**engine, "generation_tokens": engine["completion_tokens"],
                  "prefix_cache_queries": engine["prompt_tokens"], "prefix_cache_hits": engine["cached_tokens"],
                  "kv_cache_usage_perc": engine["kv_blocks_used"] / engine["kv_blocks_total"]}
        yield from (self._family(core.GaugeMetricFamily, name, text, values) for name, text in GAUGES.items())
        yield from (self._family(core.CounterMetricFamily, name, text, values) for name, text in COUNTERS.items())
        if card:
            values = {**card, "memory_used_bytes": card["memory_used_mb"] << 20,
                      "memory_total_bytes": card["memory_total_mb"] << 20,
                      "utilization_ratio": card["utilization_percent"] / 100}
            for name, text in CARD_GAUGES.items():
                if values.get(name) is not None:
                    yield self._family(core.GaugeMetricFamily, name, text, values, "gpu_")
        yield self._by("request_success", "Finished requests", "finished_reason", engine["requests"])
        yield self._by("errors", "Errors answered over HTTP", "code", dict(self._errors))

    def _family(self, kind: type, name: str, text: str, values: dict, prefix: str = "") -> Any:
        family = kind(f"rustinfer:{prefix}{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], values[name])
        return family

    def _by(self, name: str, text: str, label: str, counts: dict[str, int]) -> Any:
        family = prometheus_client.core.CounterMetricFamily(f"rustinfer:{name}", text, labels=["model_name", label])
        for value, count in counts.items():
            family.add_metric([self._model_name, value], count)
        return family


class MachineProbe:
    """The machine's load, as /v1/metrics shows it; the card's through the module pynvml where there is one."""

    def __init__(self, device_index: int | None = None, pci_bus_id: str | None = None):
        self._device_index, self._card, self._nvml = device_index, None, None
        psutil.cpu_percent()  # the first call only starts the measurement
        if device_index is not None:
            try:
                self._nvml = importlib.import_module("pynvml")
                self._nvml.nvmlInit()
                self._card = self._nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
            except Exception as error:  # no module, no driver, no such card: the card's numbers are null
                log.warning("no card metrics: %s", shorten(error))

    def snapshot(self) -> dict:
        memory, mib = psutil.virtual_memory(), 1 << 20
        return {
            "cpu": {"utilization_percent": psutil.cpu_percent(), "core_count": psutil.cpu_count() or 1},
            "memory": {"used_mb": memory.used // mib, "total_mb": memory.total // mib,
                       "available_mb": memory.available // mib},
            "gpu": self.card(),
            "timestamp": int(time.time()),
        }

    def card(self) -> dict | None:
        """The card's numbers; None where there is none."""
        if self._card is None:
            return None
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._card)
            return {
                "device_id": self._device_index,
                "utilization_percent": self._nvml.nvmlDeviceGetUtilizationRates(self._card).gpu,
                "memory_used_mb": memory.used >> 20, "memory_total_mb": memory.total >> 20,
                "temperature_celsius": self._nvml.nvmlDeviceGetTemperature(self._card, self._nvml.NVML_TEMPERATURE_GPU),
                "power_watts": self._power()}
        except self._nvml.NVMLError as error:
            log.warning("card metrics failed: %s", shorten(error))
            return None

    def _power(self) -> float | None:
        try:
            return self._nvml.nvmlDeviceGetPowerUsage(self._card) / 1000
        except self._nvml.NVMLError:  # not every card tells
            return None


# ==============================================================================
# Runner -- a step from its sequences to their tokens, on arrays or on a card
# uses: Settings, Backend, CUDA, CPU, Model, Sampler, Grammar, KV cache, Scheduler
# ==============================================================================


def prepare_batch(step: Step, block_size: int) -> Batch:
    """The arrays of a step; of the logits, those for the next tokens come first, then those that score prompts."""
    counts = np.array(list(step.values()))
    computed = np.array([seq.num_computed_tokens for seq in step])
    lengths = np.array([seq.num_tokens for seq in step])
    tables = np.zeros((len(counts), max(len(seq.block_table) for seq in step)), np.int64)
    for row, seq in enumerate(step):
        tables[row, : len(seq.block_table)] = seq.block_table
    ends = np.cumsum(counts)
    starts = ends - counts - computed  # where a sequence's token 0 would stand
    positions = np.arange(ends[-1]) - np.repeat(starts, counts)
    scored = [start + place for start, (seq, count) in zip(starts.tolist(), step.items())
              for place in seq.places_to_score(count)]
    slots = tables[np.repeat(np.arange(len(counts)), counts), positions // block_size] * block_size
    return Batch(
        input_ids=np.array([token_id for seq, count in step.items() for token_id in
                            seq.token_ids[seq.num_computed_tokens : seq.num_computed_tokens + count]], np.int64),
        positions=positions, slot_mapping=slots + positions % block_size, cu_seqlens_q=np.concatenate(([0], ends)),
        block_tables=tables,
        logits_indices=np.concatenate(((ends - 1)[computed + counts == lengths], np.array(scored, np.int64))))


def allowed_tokens(seq: Sequence, vocab_size: int) -> np.ndarray:
    """What the grammar allows, and no end before its time unless the grammar has come to its own; as `pack_bits`."""
    allowed = seq.constraint.bits() if seq.constraint else pack_bits(np.ones(vocab_size, bool))
    if seq.num_output_tokens < seq.params.min_tokens:
        ends = np.zeros(vocab_size, bool)
        ends[list(seq.end_token_ids)] = True
        later = allowed & ~pack_bits(ends)
        allowed = later if later.any() else allowed
    return allowed


class ArrayRunner:
    """Computes a step at once, by array expressions."""

    looks_ahead = False

    def __init__(self, model: Llama, config: EngineConfig):
        self._model = model
        self._sampler = (CpuSampler if isinstance(model.backend, CpuBackend) else Sampler)(model.backend)

    def launch(self, step: Step) -> list[Sampled | None]:
        """A token for each sequence whose tokens are all computed then, else None."""
        logits = self._model.run(prepare_batch(step, self._model.block_size))
        complete = [seq for seq, count in step.items() if count == seq.num_remaining]
        self._score_prompts(step, logits[len(complete) :])
        tokens = iter(self._sampler.sample(
            logits[: len(complete)], [seq.params for seq in complete], [seq.seed for seq in complete],
            [seq.choice for seq in complete], [seq.num_tokens for seq in complete],
            [seq.history if seq.params.has_penalties else None for seq in complete],
            [self._mask(seq) if seq.needs_mask else None for seq in complete]) if complete else ())
        return [next(tokens) if count == seq.num_remaining else None for seq, count in step.items()]

    def _score_prompts(self, step: Step, logits: Any) -> None:
        """Keep the log-probabilities of prompt tokens that the step's sequences ask for."""
        places = [(seq, place) for seq, count in step.items() for place in seq.places_to_score(count)]
        scores = self._sampler.score(logits, [seq.token_ids[place + 1] for seq, place in places],
                                     [seq.params.prompt_logprobs for seq, _ in places])
        for (seq, _), score in zip(places, scores):
            seq.prompt_scores.append(score)

    def _mask(self, seq: Sequence) -> np.ndarray:
        """(V,) bool, as the sampler takes it."""
        vocab_size = self._model.config.vocab_size
        allowed = allowed_tokens(seq, vocab_size).view(np.uint8)
        return np.unpackbits(allowed, count=vocab_size, bitorder="little").view(bool)

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        """The tokens of a launched step, once they are there."""
        return launched


@dataclass
class Seat:
    """A sequence's place on the card, and what the card knows of it."""

    index: int
    num_preemptions: int  # of the sequence when it sat down; a preempted one's block table is all new
    num_blocks: int = 0  # entries of the block table that the card has
    next_position: int | None = None  # where the card would go on by itself
    is_masked: bool = False  # whether the card obeys the seat's mask


class LaunchedStep(NamedTuple):
    """What `CudaRunner.collect` needs of a launched step."""

    done: Any  # an event
    place: int  # in the ring of records
    rows: list[int | None]  # of each sequence: its row of the records, None where nothing was drawn


class CudaRunner:
    """Launches steps on a card without waiting for them.

    A step in which every sequence decodes is one captured graph, replayed: tokens, positions, block tables and
    parameters lie on the card, and the host sends only what changed (`patch_state`), such as a new block every 16
    tokens. Any other step is launched kernel by kernel with its tokens and positions. One that scores prompts is waited
    for: such requests are rare, and their scores are there before anything else can happen to them.
    """

    looks_ahead = True
    MASK_COLUMN = 7  # of a seat's ints

    def __init__(self, model: Llama, config: EngineConfig):
        self._model, self._backend = model, model.backend
        self._state, self._config = model.backend.state, config
        self._seats: dict[Sequence, Seat] = {}
        self._free = list(range(config.max_num_seqs))
        self._row_seats = [config.max_num_seqs] * config.max_num_seqs  # as on the card
        self._patches: list[tuple[int, int]] = []
        self._num_drawn = 0  # steps that wrote to the ring
        self._graphs: dict[int, Any] = {}
        with self._backend.errors(), self._backend.on_device():
            self._prepare_padding()
            if not config.enforce_eager:
                self._capture_all()

    def _prepare_padding(self) -> None:
        """The last seat writes its keys and values to the cache's last block, which no sequence owns."""
        padding, scratch_block = self._config.max_num_seqs, self._model.kv_cache.shape[2] - 1
        self._patches += self._state.patch("block_tables", padding, [scratch_block])
        for row in range(padding):
            self._patches += self._state.patch("row_seats", row, [padding])
        self._send_patches()

    def _capture_all(self) -> None:
        limit = self._config.max_num_seqs
        sizes = {1, 2, 4, 8, 16, 24, 32, 48, *range(64, limit, 32), limit}
        for size in sorted(size for size in sizes if size <= limit):
            work = functools.partial(self._run, self._backend.decode_step(size))
            work()  # kernels load at their first launch, which a graph cannot hold
            self._num_drawn += 1
            self._graphs[size] = self._backend.capture(work)

    # -- launching

    def launch(self, step: Step) -> LaunchedStep:
        """Start a step; its tokens are there once `collect` returns."""
        with self._backend.errors():
            seats = [self._sit(seq) for seq in step]
            complete = [len(seq.token_ids) - seq.num_computed_tokens == count for seq, count in step.items()]
            self._send_masks(step, seats, complete)
            if all(map(self._can_decode, step, seats)):
                launched = self._launch_decode(seats)
            else:
                launched = self._launch_mixed(step, seats, complete)
            for (seq, count), seat, is_complete in zip(step.items(), seats, complete):
                seat.next_position = seq.num_computed_tokens + count if is_complete else None
            return launched

    def _note(self, rows: list[int | None]) -> LaunchedStep:
        """What is needed to collect the tokens that were drawn just now; rows as in LaunchedStep."""
        done = self._backend.xp.cuda.Event(disable_timing=True)
        done.record(self._backend.stream)
        launched = LaunchedStep(done, self._num_drawn % self._backend.RING, rows)
        self._num_drawn += any(row is not None for row in rows)
        return launched

    def _sit(self, seq: Sequence) -> Seat:
        """The sequence's seat, with whatever is new about the sequence noted for the card."""
        seat = self._seats.get(seq)
        if seat is None:
            seat = self._seats[seq] = Seat(self._free_seat(), seq.num_preemptions)
            self._introduce(seq, seat.index)
        elif seat.num_preemptions != seq.num_preemptions:
            seat.num_preemptions, seat.num_blocks, seat.next_position = seq.num_preemptions, 0, None
        if seat.num_blocks < len(seq.block_table):
            new_blocks = seq.block_table[seat.num_blocks :]
            self._patches += self._state.patch("block_tables", seat.index, new_blocks, seat.num_blocks)
            seat.num_blocks = len(seq.block_table)
        return seat

    def _free_seat(self) -> int:
        if not self._free:
            for seq in [seq for seq in self._seats if not seq.block_table]:
                self._free.append(self._seats.pop(seq).index)
        return self._free.pop()

    def _introduce(self, seq: Sequence, seat: int) -> None:
        """Send a sequence's sampling parameters, in the order of sample.cu."""
        p, state, bias = seq.params, self._state, dict(seq.params.logit_bias)
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        seed = np.array([seq.seed], np.uint64).view(np.int32).tolist()  # low word, high word
        top = -1 if p.logprobs is None else p.logprobs
        ints = (min(max(p.top_k, 0), (1 << 31) - 1), top, seq.choice, *seed, len(bias), p.has_penalties, False)
        for name, values in (("ints", ints), ("floats", (p.temperature, p.top_p, p.min_p, *penalties)),
                             ("bias_ids", bias.keys()), ("bias_values", bias.values())):
            self._patches += state.patch(name, seat, values)
        if p.has_penalties:
            self._backend.reset_counts(seat, *seq.history)

    def _send_masks(self, step: Step, seats: list[Seat], complete: list[bool]) -> None:
        """Send what may come next where that changed: with a grammar always, else when min_tokens begins and ends."""
        masks, vocab_size = {}, self._model.config.vocab_size
        for seq, seat, is_complete in zip(step, seats, complete):
            if not is_complete or not (seq.constraint or seq.params.min_tokens):
                continue
            wanted = seq.needs_mask
            if wanted and (seq.constraint or not seat.is_masked):
                masks[seat.index] = allowed_tokens(seq, vocab_size)
            if wanted != seat.is_masked:
                seat.is_masked = wanted
                self._patches += self._state.patch("ints", seat.index, [wanted], self.MASK_COLUMN)
        self._backend.masks.send(masks)

    @staticmethod
    def _can_decode(seq: Sequence, seat: Seat) -> bool:
        return seat.next_position == seq.num_computed_tokens == len(seq.token_ids) - 1

    def _launch_decode(self, seats: list[Seat]) -> LaunchedStep:
        """Replay the smallest graph that holds the sequences; rows behind them are padding."""
        size = next((size for size in self._graphs if size >= len(seats)), len(seats))
        wanted = [seat.index for seat in seats] + [self._config.max_num_seqs] * (size - len(seats))
        for row, index in enumerate(wanted):
            if self._row_seats[row] != index:
                self._row_seats[row] = index
                self._patches += self._state.patch("row_seats", row, [index])
        self._send_patches()
        if size in self._graphs:
            self._graphs[size].launch(self._backend.stream)
        else:
            self._run(self._backend.decode_step(size))
        return self._note(list(range(len(seats))))

    def _launch_mixed(self, step: Step, seats: list[Seat], complete: list[bool]) -> LaunchedStep:
        """Launch the kernels one by one: single tokens first, then prompts."""
        self._send_patches()
        sequences, counts = list(step), list(step.values())
        tokens, tiles, rows, scored, row_of = [], [], [], [], [None] * len(seats)
        for i in sorted(range(len(seats)), key=lambda i: counts[i] > 1):
            seq, count = sequences[i], counts[i]
            start, first = seq.num_computed_tokens, len(tokens)
            if count > 1:
                piece = self._backend.tokens_per_tile
                tiles += [(first + at, min(piece, count - at)) for at in range(0, count, piece)]
            tokens += [(seq.token_ids[place], place, seats[i].index) for place in range(start, start + count)]
            if complete[i]:
                row_of[i] = len(rows)
                rows.append(len(tokens) - 1)
            if seq.num_unscored:
                scored += [(seq, place, first + place - start) for place in seq.places_to_score(count)]
        self._run(self._backend.mixed_step(tokens, counts.count(1), tiles, rows))
        launched = self._note(row_of)
        if scored:
            self._score_prompts(scored)
        return launched

    def _score_prompts(self, scored: list[tuple[Sequence, int, int]]) -> None:
        """Keep the log-probabilities behind (sequence, place, which token of the step); such a step is waited for."""
        given = [(row, seq.token_ids[place + 1], seq.params.prompt_logprobs) for seq, place, row in scored]
        records = self._backend.score_step(given, self._model.norm, self._model.head)
        for (seq, *_), head, record in zip(scored, records[:, :4].tolist(), records):
            seq.prompt_scores.append(self._read(head, record))

    def _run(self, step: CudaStep) -> None:
        self._model.run(step)
        if step.num_rows:
            self._backend.sample(step)

    def _send_patches(self) -> None:
        if self._patches:
            self._backend.patch_state(self._patches)
            self._patches = []

    # -- collecting

    def collect(self, launched: LaunchedStep) -> list[Sampled | None]:
        """The tokens of a launched step, once they are there."""
        with self._backend.errors():
            launched.done.synchronize()
        records = self._backend.records[launched.place]
        heads = records[:, :4].tolist()
        return [None if row is None else self._read(heads[row], records[row]) for row in launched.rows]

    @staticmethod
    def _read(head: list[int], record: np.ndarray) -> Sampled:
        """A record of sample.cu: token, finite, logprob, number of top entries, their 20 ids, their 20 logprobs."""
        token, finite, _, count = head
        if count < 0:
            return Sampled(token, None, None, bool(finite))
        floats = record.view(np.float32)
        top = tuple(zip(record[4 : 4 + count].tolist(), floats[24 : 24 + count].tolist()))
        return Sampled(token, float(floats[2]), top, bool(finite))


def make_runner(model: Llama, config: EngineConfig) -> ArrayRunner | CudaRunner:
    """The runner that goes with the model's backend."""
    return (CudaRunner if isinstance(model.backend, CudaBackend) else ArrayRunner)(model, config)


# ==============================================================================
# Engine -- the one loop thread and the global lock: submit, stream, abort, close
# uses: Errors, Settings, Model, Sampler, Grammar, KV cache, Scheduler, Metrics, Runner
# ==============================================================================


class Handle:
    """A request's end of the engine: iterate it for tokens, or `take` what is ready.

    One thread reads a handle; any thread may abort it. `changed` may be shared by handles that one thread reads.
    """

    def __init__(self, engine: Engine, seq: Sequence, changed: threading.Condition | None):
        self._engine, self.seq, self._changed = engine, seq, changed or threading.Condition()
        self._ready: list[Sampled] = []
        self._wanted = 1  # tokens that the reader waits for
        self.timing = Timing()
        self.finish_reason: str | None = None  # stop, length, abort or error; set after the last token
        self.error: Exception | None = None

    def take(self, timeout: float | None = None, at_least: int = 1) -> list[Sampled]:
        """The tokens since the last call; waits for `at_least` of them, for the end, or for `timeout` seconds."""
        with self._changed:
            self._wanted = at_least
            self._changed.wait_for(lambda: self.has_news, timeout)
            self._wanted, taken, self._ready = 1, self._ready, []
            return taken

    @property
    def has_news(self) -> bool:
        """True when `take` would not wait; the caller holds `changed`, or takes the answer as a hint."""
        return bool(len(self._ready) >= self._wanted or self.finish_reason)

    def want(self, at_least: int) -> None:
        """News are so many tokens, until the next `take`."""
        with self._changed:
            self._wanted = at_least

    @property
    def exhausted(self) -> bool:
        """True once the request has ended and every token was taken."""
        with self._changed:
            return self.finish_reason is not None and not self._ready

    def __iter__(self) -> Iterator[Sampled]:
        while not self.exhausted:
            yield from self.take()
        if self.error:
            raise self.error

    def abort(self, reason: str = "abort") -> None:
        """Stop the request wherever it is; safe to call at any time, from any thread that does not hold `changed`."""
        self._engine.abort(self, reason)

    def abandon(self) -> None:
        """Stop the request before the next step, where it is not on hold. This takes no lock: the garbage collector may
        end a forgotten stream in the middle of anything, on a thread that holds any of them."""
        self._engine.abandon(self)

    def hold(self, on: bool) -> None:
        """Compute nothing and keep no blocks while `on`; from any thread that does not hold `changed`."""
        self._engine.hold(self, on)

    def put(self, token: Sampled) -> None:
        """Engine thread: hand over a token."""
        with self._changed:
            self._ready.append(token)
            if self.has_news:  # no thread is woken for less than it waits for
                self._changed.notify_all()

    def finish(self, reason: str, error: Exception | None = None) -> None:
        """Engine: end the request, once."""
        with self._changed:
            self.timing.finished = time.monotonic()
            self.finish_reason, self.error = reason, error
            self._changed.notify_all()


class InFlight(NamedTuple):
    """A step that was launched and whose tokens were not read yet."""

    spans: dict[Sequence, tuple[int, int]]  # of each sequence the tokens [start, stop) that the step computes
    launched: Any  # what Runner.collect takes


class Engine:
    """Runs many sequences through one model: `step` is schedule, run, update.

    Where the runner can look ahead (on a card), a step is launched before the tokens of the one before it are read:
    those are PENDING in the host's lists meanwhile. A stop is then seen a step late, and the overrun token dropped.
    A step with a sequence whose grammar must know its newest token waits for the tokens first.

    The lock guards the scheduler, the blocks and the handles' table; it is not held while the model runs. Only the
    engine thread calls the model. An error inside a run ends the sequences of that step and the loop goes on; an
    error anywhere else, or MAX_FAILURES failed runs in a row, ends the engine (`dead`).
    """

    MAX_FAILURES = 3

    def __init__(self, model: Llama, config: EngineConfig, num_blocks: int, eos_token_ids: Iterable[int],
                 model_name: str = ""):
        self.model, self.config = model, config
        self.eos_token_ids = frozenset(end for end in eos_token_ids if 0 <= end < model.config.vocab_size)
        self.blocks = BlockManager(num_blocks, config.block_size, not config.no_prefix_caching)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        asked, room = config.max_model_len or model.config.max_position_embeddings, num_blocks * config.block_size
        self.max_model_len = min(asked, room)
        self._limited_by = ("--kv-cache-memory" if room < asked else  # None: the model's own length
                            "--max-model-len" if asked < model.config.max_position_embeddings else None)
        self.metrics = Metrics(model_name)
        self.dead: Exception | None = None
        self.on_death: Callable[[], None] = lambda: None
        self._runner = make_runner(model, config)
        self._in_flight: InFlight | None = None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._handles: dict[Sequence, Handle] = {}
        self._aborted: deque[tuple[Sequence, str]] = deque()  # who shall end before the next step, and why
        self._next_id, self._failures, self._closing = 0, 0, False
        self._process = os.getpid()  # a forked one has no engine thread, and perhaps a lock that nobody releases
        self._thread = threading.Thread(target=self._loop, name="rustinfer-engine", daemon=True)
        self._thread.start()

    # -- any thread

    def submit(self, prompt_token_ids: Seq[int], params: SamplingParams, tenant: Tenant = Tenant(),
               param: str = "prompt", changed: threading.Condition | None = None, choice: int = 0,
               constraint: Constraint | None = None) -> Handle:
        """Queue a request. Raises APIError when it can never fit, the queue is full or the engine is ending.

        `param` is the request field that errors about the prompt name; `choice` tells answers of one seed apart: those
        after the first belong to a request that has begun, and the queue takes them.
        """
        if os.getpid() != self._process:
            raise EngineError(f"the engine runs in process {self._process}, from which this one was forked; "
                              "load a model of its own here")
        params = self._check(prompt_token_ids, params, param)
        seed = secrets.randbits(63) if params.seed is None else params.seed % (1 << 64)
        with self._lock:
            if self.dead:
                raise UnavailableError("the engine has failed", code="internal_error", headers=retry_after(5))
            if self._closing:
                raise UnavailableError("the engine is closed", code="shutting_down", headers=retry_after(5))
            if not choice and self.scheduler.is_full_for(tenant.name, self.config.max_queue):
                wait = self._wait_s(len(self.scheduler.waiting)) or 1
                raise QueueFullError(f"{len(self.scheduler.waiting)} requests wait and --max-queue is "
                                     f"{self.config.max_queue}; try again later", headers=retry_after(wait))
            ends = (*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids))
            seq = Sequence(self._next_id, prompt_token_ids, params, seed, tenant.salt, choice, tenant.name, constraint,
                           ends)
            self._next_id += 1
            handle = self._handles[seq] = Handle(self, seq, changed)
            self.scheduler.add(seq)
            self._work.notify()
            return handle

    def _check(self, prompt_token_ids: Seq[int], params: SamplingParams, param: str) -> SamplingParams:
        """The params with max_tokens filled in; an error where prompt and output do not fit."""
        length, limit, vocab_size = len(prompt_token_ids), self.max_model_len, self.model.config.vocab_size
        if not length:
            raise APIError("the prompt is empty; at least one token is needed", param)
        ids = np.asarray(prompt_token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < vocab_size:
            raise APIError(f"token ids must be whole numbers from 0 to {vocab_size - 1}", param)
        if any(not 0 <= token_id < vocab_size for token_id in params.stop_token_ids):
            raise APIError(f"stop_token_ids must be from 0 to {vocab_size - 1}", "stop_token_ids")
        for token_id, _ in params.logit_bias:
            if token_id >= vocab_size:
                raise APIError(f"logit_bias names token {token_id}; the last one is {vocab_size - 1}", "logit_bias")
        wanted = params.max_tokens
        if length >= limit or (wanted is not None and length + wanted > limit):
            output = f" and {wanted} of output are asked for" if wanted else ", which leaves no room for output"
            longer = f", or start with a larger {self._limited_by}" if self._limited_by else ""
            raise ContextLengthError(  # litellm finds it by its first words, langchain-openai by the code in the text
                f"This model's maximum context length is {limit} tokens: the prompt has {length} tokens{output}; "
                f"shorten the prompt or ask for less output{longer} (context_length_exceeded)", param)
        return params if wanted is not None else dataclasses.replace(
            params, max_tokens=min(self.most_tokens(params), limit - length))

    def most_tokens(self, params: SamplingParams) -> int:
        """How long an answer may get, as far as the context has room."""
        return params.max_tokens or params.default_max_tokens or self.config.max_tokens

    def abort(self, handle: Handle, reason: str = "abort") -> None:
        """Ask for the end of a request: at once while it waits, before the next step while it runs."""
        with self._lock:
            if handle.seq in self._handles:
                if handle.seq in self.scheduler.waiting:
                    self._end(handle.seq, reason)
                else:
                    self._aborted.append((handle.seq, reason))
                    self._work.notify()

    def abandon(self, handle: Handle) -> None:
        """Ask for the end of a request that waits or runs: with such a one the loop goes on and will see it."""
        self._aborted.append((handle.seq, "abort"))

    def hold(self, handle: Handle, on: bool) -> None:
        """Put a request aside before the next step, or let it go on."""
        with self._lock:
            if handle.seq in self._handles:
                self.scheduler.hold(handle.seq, on)
                self._work.notify()

    @property
    def is_open(self) -> bool:
        """True while it takes requests."""
        return self.dead is None and not self._closing

    def close(self) -> None:
        """End what still runs with an error, stop the thread, free the device's memory. Safe to call twice.

        In a forked process it does nothing: the threads to wait for are in the other one.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closing = True
            self._work.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:  # one closer at a time
            self._runner = self._in_flight = None  # graphs hold on to what they were captured with
            on_lost_card = contextlib.suppress(Exception) if self.dead else contextlib.nullcontext()  # it refuses all
            with on_lost_card, self.model.backend.on_device():
                self.model.close()

    def place(self, seq: Sequence) -> tuple[int, float | None] | None:
        """While a sequence waits: how many are before it, and the seconds it will take, if that can be told."""
        with self._lock:
            if seq not in self.scheduler.waiting:
                return None
            position = self.scheduler.waiting.position(seq)
            return position, self._wait_s(position)

    def _wait_s(self, position: int) -> float | None:
        return self.metrics.wait_s(position, len(self.scheduler.running))

    def snapshot(self) -> dict:
        """Counters and the state of queue and cache."""
        with self._lock:
            scheduler, blocks = self.scheduler, self.blocks
            return {**self.metrics.snapshot(), "num_requests_running": len(scheduler.running),
                    "num_requests_waiting": len(scheduler.waiting) + len(scheduler.aside),
                    "num_preemptions": scheduler.num_preemptions,
                    "kv_blocks_total": blocks.num_blocks, "kv_blocks_used": blocks.num_blocks - blocks.num_free}

    # -- the engine thread

    def _loop(self) -> None:
        try:
            with self.model.backend.on_device():
                while self._wait_for_work():
                    self.step()
            self._end_all(UnavailableError("the server is shutting down", code="shutting_down"))
        except BaseException as error:
            log.exception("the engine has failed")
            self.dead = error
            self._reset()
            self._end_all(EngineError("the engine has failed"))
            self.on_death()

    def _wait_for_work(self) -> bool:
        """False when the engine closes."""
        with self._work:
            self._work.wait_for(
                lambda: self._closing or self._aborted or self._in_flight or self.scheduler.has_work)
            return not self._closing

    def step(self) -> None:
        """Schedule, run, update."""
        with self._lock:
            self._drop_aborted()
            step = self._schedule()
        launched = self._launch(step) if step else None
        if self._runner.looks_ahead:
            launched, self._in_flight = self._in_flight, launched
        if launched:
            self._finish_step(launched)

    def _schedule(self) -> Step:
        """The next step; an empty one where the tokens in flight must be read first."""
        if self._in_flight and not self.scheduler.can_look_ahead():
            return {}
        step, now = self.scheduler.schedule(), time.monotonic()
        for seq in step:
            if len(seq.token_ids) == seq.num_prompt_tokens:
                timing = self._handles[seq].timing
                timing.started = timing.started or now
        return step

    def _drop_aborted(self) -> None:
        while self._aborted:
            seq, reason = self._aborted.popleft()
            if seq in self._handles:  # it may have ended by itself, or be asked for twice
                self._end(seq, reason)

    def _launch(self, step: Step) -> InFlight | None:
        """Start a step and take its tokens for computed; None when that failed."""
        try:
            launched = self._runner.launch(step)
        except (DeviceError, SettingsError):  # or the card's memory was short: nobody knows how far the step came
            raise
        except Exception as error:
            self._fail(step, error)
            return None
        with self._lock:
            spans = {}
            for seq, count in step.items():
                spans[seq] = seq.num_computed_tokens, seq.num_computed_tokens + count
                seq.num_computed_tokens += count
                if seq.num_computed_tokens == len(seq.token_ids):
                    seq.token_ids.append(PENDING)
        return InFlight(spans, launched)

    def _finish_step(self, flight: InFlight) -> None:
        """Wait for a step's tokens and hand them on."""
        drawn = self._runner.collect(flight.launched)
        with self._lock:
            self._update(flight, drawn)

    def _update(self, flight: InFlight, drawn: list[Sampled | None]) -> None:
        """Record what was computed, fill in the tokens, end what has ended."""
        self._failures, size = 0, self.blocks.block_size
        self.metrics.stepped(len(drawn))
        for (seq, (start, stop)), token in zip(flight.spans.items(), drawn):
            if seq not in self._handles:  # it ended while this step was in flight
                continue
            scores = seq.prompt_scores if stop == seq.num_prompt_tokens else ()
            if token is not None and not (token.finite and all(score.finite for score in scores)):
                self.blocks.forget(seq)
                self._end(seq, "error", EngineError("the model produced logits that are not finite"))
                continue
            if start // size < stop // size:
                self.blocks.name_full_blocks(seq, start, stop)
            if token is not None:
                self._put(seq, stop, token)

    def _put(self, seq: Sequence, place: int, token: Sampled) -> None:
        """The sequence's token at `place` has arrived."""
        handle = self._handles[seq]
        seq.token_ids[place] = token.token_id
        self.metrics.completion_tokens += 1
        if handle.timing.first_token is None:
            handle.timing.first_token = time.monotonic()
        if seq.constraint and not seq.constraint.accept(token.token_id):
            return self._end(seq, "error", seq.constraint.problem())
        handle.put(token)
        if reason := self._stop_reason(seq, token.token_id, place + 1):
            self._end(seq, reason)

    def _stop_reason(self, seq: Sequence, token_id: int, num_tokens: int) -> str | None:
        if token_id in seq.end_token_ids or (seq.constraint and seq.constraint.is_complete):
            return "stop"
        return "length" if num_tokens >= seq.max_num_tokens else None

    def _end(self, seq: Sequence, reason: str, error: Exception | None = None) -> None:
        """Free a sequence's blocks and tell its handle."""
        while seq.token_ids[-1] == PENDING:  # what is on its way counts no more
            seq.token_ids.pop()
        self.scheduler.remove(seq)
        handle = self._handles.pop(seq)
        handle.finish(reason, error)
        self.metrics.finished(reason, seq, handle.timing)

    def _fail(self, step: Step, error: Exception) -> None:
        """A run failed: its sequences end with an error; too many such runs in a row end the engine."""
        log.error("a step of %d sequences failed", len(step), exc_info=error)
        with self._lock:
            for seq in step:
                self._end(seq, "error", EngineError(f"the model failed: {type(error).__name__}"))
            self._failures += 1
        if self._failures >= self.MAX_FAILURES:
            raise EngineError(f"{self._failures} runs in a row failed") from error

    def _reset(self) -> None:
        """After an error that may have left the scheduler half changed: nothing waits, runs or owns a block."""
        with self._lock:
            self.blocks = BlockManager(self.blocks.num_blocks, self.blocks.block_size, self.blocks.prefix_caching)
            self.scheduler = Scheduler(self.blocks, self.config.max_num_seqs, self.config.max_num_batched_tokens)
            for seq in self._handles:
                seq.block_table = []

    def _end_all(self, error: Exception) -> None:
        with self._lock:
            for seq in list(self._handles):
                self._end(seq, "error", error)


# ==============================================================================
# III. THE WIRE
# ==============================================================================
# API -- JSON to typed requests, results to OpenAI objects; pure functions, no sockets
# uses: Errors, Settings, Grammar
# ==============================================================================

MAX_JSON_DEPTH, MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH = 64, 4096, 16, 1024
MAX_CHOICES, MAX_PROMPTS, MAX_STOP_TOKENS, MAX_METADATA, MAX_TOOLS, MAX_CALLS = 8, 64, 256, 16, 128, 64
ABSENT = (None,)  # values of a field that mean the same as leaving it out


class Field(NamedTuple):
    """One request field: its JSON type, its range, and the values that ask for nothing (none: it is needed).

    A field with kind `unsupported` is known but refused unless its value is one of `neutral`.
    """

    name: str
    kind: str  # boolean, integer, number, string, array, object, any or unsupported
    low: float | None = None
    high: float | None = None
    neutral: tuple = ABSENT
    above: bool = False  # low itself is not allowed


def by_name(*fields: Field) -> dict[str, Field]:
    """A table of the fields that an object may have."""
    return {field.name: field for field in fields}


SHARED_FIELDS = (  # of every route that generates
    Field("model", "string"),
    Field("stream", "boolean"),
    Field("stream_options", "object"),
    Field("n", "integer", 1, MAX_CHOICES),
    Field("max_tokens", "integer", 1, 1 << 31),
    Field("temperature", "number", 0, 2),
    Field("top_p", "number", 0, 1, above=True),
    Field("top_k", "integer", -1, 1 << 31),
    Field("min_p", "number", 0, 1),
    Field("frequency_penalty", "number", -2, 2),
    Field("presence_penalty", "number", -2, 2),
    Field("repetition_penalty", "number", 0, 10, above=True),
    Field("logit_bias", "object"),
    Field("seed", "integer", -(1 << 63), (1 << 64) - 1),
    Field("stop", "any"),
    Field("stop_token_ids", "array", 0, MAX_STOP_TOKENS),
    Field("ignore_eos", "boolean"),
    Field("user", "string"),
    Field("structured_outputs", "object"),
    Field("min_tokens", "integer", 0, 1 << 31),
)
CHAT_FIELDS = by_name(
    *SHARED_FIELDS,
    Field("messages", "array", 1, MAX_MESSAGES, neutral=()),
    Field("max_completion_tokens", "integer", 1, 1 << 31),
    Field("logprobs", "boolean"),
    Field("top_logprobs", "integer", 0, 20, neutral=(None, 0)),
    Field("metadata", "object"),
    Field("add_generation_prompt", "boolean"),
    Field("continue_final_message", "boolean"),
    Field("chat_template_kwargs", "object"),
    Field("response_format", "object", neutral=(None, {"type": "text"})),
    Field("store", "unsupported", neutral=(None, False)),
    Field("tools", "array", 0, MAX_TOOLS),
    Field("tool_choice", "any"),
    Field("parallel_tool_calls", "boolean"),
    Field("functions", "unsupported", neutral=(None, [])),
    Field("function_call", "unsupported", neutral=(None, "none")),
    Field("modalities", "unsupported", neutral=(None, ["text"])),
    Field("service_tier", "unsupported", neutral=(None, "auto", "default")),
    Field("reasoning_effort", "unsupported", neutral=(None, "none")),
    Field("audio", "unsupported"), Field("prediction", "unsupported"),
    Field("verbosity", "unsupported", neutral=(None, "medium")),
    Field("web_search_options", "unsupported"), Field("prompt_cache_key", "unsupported"),
    Field("prompt_cache_retention", "unsupported"), Field("prompt_cache_options", "unsupported", neutral=(None, {})),
    Field("safety_identifier", "unsupported"), Field("moderation", "unsupported"),
)
QUERY_FIELDS = CHAT_FIELDS | by_name(Field("api_key", "string"))  # EventSource sends no headers
COMPLETION_FIELDS = by_name(
    *SHARED_FIELDS,
    Field("prompt", "any", neutral=()),
    Field("echo", "boolean"),
    Field("logprobs", "integer", 0, 5),
    Field("best_of", "unsupported", neutral=(None, 1)),
    Field("suffix", "unsupported", neutral=(None, "")),
)
TEMPLATE_FIELDS = {name: CHAT_FIELDS[name] for name in (
    "model", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")}
TOKENIZE_FIELDS = TEMPLATE_FIELDS | by_name(  # of a text or of messages
    Field("messages", "array", 1, MAX_MESSAGES), Field("prompt", "string"), Field("add_special_tokens", "boolean"),
    Field("return_token_strs", "boolean"))
DETOKENIZE_FIELDS = by_name(Field("model", "string"), Field("tokens", "array", 0, 1 << 20, neutral=()))
TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
              type(None): "null"}  # a bool is an int, too


def type_name(value: Any) -> str:
    """A value's type as JSON calls it; from a program there may be others, by Python's names."""
    found = (name for kind, name in TYPE_NAMES.items() if isinstance(value, kind))
    return next(found, f"Python {type(value).__name__}")


def limits_of(field: Field) -> dict[str, float]:
    """A field's range in JSON schema's words."""
    low = "exclusiveMinimum" if field.above else "minimum"
    names = ("minItems", "maxItems") if field.kind == "array" else (low, "maximum")
    return {} if field.low is None else dict(zip(names, (field.low, field.high)))


def describe_fields(fields: dict[str, Field]) -> dict[str, dict]:
    """What a route takes, for clients that ask."""
    return {name: {"supported": False} if field.kind == "unsupported" else
            {"type": field.kind, "supported": True, **limits_of(field)} for name, field in fields.items()}


def field_schema(field: Field) -> dict:
    """A field as JSON schema; null means that it was left out, where it may be."""
    if field.kind == "any":
        return {}
    return {"type": [field.kind, "null"] if None in field.neutral else field.kind, **limits_of(field)}


ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
JSON_BODY = lambda schema: {"content": {"application/json": {"schema": schema}}}


def url_parameters(path: str, fields: dict[str, Field]) -> list[dict]:
    """What a route without a body takes, as OpenAPI: the names in its path, and in its query text and JSON."""
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", path)] + [
        {"name": name, "in": "query", "required": field.neutral == (),
         **({"schema": {"type": "string"}} if field.kind == "string" else JSON_BODY(field_schema(field)))}
        for name, field in fields.items() if field.kind != "unsupported"]


def openapi_document(posts: dict[str, dict[str, Field]], others: dict[tuple[str, str], dict[str, Field]]) -> dict:
    """An OpenAPI 3.1 document of routes that take JSON (their fields by path) and of others, by path and method."""
    responses = {"200": {"description": "the answer"},
                 "default": {"description": "an error", **JSON_BODY(ERROR_SCHEMA)}}
    paths: dict[str, dict] = {}
    for (path, method), fields in others.items():
        parameters = url_parameters(path, fields)
        paths.setdefault(path, {})[method] = {"parameters": parameters, "responses": responses}
    for path, fields in posts.items():
        known = {name: field_schema(field) for name, field in fields.items() if field.kind != "unsupported"}
        needed = [name for name, field in fields.items() if field.neutral == ()]
        body = {"type": "object", "properties": known, "required": needed, "additionalProperties": False}
        paths.setdefault(path, {})["post"] = {"requestBody": {"required": True, **JSON_BODY(body)},
                                              "responses": responses}
    return {"openapi": "3.1.0", "info": {"title": "rustinfer", "version": __version__}, "paths": paths}


def check_json(value: Any, depth: int = 1) -> None:
    """Raise ValueError for text that is not Unicode, RecursionError for too much depth."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None
    if isinstance(value, (dict, list)):
        if depth > MAX_JSON_DEPTH:
            raise RecursionError
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            check_json(item, depth + 1)


def parse_json(data: bytes, kind: type = dict, name: str = "the body", param: str | None = None) -> Any:
    """JSON, an object unless told: UTF-8, finite numbers, no duplicate keys, bounded depth, no lone surrogates.

    param: the field that holds the JSON as a string.
    """
    name = param or name

    def refuse(text: str) -> None:
        raise ValueError(f"{shorten(text)} is not a number that can be used")

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"key {shorten(twice)!r} appears twice")
        return table

    def integer(text: str) -> int:
        return int(text) if len(text) <= 400 else refuse(text)

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse, parse_float=finite, parse_int=integer,
                           object_pairs_hook=unique)
        check_json(value)
    except RecursionError:
        raise APIError(f"{name} is nested deeper than {MAX_JSON_DEPTH} levels", param, code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise APIError(f"{name} is not valid JSON: {shorten(str(error))}", param, code="invalid_json") from None
    if not isinstance(value, kind):
        raise InvalidTypeError(f"{name} is a JSON {type_name(value)}; an {TYPE_NAMES[kind]} is expected", param)
    return value


def parse_query_value(name: str, text: str) -> Any:
    if text in ("True", "False"):  # as Python clients write them
        return text == "True"
    try:
        return parse_json(text.encode(), object)
    except APIError:
        raise APIError(f"{name} is {shorten(text)!r}; JSON is expected", name, code="invalid_json") from None


def parse_query(query: str, fields: dict[str, Field]) -> dict:
    """The query of a GET as the object that a POST would carry; text that is no JSON stands for itself where it may."""
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict",
                                       max_num_fields=100)
    except ValueError as error:
        raise APIError(f"the query string cannot be read: {shorten(str(error))}") from None
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name in values:
            raise APIError(f"{shorten(name)} appears twice in the query string", shorten(name))
        kind = fields[name].kind if name in fields else "string"
        plain = kind == "string" or (kind == "any" and text[:1] not in tuple('[{"'))
        values[name] = text if plain else parse_query_value(name, text)
    return values


def check_type(name: str, value: Any, kind: str) -> None:
    found = type_name(value)
    if kind != "any" and found != kind and (kind, found) != ("number", "integer"):
        raise InvalidTypeError(f"{name} is of type {found}; {kind} is expected", name)


def check_range(name: str, value: Any, field: Field) -> None:
    size = len(value) if isinstance(value, list) else value
    if field.low is not None and not field.low <= size <= field.high:
        what = "has {} entries" if isinstance(value, list) else "is {}"
        raise APIError(f"{name} {what.format(shorten(size))}; from {field.low:g} to {field.high:g} is allowed", name)


def check_fields(values: Any, fields: dict[str, Field], prefix: str = "") -> dict:
    """An object's fields that ask for something, each of its type and in its range; unknown ones are errors."""
    check_type(prefix.removesuffix("."), values, "object")
    checked = {}
    for name, value in values.items():
        field = fields.get(name)
        if field is None:
            raise UnsupportedError(f"{prefix}{shorten(name)} is not a parameter that this server knows",
                                   prefix + shorten(name))
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in field.neutral):
            continue
        if field.kind == "unsupported":
            shown = shorten(json.dumps(value))
            raise UnsupportedError(f"{prefix}{name} is {shown}; this server does not support it yet", prefix + name)
        check_type(prefix + name, value, field.kind)
        check_range(prefix + name, value, field)
        checked[name] = value
    return checked


def check_typed(value: Any, tables: dict[str, dict[str, Field]], where: str, default: str | None = None) -> dict:
    """The fields of a part, an item, a block or a tool; `tables` has those that it may have, by its type."""
    kind = None
    if isinstance(value, dict):
        kind = default if value.get("type") is None else value["type"]
    if not isinstance(kind, str) or kind not in tables:
        raise APIError(f"{where}.type is {shorten(kind)}; {' or '.join(tables)} is supported", f"{where}.type",
                       code="unsupported_value")
    given = check_fields({**value, "type": kind}, tables[kind], where + ".")
    for field in tables[kind].values():
        if field.neutral == () and field.name not in given:
            raise InvalidTypeError(f"{where}.{field.name} is missing", f"{where}.{field.name}")
    return given


PART_FIELDS = {"text": by_name(  # by type
    Field("type", "string"), Field("text", "string", neutral=()), Field("prompt_cache_breakpoint", "unsupported"))}


def parse_content(content: Any, where: str, tables: dict[str, dict[str, Field]] = PART_FIELDS) -> str:
    """A string, or text parts joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidTypeError(f"{where} must be a string or a list of text parts", where)
    return "\n".join(check_typed(part, tables, f"{where}[{index}]")["text"] for index, part in enumerate(content))


MESSAGE_FIELDS = by_name(
    Field("role", "string", neutral=()),
    Field("content", "any"),
    Field("refusal", "unsupported"), Field("audio", "unsupported"),
    Field("annotations", "unsupported", neutral=(None, [])),
    Field("name", "string"), Field("function_call", "unsupported"),
    Field("tool_calls", "array", 1, MAX_CALLS, neutral=(None, [])),
    Field("tool_call_id", "string"),
)
VARIABLE_FIELDS = by_name(  # what templates of Llama and of its kin ask for
    Field("date_string", "string"), Field("tools_in_user_message", "boolean"), Field("enable_thinking", "boolean"),
    Field("thinking", "boolean"))
MESSAGE_NAME = re.compile(r"[^\s<|\\/>]{1,64}")  # as OpenAI allows
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
FUNCTION_FIELDS = by_name(
    Field("name", "string"), Field("description", "string"), Field("parameters", "object"),
    Field("strict", "boolean"))
TOOL_FIELDS = by_name(Field("type", "string"), Field("function", "object"))
CALL_FIELDS = TOOL_FIELDS | by_name(Field("id", "string"), Field("index", "integer"))  # index: from a stream
CALLED_FIELDS = by_name(  # clients that parse arguments send both forms back
    Field("name", "string"), Field("arguments", "string"), Field("parsed_arguments", "any"))
ALLOWED_CHOICE_FIELDS = by_name(Field("type", "string"), Field("allowed_tools", "object"))
ALLOWED_FIELDS = by_name(Field("mode", "string"), Field("tools", "array", 1, MAX_TOOLS))
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


def parse_function(value: Any, fields: dict[str, Field], inner: dict[str, Field], place: str) -> dict:
    """The function of {"type": "function", "function": {...}}, two objects that may hold `fields` and `inner`."""
    if not isinstance(value, dict) or "function" not in value and value.get("type") in (None, "function"):
        raise InvalidTypeError(f"{place} is {shorten(value)}; type function with a function is expected", place)
    if value.get("type", "function") != "function":
        raise UnsupportedError(f"{place}.type is {shorten(value['type'])}; function is supported", f"{place}.type",
                               code="unsupported_value")
    return check_fields(check_fields(value, fields, f"{place}.").get("function", {}), inner, f"{place}.function.")


def parse_past_calls(calls: list, where: str) -> list[dict]:
    """An assistant's calls; their arguments, JSON as a string, become objects, as templates want them."""
    parsed = []
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        function = parse_function(call, CALL_FIELDS, CALLED_FIELDS, place)
        name, text = function.get("name"), function.get("arguments")
        if name is None or text is None:
            raise InvalidTypeError(f"{place}.function must hold name and arguments, both strings", f"{place}.function")
        arguments = parse_json(text.encode(), param=f"{place}.function.arguments") if text.strip() else {}
        parsed.append({"id": call.get("id") or "", "type": "function",
                       "function": {"name": name, "arguments": arguments}})
    return parsed


def parse_messages(messages: list) -> list[dict]:
    """[{"role", "content"}] with content as one string, and what tools need, by the template's names."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidTypeError(f"messages is {shorten(messages)}; a list of at least one message is expected",
                               "messages")
    parsed, called = [], {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        given = check_fields(message, MESSAGE_FIELDS, where + ".")
        role = given.get("role")
        if role not in ROLES:
            raise APIError(f"{where}.role is {shorten(role)}; {', '.join(ROLES)} are supported", where + ".role",
                           code="unsupported_value" if role == "function" else "invalid_value")
        for field, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if field in given and role != owner:
                raise APIError(f"{where}.{field} is allowed only with role {owner}", f"{where}.{field}")
        calls = parse_past_calls(given.get("tool_calls", []), where)
        content = parse_content(given.get("content", "" if calls else None), where + ".content")
        if not MESSAGE_NAME.fullmatch(given.get("name", "x")):
            raise APIError(f"{where}.name is {shorten(given['name'])!r}; 1 to 64 characters other than white space and "
                           "<|\\/> are expected", f"{where}.name")
        called |= {call["id"]: call["function"]["name"] for call in calls}
        if role == "tool" and "name" in given and given["name"] != called.get(given.get("tool_call_id"), given["name"]):
            raise APIError(f"{where}.name is {given['name']}; the call it answers is of another function",
                           f"{where}.name")
        more = {"tool_calls": calls} if calls else {}
        more |= {name: given[name] for name in ("tool_call_id", "name") if name in given}
        parsed.append({"role": ROLES[role], "content": content, **more})
    return parsed


def parse_tools(tools: list) -> list[dict]:
    """Function tools as they were given, each checked."""
    names = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        name = parse_function(tool, TOOL_FIELDS, FUNCTION_FIELDS, where).get("name")
        if name is None or not TOOL_NAME.fullmatch(name):
            raise APIError(f"{where}.function.name is {shorten(name)}; 1 to 64 letters, digits, dots, underscores and "
                           "hyphens are expected", f"{where}.function.name")
        if name in names:
            raise APIError(f"{where}.function.name is {name} again; names must differ", f"{where}.function.name")
        names.add(name)
    return tools


def parse_conversation(given: dict) -> dict[str, Any]:
    """What the chat template takes: messages, tools, and how to render them, as arguments of `ChatTemplate.encode`."""
    if "messages" not in given:
        raise APIError("messages is missing; a list of at least one message is expected", "messages")
    messages, goes_on = parse_messages(given["messages"]), given.get("continue_final_message", False)
    if goes_on and given.get("add_generation_prompt"):
        raise APIError("continue_final_message is not allowed together with add_generation_prompt",
                       "continue_final_message")
    if goes_on and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
        raise APIError("continue_final_message needs a last message of role assistant, without tool_calls",
                       "continue_final_message")
    return {"messages": messages, "tools": parse_tools(given.get("tools", [])), "continue_final_message": goes_on,
            "add_generation_prompt": given.get("add_generation_prompt", not goes_on),
            "variables": check_fields(given.get("chat_template_kwargs", {}), VARIABLE_FIELDS, "chat_template_kwargs.")}


def named_tool(reference: Any, tools: list[dict]) -> list[dict]:
    """The tool that {"type": "function", "function": {"name": ...}} means; APIError when it means none."""
    function = {}
    if isinstance(reference, dict):
        function = parse_function(reference, TOOL_FIELDS, {"name": FUNCTION_FIELDS["name"]}, "tool_choice")
    named = [tool for tool in tools if tool["function"]["name"] == function.get("name")]
    if not named and "name" in function:
        raise APIError(f"tool_choice names {shorten(function['name'])}, which is none of the tools", "tool_choice")
    if not named:
        raise APIError(f"tool_choice has {shorten(json.dumps(reference))}; auto, none, required or the names of some "
                       "of the tools are expected", "tool_choice")
    return named


def offered_tools(tools: list[dict], given: dict) -> tuple[list[dict], list[dict]]:
    """Of a request's tools those that the model may call, and those of which it must call one."""
    choice = given.get("tool_choice", "auto")
    if "tool_choice" in given and not tools and choice != "none":
        raise APIError("tool_choice is allowed only with tools", "tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = check_fields(choice, ALLOWED_CHOICE_FIELDS, "tool_choice.").get("allowed_tools", {})
        allowed = check_fields(allowed, ALLOWED_FIELDS, "tool_choice.allowed_tools.")
        tools = [tool for one in allowed.get("tools", ()) for tool in named_tool(one, tools)]
        choice = allowed.get("mode")
    if choice in ("auto", "none"):
        return (tools if choice == "auto" else []), []
    return tools, tools if choice == "required" and tools else named_tool(choice, tools)


class ToolCall(NamedTuple):
    """A function that the model wants called."""

    name: str
    arguments: str  # JSON


def held_float(text: str) -> float:
    """A JSON number; one that no float can hold is the largest: neither JSON nor its readers have infinity."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def call_of(value: Any, names: Iterable[str]) -> ToolCall:
    """{"name": ..., "parameters" or "arguments": {...}}, optionally with "type": "function"; ValueError otherwise."""
    if not isinstance(value, dict) or set(value) - {"name", "parameters", "arguments", "type", "id"}:
        raise ValueError
    if value.get("name") not in names or value.get("type", "function") != "function":
        raise ValueError
    arguments = value.get("parameters", value.get("arguments", {}))
    arguments = json.loads(arguments, parse_float=held_float) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # half of a surrogate pair is a ValueError: clients could neither read it nor send it back
    return ToolCall(value["name"], text)


def python_calls(text: str, names: Iterable[str]) -> list[ToolCall]:
    """[f(a=1), g()] with literals as arguments; ValueError otherwise."""
    calls = []
    tree = ast.parse(text, mode="eval").body
    for call in tree.elts if isinstance(tree, ast.List) else ():
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        calls.append(call_of({"name": ast.unparse(call.func), "arguments": arguments}, names))
    return calls


def json_calls(text: str, names: Iterable[str]) -> list[ToolCall]:
    """Objects one after the other, with ; or commas between them, or a list of them; ValueError otherwise."""
    decoder, values, at = json.JSONDecoder(parse_float=held_float), [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        at = re.compile(r"[\s;,]*").match(text, at).end()
    return [call_of(value, names) for value in values]


def read_calls(text: str, names: Iterable[str]) -> list[ToolCall]:
    """The calls that a text is, all of it; none if it is anything else."""
    for reader in (json_calls, python_calls):
        try:
            calls = reader(text.strip(), names)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if 0 < len(calls) <= MAX_CALLS:
            return calls
    return []


class CallRules(NamedTuple):
    """What counts as a tool call in an answer."""

    names: frozenset[str] = frozenset()
    parallel: bool = True
    strict: bool = False


class ToolStream:
    """Tells text from tool calls while it comes: whatever the pieces are, the result is the same.

    From the first place that begins like a call (and the white space before it) everything is held back until the end,
    which tells what it was. A strict stream takes only those for calls whose arguments the grammar watched over.
    """

    MAX_CALL_TEXT = 1 << 16  # characters that are read as calls; `ast` and recursion need a bound
    START = re.compile(r"""(\[\s{0,9})? \{\s{0,9} "(name|type|id|parameters|arguments)" \s{0,9}:  # JSON
                           | \[\s{0,9} [A-Za-z_][\w.-]{0,63} \(  # [f(...""", re.VERBOSE)
    STRICT_START = re.compile(r'(\[\s{0,9})?\{"name": "[\w.-]{1,64}", "(parameters|arguments)": ', re.ASCII)
    BRACKET = re.compile(r"[{\[]")  # near the end it may grow into a call
    TAIL = 128  # characters in which a call's beginning may still be incomplete: more than START can take

    def __init__(self, rules: CallRules):
        self._rules, self._held, self._is_call = rules, "", False
        self._start = self.STRICT_START if rules.strict else self.START

    def push(self, text: str) -> str:
        """The text that is surely no call."""
        if not self._rules.names:
            return text
        self._held += text
        if self._is_call:
            return ""
        call = self._start.search(self._held)
        self._is_call = call is not None
        kept = call or self.BRACKET.search(self._held, max(0, len(self._held) - self.TAIL))
        stop = len(self._held[: kept.start() if kept else None].rstrip())
        shown, self._held = self._held[:stop], self._held[stop:]
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        readable = self._is_call and len(self._held) <= self.MAX_CALL_TEXT
        calls = read_calls(self._held, self._rules.names) if readable else []
        return ("", calls if self._rules.parallel else calls[:1]) if calls else (self._held, [])


def parse_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise InvalidTypeError("stop must be a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in stops):
        raise APIError(f"stop may hold {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters", "stop")
    return tuple(stops)


STREAM_OPTIONS = by_name(
    Field("include_usage", "boolean"), Field("include_obfuscation", "unsupported", neutral=(None, False)))


def parse_stream_options(given: dict) -> bool:
    """include_usage."""
    if "stream_options" not in given:
        return False
    if not given.get("stream"):
        raise APIError("stream_options is allowed only with stream: true", "stream_options")
    return check_fields(given["stream_options"], STREAM_OPTIONS, "stream_options.").get("include_usage", False)


def parse_logit_bias(given: dict) -> dict[int, float]:
    """{"42": -100} as JSON spells it -> {42: -100}; SamplingParams checks the values."""
    for key in given:
        if not re.fullmatch(r"[0-9]{1,9}", key, re.ASCII):
            raise APIError(f"logit_bias has the key {shorten(key)!r}; token ids are expected", "logit_bias")
    if len({int(key) for key in given}) < len(given):
        raise APIError("logit_bias names a token twice", "logit_bias")
    return {int(key): value for key, value in given.items()}


def parse_metadata(given: dict) -> dict[str, str]:
    """Up to 16 strings by name, as OpenAI allows; they go to the log."""
    if len(given) > MAX_METADATA:
        raise APIError(f"metadata has {len(given)} entries; {MAX_METADATA} are allowed", "metadata")
    for key, value in given.items():
        if not isinstance(value, str):
            kind = type_name(value)
            raise InvalidTypeError(f"metadata[{shorten(key)!r}] is of type {kind}; string is expected", "metadata")
        if len(key) > 64 or len(value) > 512:
            raise APIError("metadata may have keys of 64 and values of 512 characters", "metadata")
    return given


RESPONSE_FORMAT_FIELDS = by_name(Field("type", "string"), Field("json_schema", "object"))
SCHEMA_FIELDS = by_name(
    Field("name", "string"), Field("description", "string"), Field("schema", "object"), Field("strict", "boolean"))
STRUCTURE_FIELDS = by_name(  # as vLLM spells them
    Field("json", "any"), Field("regex", "string"), Field("choice", "array", 1, 1024), Field("grammar", "string"),
    Field("json_object", "boolean", neutral=(None, False)))


def parse_response_format(given: dict) -> Structure | None:
    """OpenAI's: text, json_object or json_schema."""
    checked = check_fields(given, RESPONSE_FORMAT_FIELDS, "response_format.")
    kind, place = checked.get("type"), "response_format.json_schema."
    if kind not in ("text", "json_object", "json_schema"):
        raise APIError(f"response_format.type is {shorten(kind)}; text, json_object and json_schema are supported",
                       "response_format.type", code="unsupported_value")
    if kind != "json_schema":
        if "json_schema" in checked:
            raise APIError(f"response_format.json_schema is not allowed with type {kind}", place[:-1])
        return Structure("json", {"type": "object"}, "response_format") if kind == "json_object" else None
    given = check_fields(checked.get("json_schema", {}), SCHEMA_FIELDS, place)
    if "schema" not in given:
        raise APIError(f"{place}schema is missing; a JSON schema is expected", f"{place}schema")
    if not TOOL_NAME.fullmatch(given.get("name", "x")):
        raise APIError(f"{place}name is {shorten(given['name'])!r}; 1 to 64 letters, digits, dots, underscores and "
                       "hyphens are expected", f"{place}name")
    label = ": ".join(given[name] for name in ("name", "description") if name in given)
    return Structure("json", given["schema"], f"{place}schema", label)


def parse_structured_outputs(given: dict) -> Structure:
    """vLLM's: one of json, regex, choice, grammar (Lark) and json_object."""
    checked = check_fields(given, STRUCTURE_FIELDS, "structured_outputs.")
    if len(checked) != 1:
        raise APIError(f"structured_outputs has {len(checked)} of {', '.join(STRUCTURE_FIELDS)}; give one",
                       "structured_outputs")
    (name, value), = checked.items()
    param = f"structured_outputs.{name}"
    if name == "choice":
        if not all(isinstance(text, str) and text for text in value):
            raise InvalidTypeError(f"{param} must hold strings that are not empty", param)
        return Structure("regex", "|".join(re.escape(text) for text in value), param)
    if name == "json":
        value = parse_json(value.encode(), param=param) if isinstance(value, str) else value
        check_type(param, value, "object")
    if name == "json_object":
        return Structure("json", {"type": "object"}, param)
    return Structure("lark" if name == "grammar" else name, value, param)


def move_references(value: Any, place: str) -> Any:
    """A schema whose root will stand at `place` of another one: its references go along."""
    if isinstance(value, dict):
        return {key: place + item[1:] if key == "$ref" and isinstance(item, str) and item.startswith("#")
                else move_references(item, place) for key, item in value.items()}
    return [move_references(item, place) for item in value] if isinstance(value, list) else value


def arguments_schema(tool: dict, place: str = "#") -> dict:
    """The JSON schema, to stand at `place`, of a tool's arguments: an object, even if its parameters do not say so.

    A tool that names no parameters takes none, as at OpenAI.
    """
    given = tool["function"].get("parameters")
    parameters = {"additionalProperties": False} if given is None else move_references(given, f"{place}/allOf/1")
    return {"allOf": [{"type": "object"}, parameters]}


def call_schema(tools: Seq[dict], answers: Seq[dict] = ()) -> dict:
    """The JSON schema of a call of one of the tools, or of another answer."""
    schemas = [move_references(schema, f"#/anyOf/{index}") for index, schema in enumerate(answers)]
    for index, tool in enumerate(tools, len(schemas)):
        parameters = arguments_schema(tool, f"#/anyOf/{index}/properties/parameters")
        schemas.append({"type": "object", "required": ["name", "parameters"], "additionalProperties": False,
                        "properties": {"name": {"const": tool["function"]["name"]}, "parameters": parameters}})
    return {"anyOf": schemas}


def call_beginnings(tools: Seq[dict]) -> list[tuple[str, dict]]:
    """How a strict stream's calls begin, and the schema of what follows: the parameters of strict tools are kept."""
    schemas = {tool["function"]["name"]: arguments_schema(tool) if tool["function"].get("strict")
               else {"type": "object"} for tool in tools}
    return [(f'{{"name": "{name}", "{key}": ', schema)
            for name, schema in schemas.items() for key in ("parameters", "arguments")]


def strict_tool(tools: Seq[dict]) -> str | None:
    """The field that asks for strict arguments."""
    asking = [index for index, tool in enumerate(tools) if tool["function"].get("strict")]
    return f"tools[{asking[0]}].function.strict" if asking else None


def parse_structure(given: dict, tools: Seq[dict] = (), forced: Seq[dict] = ()) -> Structure | None:
    """What the answer must look like; `tools` may be called in it, one of `forced` must be."""
    asked = [name for name in ("response_format", "structured_outputs") if name in given]
    asked += ["tool_choice"] if forced else []
    if len(asked) > 1:
        raise APIError(f"{asked[1]} is not allowed together with {asked[0]}", asked[1])
    if forced:
        return Structure("json", call_schema(forced), "tool_choice")
    if "response_format" in given:
        wanted = parse_response_format(given["response_format"])
        if wanted:
            return wanted._replace(source=call_schema(tools, [wanted.source])) if tools else wanted
    if "structured_outputs" in given:
        return parse_structured_outputs(given["structured_outputs"])
    strict = strict_tool(tools)
    return Structure("calls", call_beginnings(tools), strict) if strict else None


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request for text: of the chat route with a conversation, of the completions route with prompts."""

    model: str | None
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    user: str
    metadata: dict[str, str]
    structure: Structure | None = None
    conversation: dict[str, Any] | None = None  # arguments of ChatTemplate.encode
    calls: CallRules = CallRules()
    prompts: list[str | list[int]] = ()
    echo: bool = False


PASSED_ON = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
             "seed", "ignore_eos", "min_tokens")  # to SamplingParams as they are


def parse_generation(given: dict, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None,
                     **parts: Any) -> GenerationRequest:
    """What all routes have in common."""
    options = {name: given[name] for name in PASSED_ON if name in given}
    if "logit_bias" in given:
        options["logit_bias"] = parse_logit_bias(given["logit_bias"])
    params = dataclasses.replace(defaults, max_tokens=max_tokens, stop=parse_stop(given.get("stop")), logprobs=logprobs,
                                 stop_token_ids=tuple(given.get("stop_token_ids", ())), **options)
    return GenerationRequest(given.get("model"), params, given.get("n", 1), given.get("stream", False),
                             parse_stream_options(given), given.get("user", ""),
                             parse_metadata(given.get("metadata", {})), **parts)


def parse_chat(values: dict, defaults: SamplingParams) -> GenerationRequest:
    """The typed request; raises APIError naming the first field that is wrong."""
    given = check_fields(values, CHAT_FIELDS)
    limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(limits) > 1:
        raise APIError("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise APIError("top_logprobs is allowed only with logprobs: true", "top_logprobs")
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    conversation = parse_conversation(given)
    tools, forced = offered_tools(conversation["tools"], given)
    structure = parse_structure(given, tools, forced)
    calls = CallRules(frozenset(tool["function"]["name"] for tool in tools), given.get("parallel_tool_calls", True),
                      structure is not None and structure.kind == "calls")
    return parse_generation(given, defaults, limits.pop() if limits else None, logprobs, structure=structure,
                            conversation={**conversation, "tools": tools}, calls=calls)


def parse_prompts(value: Any) -> list[str | list[int]]:
    """A string, strings, token ids or lists of token ids, as a list of prompts."""
    is_ids = lambda item: isinstance(item, list) and all(type(one) is int for one in item)
    listed = [value] if isinstance(value, str) or value and is_ids(value) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) or is_ids(item) for item in listed):
        raise InvalidTypeError(f"prompt is {shorten(value)}; text, token ids or a list of such is expected", "prompt")
    if not 1 <= len(listed) <= MAX_PROMPTS:
        raise APIError(f"prompt has {len(listed)} entries; from 1 to {MAX_PROMPTS} are allowed", "prompt")
    return listed


def parse_completion(values: dict, defaults: SamplingParams) -> GenerationRequest:
    """The typed request of the completions route; max_tokens is 16 there unless given, as at OpenAI."""
    given = check_fields(values, COMPLETION_FIELDS)
    if "prompt" not in given:
        raise APIError("prompt is missing; a string or token ids are expected", "prompt")
    scored = given.get("logprobs") if given.get("echo") else None
    defaults = dataclasses.replace(defaults, default_max_tokens=16, prompt_logprobs=scored)
    return parse_generation(given, defaults, given.get("max_tokens"), given.get("logprobs"),
                            prompts=parse_prompts(given["prompt"]), echo=given.get("echo", False),
                            structure=parse_structure(given))


def usage_object(group: Group) -> dict:
    """Token counts over all choices, each prompt once, and the timing of this request as the seed reports it."""
    timings = [answer.handle.timing for answer in group.answers]
    prompt, completion = group.num_prompt_tokens, group.num_output_tokens
    prefill, decode = max(timing.prefill_s for timing in timings), max(timing.decode_s for timing in timings)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": group.num_cached_tokens},
        "performance": {
            "queue_ms": round(timings[0].queue_s * 1000, 3), "prefill_ms": round(prefill * 1000, 3),
            "decode_ms": round(decode * 1000, 3),
            "decode_iterations": max(0, max(len(answer.tokens) for answer in group.answers) - 1),
            "tokens_per_second": round(completion / (prefill + decode), 2) if prefill + decode else 0.0,
            "time_to_first_token_ms": round(timings[0].ttft_s * 1000, 3)}}


def server_timing(group: Group) -> str:
    """The Server-Timing header (W3C), in milliseconds."""
    performance = usage_object(group)["performance"]
    return ", ".join(f"{name};dur={performance[name + '_ms']:g}" for name in ("queue", "prefill", "decode"))


def event(value: dict) -> bytes:
    """One server-sent event; ASCII, since some clients split lines at U+2028."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def named_event(kind: str, value: dict) -> bytes:
    """A server-sent event with a name, which its data repeats as `type`."""
    return b"event: " + kind.encode() + b"\n" + event({"type": kind, **value})


class Reply:
    """Builds the objects of one answer with its choices; whole or in events, they say the same."""

    PREFIX = ""

    def __init__(self, group: Group, model: str):
        self.group, self.model, self.created = group, model, int(time.time())
        self.id = self.PREFIX + secrets.token_hex(12)

    def whole(self) -> dict:
        """The answer at once."""
        raise NotImplementedError

    def first_events(self) -> bytes:
        """What comes before any text."""
        raise NotImplementedError

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        """Text of a choice, with its tokens' log-probabilities where those are wanted."""
        raise NotImplementedError

    def end_events(self, index: int) -> bytes:
        """A choice is complete."""
        raise NotImplementedError

    def last_events(self) -> bytes:
        """Every choice is complete."""
        raise NotImplementedError

    def error_event(self, error: APIError) -> bytes:
        """The last event of a stream that failed."""
        return event(error.body())


class ChunkReply(Reply):
    """Answers in chunks that all carry the same id, created and model."""

    OBJECT = CHUNK = ""

    def __init__(self, group: Group, model: str, include_usage: bool = False):
        super().__init__(group, model)
        self._include_usage = include_usage
        self._head = {"id": self.id, "object": self.CHUNK, "created": self.created, "model": model,
                      "system_fingerprint": f"rustinfer-{__version__}"}
        self._frames = [self._frame(index) for index in range(len(group.places))]

    def _frame(self, index: int) -> list[bytes]:
        """What stands before and after the text in a text event."""
        return self._event(self._chunk(index, "@", None, None)).rsplit(b'"@"', 1)

    def _chunk(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        """A choice of an event."""
        raise NotImplementedError

    def _logprobs(self, index: int, tokens: Seq[Sampled]) -> dict | None:
        """The log-probabilities of some tokens of a choice as the route shows them; None unless asked for."""
        raise NotImplementedError

    def whole(self) -> dict:
        choices = [self._choice(index, answer) for index, answer in enumerate(self.group.answers)]
        return {**self._head, "object": self.OBJECT, "choices": choices, "usage": usage_object(self.group)}

    def _event(self, choice: dict) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._head, "choices": [choice], **usage})

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        answer = self.group.places[index]
        if answer.wants_logprobs and (shown := answer.shown(tokens)):
            return self._event(self._chunk(index, text, self._logprobs(index, shown), None))
        if not text:
            return b""
        before, after = self._frames[index]
        return before + json.dumps(text).encode() + after

    def end_events(self, index: int) -> bytes:
        return self._event(self._chunk(index, "", None, self.group.places[index].finish_reason))

    def last_events(self) -> bytes:
        usage = event({**self._head, "choices": [], "usage": usage_object(self.group)}) if self._include_usage else b""
        return usage + b"data: [DONE]\n\n"


class ChatReply(ChunkReply):
    """chat.completion and its chunks."""

    PREFIX, OBJECT, CHUNK = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, group: Group, model: str, include_usage: bool = False, calls: CallRules = CallRules()):
        super().__init__(group, model, include_usage)
        self._streams = [ToolStream(calls) for _ in group.places]

    def _choice(self, index: int, answer: Answer) -> dict:
        text = self._streams[index].push(answer.text)
        rest, calls = self._streams[index].finish()
        message, reason = {"role": "assistant", "content": text + rest, "refusal": None}, answer.finish_reason
        if calls:
            message |= {"content": text + rest or None, "tool_calls": [self._call(call) for call in calls]}
            reason = "tool_calls"
        return {"index": index, "message": message, "logprobs": self._logprobs(index, answer.shown(answer.tokens)),
                "finish_reason": reason}

    @staticmethod
    def _call(call: ToolCall) -> dict:
        return {"id": "call_" + secrets.token_hex(12), "type": "function",
                "function": {"name": call.name, "arguments": call.arguments}}

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        return super().text_event(index, self._streams[index].push(text), tokens)

    def end_events(self, index: int) -> bytes:
        rest, calls = self._streams[index].finish()
        events = super().text_event(index, rest)
        for number, call in enumerate(calls):
            named = {"index": number, **self._call(call), "function": {"name": call.name, "arguments": ""}}
            arguments = {"index": number, "function": {"arguments": call.arguments}}
            events += b"".join(self._event(self._delta(index, {"tool_calls": [part]})) for part in (named, arguments))
        return events + (self._event(self._delta(index, {}, None, "tool_calls")) if calls
                         else super().end_events(index))

    @staticmethod
    def _delta(index: int, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        return self._delta(index, {} if finish_reason else {"content": text}, logprobs, finish_reason)

    def first_events(self) -> bytes:
        begin = {"role": "assistant", "content": ""}
        return b"".join(self._event(self._delta(index, begin)) for index in range(len(self.group.places)))

    def _logprobs(self, index: int, tokens: Seq[Sampled]) -> dict | None:
        answer = self.group.places[index]
        return {"content": answer.logprob_entries(tokens), "refusal": None} if answer.wants_logprobs else None


class CompletionReply(ChunkReply):
    """text_completion, whole and in chunks."""

    PREFIX, OBJECT, CHUNK = "cmpl-", "text_completion", "text_completion"

    def __init__(self, group: Group, model: str, include_usage: bool = False, echoed: Seq[str] = ()):
        super().__init__(group, model, include_usage)
        self._echoed = echoed  # by prompt, where the prompt is to be shown
        self._begun: set[int] = set()  # choices whose prompt was shown
        self._offsets = [0] * len(group.places)  # of the next token's text

    def _echo(self, index: int) -> str:
        return self._echoed[index // self.group.n] if self._echoed else ""

    def _choice(self, index: int, answer: Answer) -> dict:
        tokens = [*self.group.prompt_scores(index), *answer.shown(answer.tokens)]
        return self._chunk(index, self._echo(index) + answer.text, self._logprobs(index, tokens), answer.finish_reason)

    def _chunk(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def first_events(self) -> bytes:
        """Several choices appear in order, whichever has text first."""
        places = range(len(self.group.places) if len(self.group.places) > 1 else 0)
        return b"".join(self._event(self._chunk(index, "", None, None)) for index in places)

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        return self._prompt_event(index) + super().text_event(index, text, tokens)

    def _prompt_event(self, index: int) -> bytes:
        """The prompt where it is to be shown, before anything else of its choice: by then its tokens are scored."""
        if not self._echoed or index in self._begun:
            return b""
        self._begun.add(index)
        logprobs = self._logprobs(index, self.group.prompt_scores(index))
        return self._event(self._chunk(index, self._echo(index), logprobs, None))

    def _logprobs(self, index: int, tokens: Seq[Sampled]) -> dict | None:
        answer = self.group.places[index]
        if not answer.wants_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += answer.num_characters(token.token_id)
        shown = [answer.logprob_entry(token.token_id, token.logprob) for token in tokens]
        return {"tokens": [entry["token"] for entry in shown], "token_logprobs": [entry["logprob"] for entry in shown],
                "top_logprobs": [self._table(answer, token) for token in tokens], "text_offset": offsets}

    @staticmethod
    def _table(answer: Answer, token: Sampled) -> dict[str, float] | None:
        """The likeliest tokens and the one that came; None where nothing came before."""
        if token.top is None:
            return None
        entries = [answer.logprob_entry(*pair) for pair in (*token.top, (token.token_id, token.logprob))]
        return {entry["token"]: entry["logprob"] for entry in entries}


# ==============================================================================
# Responses -- OpenAI's second dialect, stateless: to a chat request, and back from its answer
# uses: Errors, Settings, Sampler, API
# ==============================================================================

PASSED_OVER = ("model", "stream", "metadata", "user", "parallel_tool_calls", "top_logprobs", "logit_bias",
               "structured_outputs", *PASSED_ON)  # fields that mean the same in every dialect
NO_REASONING = {"effort": None, "summary": None}  # as every response says
RESPONSE_FIELDS = {name: CHAT_FIELDS[name] for name in (
    *PASSED_OVER, "stream_options", "tools", "tool_choice", "store", "service_tier", "moderation", "prompt_cache_key",
    "prompt_cache_retention", "safety_identifier")}
RESPONSE_FIELDS |= by_name(
    Field("input", "any", neutral=()),
    Field("instructions", "string"),
    Field("max_output_tokens", "integer", 1, 1 << 31),
    Field("include", "array", 0, 16),
    Field("text", "object"),
    Field("background", "unsupported", neutral=(None, False)),
    Field("truncation", "unsupported", neutral=(None, "disabled")),
    Field("reasoning", "unsupported", neutral=(None, {}, {"effort": "none"}, {"effort": None}, NO_REASONING)),
    *(Field(name, "unsupported") for name in (
        "previous_response_id", "conversation", "prompt", "max_tool_calls", "context_management", "image",
        "prompt_cache_options", "access_programs", "background_options", "prompt_cache_diagnostics")))
ITEM_FIELDS = {  # by type; of what an answer gave, ids and statuses come back and mean nothing here
    "message": by_name(
        Field("type", "string"), Field("role", "string"), Field("content", "any", neutral=()), Field("id", "string"),
        Field("status", "string"), Field("phase", "unsupported")),
    "function_call": by_name(
        Field("type", "string"), Field("call_id", "string"), Field("name", "string", neutral=()),
        Field("arguments", "string", neutral=()), Field("id", "string"), Field("status", "string"),
        Field("namespace", "unsupported"), Field("caller", "unsupported"),
        Field("async", "unsupported", neutral=(None, False))),
    "function_call_output": by_name(
        Field("type", "string"), Field("call_id", "string"), Field("output", "any", neutral=()), Field("id", "string"),
        Field("name", "string"), Field("status", "string"), Field("namespace", "unsupported"),
        Field("caller", "unsupported"))}
TEXT_PART_FIELDS = dict.fromkeys(("input_text", "output_text"), PART_FIELDS["text"] | by_name(
    Field("annotations", "any"), Field("logprobs", "any")))
RESPONSE_TOOL_FIELDS = FUNCTION_FIELDS | by_name(
    Field("type", "string"), Field("defer_loading", "unsupported", neutral=(None, False)),
    Field("async", "unsupported", neutral=(None, False)),
    Field("allowed_callers", "unsupported", neutral=(None, ["direct"])), Field("output_schema", "unsupported"))
NAMED_TOOL_FIELDS = by_name(Field("type", "string"), Field("name", "string", neutral=()))
ALLOWED_TOOLS_FIELDS = ALLOWED_FIELDS | by_name(Field("type", "string"))
TEXT_FIELDS = by_name(
    Field("format", "object", neutral=(None, {"type": "text"})),
    Field("verbosity", "unsupported", neutral=(None, "medium")))
FORMAT_FIELDS = SCHEMA_FIELDS | by_name(Field("type", "string"))
STREAM_FIELDS = {"include_obfuscation": STREAM_OPTIONS["include_obfuscation"]}
LOGPROBS_INCLUDED = "message.output_text.logprobs"


def own_names(text: str, renamed: dict[str, str]) -> str:
    """A text about fields of a chat request, by the names that they came with: the longest that fits counts."""
    inner = "|".join(map(re.escape, sorted(renamed, key=len, reverse=True)))
    return re.sub(rf"(?<![\w.])({inner})(?!\w)([\w.\[\]]*)",
                  lambda match: renamed[match[1]] + match[2].replace(".function", ""), text)


def translated(chat: dict, defaults: SamplingParams, renamed: dict[str, str]) -> GenerationRequest:
    """A chat request made from another dialect's, whose fields the errors name."""
    try:
        request = parse_chat(chat, defaults)
    except APIError as error:
        error.args = (own_names(str(error), renamed),)
        error.param = error.param and own_names(error.param, renamed)
        raise
    structure = request.structure and request.structure._replace(param=own_names(request.structure.param, renamed))
    return dataclasses.replace(request, structure=structure)


def item_message(item: Any, where: str) -> dict:
    """One input item as a chat message."""
    given = check_typed(item, ITEM_FIELDS, where, "message")
    kind = given["type"]
    if kind == "function_call":
        function = {name: given[name] for name in ("name", "arguments")}
        return {"role": "assistant", "tool_calls": [
            {"id": given.get("call_id", ""), "type": "function", "function": function}]}
    place = "output" if kind == "function_call_output" else "content"
    text = parse_content(given[place], f"{where}.{place}", TEXT_PART_FIELDS)
    if kind == "message":
        return {"role": given.get("role"), "content": text}
    named = {name: given[key] for name, key in (("tool_call_id", "call_id"), ("name", "name")) if key in given}
    return {"role": "tool", **named, "content": text}


def input_messages(given: dict) -> tuple[list[dict], dict[str, str]]:
    """instructions and input as chat messages, and where each field of those came from."""
    messages, renamed = [], {"messages": "input"}
    if "instructions" in given:
        messages.append({"role": "system", "content": given["instructions"]})
        renamed["messages[0]"] = "instructions"
    items = given.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise APIError("input must be text or a list of at least one item", "input")
    for index, item in enumerate(items):
        where = f"input[{index}]"
        message = item_message(item, where)
        calls = message.pop("tool_calls", [])
        if not calls or not messages or messages[-1]["role"] != "assistant":
            messages.append(message)
            renamed[f"messages[{len(messages) - 1}]"] = where
        if calls:  # they belong to the turn of the text and the calls before them
            turn = messages[-1].setdefault("tool_calls", [])
            turn += calls
            renamed[f"messages[{len(messages) - 1}].tool_calls[{len(turn) - 1}].function"] = where
    return messages, renamed


def nested_tools(tools: list, tables: dict[str, dict[str, Field]], default: str | None = None) -> list[dict]:
    """Tools of a dialect as the chat route has them."""
    nested = []
    for index, tool in enumerate(tools):
        function = check_typed(tool, tables, f"tools[{index}]", default)
        del function["type"]
        nested.append({"type": "function", "function": function})
    return nested


def nested_choice(choice: Any, where: str = "tool_choice") -> Any:
    """tool_choice, or a tool that it allows, as the chat route has it."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        given = check_fields(choice, ALLOWED_TOOLS_FIELDS, where + ".")
        tools = [nested_choice(tool, f"{where}.tools[{index}]") for index, tool in enumerate(given.get("tools", ()))]
        return {"type": kind, "allowed_tools": {"mode": given.get("mode"), "tools": tools}}
    if kind != "function":
        return choice
    return {"type": kind, "function": {"name": check_typed(choice, {kind: NAMED_TOOL_FIELDS}, where)["name"]}}


def response_format(given: dict) -> dict:
    """text.format as the chat route's response_format."""
    wanted = check_fields(check_fields(given.get("text", {}), TEXT_FIELDS, "text.").get("format", {}), FORMAT_FIELDS,
                          "text.format.")
    if not wanted:
        return {}
    kind = wanted.pop("type", None)
    schema = {"json_schema": wanted} if kind == "json_schema" else {}
    if wanted and not schema:
        raise APIError(f"text.format.{min(wanted)} is allowed only with type json_schema", f"text.format.{min(wanted)}")
    return {"response_format": {"type": kind, **schema}}


def parse_response(values: dict, defaults: SamplingParams) -> GenerationRequest:
    """The chat request that a request for a response is."""
    given = check_fields(values, RESPONSE_FIELDS)
    messages, renamed = input_messages(given)
    check_fields(given.get("stream_options", {}), STREAM_FIELDS, "stream_options.")
    for index, name in enumerate(given.get("include", [])):
        if name != LOGPROBS_INCLUDED:
            raise UnsupportedError(f"include[{index}] is {shorten(name)}; {LOGPROBS_INCLUDED} is supported",
                                   f"include[{index}]", code="unsupported_value")
    chat = {name: given[name] for name in PASSED_OVER if name in given}
    chat |= {"messages": messages, **response_format(given)}
    chat |= {"max_tokens": given["max_output_tokens"]} if "max_output_tokens" in given else {}
    chat |= {"tools": nested_tools(given["tools"], {"function": RESPONSE_TOOL_FIELDS})} if "tools" in given else {}
    chat |= {"tool_choice": nested_choice(given["tool_choice"])} if "tool_choice" in given else {}
    chat |= {"logprobs": True} if given.get("include") else {}
    renamed |= {"max_tokens": "max_output_tokens", "response_format": "text.format", "tools": "tools",
                "response_format.json_schema": "text.format", "logprobs: true": f"include: {LOGPROBS_INCLUDED}"}
    return translated(chat, defaults, renamed)


class ResponseReply(Reply):
    """A response and its typed events; the object at the end is made of what the events said."""

    PREFIX = "resp_"

    def __init__(self, group: Group, model: str, values: dict, request: GenerationRequest):
        super().__init__(group, model)
        self._values, self._params, self._stream = values, request.params, ToolStream(request.calls)
        self._number, self._output = 0, []  # events so far; items, the last one may be growing
        self._message: dict | None = None
        self._held: list[dict] = []  # log-probabilities of tokens before the message

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return named_event(kind, {**fields, "sequence_number": self._number - 1})

    def _object(self, status: str, usage: dict | None = None) -> dict:
        """The response as it is now."""
        given, reason = self._values, {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self._output, "usage": usage, "error": None, "incomplete_details": reason, "store": False,
            "background": False, "previous_response_id": None, "truncation": "disabled", "service_tier": "default",
            "reasoning": NO_REASONING, "temperature": self._params.temperature,
            "top_p": self._params.top_p, "top_logprobs": given.get("top_logprobs") or 0,
            "tool_choice": given.get("tool_choice") or "auto", "tools": given.get("tools") or [],
            "text": given.get("text") or {"format": {"type": "text"}}, "metadata": given.get("metadata") or {},
            "parallel_tool_calls": given.get("parallel_tool_calls", True) is not False,
            **{name: given.get(name) for name in ("instructions", "max_output_tokens", "user")}}

    def first_events(self) -> bytes:
        now = self._object("in_progress")
        return self._event("response.created", response=now) + self._event("response.in_progress", response=now)

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        return self._text(self._stream.push(text), tokens)

    def _text(self, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        answer = self.group.places[0]
        self._held += answer.logprob_entries(answer.shown(tokens)) if answer.wants_logprobs else []
        if not text and not (self._message and self._held):  # of what may be a call nothing is shown
            return b""
        events = b"" if self._message else self._open()
        part, entries, self._held = self._message["content"][0], self._held, []
        part["text"] += text
        part["logprobs"] += entries
        return events + self._event("response.output_text.delta", **self._place(), content_index=0, delta=text,
                                    logprobs=entries)

    def _place(self) -> dict:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _open(self) -> bytes:
        """Begin the message."""
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._message = {"id": "msg_" + secrets.token_hex(12), "type": "message", "status": "in_progress",
                         "role": "assistant", "content": []}
        self._output.append(self._message)
        events = self._event("response.output_item.added", output_index=0, item=self._message)
        events += self._event("response.content_part.added", **self._place(), content_index=0, part=part)
        self._message["content"] = [part]
        return events

    def end_events(self, index: int) -> bytes:
        rest, calls = self._stream.finish()
        events = self._text(rest)
        if not self._message and not calls:
            events += self._open() + self._text("")
        status = "incomplete" if self.group.places[0].finish_reason == "length" and not calls else "completed"
        if self._message:
            events += self._close(status)
        return events + b"".join(map(self._call, calls))

    def _close(self, status: str) -> bytes:
        self._message["status"], part, place = status, self._message["content"][0], self._place()
        return (self._event("response.output_text.done", **place, content_index=0, text=part["text"],
                            logprobs=part["logprobs"])
                + self._event("response.content_part.done", **place, content_index=0, part=part)
                + self._event("response.output_item.done", output_index=place["output_index"], item=self._message))

    def _call(self, call: ToolCall) -> bytes:
        item = {"id": "fc_" + secrets.token_hex(12), "type": "function_call", "status": "in_progress",
                "call_id": "call_" + secrets.token_hex(12), "name": call.name, "arguments": ""}
        self._output.append(item)
        place = self._place()
        events = self._event("response.output_item.added", output_index=place["output_index"], item=item)
        events += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        events += self._event("response.function_call_arguments.done", **place, name=call.name,
                              arguments=call.arguments)
        return events + self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _final(self) -> dict:
        usage = usage_object(self.group)
        cut = any(item["status"] == "incomplete" for item in self._output)
        return self._object("incomplete" if cut else "completed", {
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": usage["total_tokens"],
            "performance": usage["performance"]})

    def last_events(self) -> bytes:
        final = self._final()
        return self._event(f"response.{final['status']}", response=final)

    def whole(self) -> dict:
        answer = self.group.places[0]
        self.text_event(0, answer.text, answer.tokens)
        self.end_events(0)
        return self._final()

    def error_event(self, error: APIError) -> bytes:
        return self._event("error", code=error.code, message=str(error), param=error.param)


# ==============================================================================
# Messages -- Anthropic's dialect: to a chat request, and back from its answer
# uses: Errors, Settings, Sampler, API, Responses
# ==============================================================================

CACHE_CONTROL = Field("cache_control", "object")  # prefixes are cached without being asked
MESSAGES_FIELDS = {name: CHAT_FIELDS[name] for name in ("model", "messages", "stream", "top_p", "tools", "metadata")}
MESSAGES_FIELDS |= by_name(
    Field("max_tokens", "integer", 1, 1 << 31, neutral=()),
    Field("system", "any"),
    Field("stop_sequences", "array", 0, MAX_STOPS),
    Field("temperature", "number", 0, 1),
    Field("top_k", "integer", 0, 1 << 31),
    Field("tool_choice", "object"),
    Field("output_config", "object"),
    CACHE_CONTROL,
    Field("thinking", "unsupported", neutral=(None, {"type": "disabled"})),
    Field("service_tier", "unsupported", neutral=(None, "auto", "standard_only")),
    Field("speed", "unsupported", neutral=(None, "standard")),
    *(Field(name, "unsupported") for name in (
        "container", "diagnostics", "inference_geo", "user_profile_id", "workspace_id", "mcp_servers",
        "context_management", "thread")))
COUNT_FIELDS = {name: field for name, field in MESSAGES_FIELDS.items() if name in (
    "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control", "speed",
    "user_profile_id", "workspace_id", "mcp_servers", "context_management")}
TURN_FIELDS = by_name(Field("role", "string"), Field("content", "any"))
BLOCK_FIELDS = {  # by type
    "text": by_name(
        Field("type", "string"), Field("text", "string", neutral=()), CACHE_CONTROL,
        Field("citations", "unsupported", neutral=(None, []))),
    "tool_use": by_name(
        Field("type", "string"), Field("id", "string"), Field("name", "string", neutral=()), Field("input", "object"),
        CACHE_CONTROL, Field("caller", "unsupported", neutral=(None, {"type": "direct"})),
        Field("toolset_name", "unsupported")),
    "tool_result": by_name(
        Field("type", "string"), Field("tool_use_id", "string"), Field("content", "any"), Field("is_error", "boolean"),
        CACHE_CONTROL, Field("toolset_name", "unsupported"))}
MESSAGE_TOOL_FIELDS = by_name(
    Field("type", "string"), Field("name", "string"), Field("description", "string"),
    Field("input_schema", "object"), Field("strict", "boolean"), CACHE_CONTROL,
    Field("eager_input_streaming", "unsupported", neutral=(None, False)),
    Field("defer_loading", "unsupported", neutral=(None, False)),
    Field("input_examples", "unsupported", neutral=(None, [])),
    Field("allowed_callers", "unsupported", neutral=(None, ["direct"])))
CHOICE_FIELDS = by_name(
    Field("type", "string"), Field("name", "string"), Field("disable_parallel_tool_use", "boolean"))
OUTPUT_FIELDS = by_name(Field("format", "object"), Field("effort", "unsupported"))
MESSAGE_FORMAT_FIELDS = by_name(Field("type", "string"), Field("schema", "object"))
CONTROL_FIELDS = by_name(Field("type", "string"), Field("ttl", "string"))
MESSAGE_ERRORS = {  # Anthropic's names of errors, by status
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


def message_error(error: APIError) -> dict:
    """An error as Anthropic's clients parse it."""
    kind = MESSAGE_ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    found = {"type": kind, "message": str(error), "param": error.param, "code": error.code}
    if error.param == "thread":  # the SDK's tool runner then sends the whole conversation each time
        found["details"] = {"error_code": "thread_unsupported_request"}
    return found


def check_control(given: dict, prefix: str) -> None:
    """cache_control asks for what happens anyway; what it says must be known all the same."""
    control = check_fields(given.get("cache_control", {}), CONTROL_FIELDS, prefix + "cache_control.")
    if control and (control.get("type") != "ephemeral" or control.get("ttl", "5m") not in ("5m", "1h")):
        raise APIError(f"{prefix}cache_control is {shorten(control)}; type ephemeral is supported",
                       prefix + "cache_control", code="unsupported_value")


def blocks_of(content: Any, kinds: Seq[str], where: str) -> list[tuple[dict, str]]:
    """Content as blocks: the fields of each, and its place."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, where)]
    if not isinstance(content, list):
        raise InvalidTypeError(f"{where} must be a string or a list of blocks", where)
    tables, blocks = {kind: BLOCK_FIELDS[kind] for kind in kinds}, []
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        given = check_typed(block, tables, place)
        check_control(given, place + ".")
        blocks.append((given, place))
    return blocks


def joined_text(content: Any, where: str) -> str:
    """Text blocks as one string."""
    return "\n".join(block["text"] for block, _ in blocks_of(content, ("text",), where))


def user_turn(blocks: list[tuple[dict, str]]) -> list[dict]:
    """Results of tools, each a message of its own, and the text between them."""
    messages = []
    for block, where in blocks:
        if block["type"] == "text":
            messages.append({"role": "user", "content": block["text"]})
        else:
            text = joined_text(block.get("content", ""), where + ".content")
            failed = "Error: " if block.get("is_error") else ""
            messages.append({"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": failed + text})
    return messages


def assistant_turn(blocks: list[tuple[dict, str]]) -> list[dict]:
    """Text and calls as one message."""
    text = "\n".join(block["text"] for block, _ in blocks if block["type"] == "text")
    calls = [{"id": block.get("id", ""), "type": "function", "function": {
        "name": block["name"], "arguments": json.dumps(block.get("input", {}))}}
        for block, _ in blocks if block["type"] == "tool_use"]
    return [{"role": "assistant", **({"content": text} if text or not calls else {}),
             **({"tool_calls": calls} if calls else {})}]


def turn_messages(turns: list, system: Any) -> list[dict]:
    """system and messages as the chat route has them; turns of one role in a row are one."""
    messages = [] if system is None else [{"role": "system", "content": joined_text(system, "system")}]
    for index, turn in enumerate(turns):
        where = f"messages[{index}]"
        given = check_fields(turn, TURN_FIELDS, where + ".")
        role, place = given.get("role"), where + ".content"
        if role == "user":
            if given.get("content") == []:
                raise InvalidTypeError(f"{place} is an empty list; at least one block is expected", place)
            found = user_turn(blocks_of(given.get("content"), ("text", "tool_result"), place))
        elif role == "assistant":
            found = assistant_turn(blocks_of(given.get("content"), ("text", "tool_use"), place))
        elif role == "system":
            found = [{"role": "system", "content": joined_text(given.get("content"), place)}]
        else:
            raise APIError(f"{where}.role is {shorten(role)}; user, assistant and system are supported",
                           where + ".role")
        for message in found:
            last = messages[-1] if messages else {}
            if message["role"] == last.get("role") in ("user", "assistant") and "tool_calls" not in {*message, *last}:
                last["content"] += "\n" + message["content"]
            else:
                messages.append(message)
    return messages


def message_tools(tools: list) -> list[dict]:
    """Tools as the chat route has them."""
    nested = nested_tools(tools, {"custom": MESSAGE_TOOL_FIELDS}, "custom")
    for index, tool in enumerate(nested):
        function = tool["function"]
        check_control(function, f"tools[{index}].")
        function.pop("cache_control", None)
        if "input_schema" in function:
            function["parameters"] = function.pop("input_schema")
    return nested


def message_choice(choice: dict) -> dict:
    """tool_choice as the chat route's fields."""
    given = check_fields(choice, CHOICE_FIELDS, "tool_choice.")
    kind, name = given.get("type"), given.get("name")
    table = {"auto": "auto", "any": "required", "none": "none",
             "tool": {"type": "function", "function": {"name": name}}}
    if kind not in table or (name is not None) != (kind == "tool"):
        raise APIError(f"tool_choice is {shorten(choice)}; auto, any, none, or tool with a name is expected",
                       "tool_choice")
    return {"tool_choice": table[kind], "parallel_tool_calls": not given.get("disable_parallel_tool_use", False)}


def parse_message(values: dict, defaults: SamplingParams, fields: dict[str, Field]) -> GenerationRequest:
    """The chat request that a request for a message is."""
    given = check_fields(values, fields)
    for name in ("messages", "max_tokens"):
        if name in fields and name not in given:
            raise APIError(f"{name} is missing", name)
    check_control(given, "")
    same = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k")
    chat = {name: given[name] for name in same if name in given}
    messages = turn_messages(given["messages"], given.get("system"))
    goes_on = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    chat |= {"messages": messages, "continue_final_message": goes_on, "stop": given.get("stop_sequences", [])}
    chat |= {"tools": message_tools(given["tools"])} if "tools" in given else {}
    chat |= message_choice(given["tool_choice"]) if "tool_choice" in given else {}
    wanted = check_fields(given.get("output_config", {}), OUTPUT_FIELDS, "output_config.").get("format")
    if wanted is not None:
        schema = check_fields(wanted, MESSAGE_FORMAT_FIELDS, "output_config.format.")
        if (kind := schema.pop("type", None)) != "json_schema":
            raise APIError(f"output_config.format.type is {shorten(kind)}; json_schema is supported",
                           "output_config.format.type", code="unsupported_value")
        chat["response_format"] = {"type": kind, "json_schema": {"name": "answer", **schema}}
    user = check_fields(given.get("metadata", {}), by_name(Field("user_id", "string")), "metadata.")
    chat |= {"user": user["user_id"]} if user else {}
    renamed = {"tools": "tools", "response_format": "output_config.format", "stop": "stop_sequences",
               "response_format.json_schema": "output_config.format", **{
                   f"messages[{index}]": "messages" for index in range(len(messages))}}
    return translated(chat, defaults, renamed)


class MessageReply(Reply):
    """A message and its events; the object at the end is made of what the events said."""

    PREFIX = "msg_"

    def __init__(self, group: Group, model: str, calls: CallRules):
        super().__init__(group, model)
        self._stream, self._content = ToolStream(calls), []  # blocks, the last one may be growing
        self._reason: tuple[str | None, str | None] = None, None  # stop_reason, stop_sequence

    def _usage(self) -> dict:
        usage = usage_object(self.group)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached,
                "cache_creation_input_tokens": 0, "output_tokens": usage["completion_tokens"],
                "performance": usage["performance"]}

    def _object(self) -> dict:
        reason, sequence = self._reason
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": self._content,
                "stop_reason": reason, "stop_sequence": sequence, "usage": self._usage()}

    def first_events(self) -> bytes:
        return named_event("message_start", {"message": self._object()}) + named_event("ping", {})

    def text_event(self, index: int, text: str, tokens: Seq[Sampled] = ()) -> bytes:
        return self._text(self._stream.push(text))

    def _text(self, text: str) -> bytes:
        if not text:
            return b""
        events = b"" if self._content else self._open({"type": "text", "text": ""})
        self._content[0]["text"] += text
        return events + self._delta({"type": "text_delta", "text": text})

    def _open(self, block: dict) -> bytes:
        events = named_event("content_block_start", {"index": len(self._content), "content_block": block})
        self._content.append(block)
        return events

    def _delta(self, delta: dict) -> bytes:
        return named_event("content_block_delta", {"index": len(self._content) - 1, "delta": delta})

    def _close(self) -> bytes:
        return named_event("content_block_stop", {"index": len(self._content) - 1})

    def end_events(self, index: int) -> bytes:
        rest, calls = self._stream.finish()
        events = self._text(rest)
        events += self._close() if self._content else b""
        answer = self.group.places[0]
        if isinstance(answer.stop_reason, str):
            self._reason = "stop_sequence", answer.stop_reason
        else:
            self._reason = "max_tokens" if answer.finish_reason == "length" else "end_turn", None
        for call in calls:
            self._reason = "tool_use", None
            events += self._open({"type": "tool_use", "id": "toolu_" + secrets.token_hex(12), "name": call.name,
                                  "input": {}})
            events += self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self._close()
            self._content[-1]["input"] = json.loads(call.arguments)
        return events

    def last_events(self) -> bytes:
        reason, sequence = self._reason
        delta = {"delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": self._usage()}
        return named_event("message_delta", delta) + named_event("message_stop", {})

    def whole(self) -> dict:
        self.text_event(0, self.group.places[0].text)
        self.end_events(0)
        return self._object()

    def error_event(self, error: APIError) -> bytes:
        return named_event("error", {"error": message_error(error)})


# ==============================================================================
# Access -- who asks, and how much they may use; no sockets
# uses: Errors, Settings, KV cache, API
# ==============================================================================


@dataclass(frozen=True)
class Limits:
    """What one client may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None


class Allowance:
    """So much a minute: refills evenly, holds one minute's worth, may be overdrawn."""

    def __init__(self, per_minute: int):
        self.per_minute, self._level, self._at = per_minute, float(per_minute), time.monotonic()

    @property
    def level(self) -> float:
        """What is left now; below 0 when it was overdrawn."""
        now = time.monotonic()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def use(self, amount: float) -> None:
        self._level = min(self.per_minute, self.level - amount)

    def seconds_until(self, amount: float) -> float:
        """How long until so much is there."""
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


class Client:
    """Someone who asks: a key, or an address where there are no keys. Counts what was used; any thread may ask it."""

    def __init__(self, tenant: Tenant, limits: Limits):
        self.tenant, self._max_running, self.num_running = tenant, limits.max_concurrent_requests, 0
        rates = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._allowances = {what: Allowance(rate) for what, rate in rates.items() if rate is not None}
        self._lock = threading.RLock()  # a refusal is worded under it

    def take(self, what: str, amount: int) -> int:
        """Use so many requests or tokens, or raise RateLimitError; how many were taken: at most a minute's worth."""
        allowance = self._allowances.get(what)
        if allowance is None:
            return 0
        with self._lock:
            amount = min(amount, allowance.per_minute)
            if wait := allowance.seconds_until(amount):
                raise self._refusal(f"{allowance.per_minute} {what} a minute are allowed and "
                                    f"{max(0, int(allowance.level))} are left; {amount} are needed", wait)
            allowance.use(amount)
            return amount

    def settle(self, taken: int, used: int) -> None:
        """An answer for which tokens were taken used so many."""
        if allowance := self._allowances.get("tokens"):
            with self._lock:
                allowance.use(used - taken)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While a request runs."""
        with self._lock:
            if self._max_running is not None and self.num_running >= self._max_running:
                raise self._refusal(f"{self._max_running} requests at once are allowed", 1)
            self.num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self.num_running -= 1

    def _refusal(self, message: str, wait: float) -> RateLimitError:
        return RateLimitError(f"rate limit: {message}; try again in {wait:.3g} s",
                              headers={**retry_after(wait), "retry-after-ms": str(math.ceil(wait * 1000)),
                                       **self.headers()})

    def headers(self) -> dict[str, str]:
        """The x-ratelimit headers, as OpenAI names them."""
        headers = {}
        with self._lock:
            for what, allowance in self._allowances.items():
                headers |= {f"x-ratelimit-limit-{what}": str(allowance.per_minute),
                            f"x-ratelimit-remaining-{what}": str(max(0, int(allowance.level))),
                            f"x-ratelimit-reset-{what}": f"{allowance.seconds_until(allowance.per_minute):.3f}s"}
        return headers


KEY_FIELDS = by_name(
    Field("name", "string"), Field("key", "string"), Field("requests_per_minute", "integer", 1, 10**9),
    Field("tokens_per_minute", "integer", 1, 10**12), Field("max_concurrent_requests", "integer", 1, 10**6))


def read_key_file(path: str) -> Iterator[tuple[str, str, dict]]:
    """(name, key, limits) of each entry of [{"name", "key", and any of the limits}]; SettingsError if it is none."""
    try:
        entries = parse_json(Path(path).read_bytes(), list, "the file")
        if not entries:
            raise APIError("a list of keys is expected")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not {"name", "key"} <= set(entry):
                raise APIError(f"[{index}] must be an object with name and key")
            given = check_fields(entry, KEY_FIELDS, f"[{index}].")
            yield parse_text(given.pop("name", "")), parse_key(given.pop("key", "")), given
    except (OSError, APIError) as error:
        raise SettingsError(f"--api-key-file: {path}: {error}") from None
    except ValueError as error:
        raise SettingsError(f"--api-key-file: {path}: [{index}] is not allowed; it takes {error}") from None


class Access:
    """The clients: those of the keys, or one for each address where no keys are set."""

    MAX_ADDRESSES = 4096  # remembered; whoever was silent for longest is forgotten

    def __init__(self, config: ServerConfig):
        self._limits = Limits(config.requests_per_minute, config.tokens_per_minute, config.max_concurrent_requests)
        self._keys: dict[bytes, Client] = {}
        self._addresses: dict[str, Client] = {}
        self._lock = threading.Lock()
        for index, key in enumerate(config.api_key, 1):
            self._add(f"key-{index}", key, {})
        for entry in read_key_file(config.api_key_file) if config.api_key_file else ():
            self._add(*entry)

    def _add(self, name: str, key: str, limits: dict) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        if digest in self._keys or name in {client.tenant.name for client in self._keys.values()}:
            raise SettingsError(f"--api-key, --api-key-file: the name or key of {shorten(name)} is given twice")
        self._keys[digest] = Client(Tenant(name, digest), dataclasses.replace(self._limits, **limits))

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    def client(self, key: str | None, address: str) -> Client:
        """Who asks; AuthenticationError for a missing or wrong key where keys are set."""
        if not self._keys:
            return self._by_address(address)
        digest = hashlib.sha256((key or "").encode("utf-8", "replace")).digest()
        found = [client for known, client in self._keys.items() if hmac.compare_digest(known, digest)]  # always all
        if not found:
            raise AuthenticationError("the API key is missing" if key is None else "the API key is wrong",
                                      headers={"WWW-Authenticate": "Bearer"})
        return found[0]

    def _by_address(self, address: str) -> Client:
        with self._lock:
            client = self._addresses.pop(address, None) or Client(Tenant(address), self._limits)
            self._addresses[address] = client  # the latest is last
            if len(self._addresses) > self.MAX_ADDRESSES:
                idle = next((name for name, other in self._addresses.items() if not other.num_running), None)
                self._addresses.pop(idle, None)
            return client


# ==============================================================================
# LLM -- a model with its engine, for programs: text in, text out
# uses: everything above
# ==============================================================================


class Logprob(NamedTuple):
    """A token's log-probability and its rank among the vocabulary's likeliest (None: outside the reported ones)."""

    logprob: float
    rank: int | None
    decoded_token: str


class Piece(str):
    """A stretch of streamed text; the last one of an answer carries its finish_reason."""

    index: int = 0  # which prompt of a list it answers
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None

    def __new__(cls, text: str, index: int = 0, token_ids: Iterable[int] = (), finish_reason: str | None = None):
        piece = super().__new__(cls, text)
        piece.index, piece.token_ids, piece.finish_reason = index, tuple(token_ids), finish_reason
        return piece

    @property
    def text(self) -> str:
        return str(self)


@dataclass
class CompletionOutput:
    """One answer, as vLLM names its parts."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # stop or length
    stop_reason: str | int | None  # the stop string or stop token that ended it
    logprobs: list[dict[int, Logprob]] | None = None  # one a token, the chosen one and the likeliest
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """A prompt and its answers, as vLLM names its parts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # one a token; of the first there is none


class Answer:
    """One running request seen as text: turns its tokens into text, finds stop strings, collects the result."""

    def __init__(self, tokenizer: Tokenizer, handle: Handle):
        self.handle, self._tokenizer, self._params = handle, tokenizer, handle.seq.params
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopMatcher(handle.seq.params.stop)
        self.tokens: list[Sampled] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def advance(self, timeout: float | None = None, at_least: int = 1) -> list[tuple[str, list[Sampled]]]:
        """What came since the last call, as (text, tokens) pairs; empty after `timeout` seconds without a token.

        Text that may be half a character or the start of a stop string comes with a later token. Raises what ended
        the request if that was an error; `finish_reason` is set with the last pair.
        """
        parts: list[tuple[str, list[Sampled]]] = []
        for token in self.handle.take(timeout, at_least):
            self.tokens.append(token)
            shown = token.token_id not in self._params.stop_token_ids  # it ends the text, as a stop string does
            parts.append((self._matcher.push(self._decoder.push(token.token_id) if shown else ""), [token]))
            if self._matcher.matched is not None:  # tokens drawn since then do not count
                self.handle.abort("stop")
                self._finish("stop")
                break
        if self.finish_reason is None and self.handle.exhausted:
            if self.handle.error:
                raise self.handle.error
            parts.append((self._matcher.push(self._decoder.finish()) + self._matcher.finish(), []))
            self._finish(self.handle.finish_reason)
        self.text += "".join(text for text, _ in parts)
        return parts

    @property
    def wants_logprobs(self) -> bool:
        return self._params.logprobs is not None

    def shown(self, tokens: Seq[Sampled]) -> list[Sampled]:
        """Those that the text is made of: all but one that ended it."""
        return [token for token in tokens if token.token_id not in self.handle.seq.end_token_ids]

    def logprob_entry(self, token_id: int, logprob: float | None) -> dict:
        """A token as OpenAI's objects show it; -9999 stands for minus infinity, which JSON has not."""
        spelled, shown = self._tokenizer.shown_bytes(token_id), None if logprob is None else max(logprob, -9999.0)
        return {"token": spelled.decode(errors="replace"), "logprob": shown, "bytes": list(spelled)}

    def logprob_entries(self, tokens: Seq[Sampled]) -> list[dict]:
        """Tokens with the likeliest ones in their places."""
        return [{**self.logprob_entry(token.token_id, token.logprob),
                 "top_logprobs": [self.logprob_entry(*pair) for pair in token.top]} for token in tokens]

    def num_characters(self, token_id: int) -> int:
        """Characters that begin in a token's text."""
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))

    def _finish(self, reason: str) -> None:
        """Note why the answer ended: a stop string counts before what the engine says."""
        if self._matcher.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._matcher.matched
        else:
            self.finish_reason = reason
            if reason == "stop" and self.tokens[-1].token_id in self._params.stop_token_ids:
                self.stop_reason = self.tokens[-1].token_id

    def request_output(self, prompt: Any) -> RequestOutput:
        seq, text = self.handle.seq, prompt if isinstance(prompt, str) else None
        prompt_token_ids = seq.token_ids[: seq.num_prompt_tokens]
        scores = None if seq.params.prompt_logprobs is None else [None, *map(self._logprobs, seq.prompt_scores)]
        return RequestOutput(str(seq.seq_id), text, prompt_token_ids, [self.result()], seq.num_cached_tokens,
                             prompt_logprobs=scores)

    def result(self) -> CompletionOutput:
        return CompletionOutput(
            0, self.text, [token.token_id for token in self.tokens], self.finish_reason, self.stop_reason,
            [self._logprobs(token) for token in self.tokens] if self.wants_logprobs else None,
            math.fsum(token.logprob for token in self.tokens) if self.wants_logprobs else None)

    def _logprobs(self, token: Sampled) -> dict[int, Logprob]:
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(token.top, 1)}
        values = {token.token_id: token.logprob, **dict(token.top)}
        return {token_id: Logprob(value, ranks.get(token_id), self._tokenizer.decode([token_id]))
                for token_id, value in values.items()}


class Group:
    """The answers of one request: n choices of each prompt, side by side.

    A prompt's first choice computes it. The others begin once that one has a token, and find the prompt's blocks in the
    cache. One thread reads a group; any may abort it.
    """

    def __init__(self, llm: LLM, prompts: Seq[Seq[int]], params: SamplingParams, n: int = 1, param: str = "prompt",
                 constraint: Constraint | None = None, tenant: Tenant = Tenant()):
        self._constraint, self._tenant = constraint, tenant
        seed = secrets.randbits(63) if params.seed is None else params.seed  # of all choices: their numbers differ
        self.n, self._llm, self._param = n, llm, param
        self._params, self._prompts = dataclasses.replace(params, seed=seed), prompts
        self._changed, self._aborted = threading.Condition(), False
        self.places: list[Answer | None] = [None] * (len(prompts) * n)
        try:
            for place in range(0, len(self.places), n):
                self._start(place)
        except BaseException:
            self.abort()
            raise

    def _start(self, place: int) -> None:
        prompt, choice = self._prompts[place // self.n], place % self.n
        constraint = self._constraint.copy() if self._constraint else None
        params = dataclasses.replace(self._params, prompt_logprobs=None) if choice else self._params
        self.places[place] = self._llm.submit(prompt, params, self._param, self._changed, choice, constraint,
                                              self._tenant)
        if self._aborted:  # while it was being queued
            self.abort()

    @property
    def answers(self) -> list[Answer]:
        """By prompt, then choice; of a group that has not begun them all, those that there are."""
        return [answer for answer in self.places if answer]

    @property
    def finished(self) -> set[int]:
        """The places whose answers are complete."""
        return {place for place, answer in enumerate(self.places) if answer and answer.finish_reason is not None}

    @property
    def is_finished(self) -> bool:
        return len(self.finished) == len(self.places)

    @property
    def has_stops(self) -> bool:
        """True when text may end an answer."""
        return bool(self._params.stop)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts, each once."""
        return sum(answer.handle.seq.num_prompt_tokens for answer in self.places[:: self.n])

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the cache had, each prompt's once."""
        return sum(answer.handle.seq.num_cached_tokens for answer in self.places[:: self.n])

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answers as far as they were read."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def num_used_tokens(self) -> int:
        """What counts against its key: the answers, and the prompts that did not only wait."""
        begun = (answer.handle for answer in self.places[:: self.n] if answer.handle.timing.started)
        return sum(handle.seq.num_prompt_tokens for handle in begun) + self.num_output_tokens

    def prompt_scores(self, place: int) -> list[Sampled]:
        """A prompt's tokens with their log-probabilities, the first without, where these were asked for."""
        seq = self.places[place - place % self.n].handle.seq
        first = Sampled(seq.token_ids[0], None, None, True)
        return [] if seq.params.prompt_logprobs is None else [first, *seq.prompt_scores]

    def abort(self) -> None:
        self._aborted = True
        for answer in self.answers:
            answer.handle.abort()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile nothing is computed and no blocks are kept; the reading thread asks for it."""
        for answer in self.answers:
            answer.handle.hold(True)
        try:
            yield
        finally:
            for answer in self.answers:
                answer.handle.hold(False)

    def advance(self, timeout: float | None = None, at_least: int = 1) -> list[tuple[int, str, list[Sampled]]]:
        """What came since the last call as (place, text, tokens); waits like `Answer.advance`, for any of them."""
        if len(self.places) == 1:
            return [(0, *part) for part in self.places[0].advance(timeout, at_least)]
        running = [(place, answer) for place, answer in enumerate(self.places)
                   if answer and answer.finish_reason is None]
        for _, answer in running:  # of a first choice its first token: the others wait for it
            answer.handle.want(at_least if answer.tokens or self.n == 1 else 1)
        with self._changed:
            self._changed.wait_for(lambda: any(answer.handle.has_news for _, answer in running), timeout)
        parts = [(place, *part) for place, answer in running for part in answer.advance(timeout=0)]
        for place, answer in enumerate(self.places):
            if answer is None and self.places[place - place % self.n].tokens:
                self._start(place)
        return parts


def default_model_name(model: str | os.PathLike | None, folder: Path) -> str:
    """A Hub id as it is; a folder by its name."""
    local = model is None or Path(model).expanduser().is_dir()
    name = folder.resolve().name if local else str(model)
    return os.fsencode(name).decode(errors="replace")  # a folder's name need not be text, nor its locale UTF-8


def default_sampling_params(folder: Path) -> SamplingParams:
    """What generation_config.json recommends; `do_sample: false` is temperature 0."""
    spec = read_json(folder / "generation_config.json", {})
    drawn = () if spec.get("do_sample") is False else ("temperature", "top_p", "top_k", "min_p")
    names = {name: spec[name] for name in (*drawn, "repetition_penalty") if spec.get(name) is not None}
    if not drawn:
        names["temperature"] = 0.0
    try:
        return SamplingParams(**names)
    except APIError as error:
        raise CheckpointError(f"{folder / 'generation_config.json'}: {error}") from None


def count_kv_blocks(config: EngineConfig, model: Llama, max_model_len: int) -> int:
    """KV blocks to allocate: as asked, else what free memory allows, at most enough for max_num_seqs full contexts."""
    block_bytes = model.kv_block_bytes()
    if config.kv_cache_memory is not None:
        num_blocks, found = config.kv_cache_memory // block_bytes, f"{config.kv_cache_memory} bytes"
    else:
        full = config.max_num_seqs * -(-max_model_len // config.block_size)
        free = model.backend.bytes_for_cache(config.gpu_memory_utilization)
        num_blocks, found = min(full, free // block_bytes), "what memory is free"
    if num_blocks < 1:
        raise SettingsError(f"--kv-cache-memory: {found} is not enough; "
                            f"one block of {config.block_size} tokens takes {block_bytes} bytes")
    return num_blocks


def check_options(options: dict, settings: type, what: str) -> None:
    """Raise SettingsError for a keyword that is no field of the dataclass `settings`."""
    known = [item.name for item in dataclasses.fields(settings)]
    if unknown := set(options) - set(known):
        raise SettingsError(f"{min(unknown)}: no such {what}; there are {', '.join(known)}")


class LLM:
    """A Llama model that answers prompts and chats; safe to use from many threads; close it, or use `with`.

    model: a folder or a Hub id; None is the demo model. Keyword options are EngineConfig's fields, with the server's
    defaults. Raises CheckpointError for a model that cannot be served, SettingsError for an option that is not allowed.
    """

    def __init__(self, model: str | os.PathLike | None = None, *, served_model_name: str | None = None,
                 progress: Callable[[str, float], None] = lambda what, part: None, **options: Any):
        check_options(options, EngineConfig, "option")
        self.config = EngineConfig(**options)
        self.folder = resolve_model(model)
        self.model_config = ModelConfig.load(self.folder)
        self.tokenizer = Tokenizer(self.folder)
        self.template = ChatTemplate(self.folder, self.tokenizer)
        self.name = served_model_name or default_model_name(model, self.folder)
        self.created = int(time.time())
        self._check_vocabulary()
        self.default_params = default_sampling_params(self.folder)
        backend, self.backend_reason = pick_backend(self.config, self.model_config)
        budget = self.config.max_num_batched_tokens or backend.DEFAULT_BATCHED_TOKENS
        self.config = dataclasses.replace(self.config, max_num_batched_tokens=budget)
        try:
            with backend.errors(), backend.on_device():
                self._start(backend, progress)
        except BaseException:
            backend.close()
            raise

    def _start(self, backend: ArrayBackend, progress: Callable[[str, float], None]) -> None:
        checkpoint = Checkpoint(self.folder)
        max_model_len = self.config.max_model_len or self.model_config.max_position_embeddings
        if max_model_len > self.model_config.max_position_embeddings:
            raise SettingsError(f"--max-model-len: {max_model_len} is not allowed; the model's max_position_embeddings "
                                f"is {self.model_config.max_position_embeddings}")
        model = Llama(self.model_config, backend, max_model_len, self.config.block_size)
        model.load(checkpoint, functools.partial(progress, "loading"))
        num_blocks = count_kv_blocks(self.config, model, max_model_len)
        try:
            model.allocate_kv_cache(num_blocks)
        except MemoryError:
            size = num_blocks * model.kv_block_bytes()
            raise SettingsError(f"--kv-cache-memory: there is no memory for {size} bytes; choose less") from None
        self.engine = Engine(model, self.config, num_blocks, self._eos_token_ids(), self.name)
        self.grammars = GrammarCompiler(self.tokenizer, self.model_config.vocab_size, self.engine.eos_token_ids)
        self.max_model_len, self.num_parameters = self.engine.max_model_len, model.num_parameters
        self.device_index, self.pci_bus_id, self.backend_name = backend.device_index, backend.pci_bus_id, backend.name
        self.kv_capacity = num_blocks * self.config.block_size  # tokens

    def _check_vocabulary(self) -> None:
        largest = max(self.tokenizer.inner.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.model_config.vocab_size:
            log.warning("tokenizer.json has ids up to %d and config.json a vocab_size of %d", largest,
                        self.model_config.vocab_size)

    def _eos_token_ids(self) -> set[int]:
        """Ids that end an answer: the config's and the tokenizer's end-of-turn tokens."""
        texts = (*END_OF_TURN, self.tokenizer.special_text("eos_token"))
        named = {self.tokenizer.token_to_id(text) for text in texts if text}
        return {*self.model_config.eos_token_ids, *(named & self.tokenizer.special_ids)}

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free threads, files and device memory; running requests end with an error."""
        self.engine.close()

    def params(self, sampling_params: SamplingParams | None = None, **options: Any) -> SamplingParams:
        """The given parameters, or the model's defaults changed by keyword options."""
        check_options(options, SamplingParams, "sampling parameter")
        given = self.default_params if sampling_params is None else sampling_params
        if not isinstance(given, SamplingParams):
            raise InvalidTypeError(f"sampling_params is {shorten(given)}; a SamplingParams is expected",
                                   "sampling_params")
        return dataclasses.replace(given, **options)

    def describe_defaults(self) -> dict[str, float | int]:
        """What a chat request gets that names nothing else."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                 "repetition_penalty")
        return {**{name: getattr(self.default_params, name) for name in names},
                "max_tokens": self.config.max_tokens}

    def submit(self, prompt: str | dict | Seq[int], params: SamplingParams, param: str = "prompt",
               changed: threading.Condition | None = None, choice: int = 0,
               constraint: Constraint | None = None, tenant: Tenant = Tenant()) -> Answer:
        """Queue one prompt: text, a list of token ids, or vLLM's {"prompt_token_ids": [...]}."""
        if isinstance(prompt, dict):
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if not isinstance(prompt, (str, list, tuple, np.ndarray)):
            raise InvalidTypeError(
                f'{param} is {shorten(prompt)}; it must be text, token ids or {{"prompt_token_ids": [...]}}', param)
        prompt = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        token_ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        handle = self.engine.submit(token_ids, params, tenant, param, changed, choice, constraint)
        try:
            return Answer(self.tokenizer, handle)
        except BaseException:
            handle.abort()
            raise

    def generate(self, prompts: str | Seq, sampling_params: SamplingParams | None = None, *, stream: bool = False,
                 **options: Any) -> list[RequestOutput] | Iterator[Piece]:
        """Continue each prompt (text or token ids; one or a list). With stream=True, an iterator of Pieces."""
        single = isinstance(prompts, (str, dict)) or not hasattr(prompts, "__getitem__") or (
            len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        listed = [prompts] if single else list(prompts)
        return self._answer(listed, self.params(sampling_params, **options), "prompt", stream)

    def chat(self, messages: list, sampling_params: SamplingParams | None = None, *, stream: bool = False,
             **options: Any) -> list[RequestOutput] | Iterator[Piece]:
        """Answer a conversation ([{"role", "content"}, ...]) or a list of them. stream as in `generate`."""
        several = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple))
        conversations = messages if several else [messages]
        prompts = [self.template.encode(parse_messages(conversation)) for conversation in conversations]
        return self._answer(prompts, self.params(sampling_params, **options), "messages", stream)

    def _answer(self, prompts: list, params: SamplingParams, param: str,
                stream: bool) -> list[RequestOutput] | Iterator[Piece]:
        answers: list[Answer] = []
        pieces = self._pieces(prompts, params, param, answers)
        if stream:
            return pieces
        for _ in pieces:
            pass
        return [answer.request_output(prompt) for prompt, answer in zip(prompts, answers)]

    def _pieces(self, prompts: list, params: SamplingParams, param: str, answers: list[Answer]) -> Iterator[Piece]:
        """Run prompts together, at most max_queue of them at a time; closing the iterator stops what still runs."""
        changed, running = threading.Condition(), {}
        try:
            while running or len(answers) < len(prompts):
                while len(answers) < len(prompts) and len(running) < self.config.max_queue:
                    try:
                        running[len(answers)] = self.submit(prompts[len(answers)], params, param, changed)
                    except QueueFullError:  # others use the engine too: their turn first
                        time.sleep(0.01)
                        break
                    answers.append(running[len(answers)])
                with changed:
                    changed.wait_for(lambda: not running or any(a.handle.has_news for a in running.values()))
                for index, answer in list(running.items()):
                    for text, tokens in answer.advance(timeout=0):
                        yield Piece(text, index, [token.token_id for token in tokens], None)
                    if answer.finish_reason is not None:
                        del running[index]
                        yield Piece("", index, (), answer.finish_reason)
        finally:
            for answer in running.values():
                answer.handle.abandon()


# ==============================================================================
# Server -- routes, SSE, limits, CORS, shutdown; no model knowledge
# uses: Errors, Settings, Checkpoint, Metrics, API, Responses, Messages, Access, LLM
# ==============================================================================

MAX_HEAD, MAX_LINE, MAX_BODY, MAX_REST, MAX_HEADERS = 32 << 10, 8 << 10, 4 << 20, 256 << 10, 100  # bytes; a count
HEAD_TIMEOUT, BODY_TIMEOUT, IDLE_TIMEOUT = 10.0, 20.0, 75.0  # seconds, of whole phases
REST_TIMEOUT, LINGER_TIMEOUT = 5.0, 15.0  # seconds, to read unwanted input away: before a next request, before closing
MAX_UNSENT = 32 << 10  # bytes that the system takes from us before the client takes them; its own default is megabytes
STALL_TIME = 0.2  # seconds without room for more until a client counts as not reading
PING_INTERVAL = 5.0  # seconds of silence before an open stream gets a comment
PLACE_INTERVAL = 1.0  # seconds between two comments that tell a waiting stream its place in the queue
EXPOSED_HEADERS = ", ".join(["x-request-id", "request-id", "Server-Timing", "Retry-After", *(
    f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset"))])
OPEN_PATHS = ("/", "/health", "/ready")  # for everybody, whatever keys are set
QUIET_PATHS = ("/health", "/ready", "/metrics", "/v1/metrics", "/v1/queue")  # asked every second or so: logged as debug
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(%s) ([!-~]+) HTTP/([0-9])\.([0-9])" % TOKEN)
HEADER_LINE = re.compile(rb"(%s):([^\x00-\x08\x0a-\x1f\x7f]*)" % TOKEN)
SINGLE_HEADERS = {"host", "content-length", "content-type", "transfer-encoding", "origin", "expect", "authorization"}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NO_RETRY = {"x-should-retry": "false"}  # or OpenAI's clients run the request again


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")


class HTTPError(APIError):
    """A request that is broken as HTTP: the answer closes the connection."""


class Disconnected(Exception):
    """The client is gone, or silent for too long between requests: nobody to answer."""


class HTTPReader:
    """Reads one connection's bytes; every phase has one deadline however slowly the bytes trickle."""

    def __init__(self, connection: socket.socket):
        self._connection, self.buffer = connection, bytearray()

    def _fill(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            data = self._connection.recv(65536)
        except TimeoutError:
            raise
        except OSError:  # a reset, or bytes that are no TLS
            raise Disconnected from None
        if not data:
            raise Disconnected
        self.buffer += data

    def wait(self, timeout: float) -> None:
        """Return when the first byte of a request is there."""
        try:
            while not self.buffer:
                self._fill(time.monotonic() + timeout)
        except TimeoutError:
            raise Disconnected from None

    def head(self) -> list[bytes]:
        """The lines of the next request's head."""
        deadline = time.monotonic() + HEAD_TIMEOUT
        while (end := self._end_of_head()) < 0:
            self._check_head(len(self.buffer))
            if b"\n\n" in self.buffer:
                raise HTTPError("the lines of a request's head must end in CR LF")
            try:
                self._fill(deadline)
            except TimeoutError:
                raise HTTPError(f"the request's head took longer than {HEAD_TIMEOUT:g} s",
                                status=408, code="request_timeout") from None
        self._check_head(end)
        lines = bytes(self.buffer[:end]).split(b"\r\n")
        del self.buffer[: end + 4]
        return lines

    def _end_of_head(self) -> int:
        while self.buffer.startswith(b"\r\n"):  # empty lines before a request are allowed
            del self.buffer[:2]
        return self.buffer.find(b"\r\n\r\n")

    def _check_head(self, size: int) -> None:
        line = self.buffer.find(b"\r\n", 0, size)
        if (size if line < 0 else line) > MAX_LINE:
            raise HTTPError(f"the request line is longer than {MAX_LINE} bytes", status=414, code="uri_too_long")
        if size > MAX_HEAD:
            raise HTTPError(f"the headers are longer than {MAX_HEAD} bytes", status=431, code="headers_too_large")

    def line(self, limit: int, deadline: float) -> bytes:
        """A line of chunked coding, without its CRLF."""
        while (end := self.buffer.find(b"\r\n")) < 0 and len(self.buffer) <= limit:
            self._fill(deadline)
        if not 0 <= end <= limit:
            raise HTTPError(f"a line of the chunked body is longer than {limit} bytes")
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 2]
        return line

    def exactly(self, size: int, deadline: float) -> bytes:
        while len(self.buffer) < size:
            self._fill(deadline)
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data


@dataclass
class HTTPRequest:
    """A request's head, checked; `path` and `query` are as on the wire, and routing looks at nothing else."""

    method: str
    path: str
    query: str
    version: tuple[int, int]
    headers: dict[str, str]  # lower-case names; values of repeated fields joined by ", "
    content_length: int = 0
    chunked: bool = False

    @classmethod
    def parse(cls, lines: list[bytes]) -> HTTPRequest:
        match = REQUEST_LINE.fullmatch(lines[0])
        if not match:
            raise HTTPError("the request line is not METHOD TARGET HTTP/1.1")
        method, target, version = match[1].decode(), match[2].decode(), (int(match[3]), int(match[4]))
        if version not in ((1, 0), (1, 1)):
            raise HTTPError("HTTP/1.0 and HTTP/1.1 are supported", status=505)
        path, _, query = re.sub(r"\Ahttps?://[^/?#]+/?", "/", target, flags=re.IGNORECASE).partition("?")
        if not (path.startswith("/") or (target, method) == ("*", "OPTIONS")) or "#" in target:
            raise HTTPError("the request target must be a path")
        request = cls(method, path, query, version, cls._headers(lines[1:]))
        request._read_framing()
        return request

    @staticmethod
    def _headers(lines: list[bytes]) -> dict[str, str]:
        if len(lines) > MAX_HEADERS:
            raise HTTPError(f"there are {len(lines)} header fields; {MAX_HEADERS} are allowed",
                            status=431, code="headers_too_large")
        headers: dict[str, str] = {}
        for line in lines:
            match = HEADER_LINE.fullmatch(line)
            if not match:
                raise HTTPError("a header line is not NAME: VALUE")
            name, value = match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")
            if name in headers and name in SINGLE_HEADERS:
                raise HTTPError(f"header {name} appears twice")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers

    def _read_framing(self) -> None:
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if self.version == (1, 1) and not re.fullmatch(r"[!-~]+", self.headers.get("host", "")):
            raise HTTPError("HTTP/1.1 needs exactly one Host header")
        if coding is not None:
            if length is not None or self.version == (1, 0):
                raise HTTPError("Transfer-Encoding is not allowed with Content-Length or HTTP/1.0")
            if coding.lower() != "chunked":
                raise HTTPError("Transfer-Encoding must be chunked", status=501, code="unsupported_value")
            self.chunked = True
        elif length is not None:
            if not re.fullmatch(r"[0-9]{1,18}", length, re.ASCII):
                raise HTTPError("Content-Length must be one decimal number")
            self.content_length = int(length)

    @property
    def keep_alive(self) -> bool:
        tokens = {token.strip().lower() for token in self.headers.get("connection", "").split(",")}
        return self.version == (1, 1) and "close" not in tokens


class Watcher:
    """One thread that notices clients who leave while their request waits, prefills or decodes.

    A FIN counts as leaving; bytes of a next request do not.
    """

    INTERVAL = 0.025  # seconds

    def __init__(self):
        self._watched: dict[int, Callable[[], None]] = {}  # file descriptor -> what to call, once
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="rustinfer-watcher", daemon=True)
        self._thread.start()

    def add(self, connection: socket.socket, callback: Callable[[], None]) -> None:
        with self._lock:
            self._watched[connection.fileno()] = callback
        self._wake.set()

    def discard(self, connection: socket.socket) -> None:
        with self._lock:
            self._watched.pop(connection.fileno(), None)

    def close(self) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            with self._lock:
                watched = dict(self._watched)
                if not watched:
                    self._wake.clear()
            if self._closed or not watched:
                continue
            poller = select.poll()
            for descriptor in watched:
                poller.register(descriptor, getattr(select, "POLLRDHUP", select.POLLIN))
            gone = [descriptor for descriptor, events in poller.poll(0) if self._has_left(descriptor, events)]
            with self._lock:
                callbacks = [self._watched.pop(descriptor) for descriptor in gone
                             if self._watched.get(descriptor) is watched[descriptor]]  # not given to another since
            for callback in callbacks:
                callback()
            time.sleep(self.INTERVAL)

    @staticmethod
    def _has_left(descriptor: int, events: int) -> bool:
        if hasattr(select, "POLLRDHUP") or events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return True
        with socket.socket(fileno=os.dup(descriptor)) as peeked:  # elsewhere: readable and empty means closed
            try:
                return peeked.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except OSError:
                return False


def shake_hands(connection: ssl.SSLSocket, deadline: float) -> None:
    """TLS' handshake, by a deadline however slowly the client's bytes come."""
    connection.setblocking(False)
    while True:
        try:
            return connection.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
            poller = select.poll()  # select() knows no descriptor above 1023
            poller.register(connection, select.POLLIN if isinstance(wanted, ssl.SSLWantReadError) else select.POLLOUT)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError from None


def answer_head(status: int, headers: dict[str, str]) -> bytes:
    """An answer's status line and headers, as they are sent."""
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
             *(f"{name}: {value}" for name, value in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise RuntimeError("a header holds a line break")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """One connection: reads requests, calls their route, writes answers. The parsing of the base class is not used."""

    server: HTTPServer

    def setup(self) -> None:
        self.connection: socket.socket = self.request
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT)
        self.reader = HTTPReader(self.connection)
        self.owner, self.busy, self.since = self.server.owner, False, time.monotonic()
        self.owner.connections.add(self)

    def finish(self) -> None:
        self.owner.connections.discard(self)
        if isinstance(self.connection, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):  # what tells the client that nothing was cut off
                self.connection.settimeout(0)
                self.connection.unwrap()

    def handle(self) -> None:
        try:
            if isinstance(self.connection, ssl.SSLSocket):
                shake_hands(self.connection, time.monotonic() + HEAD_TIMEOUT)
            while self._handle_one():
                if self.owner.draining:
                    break
        except (Disconnected, OSError):
            pass  # nobody is left to answer

    def _handle_one(self) -> bool:
        """One request and its answer; False when the connection ends with it."""
        self.since = time.monotonic()
        self.http, self.body_read, self.must_close = None, False, False
        self.request_id, self.facts = secrets.token_hex(8), {}
        self.status, self.stream_open = 0, False  # what of an answer has begun
        self.client: Client | None = None  # once it is known who asks
        self.reply: Reply | None = None  # of a stream
        self.stalled: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.reader.wait(IDLE_TIMEOUT)
        started = self.since = time.monotonic()
        try:
            self.http = HTTPRequest.parse(self.reader.head())
            self.busy = True
            self._adopt_request_id()
            self.owner.route(self)
        except APIError as error:
            self._answer_error(error)
        except Disconnected:
            self.facts["error"], self.must_close = "client_left", True
        except BaseException as error:  # a panic in a library's Rust is no Exception
            log.exception("request %s failed", self.request_id)
            shown = str(error) if isinstance(error, EngineError) else "internal error; the log has the details"
            self._answer_error(APIError(shown, status=500, type="server_error", code="internal_error",
                                        headers=NO_RETRY))
        finally:
            self.busy = False
            self._log_request(started)
        if self.must_close and self.status and self._has_rest():
            self._linger()
        return not self.must_close and self._finish_body()

    def _adopt_request_id(self) -> None:
        given = self.http.headers.get("x-request-id", "")
        if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given):
            self.request_id = given

    def _log_request(self, started: float) -> None:
        quiet = self.http is not None and self.http.path in QUIET_PATHS
        what = f"{shorten(self.http.method, 20)} {shorten(self.http.path, 80)}" if self.http else "bad request"
        facts = {"total_ms": round((time.monotonic() - started) * 1000, 1), **self.facts}
        plain = lambda value: isinstance(value, str) and re.fullmatch(r"[\w.,-]+", value, re.ASCII)
        shown = " ".join(f"{name}={value if plain(value) else json.dumps(value)}" for name, value in facts.items())
        log.log(logging.DEBUG if quiet else logging.INFO, "request %s from %s: %s %s %s", self.request_id,
                self.client_address[0], what, self.status or "-", shown,
                extra={"facts": {"request_id": self.request_id, "address": self.client_address[0], "request": what,
                                 "status": self.status or None, **facts}})

    # -- reading

    def read_body(self) -> bytes:
        """The whole body, within limits; asks a waiting client to send it."""
        request, deadline = self.http, time.monotonic() + BODY_TIMEOUT
        if request.content_length > MAX_BODY:
            raise HTTPError(f"the body has {request.content_length} bytes; {MAX_BODY} are allowed",
                            status=413, code="request_too_large")
        expected = request.headers.get("expect", "").lower() == "100-continue" and request.version == (1, 1)
        if expected and not self.reader.buffer:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            size = request.content_length
            body = self._read_chunks(deadline) if request.chunked else self.reader.exactly(size, deadline)
        except TimeoutError:
            raise HTTPError(f"the request's body took longer than {BODY_TIMEOUT:g} s",
                            status=408, code="request_timeout") from None
        self.body_read = True
        return body

    def _read_chunks(self, deadline: float) -> bytes:
        body = bytearray()
        while True:
            size, _, extension = self.reader.line(1024, deadline).partition(b";")
            legal = re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size.rstrip(b" \t"))
            if not legal or re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", extension):
                raise HTTPError("a chunk size of the body is not a hexadecimal number")
            count = int(size, 16)
            if len(body) + count > MAX_BODY:
                raise HTTPError(f"the body has more than {MAX_BODY} bytes", status=413, code="request_too_large")
            if count == 0:
                break
            body += self.reader.exactly(count, deadline)
            if self.reader.exactly(2, deadline) != b"\r\n":
                raise HTTPError("a chunk of the body does not end where its size says")
        for _ in range(MAX_HEADERS):  # trailers mean nothing here, but must be well formed
            line = self.reader.line(MAX_LINE, deadline)
            if not line:
                return bytes(body)
            if not HEADER_LINE.fullmatch(line):
                break
        raise HTTPError("the trailer of the chunked body is not valid")

    def _has_rest(self) -> bool:
        """True if the client may still be sending this request."""
        return self.http is None or not self.body_read and (self.http.chunked or self.http.content_length > 0)

    def _can_skip_rest(self) -> bool:
        """True if a body that no route read is small, and surely sent: the connection can go on after it."""
        request = self.http
        small = not request.chunked and request.content_length <= MAX_REST
        return not self._has_rest() or small and "expect" not in request.headers

    def _finish_body(self) -> bool:
        """Discard a body that no route read: the next request starts behind it. False if it does not come."""
        try:
            if self._has_rest():
                self.reader.exactly(self.http.content_length, time.monotonic() + REST_TIMEOUT)
        except (TimeoutError, Disconnected):
            return False
        return True

    def read_json(self) -> dict:
        """The body as a JSON object. A foreign page must ask first: what it may send without a preflight is refused."""
        kind = self.http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and self._foreign_origin():
            found = shorten(kind) or "missing"
            raise APIError(f"Content-Type is {found}; from another origin application/json is expected",
                           status=415, code="unsupported_media_type")
        return parse_json(self.read_body())

    def _foreign_origin(self) -> bool:
        origin = self.http.headers.get("origin")
        return origin is not None and origin.partition("://")[2] != self.http.headers.get("host")

    # -- writing

    def _send(self, data: bytes) -> None:
        """All of it within write_timeout, or Disconnected. While the client does not read, `stalled()` is entered."""
        deadline = time.monotonic() + self.owner.config.write_timeout
        rest, patience = memoryview(data), STALL_TIME
        with contextlib.ExitStack() as stalled:
            while rest:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Disconnected
                self.connection.settimeout(min(left, patience))
                try:
                    rest = rest[self.connection.send(rest) :]
                except TimeoutError:
                    if patience == STALL_TIME:
                        stalled.enter_context(self.stalled())
                    patience = math.inf
                except OSError:
                    raise Disconnected from None

    def _speaks_messages(self) -> bool:
        """True on a route of Anthropic's dialect, which has errors and the request id's header of its own."""
        return self.http is not None and self.http.path.startswith("/v1/messages")

    def _head(self, status: int, headers: dict[str, str]) -> bytes:
        keep = self.http is not None and self.http.keep_alive and not self.must_close and self._can_skip_rest()
        keep = keep and not self.owner.draining
        self.must_close = not keep
        own = {"request-id": self.request_id} if self._speaks_messages() else {}
        head = answer_head(status, {
            "Date": email.utils.formatdate(usegmt=True), "x-request-id": self.request_id, **own, **headers,
            **(self.client.headers() if self.client else {}),
            **self.owner.cors_headers(self.http), **({} if keep else {"Connection": "close"})})
        self.status = status  # from here on the answer has begun
        return head

    def respond(self, status: int, body: bytes, content_type: str = "application/json",
                headers: dict[str, str] | None = None) -> None:
        """A whole answer in one write."""
        about = {} if status in (204, 304) else {"Content-Type": content_type, "Content-Length": str(len(body))}
        head = self._head(status, {**about, **(headers or {})})
        self._send(head if self.http and self.http.method == "HEAD" else head + body)

    def respond_json(self, value: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.respond(status, json.dumps(value).encode(), headers=headers)

    def _answer_error(self, error: APIError) -> None:
        self.facts["error"] = error.code
        self.owner.count_error(error.code)
        if error.status >= 500:
            log.error("request %s: %s", self.request_id, error)
        self.must_close = self.must_close or isinstance(error, HTTPError)
        try:
            if self.stream_open:  # its last event is the error
                self.write_stream(self.reply.error_event(error))
                self.end_stream()
            elif not self.status:
                body = error.body()
                if self._speaks_messages():
                    body = {"type": "error", "error": message_error(error), "request_id": self.request_id}
                return self.respond_json(body, error.status, error.headers)
        except Disconnected:
            pass
        self.must_close = True

    def _linger(self) -> None:
        """Let the client read the answer before unread input makes the kernel reset the connection."""
        deadline = time.monotonic() + LINGER_TIMEOUT
        try:
            self.connection.shutdown(socket.SHUT_WR)
            for _ in range(256):
                self.connection.settimeout(max(0.01, deadline - time.monotonic()))
                if time.monotonic() > deadline or not self.connection.recv(65536):
                    break
        except OSError:
            pass

    def start_stream(self) -> None:
        self._chunked = self.http.version == (1, 1)
        self.must_close = self.must_close or not self._chunked
        self._pending = self._head(200, {
            "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no",
            **({"Transfer-Encoding": "chunked"} if self._chunked else {})})
        self.stream_open = True

    def write_stream(self, data: bytes) -> None:
        """Send events, as one chunk and one write (with the head, the first time)."""
        framed = b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data
        framed = self._pending + framed
        self._pending = b""
        self._send(framed)

    def end_stream(self) -> None:
        self._send(self._pending + (b"0\r\n\r\n" if self._chunked else b""))


def close_socket(connection: socket.socket) -> None:
    """Wake whoever reads the socket; its own thread closes it, and of TLS' state here nothing may change."""
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass


class HTTPServer(http.server.ThreadingHTTPServer):
    """The listening socket: a thread a connection, up to a limit."""

    daemon_threads, block_on_close, request_queue_size, allow_reuse_address = True, False, 1024, True

    def __init__(self, owner: Server, host: str, port: int, max_connections: int, tls: ssl.SSLContext | None):
        self.owner, self._max_connections, self._tls = owner, max_connections, tls
        self._open, self._lock = 0, threading.Lock()  # accepted and not yet closed
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        super().__init__(address, RequestHandler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the base class would look the host's name up
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connection, address = super().get_request()
            if self._tls:  # the handshake is for the connection's own thread
                connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            return connection, address
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the accept loop would spin until a file is closed
                self._drop_idle()
                time.sleep(0.05)
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """At the cap the oldest connection without a request makes room; if all are at work, the new one is refused."""
        with self._lock:
            self._open += 1
        try:
            if self._open <= self._max_connections or self._drop_idle():
                return super().process_request(request, client_address)
            log.warning("connection of %s refused: all %d are in use", client_address[0], self._max_connections)
        except RuntimeError as error:
            log.warning("connection of %s refused: %s", client_address[0], error)  # the system gives no thread
        self._refuse(request)

    def shutdown_request(self, request: socket.socket) -> None:
        """Close a connection; called once for each that was accepted."""
        super().shutdown_request(request)
        with self._lock:
            self._open -= 1

    def _drop_idle(self) -> bool:
        idle = [handler for handler in list(self.owner.connections) if not handler.busy]
        if idle:
            oldest = min(idle, key=lambda handler: handler.since)
            self.owner.connections.discard(oldest)  # it ends soon, and must not be chosen twice
            close_socket(oldest.connection)
        return bool(idle)

    def _refuse(self, request: socket.socket) -> None:
        """Answer 503 without a thread, and without waiting for the client."""
        error = UnavailableError(f"all {self._max_connections} connections are in use", code="too_many_connections")
        self.owner.count_error(error.code)
        body = json.dumps(error.body()).encode()
        head = answer_head(error.status, {
            "Date": email.utils.formatdate(usegmt=True), "x-request-id": secrets.token_hex(8), **retry_after(1),
            "Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close",
            **self.owner.cors_headers(None)})
        try:
            request.setblocking(False)
            request.sendall(head + body)
            request.recv(65536)  # closing with unread input would reset the connection before the answer is read
        except OSError:
            pass
        self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("connection of %s failed", client_address[0])


class Page:
    """web/index.html: a browser runs what stands in the file and reaches this server, nothing else."""

    POLICY = ("default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
              "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'")

    def __init__(self, path: Path):
        self._path, self._read = path, (None, b"", {})  # when the file changed, its bytes and headers as read then

    def load(self) -> tuple[bytes, dict[str, str]]:
        """The page and its headers; read again when the file has changed."""
        changed = self._path.stat().st_mtime_ns
        if self._read[0] != changed:
            body = self._path.read_bytes()
            self._read = (changed, body, self._headers(body))
        return self._read[1:]

    def _headers(self, body: bytes) -> dict[str, str]:
        allowed = {name: " ".join(map(self._hash, re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)))
                   for name, tag in (("script", b"script"), ("style", b"style"))}
        return {"Content-Security-Policy": self.POLICY.format(**allowed), "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
                "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    @staticmethod
    def _hash(text: bytes) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


class Job:
    """One request that generates: who is answered, with what, since when and for how long."""

    def __init__(self, handler: RequestHandler, llm: LLM, group: Group, timeout: float | None):
        self.handler, self.llm, self.group, self.timeout = handler, llm, group, timeout
        self.client, self.request_id = handler.client, handler.request_id  # the handler goes on to others
        self.since, self.cancelled = time.monotonic(), False

    def time_left(self, most: float) -> float | None:
        """Seconds to wait: what is left of the request's time, at most `most`; None for ever."""
        left = math.inf if self.timeout is None else max(0.0, self.since + self.timeout - time.monotonic())
        return None if min(left, most) == math.inf else min(left, most)

    def cancel(self) -> None:
        self.cancelled = True
        self.group.abort()

    def place(self) -> tuple[int, float | None] | None:
        """As `Engine.place` tells it of the first sequence; None when it runs."""
        return self.llm.engine.place(self.group.places[0].handle.seq)

    def facts(self) -> dict[str, Any]:
        """What the log tells of it."""
        group, timing = self.group, self.group.places[0].handle.timing
        reasons = [answer.finish_reason or answer.handle.finish_reason or "abort" for answer in group.answers]
        return {"prompt": group.num_prompt_tokens, "cached": group.num_cached_tokens,
                "completion": group.num_output_tokens, "queue_ms": round(timing.queue_s * 1000, 1),
                "first_token_ms": round(timing.ttft_s * 1000, 1), "finish": ",".join(reasons)}

    def describe(self) -> dict:
        """Ids, ages and sizes; never text."""
        sequences = [answer.handle.seq for answer in self.group.answers]
        place, timing = self.place(), self.group.places[0].handle.timing
        waits = place or sequences[0] in self.llm.engine.scheduler.aside
        return {"id": self.request_id, "state": "waiting" if waits else "running",
                "position": place[0] if place else None, "age_seconds": round(time.monotonic() - self.since, 3),
                "queue_ms": round(timing.queue_s * 1000, 1), "prefill_ms": round(timing.prefill_s * 1000, 1),
                "decode_ms": round(timing.decode_s * 1000, 1),
                "prompt_tokens": self.group.num_prompt_tokens, "cached_tokens": self.group.num_cached_tokens,
                "completion_tokens": sum(seq.num_output_tokens for seq in sequences),
                "kv_blocks": len({block_id for seq in sequences for block_id in list(seq.block_table)})}


def describe_place(position: int, wait: float | None) -> bytes:
    """A comment for a stream whose request waits."""
    estimate = "" if wait is None else f", about {wait:.0f} s"
    return f": waiting, {position} before this one{estimate}\n\n".encode()


class Server:
    """The HTTP server of one LLM, inside any program; it serves from construction until `stop` (or use `with`).

    llm may be None and set later through `attach`: until then /ready says 503. Keyword options are ServerConfig's
    fields; port 0 picks a free one, and `port` and `url` tell which. Raises OSError if the address cannot be bound,
    SettingsError for an option that is not allowed. The LLM stays the caller's to close.
    """

    def __init__(self, llm: LLM | None = None, **options: Any):
        check_options(options, ServerConfig, "option")
        self.config = config = ServerConfig(**options)
        self.draining = False
        self._cors = {origin.strip() for origin in config.cors_origins.split(",")}
        self._access = Access(config)
        names = [*LOOPBACK, config.host, *(config.allowed_hosts or "").split(",")]
        self._hosts = {name.strip(" []").lower() for name in names}
        self._guarded = is_loopback(config.host) and not self._access.has_keys and "*" not in self._hosts
        self._lock, self._closing = threading.Lock(), threading.RLock()  # a signal's handler may stop it meanwhile
        self.connections: set[RequestHandler] = set()
        self.errors: Counter[str] = Counter()  # answers by code
        self._jobs: set[Job] = set()
        self._recent: deque[tuple[Client, dict]] = deque(maxlen=64)  # jobs that ended, oldest first
        self._index = Page((find_data("web") or HERE / "web") / "index.html")
        self._http = HTTPServer(self, config.host, config.port, config.max_connections, self._tls_context())
        self._watcher = Watcher()
        self.port = self._http.server_port
        self.attach(llm)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="rustinfer-http",
                                        daemon=True)
        self._thread.start()

    def _tls_context(self) -> ssl.SSLContext | None:
        if self.config.ssl_certfile is None:
            if self.config.ssl_keyfile is not None:
                raise SettingsError("--ssl-keyfile: needs --ssl-certfile")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.config.ssl_certfile, self.config.ssl_keyfile, password=lambda: "")
        except OSError as error:  # an SSLError is one
            raise SettingsError(f"--ssl-certfile, --ssl-keyfile: cannot be used: {shorten(str(error))}") from None
        return context

    @property
    def has_keys(self) -> bool:
        """True when clients need a key."""
        return self._access.has_keys

    @property
    def url(self) -> str:
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        scheme = "https" if self.config.ssl_certfile else "http"
        return f"{scheme}://[{shown}]:{self.port}" if ":" in shown else f"{scheme}://{shown}:{self.port}"

    def count_error(self, code: str) -> None:
        with self._lock:
            self.errors[code] += 1

    def attach(self, llm: LLM | None) -> None:
        """The model is loaded: answer requests."""
        self._probe = MachineProbe(llm.device_index, llm.pci_bus_id) if llm else MachineProbe()
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        if llm:
            self._registry.register(EngineCollector(llm.name, llm.engine.snapshot, self._probe.card, self.errors))
        self._llm = llm

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self, drain_timeout: float = 30.0) -> None:
        """Refuse new requests, let running ones finish within the timeout, end the rest with an error, close.

        Safe to call twice, from any thread; each call returns when the server has stopped.
        """
        self.draining = True
        deadline = time.monotonic() + drain_timeout
        self._wait(lambda: not self._busy() or time.monotonic() > deadline)
        for job in list(self._jobs):
            job.group.abort()
        self._wait(lambda: not self._busy() or time.monotonic() > deadline + 2)  # they write their last event
        with self._closing:
            http_server, self._http = self._http, None
            if http_server is None:
                return
            http_server.shutdown()
            http_server.server_close()
            for handler in list(self.connections):
                close_socket(handler.connection)
            self._wait(lambda: not self.connections or time.monotonic() > deadline + 4)
            self._thread.join()
            self._watcher.close()

    def _busy(self) -> bool:
        return self._http is not None and any(handler.busy for handler in list(self.connections))

    @staticmethod
    def _wait(done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(0.01)

    # -- routes; each runs on its connection's thread

    def route(self, handler: RequestHandler) -> None:
        path, method = handler.http.path, handler.http.method
        self._check_host(handler.http)
        if method != "OPTIONS" and path not in OPEN_PATHS:
            handler.client = self._identify(handler)
        routes = self.ROUTES.get(path) or next((found for shape, found in self.ROUTES.items() if shape.endswith("{id}")
                                                and path.startswith(shape.removesuffix("{id}"))), None)
        if method == "OPTIONS" and (routes or path == "*"):
            return self._options(handler, routes or {})
        if routes is None:
            raise APIError(f"there is no {shorten(path)} here", status=404, code="not_found")
        action = routes.get("GET" if method == "HEAD" else method)
        if action is None:
            raise APIError(f"{shorten(path)} does not take {shorten(method, 40)}", status=405,
                           code="method_not_allowed",
                           headers={"Allow": self._allow(routes)})
        if method == "POST" or action == Server._chat_by_query:
            handler.client.take("requests", 1)
        action(self, handler)

    def _check_host(self, request: HTTPRequest) -> None:
        """On a loopback address without keys: a web page whose name was made to mean this machine is not for us."""
        host = re.sub(r":[0-9]*\Z", "", request.headers.get("host", "")).strip("[]").lower()
        if self._guarded and host and host not in self._hosts:
            raise APIError(f"the Host header is {shorten(host)!r}, which is not this server; --allowed-hosts takes "
                           "more names", status=403, code="invalid_host")

    def _identify(self, handler: RequestHandler) -> Client:
        """Who asks. EventSource cannot send headers: the route made for it, and no other, takes a key in the query."""
        request, key = handler.http, None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = token.strip()
        elif "x-api-key" in request.headers:
            key = request.headers["x-api-key"]
        elif request.path == "/v1/chat/completions" and request.method in ("GET", "HEAD"):
            key = dict(urllib.parse.parse_qsl(request.query)).get("api_key")
        client = self._access.client(key, handler.client_address[0])
        if self._access.has_keys:
            handler.facts["key"] = client.tenant.name
        return client

    @staticmethod
    def _allow(routes: dict) -> str:
        return ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])

    def cors_headers(self, request: HTTPRequest | None) -> dict[str, str]:
        """Who may read the answer from a browser; never with credentials."""
        if "*" in self._cors:
            allowed = {"Access-Control-Allow-Origin": "*"}
        else:
            origin = request.headers.get("origin") if request else None
            allowed = {"Vary": "Origin", **({"Access-Control-Allow-Origin": origin} if origin in self._cors else {})}
        return {**allowed, "Access-Control-Expose-Headers": EXPOSED_HEADERS}

    def _options(self, handler: RequestHandler, routes: dict) -> None:
        allow = self._allow(routes)
        handler.respond(204, b"", headers={
            "Allow": allow, "Access-Control-Allow-Methods": allow, "Access-Control-Allow-Headers": "*, Authorization",
            "Access-Control-Max-Age": "600"})

    def _health(self, handler: RequestHandler) -> None:
        dead = self._llm is not None and self._llm.engine.dead is not None
        handler.respond_json({"status": "unhealthy" if dead else "healthy", "service": "rustinfer-server"},
                             503 if dead else 200)

    def _ready(self, handler: RequestHandler) -> None:
        loaded = self._llm is not None and self._llm.engine.is_open
        status = "draining" if self.draining else "ready" if loaded else "loading" if self._llm is None else "failed"
        handler.respond_json({"status": status, "model_loaded": loaded}, 200 if status == "ready" else 503)

    def _metrics(self, handler: RequestHandler) -> None:
        engine = {"engine": self._llm.engine.snapshot()} if self._llm else {}
        handler.respond_json({**self._probe.snapshot(), **engine})

    def _prometheus(self, handler: RequestHandler) -> None:
        histograms = [self._llm.engine.metrics.registry] if self._llm else []
        body = b"".join(map(prometheus_client.generate_latest, (self._registry, *histograms)))
        handler.respond(200, body, "text/plain; version=0.0.4; charset=utf-8")

    def _page(self, handler: RequestHandler) -> None:
        try:
            body, headers = self._index.load()
        except OSError:
            text = b"rustinfer serves its API under /v1; the page (web/index.html) is not installed here.\n"
            return handler.respond(200, text, "text/plain; charset=utf-8")
        known = re.findall(r'"[^"]*"', handler.http.headers.get("if-none-match", ""))
        if headers["ETag"] in known:
            return handler.respond(304, b"", headers=headers)
        handler.respond(200, body, "text/html; charset=utf-8", headers)

    @staticmethod
    def _shutting_down() -> UnavailableError:
        return UnavailableError("the server is shutting down", code="shutting_down", headers=retry_after(5))

    def _ready_llm(self) -> LLM:
        if self.draining:
            raise self._shutting_down()
        if self._llm is None:
            raise UnavailableError("the model is still loading", headers=retry_after(2))
        return self._llm

    @staticmethod
    def _model_object(llm: LLM) -> dict:
        return {"id": llm.name, "object": "model", "created": llm.created, "owned_by": "rustinfer",
                "max_model_len": llm.max_model_len}

    def _models(self, handler: RequestHandler) -> None:
        handler.respond_json({"object": "list", "data": [self._model_object(self._ready_llm())]})

    def _model(self, handler: RequestHandler) -> None:
        llm = self._ready_llm()
        self._check_model(llm, urllib.parse.unquote(handler.http.path.removeprefix("/v1/models/")))
        handler.respond_json(self._model_object(llm))

    @staticmethod
    def _check_model(llm: LLM, name: str | None) -> None:
        if name is not None and name != llm.name:
            raise APIError(f"the model {shorten(name)!r} does not exist; {llm.name!r} is served", "model", status=404,
                           code="model_not_found")

    def _chat(self, handler: RequestHandler) -> None:
        llm = self._ready_llm()
        self._answer_chat(handler, llm, parse_chat(handler.read_json(), llm.default_params))

    def _chat_by_query(self, handler: RequestHandler) -> None:
        """For EventSource, which can only GET: the body's fields as query parameters, streaming unless told not to."""
        llm = self._ready_llm()
        values = {"stream": True, **parse_query(handler.http.query, QUERY_FIELDS)}
        values.pop("api_key", None)
        self._answer_chat(handler, llm, parse_chat(values, llm.default_params))

    def _encode(self, handler: RequestHandler, llm: LLM, request: GenerationRequest, param: str) -> list[int]:
        """The prompt that a conversation is; what the template says against it names a field that the route has."""
        try:
            return llm.template.encode(**request.conversation)
        except APIError as error:
            if (error.param or "").split(".")[0] not in self.FIELDS[handler.http.path]:
                error.param = param
            raise

    def _answer_chat(self, handler: RequestHandler, llm: LLM, request: GenerationRequest) -> None:
        self._check_model(llm, request.model)
        if handler.http.method == "HEAD":
            return handler.respond(200, b"", "text/event-stream; charset=utf-8")
        prompt = self._encode(handler, llm, request, "messages")
        reply = functools.partial(ChatReply, include_usage=request.include_usage, calls=request.calls)
        self._generate(handler, llm, request, [prompt], "messages", reply)

    def _responses(self, handler: RequestHandler) -> None:
        llm = self._ready_llm()
        values = handler.read_json()
        request = parse_response(values, llm.default_params)
        self._check_model(llm, request.model)
        prompt = self._encode(handler, llm, request, "input")
        reply = functools.partial(ResponseReply, values=values, request=request)
        self._generate(handler, llm, request, [prompt], "input", reply)

    def _messages(self, handler: RequestHandler) -> None:
        llm, request = self._read_message(handler, MESSAGES_FIELDS)
        prompt = self._encode(handler, llm, request, "messages")
        reply = functools.partial(MessageReply, calls=request.calls)
        self._generate(handler, llm, request, [prompt], "messages", reply)

    def _count_tokens(self, handler: RequestHandler) -> None:
        llm, request = self._read_message(handler, COUNT_FIELDS)
        handler.respond_json({"input_tokens": len(self._encode(handler, llm, request, "messages"))})

    def _read_message(self, handler: RequestHandler, fields: dict[str, Field]) -> tuple[LLM, GenerationRequest]:
        llm, version = self._ready_llm(), handler.http.headers.get("anthropic-version", "2023-06-01")
        if not re.fullmatch(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}", version, re.ASCII):
            raise APIError(f"anthropic-version is {shorten(version)}; a date such as 2023-06-01 is expected")
        request = parse_message(handler.read_json(), llm.default_params, fields)
        self._check_model(llm, request.model)
        return llm, request

    def _completions(self, handler: RequestHandler) -> None:
        llm = self._ready_llm()
        request = parse_completion(handler.read_json(), llm.default_params)
        self._check_model(llm, request.model)
        encode = llm.tokenizer.encode_prompt
        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        for prompt in prompts if request.echo else ():
            self._check_token_ids(llm, prompt, "prompt")
        echoed = [prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
                  for prompt in request.prompts] if request.echo else ()
        self._generate(handler, llm, request, prompts, "prompt", functools.partial(
            CompletionReply, include_usage=request.include_usage, echoed=echoed))

    def _generate(self, handler: RequestHandler, llm: LLM, request: GenerationRequest, prompts: Seq[Seq[int]],
                  param: str, make_reply: Callable[..., Reply]) -> None:
        """Run the prompts and answer, whole or in events; whatever happens, nothing of them runs on."""
        handler.facts |= {"user": shorten(request.user, 64)} if request.user else {}
        handler.facts |= {"metadata": request.metadata} if request.metadata else {}
        label = request.structure.label if request.structure else ""
        handler.facts |= {"format": shorten(label)} if label else {}
        constraint = llm.grammars.compile(request.structure) if request.structure else None
        most = llm.engine.most_tokens(request.params)
        client, group = handler.client, None
        with client.running():
            taken = client.take("tokens", sum(map(len, prompts)) + len(prompts) * request.n * most)
            try:
                group = Group(llm, prompts, request.params, request.n, param, constraint, client.tenant)
                with self._job(handler, llm, group) as job:
                    reply = make_reply(group, llm.name)
                    (self._stream if request.stream else self._complete)(job, reply)
            finally:
                client.settle(taken, group.num_used_tokens if group else 0)

    @contextlib.contextmanager
    def _job(self, handler: RequestHandler, llm: LLM, group: Group) -> Iterator[Job]:
        """While a request runs it can be seen and cancelled, and its client is watched; nothing of it runs on after."""
        job = Job(handler, llm, group, self.config.request_timeout)
        self._jobs.add(job)
        self._watcher.add(handler.connection, group.abort)
        try:
            yield job
        finally:
            self._watcher.discard(handler.connection)
            self._jobs.discard(job)
            group.abort()
            handler.facts |= (facts := job.facts())
            ended = {"state": "finished", "finish_reason": facts["finish"], "ended": int(time.time())}
            self._recent.append((job.client, job.describe() | ended))

    def _complete(self, job: Job, reply: Reply) -> None:
        group = job.group
        rarely = 8 if group.has_stops else 1 << 31  # only stop strings need a look before the end
        while not group.is_finished:
            group.advance(job.time_left(math.inf), at_least=rarely)
            self._check_running(job)
        job.handler.respond_json(reply.whole(), headers={"Server-Timing": server_timing(group)})

    def _stream(self, job: Job, reply: Reply) -> None:
        """Events as the tokens come: the first at once, then writes at least stream_interval apart."""
        handler, group, interval, ended = job.handler, job.group, job.llm.config.stream_interval, set()
        handler.reply, handler.stalled = reply, group.held
        parts = self._wait_for_first(job)
        events, written = reply.first_events(), time.monotonic()
        while True:
            woken = time.monotonic()
            events += b"".join([reply.text_event(place, text, shown) for place, text, shown in parts])
            for place in sorted(group.finished - ended):
                events += reply.end_events(place)
            ended |= group.finished
            if group.is_finished:
                break
            if events or woken - written >= PING_INTERVAL:
                written = woken
                handler.write_stream(events or b": ping\n\n")
            time.sleep(max(0.0, interval - (time.monotonic() - woken)))
            parts, events = group.advance(job.time_left(PING_INTERVAL)), b""
            self._check_running(job)
        handler.write_stream(events + reply.last_events())
        handler.end_stream()

    def _wait_for_first(self, job: Job) -> list[tuple[int, str, list[Sampled]]]:
        """The first tokens, with the stream open; while the request waits, comments tell its place in the queue."""
        group, told = job.group, time.monotonic()
        parts = group.advance(job.time_left(PLACE_INTERVAL))
        self._check_running(job)  # before the first byte an error has a status of its own
        job.handler.start_stream()
        while not parts and not group.is_finished:
            place = job.place()
            if place or time.monotonic() - told >= PING_INTERVAL:
                told = time.monotonic()
                job.handler.write_stream(describe_place(*place) if place else b": ping\n\n")
            parts = group.advance(job.time_left(PLACE_INTERVAL))
            self._check_running(job)
        return parts

    def _check_running(self, job: Job) -> None:
        """An aborted answer has no client, or was cancelled, or the server is ending."""
        if job.cancelled:
            raise APIError("the request was cancelled", status=409, code="cancelled", headers=NO_RETRY)
        if not job.group.is_finished and job.time_left(math.inf) == 0:
            raise APIError(f"the request took longer than {job.timeout:g} s", status=408, code="request_timeout",
                           headers=NO_RETRY)
        if any(answer.finish_reason == "abort" for answer in job.group.answers):
            raise self._shutting_down() if self.draining else Disconnected

    # -- the queue

    def _own_jobs(self, handler: RequestHandler) -> list[Job]:
        """Those of who asks, oldest first; not one that was cancelled, though its client may be slow to read it."""
        own = [job for job in list(self._jobs) if job.client is handler.client and not job.cancelled]
        return sorted(own, key=lambda job: job.since)

    def _queue(self, handler: RequestHandler) -> None:
        """One's own requests, the last ones that ended, and how many there are of all; never text."""
        state = self._ready_llm().engine.snapshot()
        jobs = [job.describe() for job in self._own_jobs(handler)]
        recent = [ended for client, ended in list(self._recent) if client is handler.client]
        handler.respond_json({"requests": jobs, "recent": recent, "num_requests_running": state["num_requests_running"],
                              "num_requests_waiting": state["num_requests_waiting"]})

    def _cancel(self, handler: RequestHandler) -> None:
        request_id = urllib.parse.unquote(handler.http.path.removeprefix("/v1/queue/"))
        jobs = [job for job in self._own_jobs(handler) if job.request_id == request_id]
        if not jobs:
            raise APIError(f"no request {shorten(request_id)!r} of yours is here", status=404, code="not_found")
        for job in jobs:
            job.cancel()
        handler.respond_json({"id": request_id, "cancelled": True})

    # -- utilities

    FIELDS = {"/v1/chat/completions": CHAT_FIELDS, "/v1/completions": COMPLETION_FIELDS,
              "/v1/responses": RESPONSE_FIELDS, "/v1/messages": MESSAGES_FIELDS,
              "/v1/messages/count_tokens": COUNT_FIELDS,
              "/tokenize": TOKENIZE_FIELDS, "/detokenize": DETOKENIZE_FIELDS, "/apply-template": TEMPLATE_FIELDS}

    def _capabilities(self, handler: RequestHandler) -> None:
        """The model, its limits and defaults, and the fields of each route as they are checked."""
        llm = self._ready_llm()
        routes = {path: describe_fields(fields) for path, fields in self.FIELDS.items()}
        handler.respond_json({"model": llm.name, "max_model_len": llm.max_model_len, "version": __version__,
                              "defaults": llm.describe_defaults(), "routes": routes})

    def _openapi(self, handler: RequestHandler) -> None:
        others = {(path, method.lower()): QUERY_FIELDS if action == Server._chat_by_query else {}
                  for path, methods in self.ROUTES.items() for method, action in methods.items() if method != "POST"}
        handler.respond_json(openapi_document(self.FIELDS, others))

    def _version(self, handler: RequestHandler) -> None:
        handler.respond_json({"version": __version__})

    @staticmethod
    def _check_token_ids(llm: LLM, token_ids: list, param: str) -> None:
        size = llm.model_config.vocab_size
        if not all(type(token_id) is int and 0 <= token_id < size for token_id in token_ids):
            raise APIError(f"{param} must hold token ids, whole numbers from 0 to {size - 1}", param)

    def _read_fields(self, handler: RequestHandler) -> tuple[LLM, dict]:
        """The model, and the fields of a body that asks it for no answer."""
        llm, given = self._ready_llm(), check_fields(handler.read_json(), self.FIELDS[handler.http.path])
        self._check_model(llm, given.get("model"))
        return llm, given

    def _tokenize(self, handler: RequestHandler) -> None:
        """As vLLM's: of a text, or of messages as the chat route would render them."""
        llm, given = self._read_fields(handler)
        if ("prompt" in given) == ("messages" in given):
            raise APIError("give either prompt or messages", "prompt")
        unfit = set(given) & ({"add_special_tokens"} if "messages" in given else set(TEMPLATE_FIELDS) - {"model"})
        if unfit:
            other = "prompt" if "messages" in given else "messages"
            raise APIError(f"{min(unfit)} is allowed only with {other}", min(unfit))
        if "messages" in given:
            ids = llm.template.encode(**parse_conversation(given))
        else:
            encode = llm.tokenizer.encode_prompt if given.get("add_special_tokens", True) else llm.tokenizer.encode
            ids = encode(given["prompt"])
        shown = [llm.tokenizer.shown_bytes(token_id).decode(errors="replace") for token_id in ids]
        handler.respond_json({"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids,
                              "token_strs": shown if given.get("return_token_strs") else None})

    def _detokenize(self, handler: RequestHandler) -> None:
        llm, given = self._read_fields(handler)
        if "tokens" not in given:
            raise APIError("tokens is missing; a list of token ids is expected", "tokens")
        self._check_token_ids(llm, given["tokens"], "tokens")
        handler.respond_json({"prompt": llm.tokenizer.decode(given["tokens"])})

    def _apply_template(self, handler: RequestHandler) -> None:
        """The prompt of a conversation as text, without running it."""
        llm, given = self._read_fields(handler)
        handler.respond_json({"prompt": llm.template.render(**parse_conversation(given))})

    # by path and method; {id} is whatever the path ends in
    ROUTES = {
        "/": {"GET": _page}, "/health": {"GET": _health}, "/ready": {"GET": _ready}, "/version": {"GET": _version},
        "/v1/models": {"GET": _models}, "/v1/models/{id}": {"GET": _model},
        "/v1/metrics": {"GET": _metrics}, "/metrics": {"GET": _prometheus},
        "/v1/queue": {"GET": _queue}, "/v1/queue/{id}": {"DELETE": _cancel},
        "/v1/capabilities": {"GET": _capabilities}, "/openapi.json": {"GET": _openapi},
        "/v1/chat/completions": {"GET": _chat_by_query, "POST": _chat}, "/v1/completions": {"POST": _completions},
        "/v1/responses": {"POST": _responses},
        "/v1/messages": {"POST": _messages}, "/v1/messages/count_tokens": {"POST": _count_tokens},
        "/tokenize": {"POST": _tokenize}, "/detokenize": {"POST": _detokenize},
        "/apply-template": {"POST": _apply_template}}


# ==============================================================================
# CLI -- main(argv) -> exit code
# uses: everything above
# ==============================================================================


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """--help, from the settings table."""
    parser = OneLineParser(prog="rustinfer", description="OpenAI-compatible inference server for Llama-3 models.",
                           allow_abbrev=False,
                           formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    for setting in SETTINGS:
        switch = setting.parse is parse_switch
        shown = "" if setting.default in (None, ()) or switch else f" (default: {setting.default})"
        extra = {"action": "store_const", "const": "1"} if switch else {"metavar": setting.metavar}
        extra |= {"action": "append"} if setting.repeatable else {}
        text = f"{setting.help}{shown} [{setting.variable}]".replace("%", "%%")
        parser.add_argument(setting.flag, help=text, **extra)
    parser.add_argument("--version", action="version", version=f"rustinfer {__version__}")
    return parser


def read_settings(argv: Seq[str] | None, environment: dict[str, str]) -> dict[str, Any]:
    """Every setting from its flag, else its environment variable, else its default."""
    given = vars(build_parser().parse_args(argv))
    values = {}
    for setting in SETTINGS:
        flag, variable = given[setting.name], environment.get(setting.variable) or None
        text, origin = (flag, setting.flag) if flag is not None else (variable, setting.variable)
        values[setting.name] = setting.default if text is None else check_setting(setting, text, origin)
    return values


class JSONFormatter(logging.Formatter):
    """A record as one JSON object; a request's facts are members of their own."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        facts = getattr(record, "facts", None)
        error = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({"time": moment.isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
                           **(facts or {"message": record.getMessage()}), **error})


def write_through(stream: Any, text: str) -> None:
    """Write past a stream's buffer: its lock would hold the exit up at a full pipe, its rest would fail the exit."""
    data = text.encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(stream.fileno(), data) :]
    except (OSError, ValueError, AttributeError):
        pass  # a closed pipe, a full disk or no stream at all must not stop the server


class DroppingLogHandler(logging.Handler):
    """Writes records to a stream from its own thread; if nobody reads the stream they are dropped, never waited for."""

    def __init__(self, stream: Any, form: str = "text"):
        super().__init__()
        self._queue: queue.Queue[str | None] = queue.Queue(10_000)
        self._stream = stream
        self._thread = threading.Thread(target=self._write, name="rustinfer-log", daemon=True)
        self._thread.start()
        self.setFormatter(JSONFormatter() if form == "json" else
                          logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda match: ascii(match.group())[1:-1],
                      self.format(record))
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            pass

    def _write(self) -> None:
        while (text := self._queue.get()) is not None:
            write_through(self._stream, text + "\n")

    def close(self) -> None:
        try:
            self._queue.put_nowait(None)
            self._thread.join(1.0)
        except queue.Full:
            pass
        super().close()


class Progress:
    """Shows how far a long task is: a line that counts up on a terminal, a log line now and then elsewhere."""

    def __init__(self):
        self._shown = time.monotonic()

    def __call__(self, what: str, part: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{what} {part:4.0%}", end="\n" if part >= 1 else "", file=sys.stderr, flush=True)
        elif part >= 1 or time.monotonic() - self._shown > 2:
            self._shown = time.monotonic()
            log.info("%s %.0f%%", what, part * 100)


def describe_model(llm: LLM, server: Server) -> str:
    size = llm.num_parameters
    shown = f"{size / 1e9:.2f}B" if size >= 1e9 else f"{size / 1e6:.1f}M"
    return (f"rustinfer {__version__} serves {llm.name} ({shown} parameters) "
            f"on {llm.backend_name} ({llm.backend_reason}), KV cache {llm.kv_capacity} tokens, "
            f"context {llm.max_model_len}, at {server.url}")


class Interrupted(BaseException):
    """A signal came while the model was loading."""


class Shutdown:
    """SIGTERM and SIGINT: the first asks for a clean end, the second ends the process at once."""

    def __init__(self):
        self.asked, self.loading = False, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(1)
        self.ask()
        if self.loading:
            raise Interrupted

    def interrupt(self) -> None:
        """From now until `loading` is unset a signal raises Interrupted; at once if one has come."""
        self.loading = True
        if self.asked:
            raise Interrupted

    def ask(self) -> None:
        self.asked = True

    def over(self) -> None:
        """Nothing is left to end. Python would let a signal kill it while it ends itself, and fail a clean exit."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def wait(self) -> None:
        """Until asked. It polls: a signal that another thread receives would not wake this one, the main one."""
        while not self.asked:
            time.sleep(0.05)


def share_arena() -> None:
    """One heap of the C library for all threads. It would give each its own, where what the threads of connections
    leave behind adds up; the interpreter's lock lets them take turns anyway."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


def raise_file_limit(wanted: int) -> None:
    """Let the process open this many files, as far as the system allows."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))


def listen(settings: dict[str, Any]) -> Server:
    """The server on its address, without a model yet."""
    host, port = settings["host"], settings["port"]
    try:
        return Server(None, **{item.name: settings[item.name] for item in dataclasses.fields(ServerConfig)})
    except (socket.gaierror, UnicodeError):
        raise SettingsError(f"--host: {shorten(host)!r} is not allowed; "
                            "it takes a name or an address of this machine") from None
    except OSError as error:
        raise RustinferError(f"cannot listen on {host}, port {port}: {error.strerror}; "
                             "choose others with --host and --port") from None


def serve(settings: dict[str, Any]) -> int:
    """Bind, load, serve until a signal or the engine's death; the exit code."""
    shutdown = Shutdown()
    config = {item.name: settings[item.name] for item in dataclasses.fields(EngineConfig)}
    raise_file_limit(settings["max_connections"] + 256)
    server = llm = None
    try:
        shutdown.interrupt()
        if settings["device"].startswith("cuda"):
            find_card(settings["device"])  # a card that is not there is told before anything starts
        server = listen(settings)
        if not server.has_keys and not is_loopback(settings["host"]):
            log.warning("no API key is set and %s can be reached from other machines; set --api-key", settings["host"])
        log.info("listening on %s, loading the model", server.url)
        llm = LLM(settings["model"], served_model_name=settings["served_model_name"], progress=Progress(), **config)
        llm.engine.on_death = shutdown.ask
        server.attach(llm)
        shutdown.loading = False
        write_through(sys.stdout, describe_model(llm, server) + "\n")
        shutdown.wait()
    except Interrupted:
        pass
    log.info("shutting down")
    failed = llm is not None and llm.engine.dead is not None
    if server is not None:
        server.stop(0 if failed or llm is None else settings["drain_timeout"])
    if llm is not None:
        llm.close()
    shutdown.over()
    log.info("stopped")
    return 1 if failed else 0


def main(argv: Seq[str] | None = None) -> int:
    """Run the server; 0 after a clean shutdown, 1 if it could not serve, 2 for a wrong flag.

    For the main thread of a process that does nothing else: it takes the signals and keeps them. Programs use Server.
    """
    share_arena()  # before the first thread takes a heap
    handler = None
    try:
        settings = read_settings(argv, os.environ)
        handler = DroppingLogHandler(sys.stderr, settings["log_format"])
        log.addHandler(handler)
        log.setLevel(settings["log_level"].upper())
        return serve(settings)
    except (RustinferError, OSError) as error:
        if handler:
            handler.close()  # what was logged comes first, and not into the middle of this line
        write_through(sys.stderr, f"rustinfer: {error}\n")
        return 2 if isinstance(error, SettingsError) else 1
    finally:
        if handler:
            log.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    sys.exit(main())
