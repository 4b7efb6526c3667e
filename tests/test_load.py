"""The load generator: what it asks for, what it makes of what arrives, and short drives of real servers."""
import dataclasses
import itertools
import json
import random
import sys
from types import SimpleNamespace

import pytest
import rustinfer
from harness import REFERENCES, ROOT, local_server, slowed

sys.path.append(str(ROOT / "tests" / "bench"))
import load  # noqa: E402
import overhead  # noqa: E402
import serve  # noqa: E402

SHORT = load.Load(concurrency=4, seconds=1, grace=30, prompts=load.Lengths(2, 9), answers=load.Lengths(2, 12))


def drive(url, one, path="/v1/completions"):
    return load.Client(url, serve.plain_fields, path).run(one)


def test_percentiles_are_values_that_were_seen():
    values = random.Random(1).sample(range(1, 101), 100)
    assert [load.percentile(values, part) for part in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert load.spread([7]) == {"p50": 7, "p90": 7, "p99": 7}
    assert load.spread([]) == {"p50": None, "p90": None, "p99": None}


def test_lengths_fill_their_range_with_more_short_than_long_ones():
    lengths, rng = load.Lengths.parse("16-256"), random.Random(2)
    drawn = [lengths.draw(rng) for _ in range(2000)]
    assert min(drawn) in range(16, 20) and max(drawn) in range(240, 257)
    assert 0.45 < sum(length < 64 for length in drawn) / 2000 < 0.55  # half of them below the geometric mean
    assert load.Lengths.parse("5").draw(rng) == 5
    for wrong in ("0-3", "9-3", "", "x"):
        with pytest.raises(ValueError):
            load.Lengths.parse(wrong)


def test_equal_seeds_give_equal_requests_and_other_loads_other_prompts():
    first = lambda one: list(itertools.islice(one.requests(), 20))
    assert first(SHORT) == first(dataclasses.replace(SHORT, seconds=9))
    fresh = first(dataclasses.replace(SHORT, digits=1))
    shape = lambda requests: [(len(prompt), tokens) for prompt, tokens in requests]
    assert fresh != first(SHORT) and shape(fresh) == shape(first(SHORT))
    other = first(dataclasses.replace(SHORT, seed=1)) + first(dataclasses.replace(SHORT, concurrency=5))
    assert not {prompt for prompt, _ in first(SHORT) if len(prompt) > 4} & {prompt for prompt, _ in other}


def test_arrivals_keep_the_rate_and_the_shares():
    one = load.Load(rate=20, seconds=100, shares=(("a", 3), ("b", 1)))
    moments, keys = zip(*one.arrivals())
    assert list(moments) == sorted(moments) and moments[-1] < 100
    assert 1800 < len(moments) < 2200  # 4.5 standard deviations
    assert 0.7 < keys.count("a") / len(keys) < 0.8
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert sum(gap > 0.05 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)  # exp(-1), as Poisson's are


def test_requests_at_once_are_divided_by_shares():
    keys = list(load.Load(concurrency=8, shares=(("a", 3), ("b", 1))).slots())
    assert (keys.count("a"), keys.count("b")) == (6, 2)
    assert set(load.Load(concurrency=3).slots()) == {""}


def whole_answer() -> bytes:
    values = [{"choices": [{"text": "ab"}]}, {"choices": [{"delta": {"content": "c"}}]}, {"choices": []},
              {"choices": [{"text": ""}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}]
    events = b": ping\n\n" + b"".join(b"data: " + json.dumps(value).encode() + b"\r\n\r\n" for value in values)
    pieces = [events[:60], events[60:], b"data: [DONE]\n\n"]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def test_an_answer_is_read_the_same_however_it_is_cut():
    data = whole_answer()
    for size in (1, 2, 3, 7, 50, len(data)):
        reads = [(float(at), data[at : at + size]) for at in range(0, len(data), size)]
        stream = SimpleNamespace(reads=reads, due=0.0, ended=reads[-1][0], key="", failure=None)
        seen = load.outcome(stream)
        assert (seen.error, seen.prompt_tokens, seen.output_tokens) == (None, 3, 2)
        assert seen.texts == sorted(set(seen.texts)) and len(seen.texts) == (1 if size == len(data) else 2), size


def test_times_are_those_of_the_text():
    outcomes = [load.Outcome("a", None, 5, 5, [1.0, 1.5, 3.0], 3.5), load.Outcome("b", "cut off", 0, 0, [], 9.0),
                load.Outcome("b", "status 500", 0, 0, [], 0.1)]
    seen = load.figures(outcomes, 10.0, 0.1)
    assert (seen["tokens_per_s"], seen["requests_per_s"]) == (0.5, 0.1)
    assert (seen["tpot_s"]["p50"], seen["itl_s"]["p50"], seen["itl_s"]["p99"]) == (0.5, 0.5, 1.5)
    assert seen["ttft_s"] == {"p50": 1.0, "p90": 9.0, "p99": 9.0}  # who was cut off waited at least so long
    assert seen["errors"] == {"cut off": 1, "status 500": 1} and seen["keys"]["b"]["output_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_request_at_once_gets_its_tokens(demo_server, path):
    seen = drive(demo_server.url, SHORT, path)
    assert not seen["errors"] and seen["requests"] >= 4
    wanted = sum(tokens for _, tokens in itertools.islice(SHORT.requests(), seen["requests"]))
    assert seen["output_tokens"] == wanted and None not in seen["ttft_s"].values()


def test_requests_that_arrive_by_themselves_come_from_all_keys(demo_server):
    one = dataclasses.replace(SHORT, concurrency=0, rate=30, shares=(("a", 2), ("b", 1)))
    seen = drive(demo_server.url, one)
    arrivals = list(one.arrivals())
    assert not seen["errors"] and seen["requests"] == len(arrivals)
    assert {key: part["requests"] for key, part in seen["keys"].items()} == {
        key: [mine for _, mine in arrivals].count(key) for key in ("a", "b")}


def test_a_load_ends_in_time_and_says_who_was_cut_off():
    with rustinfer.LLM(REFERENCES / "llama3-tied", device="cpu") as llm, local_server(llm) as server:
        with slowed(llm, 0.05):
            long = dataclasses.replace(SHORT, seconds=0.3, grace=0.2, answers=load.Lengths(200, 200))
            seen = drive(server.url, long)
    assert seen["errors"] == {"cut off": 4} and seen["requests_per_s"] == 0


def test_refusals_are_errors():
    with local_server() as server:  # no model
        seen = drive(server.url, load.Load(rate=50, seconds=0.3))
    assert set(seen["errors"]) == {"status 503"} and sum(seen["errors"].values()) == seen["requests"] > 0


def test_servers_are_compared_in_rounds(demo_server, tiny_server):
    path = "/v1/completions"
    starters = {name: lambda url=server.url: serve.RunningServer(url, serve.plain_fields, path)
                for name, server in {"demo": demo_server, "tiny": tiny_server}.items()}
    args = SimpleNamespace(rounds=2, tries=1, patience=0, json=None)
    seen = serve.measure(starters, [dataclasses.replace(SHORT, seconds=0.2)], args)
    assert [len(rounds) for rounds in seen["4 at once"].values()] == [2, 2]
    assert serve.table(seen).count("| 4 at once |") == 2 and "| 0 of " in serve.table(seen)
    assert serve.comparison(seen, "demo").splitlines()[-1].startswith("| tiny | 4 at once | ")


def figures_of(rate, wait, others=0.0):
    return {"tokens_per_s": rate, "ttft_s": {"p50": wait}, "others_cpu": others}


def test_ratios_above_one_are_ahead():
    ours, theirs = [figures_of(20.0, 1.0), figures_of(30.0, 2.0)], [figures_of(10.0, 3.0), figures_of(10.0, None)]
    assert serve.ratio(ours, theirs, ("tokens_per_s",)) == 2.5
    assert serve.ratio(ours, theirs, ("ttft_s", "p50")) == 2.0
    assert serve.ratio(ours, theirs[1:], ("ttft_s", "p50")) is None


def test_rounds_that_others_disturbed_count_only_where_there_is_no_other():
    rounds = [figures_of(5.0, 9.0, 0.9), figures_of(20.0, 1.0, 0.05), figures_of(30.0, 2.0, 0.0)]
    assert serve.middle(serve.quiet(rounds))["tokens_per_s"] == 25.0
    assert serve.quiet([rounds[0], figures_of(7.0, 8.0, 0.5)]) == [figures_of(7.0, 8.0, 0.5)]


def test_the_simulated_engine_runs_with_and_without_readers():
    seen = overhead.measure(rounds=1, streams=3, seconds=0.3)
    for kind in ("AtOnce", "Ahead"):
        assert seen[kind]["ratio"] == seen[kind]["read_steps_per_s"] / seen[kind]["unread_steps_per_s"] > 0
