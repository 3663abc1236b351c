"""RESULTS.md from the figures: the machine, the method, and for each scenario a table, its bars and its notes."""

from __future__ import annotations

import os
import platform
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, processes, proxies
from benchmarks.scenarios import ENVOY, OURS, SCENARIOS, Bar, Case, Scenario

Figures = Mapping[str, Mapping[str, list[float]]]  # line -> metric -> one value a round


@dataclass(frozen=True, slots=True)
class Metric:
    """A column. `format` is a format specification; values are multiplied by `scale` before."""

    title: str
    format: str = ",.1f"
    scale: float = 1.0

    def show(self, value: float) -> str:
        """A value as the tables have it."""
        return format(value * self.scale, self.format)


METRICS = {
    "user_instructions": Metric("user kinstr/req", ",.1f", 1e-3),
    "kernel_instructions": Metric("kernel kinstr/req", ",.1f", 1e-3),
    "cpu_us": Metric("CPU us/req", ",.1f"),
    "per_core": Metric("req per CPU second", ",.0f"),
    "throughput": Metric("req/s", ",.0f"),
    "p50_us": Metric("p50 us", ",.0f"),
    "p99_us": Metric("p99 us", ",.0f"),
    "cpu_s_per_gb": Metric("CPU s/GB", ".3f"),
    "user_s_per_gb": Metric("user s/GB", ".3f"),
    "kernel_s_per_gb": Metric("kernel s/GB", ".3f"),
    "gb_per_s": Metric("GB/s", ".2f"),
    "ready_ms": Metric("ready ms", ",.0f"),
    "pss": Metric("PSS MB"),
    "alone": Metric("PSS as if alone MB"),
    "pss_anon": Metric("Pss_Anon MB"),
    "anonymous": Metric("Anonymous MB, summed"),
    "loaded_pss": Metric("loaded: PSS MB"),
    "loaded_alone": Metric("loaded: PSS as if alone MB"),
    "loaded_pss_anon": Metric("loaded: Pss_Anon MB"),
    "grown": Metric("grown by MB", ",.2f"),
    "loaded_anonymous": Metric("loaded: Anonymous MB, summed"),
    "push_s": Metric("full push s"),
    "push_cpu_s": Metric("full push CPU s"),
    "push_mb": Metric("full push MB sent", ",.0f"),
    "peak_alone": Metric("most PSS as if alone MB", ",.0f"),
    "acked_s": Metric("edit to last ACK s, slowest", ".2f"),
    "edit_cpu_s": Metric("CPU s an edit", ".2f"),
    "followed_p50_s": Metric("p50 s", ",.2f"),
    "followed_p99_s": Metric("p99 s", ",.2f"),
    "first_request_s": Metric("first request s", ",.1f"),
    "updates": Metric("updates a second", ",.2f"),
    "cpu_share": Metric("CPU, share of a core", ",.2f"),
    "requests": Metric("requests", ",.0f"),
    "failed": Metric("failed", ",.0f"),
    "certificates": Metric("certificates, at least", ",.0f"),
    "handshakes": Metric("handshakes", ",.0f"),
    "away_s": Metric("control plane away s", ",.0f"),
    "followed_s": Metric("edit followed after its return s", ".1f"),
}

METHOD = """\
Each proxy's processes run on one core, the load (wrk, or a sender of our own) and the service behind the proxy on another. The proxies take turns, A B A B,
in one run; figures are medians over the turns, and the ratio in brackets is the median of the ratios of turns that followed each other: ours to Envoy's.
Times swing on shared machines, instructions do not. docs/benchmarks.md says what each column is and how it is measured.
"""


def machine() -> dict[str, str]:
    """What the figures were measured on and with."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown")
    memory_kb = int(Path("/proc/meminfo").read_text().split(None, 2)[1])
    facts = {
        "CPU": f"{os.cpu_count()} cores, {model}; the proxy on core {processes.PROXY_CPU}, load and service on core {processes.LOAD_CPU}",
        "memory": f"{memory_kb / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, {_distribution()}",
        "Python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "instructions": "perf, the processor's counters" if measure.perf_works() else "callgrind (the processor's counters are hidden here)",
    }
    if processes.PROXY_CPU == processes.LOAD_CPU:
        facts["warning"] = "there is only one core: proxy and load share it, and throughput and latency say little"
    return facts | {kind.name: proxies.version(kind) for kind in proxies.KINDS.values()}


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown distribution")
    except OSError:
        return "unknown distribution"


# -- figures


def value_of(figures: Figures, line: str, metric: str) -> float | None:
    """The median of a metric, if it was measured."""
    values = figures.get(line, {}).get(metric)
    return median(values) if values else None


def ratio_of(figures: Figures, line: str, versus: str, metric: str) -> float | None:
    """The median of the ratios of paired rounds."""
    ours, theirs = (figures.get(name, {}).get(metric, []) for name in (line, versus))
    ratios = [one / other for one, other in zip(ours, theirs, strict=False) if other]
    return median(ratios) if ratios else None


def judge(bar: Bar, figures: Figures) -> tuple[str, str, bool | None]:
    """(limit, measured, whether it is met) of a bar; None: it was not measured."""
    metric = METRICS[bar.metric]
    measured = ratio_of(figures, bar.case, bar.versus, bar.metric) if bar.versus else value_of(figures, bar.case, bar.metric)
    limit = bar.at_most if bar.at_most is not None else bar.at_least
    assert limit is not None
    sign = "<=" if bar.at_most is not None else ">="
    show = (lambda value: f"{value:.2f}x") if bar.versus else metric.show
    if measured is None:
        return f"{sign} {show(limit)}", "not measured", None
    return f"{sign} {show(limit)}", show(measured), measured <= limit if bar.at_most is not None else measured >= limit


# -- text


def render(facts: Mapping[str, str], results: Mapping[str, Mapping[str, Any]], plots: Mapping[str, str]) -> str:
    """RESULTS.md. `results` are those of `results.json`; `plots` are paths of pictures, by scenario, relative to the report."""
    parts = ["# Benchmark results", "Generated by `python -m benchmarks`; do not edit.", METHOD, _facts(facts), _summary(results)]
    for scenario in SCENARIOS:
        if scenario.name in results:
            parts.append(_scenario(scenario, results[scenario.name], plots.get(scenario.name)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _facts(facts: Mapping[str, str]) -> str:
    return _table(["measured on", "with"], [[name, text] for name, text in facts.items()]).replace("---:", "---")


def _summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [row for scenario in SCENARIOS if scenario.name in results for row in _bars(scenario, results[scenario.name]["cases"], with_name=True)]
    return "## Bars\n\n" + _table(["scenario", "measure", "bar", "measured", "met"], rows) if rows else ""


def _bars(scenario: Scenario, figures: Figures, *, with_name: bool = False) -> list[list[str]]:
    rows = []
    for bar in scenario.bars:
        limit, measured, met = judge(bar, figures)
        verdict = {True: "yes", False: "not yet" if bar.stretch else "**no**", None: "-"}[met]
        rows.append([*([scenario.name] if with_name else []), bar.text, limit + (" (stretch)" if bar.stretch else ""), measured, verdict])
    return rows


def _scenario(scenario: Scenario, result: Mapping[str, Any], plot: str | None) -> str:
    python = f", Python {result['python']}" if "python" in result else ""  # results of before do not say
    parts = [f"## {scenario.title}", f"{scenario.about} `python -m benchmarks {scenario.name}`, {result['at']}{python}."]
    if result["quick"]:
        parts.append("**A quick run: these figures are noise, good for nothing but to see that the harness works.**")
    parts.append(_figures(scenario, result["cases"]))
    if scenario.bars:
        parts.append(_table(["bar", "limit", "measured", "met"], _bars(scenario, result["cases"])))
    if plot:
        parts.append(f"![{scenario.title}]({plot})")
    if result["notes"]:
        parts.append("\n".join(f"- {' '.join(note.split())}" for note in result["notes"]))
    return "\n\n".join(parts)


def _figures(scenario: Scenario, figures: Figures) -> str:
    measured = [name for name in METRICS if any(name in metrics for metrics in figures.values())]
    rows = []
    for case in scenario.cases:
        for proxy in scenario.proxies:
            if case.key(proxy) in figures:
                rows.append([case.key(proxy), *(_cell(figures, case, proxy, name) for name in measured)])
    return _table(["", *(METRICS[name].title for name in measured)], rows) if rows else "Nothing was measured."


def _cell(figures: Figures, case: Case, proxy: str, metric: str) -> str:
    value = value_of(figures, case.key(proxy), metric)
    if value is None:
        return "-"
    ratio = ratio_of(figures, case.key(OURS), case.key(ENVOY), metric) if proxy == OURS else None
    return METRICS[metric].show(value) + (f" ({ratio:.2f}x)" if ratio is not None else "")
