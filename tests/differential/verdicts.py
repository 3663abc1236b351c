"""What the cases come to, for the summary: each says so in its test's report, as other processes than the one that sums up may run it."""

from __future__ import annotations

from collections import Counter

import pytest

VERDICT = "against Envoy"  # the property of a report


def tell(terminalreporter: pytest.TerminalReporter) -> None:
    """Sum up what all reports say."""
    verdicts: dict[str, str] = {}  # by test: a case counts once, however many reports it has
    for kind in ("passed", "xpassed", "xfailed", "failed", "error"):
        for report in terminalreporter.stats.get(kind, []):  # those of collecting have no properties
            said = [str(value) for name, value in getattr(report, "user_properties", ()) if name == VERDICT]
            if said and kind not in {"passed", "xpassed"}:
                verdicts[report.nodeid] = "different"
            elif said and said[-1]:
                verdicts[report.nodeid] = said[-1]
    if verdicts:
        count = Counter(verdicts.values())
        terminalreporter.section("differential")
        terminalreporter.line(
            f"{len(verdicts)} cases against Envoy: {count['equal']} equal, {count['stricter']} stricter by decision, {count['different']} different",
        )
