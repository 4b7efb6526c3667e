"""The stages of gpu.py that find out whether the numbers are right: kernels, accuracy, bits, memory.

A stage is a function of (card, left): `left()` is the time in seconds that it may still take. It returns what goes into
the results, and raises CheckError, with the same under `found`, where something is wrong.
"""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import sys

import numpy as np
from gpu_card import (ROOT, Card, CheckError, check, distance, from_bf16, load_on_card, load_on_host, model_config,
                      round_bf16, same_bits, write_checkpoint)

import rustinfer
from rustinfer import ArrayBackend, Batch, CudaBackend, CudaRunner, EngineConfig, Llama, ModelConfig, SamplingParams

TOKENS = (1, 3, 8, 16, 17, 64, 130)
CONTEXTS = (1, 128, 1000, 2, 15, 16, 17, 64, 65, 127, 129, 256, 257, 640)  # of decoding rows, in turns
PRODUCTS = ("qkv_rope", "gate_up", "output", "down", "lm_head")
FORMS = ("fused", "stream", *(f"tiled_{rows}{split}" for rows in (32, 64, 128) for split in ("", " in quarters")))
ROWS_16 = ("fused", "stream")  # forms that take at most 16 tokens
# Greatest difference from the array expressions, over the greatest value. Both sides round activations to bf16 at the
# same places, so float32 results differ by the order of sums; results in bf16 by a unit in their last place (2^-8);
# attention also by its probabilities, which the kernel rounds to bf16.
WIDE, ROUNDED, ATTENDED = 2e-4, 0.005, 0.01


class OneLayer:
    """One layer and the head of a model on the card, inputs for MOST tokens, and the same in float32 on the host."""

    MOST, BLOCKS, SEATS = 130, 4 * 64, 4

    def __init__(self, card: Card, name: str):
        self.card, self.shape = card, card.shape(name)
        config = EngineConfig(device="cuda:0", max_num_seqs=self.MOST, max_num_batched_tokens=self.MOST)
        self.config = model = model_config(self.shape, 1)
        self.model, self.host = load_on_card(card, config, model, 1024), load_on_host(card, model, 1024, 1)
        self.ops: CudaBackend = self.model.backend
        self.arrays: ArrayBackend = self.host.backend
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((self.MOST, model.hidden_size), np.float32)
        widths = {"output": model.num_attention_heads * model.head_dim, "down": model.intermediate_size}
        self.wide = {key: round_bf16(rng.standard_normal((self.MOST, width))) for key, width in widths.items()}
        self.positions = rng.permutation(1000)[: self.MOST].astype(np.int32)
        self.slots = rng.permutation(self.BLOCKS * 16)[: self.MOST].astype(np.int32)
        with self.use():
            self.model.allocate_kv_cache(self.BLOCKS)
            self.cache = card.random(self.model.kv_cache.shape, 1)  # what the cache holds before a launch
            self.inputs = dict(x=self.x, positions=self.positions, slot_mapping=self.slots,
                               attended=self.bf16(self.wide["output"]), h=self.bf16(self.wide["down"]))
            self.inputs = {name: card.cupy.asarray(values) for name, values in self.inputs.items()}
            self.tables = rng.permutation(self.BLOCKS).reshape(self.SEATS, -1)
            for seat, blocks in enumerate(self.tables.tolist()):
                self.ops.patch_state(self.ops.state.patch("block_tables", seat, blocks))

    @contextlib.contextmanager
    def use(self):
        with self.ops.on_device(), self.ops.errors():
            yield

    @staticmethod
    def bf16(values: np.ndarray) -> np.ndarray:
        return rustinfer.to_bfloat16(rustinfer.RawTensor(values, "F32"))

    def put(self, target, values: np.ndarray) -> None:
        """Host values into the beginning of a buffer of the backend."""
        target.reshape(-1)[: values.size].set(np.ascontiguousarray(values).reshape(-1), stream=self.ops.stream)

    def take(self, array):
        """A copy on the card, once everything is done."""
        self.ops.stream.synchronize()
        return array.copy()

    def step(self, tokens: int) -> rustinfer.CudaStep:
        return self.ops.prepare(self.ops.decode_step(tokens))

    # -- products

    @contextlib.contextmanager
    def forced(self, form: str):
        """Every product in that form, whatever the backend would choose."""
        ops, buffers = self.ops, self.ops.buffers
        kept = {name: getattr(ops, name) for name in ("FUSED_ROWS", "STREAM_ROWS", "TILES", "num_processors")}
        kept_buffers = buffers.split_sums, buffers.linear_tickets
        ops.FUSED_ROWS, ops.STREAM_ROWS = 16 * (form == "fused"), 16 * (form in ROWS_16)
        if form not in ROWS_16:
            rows = form.split()[0].partition("_")[2]
            ops.TILES = tuple((float("inf"), *tile[1:]) for tile in ops.TILES if tile[1] == int(rows))
            ops.num_processors = 1 << 30 if "quarters" in form else 0
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(ops, name, value)
            buffers.split_sums, buffers.linear_tickets = kept_buffers

    def make_room(self, product: str, form: str, tokens: int) -> None:
        """Partial sums for the tiles of a whole weight in quarters, of which the backend splits small ones only."""
        buffers, (_, rows, weight_rows, *_) = self.ops.buffers, self.ops.TILES[0]
        height = {"qkv_rope": len(self.model.layers[0].qkv), "gate_up": len(self.model.layers[0].gate_up),
                  "lm_head": self.config.vocab_size}.get(product, self.config.hidden_size)
        tiles = -(-(height + 8) // weight_rows) * -(-tokens // rows)
        if "quarters" in form and tiles > len(buffers.linear_tickets):
            buffers.linear_tickets = self.card.cupy.zeros((tiles,), np.uint32)
            buffers.split_sums = self.card.cupy.empty((4 * tiles * rows * weight_rows,), np.float32)

    def run(self, product: str, form: str, first: int, tokens: int) -> list:
        """Launch a product on tokens [first, first + tokens); copies of what it wrote, on the card."""
        ops, buffers, layer, part = self.ops, self.ops.buffers, self.model.layers[0], slice(first, first + tokens)
        for name, values in self.inputs.items():
            getattr(buffers, name)[:tokens] = values[part]
        cache = self.model.kv_cache[:, 0]
        if product == "qkv_rope":
            cache[...] = self.cache[:, 0]
        with self.forced(form):
            self.make_room(product, form, tokens)
            step = self.step(tokens)
            if product == "qkv_rope":
                found = [ops.qkv_rope(buffers.x, layer, cache, step)[:tokens], cache]
            elif product == "gate_up":
                found = [ops.gate_up(buffers.x, layer)[:tokens]]
            elif product == "lm_head":
                found = [ops.lm_head(buffers.x, self.model.norm, self.model.head, step)[:tokens]]
            else:
                source = buffers.attended if product == "output" else buffers.h
                found = [ops.add_linear(buffers.x, source, getattr(layer, product), None)[:tokens]]
            found = [self.take(array) for array in found]
            check(not bool((buffers.linear_tickets != 0).any()), f"{product} {form}: tickets are left behind")
        return found

    def normed(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """rms_norm in two parts, as the kernels do: what is rounded to bf16, and the factor of the result."""
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config.rms_norm_eps))
        return round_bf16(x * weight), scale

    def expected(self, product: str) -> list[np.ndarray]:
        """The product of all tokens by array expressions."""
        layer, arrays, c = self.host.layers[0], self.arrays, self.config
        if product in self.wide:
            return [self.x + self.wide[product] @ getattr(layer, product).T]
        norm, weight = {"qkv_rope": (layer.attention_norm, layer.qkv), "gate_up": (layer.mlp_norm, layer.gate_up),
                        "lm_head": (self.host.norm, self.host.head)}[product]
        rounded, scale = self.normed(self.x, norm)
        y = rounded @ weight.T * scale
        if product == "lm_head":
            return [y]
        if product == "gate_up":
            return [round_bf16(arrays.silu_mul(y))]
        heads, y = c.num_attention_heads + c.num_kv_heads, y.reshape(self.MOST, -1, c.head_dim)
        turned = arrays.rope(y[:, :heads], arrays.cos[self.positions], arrays.sin[self.positions])
        cache = from_bf16(self.card.cupy.asnumpy(self.cache[:, 0]))
        keys, values = (part.reshape(-1, c.num_kv_heads, *sizes) for part, sizes in zip(
            cache, ((16, c.head_dim), (c.head_dim, 16))))
        keys[self.slots // 16, :, self.slots % 16] = round_bf16(turned[:, c.num_attention_heads :])
        values[self.slots // 16, :, :, self.slots % 16] = round_bf16(y[:, heads:])
        queries = round_bf16(turned[:, : c.num_attention_heads]).reshape(self.MOST, -1)
        return [queries, np.stack([keys.reshape(len(keys), -1), values.reshape(len(values), -1)])]

    def check_product(self, product: str) -> dict:
        """One form against the array expressions, then every form against that one, bit for bit."""
        reference = self.run(product, "tiled_128", 0, self.MOST)
        worst = 0.0
        for found, expected in zip(reference, self.expected(product)):
            found = self.card.cupy.asnumpy(found)
            is_rounded = found.dtype == np.uint16
            found = from_bf16(found).reshape(expected.shape) if is_rounded else found
            worst = max(worst, distance(found, expected))
            check(worst <= (ROUNDED if is_rounded else WIDE), f"{product}: off by {worst:.2g} of the greatest value")
        runs = 0
        for form, tokens in itertools.product(FORMS, self.card.only_real(TOKENS, (1, 3, 17))):
            if form in ROWS_16 and tokens > 16 or form == "fused" and product in self.wide:
                continue
            for first in {0, min(5, self.MOST - tokens)}:
                found, runs = self.run(product, form, first, tokens), runs + 1
                self.check_form(product, reference, found, first, tokens, f"{product}: {form}, {tokens} tokens")
        return {"distance": worst, "launches with equal bits": runs}

    def check_form(self, product: str, reference: list, found: list, first: int, tokens: int, what: str) -> None:
        part = slice(first, first + tokens)
        check(same_bits(found[0], reference[0][part]), f"{what}: other bits than tiled_128 of all tokens")
        if product == "qkv_rope":  # slots of these tokens as in the whole, every other one as it was
            written = np.zeros((self.BLOCKS + 1, 1, 16, 1), np.uint16)
            written[self.slots[part] // 16, 0, self.slots[part] % 16] = 0xFFFF
            heads, dim = self.config.num_kv_heads, self.config.head_dim
            arrays = found[1], reference[1], self.cache[:, 0]
            for side, sizes, mask in ((0, (heads, 16, dim), written), (1, (heads, dim, 16), written.swapaxes(2, 3))):
                new, whole, old = (array[side].reshape(-1, *sizes) for array in arrays)
                expected = old ^ (old ^ whole) & self.card.cupy.asarray(np.ascontiguousarray(mask))
                check(same_bits(new, expected), f"{what}: wrong {'values' if side else 'keys'} in the cache")

    # -- the other kernels

    def check_rms_norm(self) -> dict:
        rows = np.array([7, 0, self.MOST - 1], np.int32)
        weight = self.host.layers[0].attention_norm
        self.put(self.ops.buffers.x, self.x)
        for wanted, which in ((None, slice(None)), (self.card.cupy.asarray(rows), rows)):
            x = self.x[which]
            bits, scales = self.ops._normed(self.ops.buffers.x, self.model.layers[0].attention_norm, len(x), wanted)
            bits, scales = self.take(bits[: len(x)]), self.take(scales[: len(x)])
            expected, scale = self.normed(x, weight)
            found = from_bf16(self.card.cupy.asnumpy(bits))
            check(np.array_equal(found, expected), "rms_norm: other bits than bf16(x * g)")
            worst = distance(self.card.cupy.asnumpy(scales), scale[:, 0])
            check(worst < 1e-5, f"rms_norm: scales are off by {worst:.2g}")
        return {"distance": worst}

    def check_embedding(self) -> dict:
        """Given tokens, and tokens that the card knows by itself."""
        state, tokens = self.ops.state, []
        rng = np.random.default_rng(2)
        for seat in range(self.SEATS):
            for name, value in (("last_token", seat + 5), ("next_position", 40 + seat), ("row_seats", seat)):
                self.ops.patch_state(state.patch(name, seat, [value]))
        for t in range(self.MOST):
            tokens.append((int(rng.integers(self.config.vocab_size)), int(rng.integers(1000)), t % self.SEATS))
        known = [(seat + 5, 40 + seat, seat) for seat in range(self.SEATS)]
        for kind, given, step in (("given", tokens, self.ops.mixed_step(tokens, len(tokens), [], [0])),
                                  ("known", known, self.ops.decode_step(self.SEATS))):
            x, count = self.ops.embedding(step, self.model.embed), len(given)
            found = [self.card.cupy.asnumpy(self.take(array[:count])) for array in (
                x, self.ops.buffers.positions, self.ops.buffers.slot_mapping)]
            ids, positions, seats = map(np.array, zip(*given))
            slots = self.tables[seats, positions // 16] * 16 + positions % 16
            for name, got, wanted in zip(("x", "positions", "slots"), found, (self.host.embed[ids], positions, slots)):
                check(np.array_equal(got, wanted), f"embedding: wrong {name} of {kind} tokens")
        return {"tokens": len(tokens) + len(known)}

    def attended(self, q: np.ndarray, positions: np.ndarray, seats: np.ndarray, num_decode: int) -> object:
        """attention of the rows, of which the first `num_decode` decode and the others are one piece of a prompt."""
        ops, buffers, count = self.ops, self.ops.buffers, len(q)
        self.put(buffers.q, self.bf16(q))
        piece = ops.tokens_per_tile
        tiles = [(at, min(piece, count - at)) for at in range(num_decode, count, piece)]
        step = ops.mixed_step([(0, int(p), int(s)) for p, s in zip(positions, seats)], num_decode, tiles, [0])
        self.put(buffers.positions, positions.astype(np.int32))
        return self.take(ops.attention(buffers.q, self.model.kv_cache[:, 0], ops.prepare(step))[:count])

    def expected_attention(self, q: np.ndarray, positions: np.ndarray, seats: np.ndarray) -> np.ndarray:
        """softmax(q k^T / sqrt(D)) v over the row's own keys, head by head."""
        c, cache = self.config, from_bf16(self.card.cupy.asnumpy(self.model.kv_cache[:, 0]))
        keys = cache[0].reshape(-1, c.num_kv_heads, 16, c.head_dim)
        values = cache[1].reshape(-1, c.num_kv_heads, c.head_dim, 16).swapaxes(2, 3)
        out = np.empty_like(q)
        for row, (position, seat) in enumerate(zip(positions, seats)):
            k, v = (part[self.tables[seat]].swapaxes(0, 1).reshape(c.num_kv_heads, -1, c.head_dim)[:, : position + 1]
                    for part in (keys, values))
            by_group = q[row].reshape(c.num_kv_heads, -1, c.head_dim)
            scores = by_group @ k.swapaxes(1, 2) * c.head_dim**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row] = (weights @ v / weights.sum(-1, keepdims=True)).reshape(-1)
        return out

    def check_attention(self) -> dict:
        """Decode against the expressions; alone, with other numbers of splits, and as a prompt: the same bits."""
        c, count = self.config, self.card.only_real((self.MOST,), (5,))[0]
        rng = np.random.default_rng(3)
        q = round_bf16(rng.standard_normal((count, c.num_attention_heads * c.head_dim)))
        cache = self.model.kv_cache[:, 0]
        cache[...] = self.cache[:, 0]
        positions = np.resize(CONTEXTS, count) - 1
        seats = np.arange(count) % self.SEATS
        together = self.attended(q, positions, seats, count)
        worst = distance(from_bf16(self.card.cupy.asnumpy(together)), self.expected_attention(q, positions, seats))
        check(worst <= ATTENDED, f"attention_decode: off by {worst:.2g} of the greatest value")
        kept = self.ops.num_processors
        for processors, row in itertools.product((1, kept, 4096), self.card.only_real(tuple(range(14)), (0, 1, 2))):
            self.ops.num_processors = processors  # which decides on the number of splits
            one = self.attended(q[row : row + 1], positions[row : row + 1], seats[row : row + 1], 1)
            self.ops.num_processors = kept
            check(same_bits(one, together[row : row + 1]),
                  f"attention_decode, context {CONTEXTS[row]}: other bits alone, as for {processors} processors")
        check(not bool((self.ops.buffers.attention_tickets != 0).any()), "attention: tickets are left behind")
        return {"distance": worst, "pieces": self.check_pieces(q)}

    def check_pieces(self, q: np.ndarray) -> int:
        """A prompt's piece has the bits of its tokens one by one, whatever lies behind it in the cache."""
        lengths, ends = self.card.only_real(TOKENS, (1, 3)), self.card.only_real((130, 256, 1000), (37,))
        for length, end in itertools.product(lengths, ends):
            last_block, beyond = self.tables[1, (end - 1) // 16], (end - 1) % 16 + 1
            cache = self.model.kv_cache[:, 0].reshape(2, self.BLOCKS + 1, self.config.num_kv_heads, -1)
            keys = cache[0, last_block].reshape(self.config.num_kv_heads, 16, -1)
            values = cache[1, last_block].reshape(self.config.num_kv_heads, -1, 16)
            keys[:, beyond:], values[:, :, beyond:] = 0x7FC0, 0x7FC0  # NaN
            where, seats = np.arange(end - length, end), np.ones(length, int)
            as_prompt = self.attended(q[:length], where, seats, 0)
            one_by_one = self.attended(q[:length], where, seats, length)
            what = f"attention_prefill, {length} tokens up to {end}"
            check(bool(((as_prompt & 0x7FFF) < 0x7F80).all()), f"{what}: not finite")
            check(same_bits(as_prompt, one_by_one), f"{what}: other bits than decode")
            self.model.kv_cache[:, 0] = self.cache[:, 0]
        return len(lengths) * len(ends)

    def check_sampling(self) -> dict:
        """Rows of all kinds of parameters, every third with a mask, against the Sampler on NumPy."""
        count = self.card.only_real((64,), (6,))[0]
        rng = np.random.default_rng(4)
        logits = 3 * rng.standard_normal((count, self.config.vocab_size), np.float32)
        kinds = [dict(temperature=0.0), dict(), dict(top_k=20), dict(top_p=0.9), dict(min_p=0.05, temperature=0.7),
                 dict(top_k=50, top_p=0.8, temperature=1.5), dict(repetition_penalty=1.3, frequency_penalty=0.5),
                 dict(logit_bias={3: 4.0, 17: -100.0}, presence_penalty=0.4)]
        params = [SamplingParams(seed=row, logprobs=5, **dict(temperature=1.0) | kinds[row % len(kinds)])
                  for row in range(count)]
        prompts = [rng.integers(0, self.config.vocab_size, 20).tolist() for _ in range(count)]
        masks = [None if row % 3 else rng.random(self.config.vocab_size) < 0.1 for row in range(count)]
        expected = rustinfer.Sampler(self.arrays).sample(logits, params, [p.seed for p in params], [0] * count,
                                                         [20] * count, [(prompt, []) for prompt in prompts], masks)
        found = self.drawn(logits, params, prompts, masks)
        wrong = [row for row in range(count) if found[row].token_id != expected[row].token_id]
        apart = max(abs(a.logprob - b.logprob) for row, (a, b) in enumerate(zip(found, expected)) if row not in wrong)
        check(len(wrong) <= count // 32, f"sample: rows {wrong} of {count} drew other tokens than the expressions")
        check(apart < 1e-3, f"sample: logprobs are off by {apart:.2g}")
        listed = [row for row in range(count) if [i for i, _ in found[row].top] != [i for i, _ in expected[row].top]]
        check(not listed, f"sample: rows {listed} list other likeliest tokens")
        check(self.scored(found) == found, "score: other logprobs than those of the tokens when they were drawn")
        return {"rows": count, "other tokens": len(wrong), "greatest difference of a logprob": apart}

    def drawn(self, logits: np.ndarray, params: list, prompts: list, masks: list) -> list:
        """What the card draws: row r sits on seat r."""
        config = dataclasses.replace(self.ops.engine_config, enforce_eager=True)
        runner, count = CudaRunner(self.model, config), len(params)
        for row, (prompt, p) in enumerate(zip(prompts, params)):
            runner._introduce(rustinfer.Sequence(row, prompt, p, p.seed, b""), row)
            runner._patches += self.ops.state.patch("row_seats", row, [row])
            runner._patches += self.ops.state.patch("ints", row, [masks[row] is not None], runner.MASK_COLUMN)
        self.ops.masks.send({row: rustinfer.pack_bits(mask) for row, mask in enumerate(masks) if mask is not None})
        runner._send_patches()
        self.put(self.ops.buffers.logits, logits)
        self.put(self.ops.buffers.positions, np.full(count, 19, np.int32))
        self.ops.sample(self.ops.prepare(self.ops.decode_step(count)))
        return runner.collect(runner._note(list(range(count))))

    def scored(self, drawn: list) -> list:
        """The same tokens as if they had been given, from the same logits."""
        lists = [row.token_id for row in drawn], [len(row.top) for row in drawn]
        self.ops.score(*(self.card.cupy.asarray(np.array(values, np.int32)) for values in lists), 0)
        self.ops.stream.synchronize()
        return [CudaRunner._read(record[:4].tolist(), record) for record in self.ops.scores[: len(drawn)]]

    def close(self) -> None:
        self.model.close()


def stage_kernels(card: Card, left) -> dict:
    """Every kernel against the array expressions and every form against the others, at the sizes of three models."""
    results, wrong = {}, []
    for name in card.only_real(("1B", "8B"), ("1B",)):
        if left() < 20 and results:
            results[name] = "skipped: out of time"
            continue
        layer = OneLayer(card, name)
        checks = {product: (lambda product=product: layer.check_product(product)) for product in PRODUCTS}
        checks |= {"rms_norm": layer.check_rms_norm, "embedding": layer.check_embedding,
                   "attention": layer.check_attention, "sample": layer.check_sampling}
        try:
            with layer.use():
                results[name] = {what: attempt(run, f"{name}: {what}", wrong, card) for what, run in checks.items()}
        finally:
            layer.close()
    return conclude(results, wrong)


def attempt(run, what: str, wrong: list, card: Card):
    """What a check found; a failure is noted and the next check may go on, unless the card is lost."""
    try:
        return run()
    except Exception as error:
        if card.is_lost():
            raise
        wrong.append(f"{what}: {error if isinstance(error, CheckError) else repr(error)}")
        return {"error": wrong[-1]}


def conclude(results: dict, wrong: list) -> dict:
    if wrong:
        error = CheckError("; ".join(wrong))
        error.found = results
        raise error
    return results


# ------------------------------------------------------------------------------
# accuracy: logits against float32

def card_logits(model: Llama, ids: list[int], rows: int = 128) -> np.ndarray:
    """The logits after each token of a text, on the card; (n, V)."""
    ops, found = model.backend, []
    ops.patch_state(ops.state.patch("block_tables", 0, range(-(-len(ids) // 16))))
    for start in range(0, len(ids), rows):
        piece = ids[start : start + rows]
        tiles = [(at, min(ops.tokens_per_tile, len(piece) - at)) for at in range(0, len(piece), ops.tokens_per_tile)]
        tokens = [(token, start + at, 0) for at, token in enumerate(piece)]
        logits = model.run(ops.mixed_step(tokens, 0, tiles, list(range(len(piece)))))
        found.append(ops.xp.asnumpy(logits[: len(piece)]))
    return np.concatenate(found)


def host_logits(model: Llama, ids: list[int]) -> np.ndarray:
    count, places = len(ids), np.arange(len(ids))
    blocks = np.arange(-(-count // 16))[None]
    return model.run(Batch(np.array(ids), places, places, np.array([0, count]), blocks, places))


def compare_logits(found: np.ndarray, expected: np.ndarray, ids: list[int]) -> dict:
    """Over the tokens of a text: mean and greatest KL divergence from float32, both NLLs, and other first choices."""
    def log_softmax(x):
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    divergence = (np.exp(p) * (p - q)).sum(-1)
    rows, best = np.arange(len(ids) - 1), np.arange(len(ids))
    other = found.argmax(-1) != expected.argmax(-1)
    margins = expected.max(-1) - expected[best, found.argmax(-1)]
    return {"tokens": len(ids), "kl_mean": divergence.mean(), "kl_max": divergence.max(),
            "nll": -q[rows, ids[1:]].mean(), "nll_float32": -p[rows, ids[1:]].mean(),
            "other_first_choices": int(other.sum()), "their_greatest_margin": float(margins[other].max(initial=0))}


def judge_logits(name: str, texts: list[dict], allowed: float = 0.1) -> dict:
    """All texts of a model in one; raises CheckError beyond a KL of 1e-3 or `allowed` percent of perplexity."""
    tokens = np.array([text["tokens"] for text in texts])
    whole = {key: float(np.average([text[key] for text in texts], weights=tokens))
             for key in ("kl_mean", "nll", "nll_float32")}
    whole |= {key: float(max(text[key] for text in texts)) for key in ("kl_max", "their_greatest_margin")}
    whole |= {"tokens": int(tokens.sum()), "other_first_choices": sum(text["other_first_choices"] for text in texts)}
    whole["perplexity_difference_percent"] = 100 * (np.exp(whole["nll"] - whole["nll_float32"]) - 1)
    check(whole["kl_mean"] <= 1e-3, f"{name}: KL divergence {whole['kl_mean']:.2g} a token; at most 1e-3 is right")
    check(abs(whole["perplexity_difference_percent"]) <= allowed,
          f"{name}: perplexity differs by {whole['perplexity_difference_percent']:.2g} %; at most {allowed} % is right")
    return whole


def demo_texts(count: int, most: int) -> list[list[int]]:
    """Dialogues of the kind that the demo model was trained on, as token ids."""
    sys.path.insert(0, str(ROOT / "demo"))
    import dialogues

    tokenizer = rustinfer.Tokenizer(ROOT / "demo")
    texts = [dialogues.render(*dialogues.conversation(random.Random(seed))) for seed in range(count)]
    return [tokenizer.inner.encode(text, add_special_tokens=False).ids[:most] for text in texts]


def random_model_logits(card: Card) -> dict:
    """Two layers of the 1B shape with random weights, on random tokens."""
    model, length = model_config(card.shape("1B"), 2), card.only_real((256,), (20,))[0]
    config = EngineConfig(device="cuda:0", max_num_seqs=128, max_num_batched_tokens=128)
    ids = np.random.default_rng(5).integers(0, model.vocab_size, length).tolist()
    on_card, host = load_on_card(card, config, model, 512), load_on_host(card, model, 512, 32)
    try:
        with on_card.backend.on_device(), on_card.backend.errors():
            on_card.allocate_kv_cache(32)
            found = card_logits(on_card, ids)
        return judge_logits("random weights", [compare_logits(found, host_logits(host, ids), ids)])
    finally:
        on_card.close()


def demo_model_logits(card: Card) -> dict:
    """The demo model on its own kind of text."""
    folder, texts = ROOT / "demo", demo_texts(*card.only_real((48, 512), (1, 40)))
    model = ModelConfig.load(folder)
    config = EngineConfig(device="cuda:0", max_num_seqs=128, max_num_batched_tokens=128)
    backend, reason = rustinfer.pick_backend(config, model)
    check(isinstance(backend, CudaBackend), f"the kernels were refused: {reason}")
    checkpoint = rustinfer.Checkpoint(folder)
    host = Llama(model, ArrayBackend(np, batch_invariant=False), 1024, 16)
    host.load(checkpoint)
    host.allocate_kv_cache(64)
    with backend.on_device(), backend.errors():
        on_card = Llama(model, backend, 1024, 16)
        on_card.load(checkpoint)
        on_card.allocate_kv_cache(64)
        compared = [compare_logits(card_logits(on_card, ids), host_logits(host, ids), ids) for ids in texts]
    on_card.close()
    return judge_logits("demo model", compared, 0.1 if not card.dry else 3)  # chance, with few tokens


def demo_answers(card: Card) -> dict:
    """64 greedy tokens of the demo model for a few questions, on the card and on NumPy."""
    count, length = card.only_real((8, 64), (1, 8))
    questions = ("What is Rust?", "Who are you?", "Tell me a story about a fox.", "Count to 10.", "What can you do?",
                 "Write a haiku about the sea.", "Tell me a joke.", "What is the capital of France?")[:count]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    answers = []
    for device in ("cuda:0", "cpu"):
        with rustinfer.LLM(ROOT / "demo", device=device, max_num_seqs=8) as llm:
            found = llm.chat(conversations, temperature=0, max_tokens=length, ignore_eos=True)
            answers.append([output.outputs[0].token_ids for output in found])
    equal = sum(a == b for a, b in zip(*answers))
    same_tokens = sum(sum(map(int.__eq__, a, b)) for a, b in zip(*answers))
    check(equal >= 0.75 * count, f"demo model: {equal} of {count} greedy answers are those of NumPy")
    return {"answers": count, "equal": equal, "tokens": count * length, "equal_tokens": same_tokens}


def stage_accuracy(card: Card, left) -> dict:
    """Logits, likelihoods and greedy answers against float32 on the host."""
    wrong: list[str] = []
    runs = {"random model": random_model_logits, "demo model": demo_model_logits, "demo answers": demo_answers}
    return conclude({what: attempt(lambda: run(card), what, wrong, card) for what, run in runs.items()}, wrong)


# ------------------------------------------------------------------------------
# bits: a request's answer depends on nothing but the request

def mixed_requests(vocab_size: int, count: int, longest: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, half of them with a beginning that others have too; every kind of sampling."""
    rng = random.Random(7)
    stem = [rng.randrange(vocab_size) for _ in range(longest)]
    kinds = [dict(temperature=0.0), dict(), dict(temperature=1.3, top_k=20, top_p=0.9), dict(top_p=0.7),
             dict(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5), dict(temperature=0.8, min_p=0.02),
             dict(frequency_penalty=1.0, logit_bias={7: 5.0, 11: -100.0}),
             dict(min_tokens=5, stop_token_ids=tuple(range(vocab_size // 2)))]
    lengths = [1, 2, 15, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 257, 300, 500]
    made = []
    for number in range(count):
        length = min(lengths[number % len(lengths)] if number < 32 else rng.randint(1, longest), longest)
        shared = length // 2 if number % 2 else 0
        prompt = stem[:shared] + [rng.randrange(vocab_size) for _ in range(length - shared)]
        limits = dict(max_tokens=rng.randint(6, 40), ignore_eos=True, logprobs=rng.choice([0, 1, 5, 20]), seed=number)
        made.append((prompt, SamplingParams(**dict(temperature=1.0) | kinds[number % len(kinds)] | limits)))
    return made


CHUNK = 80  # tokens a step where prompts are computed in pieces


def requests_around_a_chunk(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that end with a piece, a token before it or behind it."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    rng, lengths = random.Random(8), (CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1)
    return [([rng.randrange(vocab_size) for _ in range(length)], params) for length in lengths]


def bits_of(handle) -> list:
    """Token ids, logprobs and likeliest tokens, the floats by their bits."""
    return [(token.token_id, token.logprob.hex(), [(i, value.hex()) for i, value in token.top]) for token in handle]


def answers(llm: rustinfer.LLM, requests: list, alone: bool = False) -> list:
    if alone:
        return [bits_of(llm.engine.submit(*request)) for request in requests]
    return [bits_of(handle) for handle in [llm.engine.submit(*request) for request in requests]]


def long_answer(llm: rustinfer.LLM, tokens: int) -> list:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    return bits_of(llm.engine.submit([1, 2, 3, 4, 5], params))


def compare_answers(found: list, expected: list, what: str) -> None:
    different = [number for number, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]]
    if different:
        pairs = zip(found[different[0]], expected[different[0]])
        place = next((at for at, (a, b) in enumerate(pairs) if a != b), "the end")
        raise CheckError(f"{what}: {len(different)} of {len(expected)} requests differ from alone, {different[:8]}; "
                         f"the first at token {place}")


def stage_bits(card: Card, left) -> dict:
    """64 requests alone and in every kind of company: token ids and logprobs, bit for bit."""
    folder, count, longest, steps = (write_checkpoint(card, "1B", 2), *card.only_real((64, 500, 1000), (4, 40, 12)))
    base = dict(device="cuda:0", max_model_len=2048 if not card.dry else 256, max_num_seqs=64 if not card.dry else 3)
    vocab_size = card.shape("1B")["vocab_size"]
    requests, beside = mixed_requests(vocab_size, count, longest), requests_around_a_chunk(vocab_size)
    with rustinfer.LLM(folder, **base | dict(max_num_seqs=1), enforce_eager=True, no_prefix_caching=True) as llm:
        alone, long_alone = answers(llm, requests, alone=True), long_answer(llm, steps)
        beside_alone = answers(llm, beside, alone=True)
    block_bytes = 2 * 2 * 16 * 2 * card.shape("1B")["num_kv_heads"] * card.shape("1B")["head_dim"]
    few_blocks = max(-(-(len(prompt) + params.max_tokens) // 16) for prompt, params in requests)
    company = {"graphs": {}, "eager": dict(enforce_eager=True), "no pdl": dict(no_pdl=True),
               "no pdl, eager": dict(no_pdl=True, enforce_eager=True), "chunked": dict(max_num_batched_tokens=CHUNK),
               "preempted": dict(no_prefix_caching=True, kv_cache_memory=few_blocks * block_bytes)}
    company = {what: company[what] for what in card.only_real(tuple(company), ("graphs", "chunked", "preempted"))}
    results, wrong = {"requests": count, "tokens": sum(map(len, alone))}, []

    def compare(what, options):
        with rustinfer.LLM(folder, **base | options) as llm:
            compare_answers(answers(llm, requests), alone, what)
            found = {"preemptions": llm.engine.snapshot()["num_preemptions"]}
            if not options.get("no_prefix_caching"):
                compare_answers(answers(llm, requests), alone, f"{what}, once more")
                found["cached tokens"] = llm.engine.snapshot()["cached_tokens"]
            if what == "chunked":
                compare_answers(answers(llm, beside, alone=True), beside_alone, "prompts that end near a piece's end")
            if llm.engine.max_model_len > steps + 5:
                compare_answers([long_answer(llm, steps)], [long_alone], f"{what}, one of {steps} tokens")
            check(what != "preempted" or found["preemptions"] > 0, "nobody was preempted: the cache is too large")
            return found

    for what, options in company.items():
        run = lambda: compare(what, options) if left() > 5 else "skipped: out of time"
        results[what] = attempt(run, what, wrong, card)
    return conclude(results, wrong)


# ------------------------------------------------------------------------------
# memory

def stage_memory(card: Card, left) -> dict:
    """1000 short requests leave the card's memory about as they found it."""
    folder, (first, then) = write_checkpoint(card, "1B", 2), card.only_real((200, 1000), (2, 4))
    vocab_size, rng = card.shape("1B")["vocab_size"], random.Random(1)
    prompt = lambda: [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
    with rustinfer.LLM(folder, device="cuda:0", max_model_len=256, max_num_seqs=2 if card.dry else 64, max_queue=2000,
                       max_tokens=4) as llm:
        used = []
        for count in (first, then):
            for handle in [llm.engine.submit(prompt(), SamplingParams()) for _ in range(count)]:
                list(handle)
            llm.engine.model.backend.stream.synchronize()
            used.append(card.card_memory())
        llm.engine.blocks.check(())
    found = {"requests": then, "bytes_before": used[0], "bytes_after": used[1]}
    some = 4 << 20  # a list of a size that never was takes new memory, and the driver takes 2 MiB for it
    check(card.dry or used[1] - used[0] <= some, f"{used[1] - used[0]} bytes more are in use after {then} requests")
    return found
