"""What the documents name is there: files and headings that they link to, modules and folders, options of our commands, targets of make, keys and endpoints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from control import cli as control_cli
from meshproxy import cli
from meshproxy.admin.endpoints import ENDPOINTS, OURS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), ROOT / "benchmarks" / "RESULTS.md"])
OF_OTHERS = {"--from-file", "--help", "--hypothesis-profile", "--gid-owner", "--to-ports"}  # of kubectl, everybody, plug-ins of pytest, iptables
TREES = (ROOT, *(ROOT / name for name in ("meshproxy", "control", "tests", "benchmarks", "examples")))

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"[\w./*<>-]+\.(?:py|md|yaml|toml|lock)|[\w./-]+/")


def _headings(path: Path) -> set[str]:
    """The anchors of a document, as they are made from its headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from _options(one)


def _known_options() -> set[str]:
    known = {f"--{flag.name}" for flag in cli.FLAGS} | {*_options(control_cli._parser())} | OF_OTHERS
    for path in (*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), ROOT / "tests" / "conftest.py"):
        known.update(re.findall(r'add(?:_argument|option)\(\s*"(--[a-z0-9-]+)"', path.read_text()))
    return known


def _is_there(name: str) -> bool:
    """Whether a file or folder is anywhere that the documents may mean: below the root, one of our trees or a package of theirs; a mere name, anywhere."""
    pattern = re.sub(r"<\w+>", "*", name.rstrip("/"))
    if "/" not in name:
        return any(next(tree.rglob(pattern), None) for tree in TREES[1:])
    return any(next(tree.glob(pattern), None) or next(tree.glob(f"*/{pattern}"), None) for tree in TREES)


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_relative)
def test_links_lead_somewhere(document):
    broken = []
    for link in _LINK.findall(document.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in _headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_relative)
def test_files_are_there(document):
    named = {name for name in _CODE.findall(document.read_text()) if _FILE.fullmatch(name) and not name.startswith("/")}
    assert sorted(name for name in named if not _is_there(name)) == []


def test_the_map_shows_every_part():
    """Packages, wherever they are, and modules that are in none."""
    text = re.sub(r"```.*?```", "", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.DOTALL)
    shown = " ".join(_CODE.findall(text))
    parts = [path for tree in (ROOT / "meshproxy", ROOT / "control") for path in tree.glob("[!_]*.py")]
    parts += [path.parent for tree in (ROOT / "meshproxy", ROOT / "control") for path in tree.glob("*/**/__init__.py")]
    parts += [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(_relative(path) for path in parts if not re.search(rf"(?<!\w){re.escape(path.name)}(?!\w)", shown)) == []


def test_the_index_shows_every_decision():
    """By its number and title."""
    decisions = ROOT / "docs" / "decisions"
    listed = re.findall(r"^\| \[(\d+)\]\((\S+)\) \| (.*) \|$", (decisions / "README.md").read_text(), re.MULTILINE)
    found = [(path.name[:4], path.name, path.read_text().split("\n")[0].removeprefix(f"# {path.name[:4]} ")) for path in sorted(decisions.glob("0*.md"))]
    assert listed == found


@pytest.mark.parametrize("document", DOCUMENTS, ids=_relative)
def test_options_are_there(document):
    assert sorted({*_OPTION.findall(document.read_text())} - _known_options()) == []


def test_targets_are_there():
    targets = {*re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    named = {name for document in DOCUMENTS for name in re.findall(r"(?:`|\$ )make (\w+)", document.read_text())}
    assert named
    assert named <= targets


def test_admin_endpoints_of_the_tour_are_there():
    named = set(re.findall(r"localhost:18009(/\w*(?:/\w+)*)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= {one.path for one in (*ENDPOINTS, *OURS)}
