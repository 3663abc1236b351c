r"""Inputs that parsers are tried with again and again: tests/data/corpus, one file a parser, one input a line, written as the inside of a Python bytes literal.

What once broke a parser goes there. Lines that begin with `# ` are comments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "corpus"


def load(name: str) -> list[bytes]:
    """The inputs for a parser."""
    lines = (FOLDER / f"{name}.txt").read_text("ascii").splitlines()
    return [line.encode().decode("unicode_escape").encode("latin-1") for line in lines if not line.startswith("# ")]


def mutants(name: str, count: int, seed: int) -> Iterator[bytes]:
    """Damaged inputs, the same in every run: bytes changed, put in and taken out, pieces repeated, cut and exchanged."""
    source = random.Random(seed)
    corpus = load(name)
    for _ in range(count):
        data = bytearray(source.choice(corpus))
        for _ in range(source.randint(1, 4)):
            at = source.randint(0, len(data))
            match source.randint(0, 6):
                case 0:
                    data[at:at] = source.randbytes(source.randint(1, 4))
                case 1:
                    del data[at : at + source.randint(1, 8)]
                case 2:
                    data[at : at + 1] = bytes((source.randint(0, 255),))
                case 3:
                    data[at:at] = source.choice([b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"\xff", b"%", b"0", b"9" * 30, b"-1", b"/../"])
                case 4:
                    data[at:at] = data[at : at + source.randint(1, 60)] * source.randint(1, 3)
                case 5:
                    del data[at:]
                case 6:
                    other = source.choice(corpus)
                    data[at:] = other[source.randint(0, len(other)) :]
        yield bytes(data)
