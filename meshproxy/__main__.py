"""The `meshproxy` command, and `python -m meshproxy`."""

from typing import NoReturn

from meshproxy import start_cache


def main() -> NoReturn:
    """Entry point of the command; see `cli`."""
    # Before anything else is imported.
    start_cache.install()
    from meshproxy import cli

    cli.main()


if __name__ == "__main__":
    main()
