"""`python -m meshproxy`."""

from meshproxy.cli import main

main()
