"""What can go wrong with a measurement, as far as the operator can mend it."""

from __future__ import annotations


class BenchmarkError(Exception):
    """A measurement that cannot be made or trusted; the text says why. It ends its scenario, not the run."""


class Missing(BenchmarkError):
    """A program that is not installed: what needs it is skipped, aloud."""
