"""The store in the Prometheus text format, with Envoy's names and tags.

Source: source/server/admin/prometheus_stats in Envoy; prometheus.io, exposition formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from meshproxy.api.errors import ConfigError
from meshproxy.observe import histogram as bins
from meshproxy.observe.stats import Histogram, Kind, Store
from meshproxy.observe.stats_render import EVERYTHING, Selection, selected
from meshproxy.record import replace

if TYPE_CHECKING:
    from meshproxy.observe.tags import StatsConfig, Tag

# Metrics in these namespaces are shown by their own names, without the namespace and without `envoy_`: Istio's have been known so before it used Envoy.
_NAMESPACES = ("istiocustom.",)
_UNSAFE = re.compile(r"[^a-zA-Z0-9_]")
# Kind -> the type that Prometheus is told. It knows no texts: they are gauges with the text as a label.
_TYPES: dict[Kind, str] = {"counter": "counter", "gauge": "gauge", "text": "gauge", "histogram": "histogram"}


def render_prometheus(store: Store, config: StatsConfig, selection: Selection = EVERYTHING) -> Iterator[str]:
    """All stats in groups of one name: counters, gauges, text readouts (if asked for), histograms. Some pieces are empty: see `Store.in_order`.

    ConfigError holds the text of the 400 answer when the histograms are wanted in a form that Prometheus does not have.
    """
    if selection.histogram_buckets not in ("", "cumulative", "summary", "none"):
        raise ConfigError("unsupported prometheus histogram bucket mode")
    return _pieces(store, config, selection)


def _pieces(store: Store, config: StatsConfig, selection: Selection) -> Iterator[str]:
    summary = selection.histogram_buckets in ("summary", "none")
    for kind, shown in _TYPES.items():
        if kind not in selection.kinds or (kind == "text" and not selection.text_readouts):
            continue
        groups: dict[str, list[tuple[str, int | str | Histogram]]] = {}
        for entry in selected(store, replace(selection, kinds=(kind,))):
            if entry is None:
                yield ""
            else:
                known = store.tags.get(entry[0])
                groups.setdefault((known or config.tagged(entry[0]))[0], []).append(entry)
        for base in sorted(groups, key=_parts):
            metric_name = _shown(base)
            yield f"# TYPE {metric_name} {'summary' if summary and kind == 'histogram' else shown}\n"
            for name, metric in sorted(groups.pop(base), key=lambda entry: _parts(entry[0])):
                known = store.tags.get(name)
                tags = [*(known or config.tagged(name))[1]]  # asked for anew: to keep them would take more memory than all the names
                if isinstance(metric, Histogram):
                    yield "".join(_summary(metric_name, tags, metric) if summary else _histogram(metric_name, tags, metric, config.buckets(name)))
                elif isinstance(metric, str):
                    yield f"{metric_name}{{{_labels([*tags, ('text_value', metric)])}}} 0\n"
                else:
                    yield f"{metric_name}{{{_labels(tags)}}} {metric}\n"


def _shown(base: str) -> str:
    for namespace in _NAMESPACES:
        if base.startswith(namespace):
            return _UNSAFE.sub("_", base[len(namespace) :])
    return "envoy_" + _UNSAFE.sub("_", base)


def _parts(name: str) -> list[str]:
    return name.split(".")


def _labels(tags: Iterable[Tag]) -> str:
    return ",".join([f'{_UNSAFE.sub("_", name)}="{_escape(value)}"' for name, value in tags])


def _escape(value: str) -> str:
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return value


def _histogram(name: str, tags: list[Tag], metric: Histogram, buckets: tuple[float, ...]) -> list[str]:
    counts = bins.cumulative(metric.cumulative, buckets)
    lines = [f"{name}_bucket{{{_labels([*tags, ('le', _exact(bound))])}}} {count}\n" for bound, count in zip(buckets, counts, strict=True)]
    lines.append(f"{name}_bucket{{{_labels([*tags, ('le', '+Inf')])}}} {bins.count(metric.cumulative)}\n")
    return lines + _sum_and_count(name, tags, metric)


def _summary(name: str, tags: list[Tag], metric: Histogram) -> list[str]:
    pairs = zip(bins.QUANTILES, bins.quantiles(metric.interval), strict=True)
    lines = [f"{name}{{{_labels([*tags, ('quantile', f'{fraction:g}')])}}} {_exact(value)}\n" for fraction, value in pairs]
    return lines + _sum_and_count(name, tags, metric)


def _sum_and_count(name: str, tags: list[Tag], metric: Histogram) -> list[str]:
    labels = _labels(tags)
    return [f"{name}_sum{{{labels}}} {_exact(bins.total(metric.cumulative))}\n", f"{name}_count{{{labels}}} {bins.count(metric.cumulative)}\n"]


def _exact(number: float) -> str:
    return f"{number:.32g}"
