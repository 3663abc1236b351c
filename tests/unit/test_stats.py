"""The stats store: metrics, declarations, frames between processes."""

from __future__ import annotations

import pytest

from meshproxy.observe.stats import Store


def test_the_same_name_is_the_same_object() -> None:
    scope = Store().scope("cluster.foo.")
    assert scope.counter("upstream_rq_total") is scope.counter("upstream_rq_total")
    with pytest.raises(TypeError, match=r"cluster\.foo\.upstream_rq_total is a counter, not a gauge"):
        scope.gauge("upstream_rq_total")


def test_colons_of_scopes_become_underscores() -> None:
    assert Store().scope("listener.[::1]:80.").counter("x").name == "listener.[__1]_80.x"


def test_counters_and_gauges_of_workers_add_up() -> None:
    main, one, two = Store(), Store(), Store()
    for worker in (one, two):
        worker.counter("c").n += 3
        worker.gauge("g").n += 2
    main.merge(1, one.deltas())
    main.merge(2, two.deltas())
    one.counter("c").n += 1
    one.gauge("g").n -= 1
    main.merge(1, one.deltas())
    assert main.value("c") == 7
    assert main.value("g") == 3


def test_a_dead_worker_leaves_its_counters_and_takes_its_gauges() -> None:
    main, one, two = Store(), Store(), Store()
    for worker in (one, two):
        worker.counter("c").n += 3
        worker.gauge("g").n += 2
    main.merge(1, one.deltas())
    main.merge(2, two.deltas())
    main.drop_worker(1)
    assert (main.value("c"), main.value("g")) == (6, 2)
    replacement = Store()
    replacement.gauge("g").n += 5
    main.merge(1, replacement.deltas())
    assert (main.value("c"), main.value("g")) == (6, 7)


def test_a_first_frame_replaces_the_worker_of_that_number() -> None:
    main = Store()
    for _ in range(2):
        worker = Store()
        worker.counter("other").n += 1
        worker.gauge("g").n += 2
        main.merge(1, worker.deltas())
    assert (main.value("other"), main.value("g")) == (2, 2)


def test_shared_metrics_are_not_added_up() -> None:
    main, one, two = Store(), Store(), Store()
    for worker in (one, two):
        worker.scope("").gauge("hosts", shared=True).n = 10
        worker.scope("").counter("changes", shared=True).n += 1
    main.merge(1, one.deltas())
    main.merge(2, two.deltas())
    assert (main.value("hosts"), main.value("changes")) == (10, 1)
    for worker in (one, two):
        worker.gauge("hosts").n = 4
        worker.counter("changes").n += 1
    main.merge(1, one.deltas())
    main.merge(2, two.deltas())
    assert (main.value("hosts"), main.value("changes")) == (4, 2)
    main.drop_worker(1)
    assert (main.value("hosts"), main.value("changes")) == (4, 2)
    main.drop_worker(2)
    assert (main.value("hosts"), main.value("changes")) == (0, 2)


def test_a_frame_holds_changes_only() -> None:
    worker = Store()
    for number in range(1000):
        worker.counter(f"some.counter.{number}").n += 1
    first = worker.deltas()
    quiet = worker.deltas()
    assert len(first) > 20_000
    assert len(quiet) < 64


def test_histograms_reach_main_and_start_intervals_at_flush() -> None:
    main, worker = Store(), Store()
    worker.histogram("h").record(12)
    worker.histogram("h").record(0.7)
    main.merge(1, worker.deltas())
    assert not main.find("h").used
    main.flush()
    assert main.find("h").interval == {0: 1, 212: 1}
    main.flush()
    assert main.find("h").interval == {}
    assert main.find("h").cumulative == {0: 1, 212: 1}


def test_text_readouts_reach_main() -> None:
    main, worker = Store(), Store()
    worker.text("version").value = "1"
    main.merge(1, worker.deltas())
    assert main.find("version").value == "1"


def test_declared_names_exist_without_metrics_and_reach_main() -> None:
    names = ("a", "b")
    main, worker = Store(), Store()
    for number in range(3):
        worker.scope(f"cluster.{number}.").declare("counter", names)
    worker.counter("cluster.1.a").n += 1
    assert len(worker.metrics) == 1
    expected = [f"cluster.{number}.{name}" for number in range(3) for name in names]
    assert sorted(worker.names("counter")) == expected
    main.merge(1, worker.deltas())
    main.merge(2, worker.deltas())
    assert sorted(main.names("counter")) == expected
    assert list(main.names("gauge")) == []


def test_declaring_for_a_thousand_clusters_costs_little() -> None:
    store = Store()
    names = tuple(f"upstream_{number}" for number in range(100))
    for number in range(1000):
        store.scope(f"cluster.{number}.").declare("counter", names)
    assert len(store.metrics) == 0
    assert len(store.deltas()) < 60_000


def test_reset_counters_keeps_the_rest() -> None:
    main, worker = Store(), Store()
    worker.counter("c").n += 3
    worker.gauge("g").n += 3
    main.merge(1, worker.deltas())
    main.reset_counters()
    assert (main.value("c"), main.value("g")) == (0, 3)
    assert main.find("c").used
    worker.counter("c").n += 1
    main.merge(1, worker.deltas())
    assert main.value("c") == 1


def test_remove_forgets_a_scope_everywhere() -> None:
    main, worker = Store(), Store()
    scope = worker.scope("cluster.a.")
    scope.declare("counter", ("x", "y"))
    scope.counter("x").n += 1
    worker.counter("cluster.b.x").n += 1
    main.merge(1, worker.deltas())
    scope.remove()
    main.remove("cluster.a.")
    main.merge(1, worker.deltas())
    assert list(main.names("counter")) == ["cluster.b.x"]
    scope.counter("x").n += 5
    main.merge(1, worker.deltas())
    assert main.value("cluster.a.x") == 5


def test_refused_metrics_work_but_are_not_shown() -> None:
    store = Store(accepts=lambda name: not name.startswith("cluster."))
    store.counter("cluster.a.x").n += 1
    store.scope("cluster.b.").declare("counter", ("x",))
    store.counter("http.x").n += 1
    assert list(store.names("counter")) == ["http.x"]


def test_names_come_in_order_whatever_section_they_are_in():
    store = Store()
    names = ["a", "a.b", "a.b-c", "a.b.c", "a.b.c.d", "a.b.d", "a.bc", "a-b.c.d", "cluster.x.y", "cluster.x-1.y", "cluster.x.1.y", "server.live", "z."]
    for number, name in enumerate(names):
        prefix, dot, short = name.rpartition(".")
        if number % 2:
            store.scope(prefix + dot).declare("counter", (short,))
        else:
            store.counter(name)
    store.counter("a.b.d")  # declared before
    found = [entry for entry in store.in_order(("counter",)) if entry is not None]
    assert found == [(name, "counter") for name in sorted(names)]
    assert [name for name, _ in filter(None, store.in_order(("counter",), declared=False))] == sorted([*names[::2], "a.b.d"])
    assert list(filter(None, store.in_order(("gauge",)))) == []


def test_many_scopes_are_forgotten_in_one_go():
    store = Store()
    for name in ("a", "ab", "a.b", "c"):
        store.scope(f"cluster.{name}.").counter("hits").n += 1
        store.declare("gauge", f"cluster.{name}.", ("size",))
    store.remove("cluster.a.", "cluster.c.", "cluster.none.")
    assert sorted(store.metrics) == ["cluster.ab.hits"]
    assert list(store.names("gauge")) == ["cluster.ab.size"]
