"""KV cache: who owns which block, what is shared, what is reused first."""
import random

import pytest

from rustinfer import BlockManager, EngineError, SamplingParams, Sequence

S = 8  # block size


def sequence(token_ids, salt=b"", seq_id=0):
    return Sequence(seq_id, token_ids, SamplingParams(), seed=0, salt=salt)


def compute(blocks, seq, num_tokens=None):
    """What a step does: the KV of the sequence's tokens is written, and full blocks get their names."""
    before = seq.num_computed_tokens
    seq.num_computed_tokens = seq.num_tokens if num_tokens is None else before + num_tokens
    blocks.name_full_blocks(seq, before, seq.num_computed_tokens)


def admit(blocks, token_ids, salt=b""):
    """A sequence with blocks for its tokens, all computed."""
    seq = sequence(token_ids, salt)
    blocks.admit(seq, blocks.find_prefix(seq))
    compute(blocks, seq)
    return seq


def leave(blocks, token_ids, salt=b""):
    """A sequence that came and went; the contents of its blocks stay behind."""
    seq = admit(blocks, token_ids, salt)
    table = list(seq.block_table)
    blocks.release(seq)
    return table


def test_unknown_prefix_is_not_found():
    blocks = BlockManager(8, S)
    leave(blocks, range(20))
    assert blocks.find_prefix(sequence(range(1, 21))) == []


def test_equal_beginning_is_found_block_by_block():
    blocks = BlockManager(8, S)
    table = leave(blocks, range(3 * S))
    assert blocks.find_prefix(sequence([*range(2 * S), 99, 99, 99])) == table[:2]
    assert blocks.find_prefix(sequence([*range(S), 99, *range(S + 1, 40)])) == table[:1]


def test_running_sequence_shares_its_blocks():
    blocks = BlockManager(8, S)
    first, second = admit(blocks, range(20)), admit(blocks, range(20))
    assert second.block_table[:2] == first.block_table[:2] and second.block_table[2] != first.block_table[2]
    assert [blocks.blocks[b].ref_count for b in first.block_table] == [2, 2, 1]
    assert blocks.num_free == 8 - 4
    blocks.check([first, second])
    blocks.release(first)
    assert [blocks.blocks[b].ref_count for b in second.block_table] == [1, 1, 1]
    blocks.check([second])


def test_block_is_not_found_before_its_kv_is_written():
    blocks = BlockManager(8, S)
    seq = sequence(range(20))
    blocks.admit(seq, [])
    assert blocks.find_prefix(sequence(range(20))) == []
    compute(blocks, seq, S + 1)
    assert blocks.find_prefix(sequence(range(20))) == seq.block_table[:1]


@pytest.mark.parametrize("length", [1, S - 1, S, S + 1, 2 * S, 2 * S + 1])
def test_at_least_one_token_is_left_to_compute(length):
    blocks = BlockManager(8, S)
    leave(blocks, range(length))
    assert len(blocks.find_prefix(sequence(range(length)))) == (length - 1) // S


def test_salt_separates_tenants():
    blocks = BlockManager(8, S)
    table = leave(blocks, range(20), salt=b"a")
    assert blocks.find_prefix(sequence(range(20), b"b")) == []
    assert blocks.find_prefix(sequence(range(20))) == []
    assert blocks.find_prefix(sequence(range(20), b"a")) == table[:2]


def test_without_prefix_caching_nothing_is_named_or_found():
    blocks = BlockManager(8, S, prefix_caching=False)
    leave(blocks, range(20))
    assert blocks.find_prefix(sequence(range(20))) == [] and not blocks.named


def test_tokens_are_compared_on_a_hash_hit():
    blocks = BlockManager(8, S)
    table = leave(blocks, range(20))
    blocks.blocks[table[0]].token_ids = tuple(range(1, S + 1))  # what a collision of names would look like
    assert blocks.find_prefix(sequence(range(20))) == []


def test_equal_blocks_computed_side_by_side_get_one_name():
    blocks = BlockManager(8, S)
    first, second = sequence(range(S + 1)), sequence(range(S + 1))
    for seq in (first, second):
        blocks.admit(seq, blocks.find_prefix(seq))
    for seq in (first, second):
        compute(blocks, seq)
    assert list(blocks.named.values()) == first.block_table[:1]
    blocks.check([first, second])


def test_oldest_contents_are_reused_first():
    blocks = BlockManager(6, S)
    leave(blocks, range(2 * S + 1))
    recent = leave(blocks, range(100, 101 + 2 * S))
    admit(blocks, range(200, 201 + 3 * S))  # takes the four blocks of no or of older contents
    assert blocks.find_prefix(sequence(range(2 * S + 1))) == []
    assert blocks.find_prefix(sequence(range(100, 101 + 2 * S))) == recent[:2]


def test_end_of_a_prefix_is_reused_before_its_beginning():
    blocks = BlockManager(4, S)
    table = leave(blocks, range(4 * S))
    admit(blocks, range(100, 100 + 2 * S))
    assert blocks.find_prefix(sequence(range(4 * S))) == table[:2]


def test_hit_makes_a_prefix_recent_again():
    blocks = BlockManager(4, S)
    old = leave(blocks, range(S + 1))
    leave(blocks, range(100, 101 + S))
    leave(blocks, range(S + 1))
    admit(blocks, range(200, 203 + 2 * S))
    assert blocks.find_prefix(sequence(range(S + 1))) == old[:1]
    assert blocks.find_prefix(sequence(range(100, 101 + S))) == []


def test_reused_block_loses_its_name():
    blocks = BlockManager(2, S)
    leave(blocks, range(2 * S))
    seq = sequence(range(50, 51 + S))
    blocks.admit(seq, [])
    assert not blocks.named and all(blocks.blocks[b].hash is None for b in seq.block_table)
    blocks.check([seq])


def test_blocks_needed_counts_idle_prefix_blocks_and_not_those_in_use():
    blocks = BlockManager(8, S)
    leave(blocks, range(20))
    newcomer = sequence(range(20))
    assert blocks.blocks_needed(newcomer, blocks.find_prefix(newcomer)) == 3
    admit(blocks, range(20))
    assert blocks.blocks_needed(newcomer, blocks.find_prefix(newcomer)) == 1


def test_growing_adds_a_block_at_each_boundary():
    blocks = BlockManager(4, S)
    seq = admit(blocks, range(S))
    for size in range(S + 1, 3 * S + 1):
        seq.token_ids.append(size)
        blocks.grow(seq)
        assert len(seq.block_table) == -(-size // S)
    assert len(set(seq.block_table)) == 3


def test_generated_tokens_are_found_like_prompt_tokens():
    blocks = BlockManager(8, S)
    seq = admit(blocks, range(S + 1))
    for token in range(S + 1, 2 * S + 1):
        seq.token_ids.append(token)
        blocks.grow(seq)
        compute(blocks, seq)
    assert blocks.find_prefix(sequence(range(2 * S + 1))) == seq.block_table[:2]


def test_forgotten_blocks_are_not_shared_any_more():
    blocks = BlockManager(8, S)
    seq = admit(blocks, range(20))
    blocks.forget(seq)
    assert blocks.find_prefix(sequence(range(20))) == [] and not blocks.named
    blocks.check([seq])


class Twin:
    """What the block manager promises, kept in the plainest way: the contents of every block that was filled."""

    def __init__(self, blocks):
        self.blocks, self.contents = blocks, {}  # block id -> (salt, all tokens up to the block's end)

    def record(self, seq):
        """The step wrote the sequence's KV: note what each full block now stands for."""
        for index in range(seq.num_computed_tokens // S):
            self.contents[seq.block_table[index]] = seq.salt, tuple(seq.token_ids[: (index + 1) * S])
        for block_id in seq.block_table[seq.num_computed_tokens // S :]:
            self.contents.pop(block_id, None)

    def check_prefix(self, seq, prefix):
        for index, block_id in enumerate(prefix):
            assert self.contents[block_id] == (seq.salt, tuple(seq.token_ids[: (index + 1) * S]))
        assert len(prefix) * S < seq.num_tokens

    def check_shared(self, seq):
        """Every sequence still finds its own KV in its blocks: nobody has written over them."""
        for index in range(seq.num_computed_tokens // S):
            assert self.contents[seq.block_table[index]] == (seq.salt, tuple(seq.token_ids[: (index + 1) * S]))


class RandomRun:
    """Sequences that come, compute, grow and go at random, with few kinds of beginnings."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.blocks = BlockManager(self.rng.choice([5, 12, 40]), S)
        self.twin, self.live, self.hits = Twin(self.blocks), [], 0

    def come(self):
        stem = [self.rng.choice([1, 2])] * self.rng.choice([0, S, 2 * S, 3 * S])
        tail = [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 2 * S))]
        seq = sequence(stem + tail, self.rng.choice([b"", b"x"]))
        prefix = self.blocks.find_prefix(seq)
        self.twin.check_prefix(seq, prefix)
        if self.blocks.blocks_needed(seq, prefix) <= self.blocks.num_free:
            free = self.blocks.num_free - self.blocks.blocks_needed(seq, prefix)
            self.blocks.admit(seq, prefix)
            assert self.blocks.num_free == free and seq.num_computed_tokens == len(prefix) * S
            self.hits += len(prefix)
            self.twin.record(seq)
            self.live.append(seq)

    def work(self, seq):
        if seq.num_remaining:
            compute(self.blocks, seq, self.rng.randint(1, seq.num_remaining))
        elif self.blocks.num_free:
            seq.token_ids.append(self.rng.randrange(3))
            self.blocks.grow(seq)
        self.twin.record(seq)

    def go(self, seq):
        if self.rng.random() < 0.1:
            self.blocks.forget(seq)
        self.blocks.release(seq)
        assert seq.block_table == [] and seq.num_computed_tokens == 0
        self.live.remove(seq)

    def step(self):
        kind = self.rng.random()
        if kind < 0.3 or not self.live:
            self.come()
        elif kind < 0.8:
            self.work(self.rng.choice(self.live))
        else:
            self.go(self.rng.choice(self.live))
        self.blocks.check(self.live)
        for seq in self.live:
            self.twin.check_shared(seq)


@pytest.mark.parametrize("seed", range(6))
def test_random_operations_keep_every_promise(seed):
    run = RandomRun(seed)
    for _ in range(1500):
        run.step()
    assert run.hits > 20
    for seq in list(run.live):
        run.go(seq)
    run.blocks.check(())
    assert run.blocks.num_free == run.blocks.num_blocks


CORRUPTIONS = {
    "a count too high": lambda blocks, seq: setattr(blocks.blocks[seq.block_table[0]], "ref_count", 2),
    "a used block in the free list": lambda blocks, seq: blocks.free.update({seq.block_table[0]: None}),
    "a free block lost": lambda blocks, seq: blocks.free.popitem(),
    "one block at two places": lambda blocks, seq: seq.block_table.__setitem__(1, seq.block_table[0]),
    "too few blocks": lambda blocks, seq: blocks.free.update({seq.block_table.pop(): None}),
    "a name without a block": lambda blocks, seq: blocks.named.update({b"?": 0}),
    "a name taken away": lambda blocks, seq: blocks.named.popitem(),
    "a name of another block": lambda blocks, seq: blocks.named.update(dict.fromkeys(blocks.named, 7)),
    "other tokens": lambda blocks, seq: seq.token_ids.__setitem__(3, 1000),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_check_notices_corruption(corruption):
    blocks = BlockManager(8, S)
    seq = admit(blocks, range(20))
    blocks.check([seq])
    corruption(blocks, seq)
    with pytest.raises(EngineError):
        blocks.check([seq])


def test_check_notices_a_sequence_nobody_knows():
    blocks = BlockManager(8, S)
    admit(blocks, range(20))
    with pytest.raises(EngineError, match="used by 0 sequences"):
        blocks.check([])
