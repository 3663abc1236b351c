"""The store as the /stats endpoint shows it: text and JSON. Layout and number formats are Envoy's, to the byte.

Source: source/server/admin/stats_render in Envoy; operations/admin.rst for the query parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import re2

from meshproxy.api.errors import ConfigError
from meshproxy.observe import histogram as bins
from meshproxy.observe.json_text import quote
from meshproxy.observe.stats import Counter, Histogram, Kind, Store, Text
from meshproxy.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshproxy.observe.tags import StatsConfig

TYPES: dict[str, tuple[Kind, ...]] = {
    "All": ("text", "counter", "gauge", "histogram"),
    "Counters": ("counter",),
    "Gauges": ("gauge",),
    "Histograms": ("histogram",),
    "TextReadouts": ("text",),
}
BUCKETS = ("cumulative", "disjoint", "detailed", "summary", "none", "prometheusnative")
FORMATS = ("html", "active-html", "json", "prometheus", "text")


class Selection(Record, frozen=True):
    """Which stats to show, and how. `filter` is a RE2 pattern that may match anywhere in a name; `inverted`: show what it does not match."""

    filter: str = ""
    usedonly: bool = False
    kinds: tuple[Kind, ...] = TYPES["All"]
    histogram_buckets: str = ""
    text_readouts: bool = False
    inverted: bool = False

    def names(self) -> Callable[[str], bool]:
        """The test of `filter`. ConfigError when it is no pattern."""
        if not self.filter:
            return lambda _: True
        options = re2.Options()
        options.log_errors = False
        try:
            search = re2.compile(self.filter, options).search
        except re2.error as error:
            text = error.args[0].decode() if isinstance(error.args[0], bytes) else error.args[0]
            raise ConfigError(f"Invalid re2 regex: {text}") from None
        wanted = not self.inverted
        return lambda name: (search(name) is not None) is wanted


EVERYTHING = Selection()


def parse_selection(query: Mapping[str, str]) -> Selection:
    """The parameters of a request. ConfigError holds the text of the 400 answer."""
    kinds = TYPES.get(query.get("type", "All"))
    if kinds is None:
        raise ConfigError("invalid &type= param")
    if query.get("format", "text") not in FORMATS:
        raise ConfigError("usage: /stats?format=(html|active-html|json|prometheus|text)\n\n")
    buckets = query.get("histogram_buckets", "")
    if buckets and buckets not in BUCKETS:
        raise ConfigError("usage: /stats?histogram_buckets=(cumulative|disjoint|detailed|summary|prometheusnative)\n")
    selection = Selection(query.get("filter", ""), "usedonly" in query, kinds, buckets, "text_readouts" in query, "invert_filter" in query)
    selection.names()
    return selection


def render_text(store: Store, config: StatsConfig, selection: Selection = EVERYTHING) -> Iterator[str]:
    """Lines of `name: value`: text readouts, then counters and gauges, then histograms, each sorted. Some pieces are empty: see `Store.in_order`."""
    render = _TEXT[selection.histogram_buckets or "summary"]
    for entry in selected(store, selection):
        if entry is None:
            yield ""
            continue
        name, metric = entry
        if isinstance(metric, Histogram):
            yield render(name, metric, config) if metric.used else f"{name}: No recorded values\n"
        elif isinstance(metric, str):
            yield f'{name}: "{metric}"\n'
        else:
            yield f"{name}: {metric}\n"


def render_json(store: Store, config: StatsConfig, selection: Selection = EVERYTHING) -> Iterator[bytes]:
    """`{"stats":[{"name":..,"value":..},...,{"histograms":...}]}`. Some pieces are empty."""
    mode = selection.histogram_buckets or "summary"
    before, _, after = _JSON_FRAME[mode].partition(b"%b")
    comma = b""
    histograms = False
    yield b'{"stats":['
    for entry in selected(store, selection):
        if entry is None:
            yield b""
            continue
        name, metric = entry
        if isinstance(metric, Histogram):
            if not histograms:  # they come last
                histograms = True
                yield comma + b'{"histograms":' + before
                comma = b""
            yield comma + _JSON[mode](name, metric, config)
        else:
            yield comma + b'{"name":%b,"value":%b}' % (quote(name), quote(metric) if isinstance(metric, str) else b"%d" % metric)
        comma = b","
    yield after + b"}]}" if histograms else b"]}"


def selected(store: Store, selection: Selection) -> Iterator[tuple[str, int | str | Histogram] | None]:
    """Names with their values (of histograms, the histogram), in the order in which they are shown; None now and then, as of `Store.in_order`."""
    wanted = selection.names()
    groups: list[tuple[Kind, ...]] = [("text",), ("counter", "gauge"), ("histogram",)]
    metrics = store.metrics
    for group in groups:
        kinds = [kind for kind in group if kind in selection.kinds]
        for entry in store.in_order(kinds, declared=not selection.usedonly) if kinds else ():
            if entry is None:
                yield None
                continue
            name, kind = entry
            metric = metrics.get(name)
            if (selection.usedonly and (metric is None or not metric.used)) or not wanted(name):
                continue
            if isinstance(metric, Histogram):
                yield name, metric
            elif isinstance(metric, Text):
                yield name, metric.value
            elif isinstance(metric, Counter):
                yield name, metric.n
            else:
                yield name, _unused(name, kind)


def _unused(name: str, kind: Kind) -> int | str | Histogram:
    if kind == "histogram":
        return Histogram(name, 0, False)
    return "" if kind == "text" else 0


# -- numbers


def shortest(number: float) -> str:
    """A number as C++'s fmt writes it: shortest digits, exponents from 1e16 and below 1e-4."""
    if math.isnan(number):
        return "nan"
    return repr(number).removesuffix(".0")


def compact(number: float) -> str:
    """A number as JSON gets it from C++'s to_chars: the shorter of plain and scientific, `null` when there is none."""
    if math.isnan(number):
        return "null"
    plain = shortest(number)
    if "e" in plain or "." in plain:
        return plain
    digits = plain.rstrip("0")
    exponent = len(plain) - 1
    if not digits or len(digits) == len(plain):
        return plain
    mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
    scientific = f"{mantissa}e+{exponent:02}"
    return scientific if len(scientific) < len(plain) else plain


def _general(number: float) -> str:
    return f"{number:g}"


# -- histograms as text


def _text_summary(name: str, metric: Histogram, config: StatsConfig) -> str:
    return f"{name}: {_summary(metric)}\n"


def _summary(metric: Histogram) -> str:
    pairs = zip(bins.QUANTILES, bins.quantiles(metric.interval), bins.quantiles(metric.cumulative), strict=True)
    return " ".join([f"P{_general(100 * fraction)}({shortest(interval)},{shortest(cumulative)})" for fraction, interval, cumulative in pairs])


def _text_buckets(name: str, metric: Histogram, config: StatsConfig, view: Callable[[list[int]], list[int]]) -> str:
    buckets = config.buckets(name)
    interval, cumulative = (view(bins.cumulative(values, buckets)) for values in (metric.interval, metric.cumulative))
    triples = zip(buckets, interval, cumulative, strict=True)
    return f"{name}: {' '.join([f'B{_general(bound)}({recent},{ever})' for bound, recent, ever in triples])}\n"


def _text_detailed(name: str, metric: Histogram, config: StatsConfig) -> str:
    totals, intervals = _details(metric.cumulative), _details(metric.interval)
    return f"{name}:\n  totals={totals}\n  intervals={intervals}\n  summary={_summary(metric)}\n"


def _details(values: bins.Bins) -> str:
    triples = [(*bins.bounds(key), values[key]) for key in sorted(values)]
    return ", ".join([f"{_general(left)},{_general(width)}:{count}" for left, width, count in triples])


def _same(counts: list[int]) -> list[int]:
    return counts


_TEXT: dict[str, Callable[[str, Histogram, StatsConfig], str]] = {
    "summary": _text_summary,
    "none": _text_summary,
    "prometheusnative": _text_summary,
    "cumulative": lambda name, metric, config: _text_buckets(name, metric, config, _same),
    "disjoint": lambda name, metric, config: _text_buckets(name, metric, config, bins.disjoint),
    "detailed": _text_detailed,
}


# -- histograms as JSON


def _percentiles(metric: Histogram) -> bytes:
    pairs = zip(bins.quantiles(metric.cumulative), bins.quantiles(metric.interval), strict=True)
    return b",".join([f'{{"cumulative":{compact(ever)},"interval":{compact(recent)}}}'.encode() for ever, recent in pairs])


def _json_summary(name: str, metric: Histogram, config: StatsConfig) -> bytes:
    return b'{"name":%b,"values":[%b]}' % (quote(name), _percentiles(metric))


def _json_buckets(name: str, metric: Histogram, config: StatsConfig, view: Callable[[list[int]], list[int]]) -> bytes:
    buckets = config.buckets(name)
    interval, cumulative = (view(bins.cumulative(values, buckets)) for values in (metric.interval, metric.cumulative))
    triples = zip(buckets, interval, cumulative, strict=True)
    texts = [f'{{"upper_bound":{compact(bound)},"interval":{recent},"cumulative":{ever}}}' for bound, recent, ever in triples]
    return b'{"name":%b,"buckets":[%b]}' % (quote(name), ",".join(texts).encode())


def _json_detailed(name: str, metric: Histogram, config: StatsConfig) -> bytes:
    totals, intervals = _json_details(metric.cumulative), _json_details(metric.interval)
    return b'{"name":%b,"totals":[%b],"intervals":[%b],"percentiles":[%b]}' % (quote(name), totals, intervals, _percentiles(metric))


def _json_details(values: bins.Bins) -> bytes:
    triples = [(*bins.bounds(key), values[key]) for key in sorted(values)]
    return b",".join([f'{{"lower_bound":{compact(left)},"width":{compact(width)},"count":{count}}}'.encode() for left, width, count in triples])


_JSON: dict[str, Callable[[str, Histogram, StatsConfig], bytes]] = {
    "summary": _json_summary,
    "none": _json_summary,
    "prometheusnative": _json_summary,
    "cumulative": lambda name, metric, config: _json_buckets(name, metric, config, _same),
    "disjoint": lambda name, metric, config: _json_buckets(name, metric, config, bins.disjoint),
    "detailed": _json_detailed,
}
_PERCENTILES = b"[0,25,50,75,90,95,99,99.5,99.9,100]"
_QUANTILE_FRAME = b'{"supported_quantiles":%b,"computed_quantiles":[%%b]}' % _PERCENTILES
_JSON_FRAME = {
    "summary": _QUANTILE_FRAME,
    "none": _QUANTILE_FRAME,
    "prometheusnative": _QUANTILE_FRAME,
    "cumulative": b"[%b]",
    "disjoint": b"[%b]",
    "detailed": b'{"supported_percentiles":%b,"details":[%%b]}' % _PERCENTILES,
}
