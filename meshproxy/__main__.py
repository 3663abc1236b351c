"""The `meshproxy` command, and `python -m meshproxy`."""

from __future__ import annotations

from meshproxy import start_cache

TYPE_CHECKING = False  # as in start_cache
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the command; see `cli`."""
    # Before anything else is imported.
    start_cache.install()
    from meshproxy import cli

    cli.main()


if __name__ == "__main__":
    main()
