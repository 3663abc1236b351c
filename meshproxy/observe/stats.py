"""Counters, gauges, histograms and text readouts, named as Envoy names them.

A metric is an object with a plain slot: hot code does `counter.n += 1` and `histogram.record(milliseconds)` and nothing else. A worker's store turns what
changed into a small frame (`deltas`), main's store adds the frames of all workers up (`merge`) and is what the admin endpoints render
(`stats_render`, `prometheus`). Names that a configuration brings along but nobody touched yet are only declared: a prefix and a tuple of names that many
scopes share.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from meshproxy.observe import histogram as bins

Kind = Literal["counter", "gauge", "histogram", "text"]
KINDS: tuple[Kind, ...] = ("counter", "gauge", "histogram", "text")


class Metric:
    """What all metrics have: a name, the number that frames know them by, and whether they were ever used (Envoy's `usedonly`)."""

    __slots__ = ("id", "name", "seen", "shared")
    kind: Kind

    def __init__(self, name: str, number: int, shared: bool) -> None:
        self.name = name
        self.id = number
        self.seen = False
        # A shared metric says the same in every worker (say, the number of hosts in a cluster): main shows the greatest one instead of the sum.
        self.shared = shared

    @property
    def used(self) -> bool:
        """Whether it ever had a value other than nothing."""
        return self.seen

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Counter(Metric):
    """A number that only grows: `counter.n += 1`."""

    __slots__ = ("n", "sent")
    kind: Kind = "counter"

    def __init__(self, name: str, number: int, shared: bool) -> None:
        super().__init__(name, number, shared)
        self.n = 0
        self.sent = 0

    @property
    def used(self) -> bool:
        return self.seen or self.n != 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.n})"


class Gauge(Counter):
    """A number that goes up and down: `gauge.n += 1`, `gauge.n = 5`."""

    __slots__ = ()
    kind: Kind = "gauge"


class Histogram(Metric):
    """A distribution of whole numbers (milliseconds, bytes).

    `record(value)` only appends to a list: the values are counted into bins by `Store.deltas` or `Store.flush`, of which one must be called every few
    seconds. `interval` holds what the last flush period brought, `cumulative` everything since the start; both change in `flush` only.
    """

    __slots__ = ("_counted", "_pending", "cumulative", "interval", "merged", "record")
    kind: Kind = "histogram"

    def __init__(self, name: str, number: int, shared: bool) -> None:
        super().__init__(name, number, shared)
        self._pending: list[float] = []
        self._counted: bins.Bins = {}
        self.record: Callable[[float], None] = self._pending.append
        self.merged: bins.Bins = {}
        self.interval: bins.Bins = {}
        self.cumulative: bins.Bins = {}

    @property
    def used(self) -> bool:
        return bool(self.cumulative)

    def extend(self, values: Iterable[float]) -> None:
        """Record several values."""
        self._pending.extend(values)

    def count(self, values: Mapping[int, int]) -> None:
        """Record values that came several times: value -> how often."""
        for value, count in values.items():
            key = bins.bin_of(value)
            self._counted[key] = self._counted.get(key, 0) + count

    def drain(self) -> bins.Bins:
        """The bins of the values recorded since the last call."""
        drained, self._counted = self._counted, {}
        if self._pending:
            bins.fold(self._pending, drained)
            self._pending.clear()
        return drained

    def flush(self) -> None:
        """Start a new interval."""
        interval = self.merged
        self.merged = {}
        bins.add(interval, self.drain())
        self.interval = interval
        bins.add(self.cumulative, interval)


class Text(Metric):
    """A text readout: `text.value = "1.2.3"`."""

    __slots__ = ("sent", "value")
    kind: Kind = "text"

    def __init__(self, name: str, number: int, shared: bool) -> None:
        super().__init__(name, number, shared)
        self.value = ""
        self.sent = ""

    @property
    def used(self) -> bool:
        return self.seen or self.value != ""


_CLASSES: dict[Kind, type[Metric]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram, "text": Text}
M = TypeVar("M", bound=Metric)
Tag = tuple[str, str]


class Scope:
    """Makes metrics whose names begin with `prefix` (which ends with a dot, or is empty)."""

    __slots__ = ("prefix", "store")

    def __init__(self, store: Store, prefix: str) -> None:
        self.store = store
        self.prefix = prefix

    def counter(self, name: str, *, shared: bool = False) -> Counter:
        """The counter of that name. `shared`: every worker counts the same events, so main must not add them up."""
        return self.store.metric(Counter, self.prefix + name, shared)

    def gauge(self, name: str, *, shared: bool = False) -> Gauge:
        """The gauge of that name. `shared`: every worker sees the same value, so main must not add them up."""
        return self.store.metric(Gauge, self.prefix + name, shared)

    def histogram(self, name: str) -> Histogram:
        """The histogram of that name, of whole numbers."""
        return self.store.metric(Histogram, self.prefix + name)

    def text(self, name: str) -> Text:
        """The text readout of that name."""
        return self.store.metric(Text, self.prefix + name)

    def scope(self, name: str) -> Scope:
        """A scope below this one."""
        return self.store.scope(self.prefix + name)

    def declare(self, kind: Kind, names: tuple[str, ...]) -> None:
        """These metrics exist, with no value yet. Pass the same tuple for all scopes of one sort: only a reference to it is kept."""
        self.store.declare(kind, self.prefix, names)

    def remove(self) -> None:
        """Forget everything below this scope: what it belonged to is gone."""
        self.store.remove(self.prefix)

    def __repr__(self) -> str:
        return f"Scope({self.prefix!r})"


class Store:
    """All metrics of one process.

    `accepts` decides which names exist at all (`stats_config.stats_matcher`): a metric that it refuses works but is never shown.
    """

    def __init__(self, accepts: Callable[[str], bool] | None = None) -> None:
        self.accepts = accepts
        # Called before metrics are read: hot code may count in fewer places than there are metrics and settle the difference here.
        self.collectors: list[Callable[[], None]] = []
        self._metrics: dict[str, Metric] = {}
        # What the names of some metrics say that were made by `tagged`: the name without its tags, and the tags.
        self.tags: dict[str, tuple[str, tuple[Tag, ...]]] = {}
        self._declared: dict[tuple[Kind, str], tuple[tuple[str, ...], ...]] = {}
        self._next_id = 0
        self._workers: dict[int, _Worker] = {}
        self._tuples: dict[tuple[str, ...], tuple[str, ...]] = {}
        # What the next frame must tell main besides numbers.
        self._frames = 0
        self._new: list[Metric] = []
        self._new_declarations: list[tuple[Kind, str, tuple[str, ...]]] = []
        self._removed: list[int] = []

    # -- making metrics

    def scope(self, prefix: str) -> Scope:
        """A scope. Colons in its prefix become underscores: `listener.127.0.0.1:80.` is `listener.127.0.0.1_80.`."""
        return Scope(self, sanitise(prefix) if ":" in prefix else prefix)

    def metric(self, cls: type[M], name: str, shared: bool = False) -> M:
        """The metric of that class and full name. Raises TypeError when the name is taken by a metric of another kind."""
        found = self._metrics.get(name)
        if found is not None:
            if type(found) is not cls:
                raise TypeError(f"stat {name} is a {found.kind}, not a {cls.kind}")
            return found
        made = cls(name, self._next_id, shared)
        if self.accepts is None or self.accepts(name):
            self._next_id += 1
            self._metrics[name] = made
            self._new.append(made)
        return made

    def tagged(self, cls: type[M], name: str, tags: tuple[Tag, ...], shared: bool = False) -> M:
        """The metric of a name with these tags, which are not looked for in it. Its full name holds them, as Envoy has it: `name.tag.value.tag.value`."""
        full = ".".join([name, *[word for tag in tags for word in tag if word]])
        made = self.metric(cls, full, shared)
        if full in self._metrics:
            self.tags[full] = name, tags
        return made

    def counter(self, name: str) -> Counter:
        """The counter of that full name."""
        return self.metric(Counter, name)

    def gauge(self, name: str) -> Gauge:
        """The gauge of that full name."""
        return self.metric(Gauge, name)

    def histogram(self, name: str) -> Histogram:
        """The histogram of that full name."""
        return self.metric(Histogram, name)

    def text(self, name: str) -> Text:
        """The text readout of that full name."""
        return self.metric(Text, name)

    def declare(self, kind: Kind, prefix: str, names: tuple[str, ...]) -> None:
        """See `Scope.declare`."""
        declared = self._declared.get((kind, prefix), ())
        if names not in declared:
            self._declared[kind, prefix] = (*declared, names)
            self._new_declarations.append((kind, prefix, names))

    def remove(self, *prefixes: str) -> None:
        """Forget all metrics and declarations whose names begin with one of `prefixes`, which end with dots. Linear in the number of metrics, however many
        prefixes there are: for configuration changes."""
        wanted = frozenset(prefixes)
        lengths = sorted({len(prefix) for prefix in wanted})

        def is_gone(name: str) -> bool:
            return any(name[:length] in wanted for length in lengths)

        for name in [name for name in self._metrics if is_gone(name)]:
            self._removed.append(self._metrics.pop(name).id)
            self.tags.pop(name, None)
        for key in [key for key in self._declared if is_gone(key[1])]:
            del self._declared[key]
        self._new = [metric for metric in self._new if not is_gone(metric.name)]
        self._new_declarations = [entry for entry in self._new_declarations if not is_gone(entry[1])]

    # -- from worker to main

    def collect(self) -> None:
        """Bring the metrics up to date: run the collectors. Part of `deltas` and `flush`; call it before reading a store directly."""
        for settle in self.collectors:
            settle()

    def deltas(self) -> bytes:
        """A frame with everything that changed since the last call. Call it at least every few seconds: histograms keep their values until then."""
        self.collect()
        counts: list[int] = []
        histograms: list[tuple[int, bins.Bins]] = []
        texts: list[tuple[int, str]] = []
        for metric in self._metrics.values():
            if isinstance(metric, Counter):
                if metric.n != metric.sent:
                    counts += (metric.id, metric.n - metric.sent)
                    metric.sent = metric.n
            elif isinstance(metric, Histogram):
                drained = metric.drain()
                if drained:
                    histograms.append((metric.id, drained))
            elif isinstance(metric, Text) and metric.value != metric.sent:
                texts.append((metric.id, metric.value))
                metric.sent = metric.value
        new = [(metric.id, metric.kind, metric.name, metric.shared, self.tags.get(metric.name)) for metric in self._new]
        frame = marshal.dumps((self._frames, new, self._new_declarations, self._removed, counts, histograms, texts))
        self._frames += 1
        self._new = []
        self._new_declarations = []
        self._removed = []
        return frame

    def merge(self, worker_id: int, frame: bytes) -> None:
        """Add a frame of a worker (from our own process tree: frames are not checked). A first frame means that the worker was replaced."""
        number, new, declarations, removed, counts, histograms, texts = marshal.loads(frame)
        if number == 0:
            self.drop_worker(worker_id)
        worker = self._workers.get(worker_id)
        if worker is None:
            worker = self._workers[worker_id] = _Worker()
        for kind, prefix, names in declarations:
            self.declare(kind, prefix, self._tuples.setdefault(names, names))
        for metric_id, kind, name, shared, tags in new:
            worker.metrics[metric_id] = self.metric(_CLASSES[kind], name, shared)
            if tags is not None and name in self._metrics:
                self.tags[name] = tags
        for metric_id, delta in zip(counts[::2], counts[1::2], strict=True):
            self._count(worker, worker.metrics[metric_id], delta)
        for metric_id, drained in histograms:
            bins.add(worker.metrics[metric_id].merged, drained)
        for metric_id, value in texts:
            worker.metrics[metric_id].value = value
        for metric_id in removed:
            worker.values.pop(worker.metrics.pop(metric_id, None), None)

    def drop_worker(self, worker_id: int) -> None:
        """A worker is gone: what its gauges said is no longer true, what it counted stays counted."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        for metric, value in worker.values.items():
            if metric.kind == "gauge":
                metric.n = self._greatest(metric) if metric.shared else metric.n - value

    def _count(self, worker: _Worker, metric: Counter, delta: int) -> None:
        metric.seen = True
        if metric.shared:
            worker.values[metric] = worker.values.get(metric, 0) + delta
            greatest = self._greatest(metric)
            metric.n = greatest if metric.kind == "gauge" else max(metric.n, greatest)
        else:
            metric.n += delta
            if metric.kind == "gauge":
                worker.values[metric] = worker.values.get(metric, 0) + delta

    def _greatest(self, metric: Counter) -> int:
        return max((worker.values[metric] for worker in self._workers.values() if metric in worker.values), default=0)

    # -- in main

    def flush(self) -> None:
        """Start a new histogram interval: every `stats_flush_interval`."""
        self.collect()
        for metric in self._metrics.values():
            if isinstance(metric, Histogram):
                metric.flush()

    def reset_counters(self) -> None:
        """Set all counters to zero. They stay used, and gauges and histograms stay as they are."""
        for metric in self._metrics.values():
            if type(metric) is Counter and metric.n:
                metric.seen = True
                metric.n = 0
        for worker in self._workers.values():
            worker.values = {metric: value for metric, value in worker.values.items() if metric.kind == "gauge"}

    def find(self, name: str) -> Any:
        """The metric of that full name, or None. Tests and admin use it."""
        return self._metrics.get(name)

    def value(self, name: str) -> int:
        """The value of a counter or gauge; 0 when there is none."""
        return getattr(self._metrics.get(name), "n", 0)

    def names(self, kind: Kind) -> Iterator[str]:
        """Every name of a kind, of live metrics and of declared ones, each once, sorted."""
        return (entry[0] for entry in self.in_order((kind,)) if entry is not None)

    def in_order(self, kinds: Container[Kind], *, declared: bool = True) -> Iterator[tuple[str, Kind] | None]:
        """Every name of some kinds with its kind, sorted by name; now and then None, where others may have their turn. `declared`: the unused ones too.

        A store can have a million names. They are made and sorted section by section (the names that have their first two parts in common), so that neither
        memory nor an event loop has to deal with all of them at once. What comes or goes meanwhile may be missing or be named.
        """
        live: dict[str, list[str]] = {}
        for position, name in enumerate(list(self._metrics)):
            if position % _STEPS == 0:
                yield None
            live.setdefault(_section(name), []).append(name)
        unused: dict[str, list[tuple[Kind, str, tuple[str, ...]]]] = {}
        for (kind, prefix), tuples in list(self._declared.items()) if declared else ():
            if kind in kinds:
                for names in tuples:
                    if prefix.count(".") >= 2:
                        unused.setdefault(_section(prefix), []).append((kind, prefix, names))
                    else:
                        for short in names:
                            unused.setdefault(_section(prefix + short), []).append((kind, prefix, (short,)))
        yield None
        for section in sorted(live.keys() | unused.keys()):
            found: dict[str, Kind] = {}
            for name in live.get(section, ()):
                metric = self._metrics.get(name)
                if metric is not None and metric.kind in kinds:
                    found[name] = metric.kind
            for kind, prefix, names in unused.get(section, ()):
                for name in [prefix + short for short in names]:
                    if name not in self._metrics and (self.accepts is None or self.accepts(name)):
                        found[name] = kind
            yield from sorted(found.items())
            yield None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Live metrics by name. Read only."""
        return self._metrics


class _Worker:
    """What main knows of one worker: which metric each number means, and the part that each gauge (and shared counter) got from it."""

    __slots__ = ("metrics", "values")

    def __init__(self) -> None:
        self.metrics: dict[int, Any] = {}
        self.values: dict[Any, int] = {}


_STEPS = 1024


def _section(name: str) -> str:
    """The first two parts of a name with their dots. No section begins with another one, so that the order of sections is the order of names."""
    end = name.find(".", name.find(".") + 1)
    return name[: end + 1] if end >= 0 else name


def sanitise(name: str) -> str:
    """A name as part of a stat name: Envoy replaces colons (with the slashes of a scheme) and NUL by an underscore."""
    return name.replace("://", "_").replace(":/", "_").replace(":", "_").replace("\0", "_")
