"""`python -m benchmarks [scenario ...] [--quick] [--out DIR]`: measure, and write results.json, RESULTS.md and plots."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import plots, processes, report
from benchmarks.runner import Run
from benchmarks.scenarios import BY_NAME, SCENARIOS

HERE = Path(__file__).parent


def main() -> int:
    """The exit status: 0 if everything that was asked for was measured or skipped aloud, 1 if something failed."""
    options = _parse()
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<14} {scenario.title}")
        return 0
    # Ended from outside, leave the `with` blocks, which end what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.sched_setaffinity(0, [processes.LOAD_CPU])
    out = _folder(options)
    stored = out / "results.json"
    results: dict[str, Any] = json.loads(stored.read_text())["scenarios"] if stored.exists() else {}
    failed = False
    for name in options.scenarios or BY_NAME:
        result = _run(name, options)
        failed |= any("FAILED" in note for note in result["notes"]) or not result["cases"]
        results[name] = result
        # After every scenario: a run that is broken off keeps what it has.
        _write(out, results)
    print(f"\n{out / 'RESULTS.md'}")
    return int(failed)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="meshproxy beside Envoy, nginx and HAProxy: costs, throughput, latency, memory.")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"default: all of {', '.join(BY_NAME)}")
    parser.add_argument("--quick", action="store_true", help="one second a turn, one round: to see that the harness works, not to measure")
    parser.add_argument("--out", type=Path, help="where the results go; default: this folder, and with --quick a temporary one")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--keep", action="store_true", help="keep the folder with configurations and logs of the proxies")
    options = parser.parse_args()
    unknown = [name for name in options.scenarios if name not in BY_NAME]
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    return options


def _folder(options: argparse.Namespace) -> Path:
    if options.out is None and options.quick:
        return Path(tempfile.mkdtemp(prefix="meshproxy-benchmarks-"))
    out: Path = options.out or HERE
    out.mkdir(parents=True, exist_ok=True)
    return out


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    scenario = BY_NAME[name]
    print(f"\n{scenario.name}: {scenario.title}", flush=True)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="meshproxy-benchmark-"))
    folder.chmod(0o755)  # nginx's workers may be another user
    try:
        result = asdict(Run(scenario, folder, quick=options.quick).run())
    finally:
        if options.keep:
            print(f"  kept: {folder}")
        else:
            shutil.rmtree(folder)
    for line, metrics in result["cases"].items():
        figures = (f"{report.METRICS[metric].title} {report.METRICS[metric].show(report.value_of(result['cases'], line, metric) or 0)}" for metric in metrics)
        print(f"  {line:<30} {', '.join(figures)}")
    for bar in scenario.bars:
        limit, measured, met = report.judge(bar, result["cases"])
        print(f"  {'ok  ' if met else '-   ' if met is None else 'MISS'} {bar.text}: {measured} ({limit}{', stretch' if bar.stretch else ''})")
    print(f"  {time.monotonic() - started:.0f} s", flush=True)
    return result


def _write(out: Path, results: dict[str, Any]) -> None:
    facts = report.machine()
    (out / "results.json").write_text(json.dumps({"machine": facts, "scenarios": results}, indent=1) + "\n")
    drawn = plots.draw(results, out / "plots")
    (out / "RESULTS.md").write_text(report.render(facts, results, {name: f"plots/{file}" for name, file in drawn.items()}))


if __name__ == "__main__":
    sys.exit(main())
