"""Pictures of the results, as SVG. They need matplotlib, an extra of the distribution; without it there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import METRICS, value_of
from benchmarks.scenarios import SCENARIOS, Scenario

_SHOWN = (
    "user_instructions",
    "cpu_us",
    "throughput",
    "p50_us",
    "p99_us",
    "cpu_s_per_gb",
    "ready_ms",
    "alone",
    "pss_anon",
    "loaded_alone",
    "loaded_pss_anon",
    "grown",
    "push_s",
    "peak_alone",
    "acked_s",
)
_MOST = 3  # metrics in one picture
_COLOURS = {"meshproxy": "#2563eb", "envoy": "#ae3ec9", "nginx": "#2f9e44", "haproxy": "#e8590c"}


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, str]:
    """One picture a scenario, in `folder`; scenario -> file name. Empty, with a notice, if matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'meshproxy[dev]')")
        return {}
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "meshproxy", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for scenario in SCENARIOS:
        figures = results.get(scenario.name, {}).get("cases")
        file = folder / f"{scenario.name}.svg"
        if figures and _draw(scenario, figures, file):
            drawn[scenario.name] = file.name
    return drawn


def _draw(scenario: Scenario, figures: Mapping[str, Mapping[str, list[float]]], file: Path) -> bool:
    """Whether there was anything to draw."""
    import matplotlib.pyplot as plt

    lines = [case.key(proxy) for case in scenario.cases for proxy in scenario.proxies if case.key(proxy) in figures]
    metrics = [name for name in _SHOWN if any(name in figures[line] for line in lines)][:_MOST]
    if not metrics:
        return False
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.6 * len(metrics) + 1.4, 0.32 * len(lines) + 1.0), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], metrics, strict=True):
        metric = METRICS[name]
        values = [value_of(figures, line, name) for line in lines]
        bars = axis.barh(lines, [(value or 0) * metric.scale for value in values], color=[_COLOURS[line.partition(",")[0]] for line in lines], height=0.65)
        axis.bar_label(bars, ["" if value is None else metric.show(value) for value in values], padding=3, fontsize=8)
        axis.set_title(metric.title, fontsize=9)
        axis.margins(x=0.18)
        axis.tick_params(left=False)
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True
