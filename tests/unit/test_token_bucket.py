"""Token buckets and the numbers that workers share."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from meshproxy.api.errors import ConfigError
from meshproxy.net import token_bucket
from meshproxy.net.shared import Cells, LocalCounter, counter_for
from meshproxy.net.token_bucket import SharedTokenBucket, TokenBucket
from tests.unit.filter_help import Clock, context, proto

PROTO = "envoy.type.v3.TokenBucket"


def test_full_then_empty_then_filling() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 2.0, clock)
    assert [bucket.consume() for _ in range(11)] == [True] * 10 + [False]
    assert bucket.remaining() == pytest.approx(0)
    assert bucket.next_token() == pytest.approx(0.5)
    clock.now += 0.4
    assert not bucket.consume()
    clock.now += 0.1
    assert bucket.consume()
    assert not bucket.consume()


def test_fractions_are_not_lost() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 1.0, clock)
    assert bucket.consume()
    taken = 0
    for _ in range(100):
        clock.now += 0.3
        taken += bucket.consume()
    assert taken == 25  # every fourth step of 0.3 s: the bucket holds one token only, so the rest of the fourth step is lost as it is in Envoy


def test_never_more_than_it_holds() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 100.0, clock)
    clock.now += 1e6
    assert bucket.remaining() == 3
    assert not bucket.consume(4)
    assert bucket.consume(3)
    assert bucket.next_token() == pytest.approx(0.01)


def test_all_or_none() -> None:
    bucket = TokenBucket(10, 1.0, Clock())
    assert bucket.consume(7)
    assert not bucket.consume(5)
    assert bucket.remaining() == pytest.approx(3)
    assert bucket.next_token() == 0.0
    assert "3.0 of 10" in repr(bucket)


def test_compile() -> None:
    ctx = context().context
    bucket = token_bucket.compile_bucket(proto(PROTO, "{max_tokens: 10, tokens_per_fill: 5, fill_interval: 2s}"), ctx)
    assert (bucket.max_tokens, bucket.fill_rate) == (10, 2.5)
    bucket = token_bucket.compile_bucket(proto(PROTO, "{max_tokens: 10, fill_interval: 0.05s}"), ctx)
    assert bucket.fill_rate == pytest.approx(20)
    with pytest.raises(ConfigError, match="fill_interval: must be at least 50ms"):
        token_bucket.compile_bucket(proto(PROTO, "{max_tokens: 10, fill_interval: 0.049s}"), ctx)


def test_without_cells_each_worker_has_its_share() -> None:
    ctx = context(concurrency=4).context
    bucket = token_bucket.compile_bucket(proto(PROTO, "{max_tokens: 10, tokens_per_fill: 10, fill_interval: 1s}"), ctx, b"key")
    assert (type(bucket), bucket.max_tokens, bucket.fill_rate) == (TokenBucket, 3, 2.5)
    assert isinstance(counter_for(ctx, b"key")[0], LocalCounter)
    assert counter_for(ctx, b"key")[1] == 4


def two_workers() -> tuple[Any, Any]:
    """The contexts of two workers, each with its own view of the same cells, and one clock."""
    cells = Cells.create(64)
    first, second = context(concurrency=2).context, context(concurrency=2).context
    second.clock = first.clock
    first.cells, second.cells = cells, Cells(os.dup(cells.fileno()))
    second.worker_id = 1
    return first, second


def test_workers_share_a_bucket() -> None:
    first, second = two_workers()
    settings = proto(PROTO, "{max_tokens: 3, tokens_per_fill: 1, fill_interval: 1s}")
    ours = token_bucket.compile_bucket(settings, first, b"k")
    theirs = token_bucket.compile_bucket(settings, second, b"k")
    other = token_bucket.compile_bucket(settings, second, b"other")
    assert isinstance(ours, SharedTokenBucket)
    assert [ours.consume(), theirs.consume(), ours.consume(), theirs.consume(), ours.consume()] == [True, True, True, False, False]
    assert ours.remaining() == pytest.approx(0)
    assert other.remaining() == 3
    first.clock.now += 1
    assert theirs.consume()
    assert not ours.consume()


def test_workers_share_a_count() -> None:
    first, second = two_workers()
    ours, share = counter_for(first, b"k")
    theirs, _ = counter_for(second, b"k")
    assert share == 1
    assert [ours.acquire(2), theirs.acquire(2), ours.acquire(2)] == [True, True, False]
    assert (ours.total(), theirs.total()) == (2, 2)
    ours.add(1)  # whatever the limit
    assert theirs.total() == 3
    assert counter_for(first, b"k")[0] is ours
    # A worker that takes the place of a dead one starts from nothing; the others keep theirs.
    replaced = context(concurrency=2).context
    replaced.cells = Cells(os.dup(first.cells.fileno()))
    assert counter_for(replaced, b"k")[0].total() == 1


def test_local_counter() -> None:
    counter = LocalCounter()
    assert [counter.acquire(1), counter.acquire(1)] == [True, False]
    counter.add(-1)
    assert counter.total() == 0
    assert counter.acquire(1)


def test_no_free_cells() -> None:
    ctx, _ = two_workers()
    ctx.cells = Cells.create(1)
    settings = proto(PROTO, "{max_tokens: 4, tokens_per_fill: 1, fill_interval: 1s}")
    assert isinstance(token_bucket.compile_bucket(settings, ctx, b"a"), SharedTokenBucket)
    split = token_bucket.compile_bucket(settings, ctx, b"b")
    assert (type(split), split.max_tokens) == (TokenBucket, 2)
    assert isinstance(counter_for(ctx, b"c")[0], LocalCounter)


def _hammer(fd: int, rounds: int, taken: Any) -> None:
    ctx = context(concurrency=2).context
    ctx.cells = Cells(fd)
    ctx.cells.patience = 1 << 30
    bucket = token_bucket.compile_bucket(proto(PROTO, "{max_tokens: 1000, fill_interval: 1000s}"), ctx, b"k")
    mine = sum(bucket.consume() for _ in range(rounds))
    with taken.get_lock():
        taken.value += mine


def test_two_processes_never_take_a_token_twice() -> None:
    fork = multiprocessing.get_context("fork")
    cells = Cells.create(64)
    taken = fork.Value("i", 0)
    workers = [fork.Process(target=_hammer, args=(cells.fileno(), 800, taken)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
    assert taken.value == 1000


def test_a_holder_that_died_blocks_nobody(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    cells = Cells.create(8)

    def die() -> None:
        cells.lock(0)
        os._exit(1)

    process = fork.Process(target=die)
    process.start()
    process.join(10)
    cells.patience = 1 << 30
    cells.lock(0)
    cells.unlock(0)


def test_a_lock_that_cannot_be_had_stalls_nobody() -> None:
    fork = multiprocessing.get_context("fork")
    cells = Cells.create(8)
    cells.lock(0)
    passed = fork.Event()

    def go_on() -> None:
        cells.lock(0)
        cells.unlock(0)
        passed.set()

    process = fork.Process(target=go_on)
    process.start()
    process.join(10)
    assert passed.is_set()
