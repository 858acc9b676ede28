"""The block pool: who holds a block, which content can be found, which block goes next."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pagoda.block_pool import BlockPool, chain_hash, root_hash


def chain(tokens: list[int], *, size: int = 2, salt: str = "") -> list[bytes]:
    hashes, parent = [], root_hash(salt)
    for start in range(0, len(tokens) - size + 1, size):
        parent = chain_hash(parent, tokens[start : start + size])
        hashes.append(parent)
    return hashes


def test_memory_modules_import_no_torch() -> None:
    """The scheduler must load in a process that has no torch."""
    modules = "sys, pagoda.block_pool, pagoda.scheduler, pagoda.engine, pagoda.sessions, pagoda.host"
    code = f"import {modules}; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_new_pool_is_all_free() -> None:
    pool = BlockPool(4)
    assert (pool.num_free, pool.num_owned) == (4, 0)
    pool.check([])


def test_take_gives_distinct_blocks_with_one_owner() -> None:
    pool = BlockPool(4)
    blocks = pool.take(3)
    assert len(set(blocks)) == 3
    assert (pool.num_free, pool.num_owned) == (1, 3)
    pool.check([blocks])


def test_take_beyond_what_is_free_takes_nothing() -> None:
    """A refused take that had popped some blocks would leak them."""
    pool = BlockPool(4)
    blocks = pool.take(3)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        pool.take(2)
    pool.check([blocks])


def test_take_none_of_an_exhausted_pool() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    assert pool.take(0) == []
    pool.check([blocks])


def test_a_shared_block_is_free_after_its_last_owner() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.share(blocks)
    pool.check([blocks, blocks])
    pool.release(blocks)
    assert pool.num_owned == 1
    pool.check([blocks])
    pool.release(blocks)
    pool.check([])


def test_find_returns_the_longest_known_prefix() -> None:
    """A gap ends the prefix: a block behind it continues another history."""
    pool = BlockPool(4)
    hashes = chain([1, 2, 3, 4, 5, 6])
    blocks = pool.take(3)
    pool.publish(blocks[0], hashes[0])
    pool.publish(blocks[2], hashes[2])
    assert pool.find(hashes) == blocks[:1]
    pool.publish(blocks[1], hashes[1])
    assert pool.find(hashes) == blocks
    assert pool.find(chain([1, 2, 3, 9])) == blocks[:1]
    assert pool.find(chain([9, 2])) == []
    pool.check([blocks])


def test_content_outlives_its_owner_until_the_block_is_taken() -> None:
    pool = BlockPool(2)
    (name,) = chain([1, 2])
    blocks = pool.take(1)
    pool.publish(blocks[0], name)
    pool.release(blocks)
    assert pool.find([name]) == blocks
    assert pool.num_unreferenced(blocks) == 1
    pool.share(blocks)
    assert (pool.num_free, pool.num_unreferenced(blocks)) == (1, 0)
    pool.release(blocks)
    taken = pool.take(2)
    assert pool.find([name]) == []
    pool.check([taken])


def test_the_first_block_with_a_content_keeps_the_name() -> None:
    """Two requests that computed the same content at once: tables never change, the second block is worthless."""
    pool = BlockPool(3)
    (name,) = chain([1, 2])
    first, second = pool.take(1), pool.take(1)
    pool.publish(first[0], name)
    pool.publish(second[0], name)
    assert pool.find([name]) == first
    pool.release(second)
    assert pool.take(1) == second
    pool.check([first, second])


def test_a_block_keeps_its_first_name() -> None:
    """A second name would leave the first one dangling when the block is taken."""
    pool = BlockPool(1)
    first, second = chain([1, 2, 3, 4])
    blocks = pool.take(1)
    pool.publish(blocks[0], first)
    pool.publish(blocks[0], second)
    assert pool.find([first]) == blocks
    assert pool.find([second]) == []
    pool.check([blocks])


def test_empty_blocks_go_first_then_the_least_recently_freed() -> None:
    pool = BlockPool(4)
    hashes = chain([1, 2, 3, 4])
    a, b, c = pool.take(1), pool.take(1), pool.take(1)
    pool.publish(a[0], hashes[0])
    pool.publish(b[0], hashes[1])
    pool.release(b)
    pool.release(a)
    pool.release(c)
    assert set(pool.take(2)) == {*c, 3}
    assert pool.take(2) == b + a


def test_the_head_of_a_chain_lives_longest() -> None:
    """A tail without its head can never be found again."""
    pool = BlockPool(3)
    hashes = chain([1, 2, 3, 4, 5, 6])
    blocks = pool.take(3)
    for block, name in zip(blocks, hashes, strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    for left in (2, 1, 0):
        pool.take(1)
        assert pool.find(hashes) == blocks[:left]


def test_hashes_depend_on_salt_parent_order_and_width() -> None:
    """One collision would hand a request another one's context."""
    histories = [[1, 2, 3, 4], [1, 2, 4, 3], [3, 4, 1, 2], [1, 2], [2, 1], [258, 0], [0, 258], [2**40, 1]]
    salts = ["", "a", "a\0"]
    names = [name for salt in salts for tokens in histories for name in chain(tokens, salt=salt)]
    distinct = {(salt, *tokens[:n]) for salt in salts for tokens in histories for n in (2, 4) if n <= len(tokens)}
    assert len(set(names)) == len(distinct)


def test_hashes_are_the_same_in_every_process() -> None:
    """Python's own hash is salted; a name must mean the same on every rank."""
    assert chain([1, 2], salt="s")[0].hex() == "b9b4d1374bcde611ce442434ce404fd3eb9503b92dd2081897e301bd6f020677"


def test_a_salt_may_hold_any_text_of_a_request() -> None:
    """JSON can carry a lone surrogate, which UTF-8 refuses."""
    assert root_hash("\ud800") != root_hash("\udfff")


@pytest.mark.parametrize(
    ("breach", "owners", "message"),
    [
        (lambda pool: pool.take(1), [], "1 references and 0 owners"),
        (lambda pool: None, [[0]], "0 references and 1 owners"),
        (lambda pool: pool._free.pop(2), [], "not in the free queue"),
        (lambda pool: pool._references.__setitem__(0, 1), [[0]], "in the free queue"),
        (lambda pool: pool._block_of.update({b"x": 1}), [], "hash it does not have"),
        (lambda pool: pool._hash_of.__setitem__(1, b"x"), [], "1 blocks have a hash, 0 can be found"),
    ],
    ids=["leak", "lost reference", "lost block", "free and owned", "wrong name", "dangling name"],
)
def test_check_names_the_breach(breach, owners, message) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(4)
    breach(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check(owners)
