"""Blocks: who holds them, what they are found by, and which is reused first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.engine.blocks import BlockPool


def key(text: str, parent: int | str = "root") -> tuple:
    return parent, text.encode(), ()


def cached(pool: BlockPool, *texts: str) -> list[int]:
    """Blocks that were held by one sequence, published under a chain of keys, and given back."""
    blocks, parent = [], "root"
    for text in texts:
        blocks.append(pool.take(after=blocks[-1] if blocks else None))
        parent = pool.publish(blocks[-1], key(text, parent))
    pool.release(blocks)
    return blocks


def test_a_block_behind_the_last_one_is_taken_where_it_is_unused():
    pool = BlockPool(8)
    first = pool.take()
    assert [pool.take(after=first), pool.take(after=first + 1)] == [first + 1, first + 2]
    assert pool.take(after=first) not in (first, first + 1, first + 2)  # that one is held


def test_an_unused_block_is_taken_before_a_cached_one():
    pool = BlockPool(4)
    kept = cached(pool, "a", "b")
    assert not {pool.take(), pool.take()} & set(kept)
    assert pool.cached == 2


def test_the_block_behind_the_last_one_is_left_alone_where_it_is_cached():
    pool = BlockPool(4)
    one, two = pool.take(), pool.take()
    pool.publish(two, key("kept"))
    pool.release([two])
    assert pool.take(after=one) != two


def test_the_cached_block_that_has_been_idle_longest_goes_first():
    pool = BlockPool(3)
    for text in "abc":
        cached(pool, text)
    block, _ = pool.find(key("a"))
    pool.hold([block])  # used again: now "b" is the oldest
    pool.release([block])
    gone = []
    for _ in range(3):
        pool.take()
        gone.append([text for text in "abc" if pool.find(key(text)) is None])
    assert gone == [["b"], ["b", "c"], ["a", "b", "c"]]


def test_of_one_sequence_the_tail_goes_first():
    pool = BlockPool(4)
    blocks = cached(pool, "a", "b", "c", "d")
    assert [pool.take() for _ in range(4)] == blocks[::-1]


def test_a_block_that_two_hold_is_free_when_both_have_let_go():
    pool = BlockPool(2)
    blocks = cached(pool, "a")
    pool.hold(blocks)
    pool.hold(blocks)
    assert pool.free == 1
    pool.release(blocks)
    assert pool.free == 1
    pool.release(blocks)
    assert pool.free == 2 and pool.find(key("a")) is not None


def test_equal_contents_under_another_parent_or_salt_are_not_found():
    pool = BlockPool(4)
    pool.publish(pool.take(), key("a", "shared one"))
    assert pool.find(key("a", "shared two")) is None
    assert pool.find(key("a", 1)) is None
    assert pool.find(("shared one", b"a", (b"image",))) is None
    assert pool.find(key("a", "shared one")) is not None


def test_what_two_computed_is_found_once():
    pool = BlockPool(4)
    one, two = pool.take(), pool.take()
    assert pool.publish(one, key("a")) == pool.publish(two, key("a"))
    assert pool.cached == 1 and pool.find(key("a"))[0] == one
    pool.release([one, two])
    assert pool.take() == two  # nobody can find the second: it is of no use


def test_after_forget_nothing_is_found_and_all_is_free():
    pool = BlockPool(4)
    cached(pool, "a", "b")
    held = pool.take()
    number = pool.publish(held, key("c"))
    pool.forget()
    assert pool.cached == 0 and all(pool.find(key(text)) is None for text in "abc")
    pool.release([held])
    assert pool.free == 4
    assert pool.publish(pool.take(), key("c")) != number  # a number stands for one publication


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["take", "hold", "release", "publish", "forget"]), st.integers(0, 30)), max_size=60
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(size=st.integers(1, 6), operations=OPERATIONS)
def test_a_pool_agrees_with_a_plain_model(size, operations):
    pool = BlockPool(size)
    holds: list[list[int]] = []  # what each holder holds
    contents: dict[int, tuple] = {}  # what each block was published under, until it is taken again

    def idle() -> int:
        return size - len({block for blocks in holds for block in blocks})

    for operation, number in operations:
        if operation == "take" and pool.free:
            block = pool.take(after=number % size)
            assert all(block not in blocks for blocks in holds)
            contents.pop(block, None)
            holds.append([block])
        elif operation == "hold" and (found := pool.find(key(str(number % 4)))):
            assert contents[found[0]] == key(str(number % 4))
            pool.hold([found[0]])
            holds.append([found[0]])
        elif operation == "release" and holds:
            pool.release(holds.pop(number % len(holds)))
        elif operation == "publish" and holds:
            block = holds[number % len(holds)][0]
            if block not in contents:
                found = pool.find(key(str(number % 4)))
                pool.publish(block, key(str(number % 4)))
                if found is None:
                    contents[block] = key(str(number % 4))
        elif operation == "forget":
            pool.forget()
            contents.clear()
        owners = Counter(block for blocks in holds for block in blocks)
        assert pool._holders == [owners[block] for block in range(size)]
        assert pool.free == idle() and pool.cached == len(contents)
        for block, held_under in contents.items():
            assert pool.find(held_under)[0] == block
