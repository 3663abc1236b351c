"""`meshctl diff` and `meshctl apply`: what is said of a change, and that it happens at once or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from control import cli
from control.kinds.store import Store
from control.plan import compare, files
from control.plan.compare import ADDED, CHANGED, REMOVED
from control.sources import journal
from control.sources.folder import Folder
from tests.unit.control_help import MESH, istio

RULES = istio("VirtualService", "reviews", "{hosts: [reviews], http: [{timeout: 5s, route: [{destination: {host: reviews}}]}]}")
SUBSETS = istio("DestinationRule", "reviews", "{host: reviews, subsets: [{name: v1, labels: {version: v1}}]}")


@pytest.fixture
def mesh(tmp_path):
    made = tmp_path / "mesh"
    made.mkdir()
    (made / "mesh.yaml").write_text(MESH)
    return made


@pytest.fixture
def source(tmp_path):
    made = tmp_path / "source"
    made.mkdir()
    return made


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status and what is said on stdout and stderr."""
    status = cli.main([str(one) for one in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def documents(folder) -> set[str]:
    """What a control plane that starts now reads of a folder."""
    store = Store()
    Folder(str(folder), store).scan(10**20)
    store.settle()
    return {f"{identity}={store.texts[identity].strip()[-1:]}" for identity in store.objects}


# --- diff


def test_the_trust_domain_is_checked_as_serve_does(capsys, mesh, source):
    config = "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'trustDomain: new.example'}}"
    for folder in (mesh, source):
        (folder / "mesh.yaml").write_text(MESH)
        (folder / "config.yaml").write_text(config)
    why = "data.mesh.trustDomain: 'new.example' is not the one that is served, cluster.local"
    with_domain = ["--trust-domain", "new.example"]
    for arguments in (("diff", source, "--against", mesh), ("apply", source, "--to", mesh, "--dry-run")):
        status, _, err = run(capsys, *arguments)
        assert status in (1, 2)
        assert why in err
        status, _, err = run(capsys, *arguments, *with_domain)
        assert (status, err) == (0, "")


def test_nothing_differs(capsys, mesh, source):
    (source / "other-name.yaml").write_text(MESH)
    assert run(capsys, "diff", source, "--against", mesh) == (0, "nothing changes for any proxy\n", "")
    assert run(capsys, "diff", source, "--against", mesh, "-o", "json")[:2] == (0, "[]\n")


def test_what_differs_is_told_by_proxy_and_resource(capsys, mesh, source):
    (source / "mesh.yaml").write_text(MESH)
    (mesh / "rules.yaml").write_text(RULES)
    (source / "rules.yaml").write_text(f"{RULES.replace('5s', '7s')}---\n{SUBSETS}")
    status, said, _ = run(capsys, "diff", source, "--against", mesh, "-o", "json")
    assert status == 1
    (web,) = json.loads(said)
    assert web["proxy"] == "web.default"
    host = "reviews.default.svc.cluster.local"
    found = {(one["type"], one["name"]): one for one in web["changes"]}
    assert {key: one["change"] for key, one in found.items()} == {
        ("cluster", f"outbound|9080||{host}"): CHANGED,  # where it comes from is in its metadata
        ("cluster", f"outbound|9080|v1|{host}"): ADDED,
        ("endpoints", f"outbound|9080|v1|{host}"): ADDED,
        ("route", "http_proxy"): CHANGED,
        ("route", f"{host}:9080"): CHANGED,
    }
    (field,) = found["route", f"{host}:9080"]["fields"]
    assert field == {"path": f"virtual_hosts[{host}:9080].routes[0].route.timeout", "before": "5s", "after": "7s"}

    status, said, _ = run(capsys, "diff", source, "--against", mesh)
    assert status == 1
    lines = said.splitlines()
    assert lines[0].split() == ["CHANGE", "TYPE", "RESOURCE", "PROXIES"]
    assert ["added", "cluster", f"outbound|9080|v1|{host}", "web.default"] in [line.split() for line in lines]
    assert any(line.startswith("  ~ ") and line.endswith('.route.timeout: "5s" -> "7s"') for line in lines)


def test_only_the_proxy_that_is_asked_for(capsys, mesh, source):
    (source / "mesh.yaml").write_text(MESH.replace("locality: eu/a", "locality: eu/c"))
    assert run(capsys, "diff", source, "--against", mesh, "--proxy", "web.default")[0] == 1
    status, _, why = run(capsys, "diff", source, "--against", mesh, "--proxy", "nobody.default")
    assert status == 2
    assert "nobody.default" in why


def test_documents_that_are_wrong_cannot_be_compared(capsys, mesh, source):
    (source / "a.yaml").write_text(RULES.replace("timeout", "timeuot"))
    status, _, why = run(capsys, "diff", source, "--against", mesh)
    assert status == 2
    assert "a.yaml: document 1 (VirtualService default/reviews): spec.http[0].timeuot" in why


def test_without_a_control_plane(capsys, mesh):
    status, _, why = run(capsys, "diff", mesh, "--server", "127.0.0.1:1")
    assert status == 2
    assert "127.0.0.1:1" in why


def test_ports_that_up_chooses_are_no_difference(capsys, mesh, source):
    text = textwrap.dedent(
        """
        apiVersion: meshproxy/v1
        kind: Workload
        metadata: {name: web, labels: {app: web}}
        spec: {ports: {http: 0}, run: {command: [x]}, sidecar: {outbound: [{host: a.test, port: 80}]}}
        """
    )
    (mesh / "mesh.yaml").write_text(text)
    (source / "mesh.yaml").write_text(text)
    assert run(capsys, "diff", source, "--against", mesh)[0] == 0
    (source / "more.yaml").write_text("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web}, ports: [{name: http, port: 80}]}}")
    status, said, _ = run(capsys, "diff", source, "--against", mesh, "-o", "json")
    assert status == 1
    assert ("endpoints", "added") in {(one["type"], one["change"]) for one in json.loads(said)[0]["changes"]}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 2}, [("a", 1, 2)]),
        ({"a": 1}, {}, [("a", 1, None)]),
        ({"a": [{"name": "x", "b": 1}]}, {"a": [{"name": "y"}, {"name": "x", "b": 2}]}, [("a[x].b", 1, 2), ("a[y]", None, {"name": "y"})]),
        ({"a": [{"name": "x"}, {"name": "y"}]}, {"a": [{"name": "y"}, {"name": "x"}]}, [("a[]", ["x", "y"], ["y", "x"])]),
        ({"a": [1, 2]}, {"a": [1, 3, 4]}, [("a[1]", 2, 3), ("a[2]", None, 4)]),
        ({"a": [{"name": "x"}, {"name": "x"}]}, {"a": [{"name": "x"}]}, [("a[1]", {"name": "x"}, None)]),
    ],
)
def test_fields(before, after, expected):
    assert [tuple(one) for one in compare._fields("", before, after)] == expected


# --- apply


def test_apply_says_what_it_does_and_does_it(capsys, mesh, source):
    (source / "rules.yaml").write_text(f"{RULES}---\n{SUBSETS}")
    (source / "below").mkdir()
    (source / "below" / "more.yaml").write_text("{apiVersion: v1, kind: Service, metadata: {name: more}, spec: {ports: [{port: 80}]}}")
    status, said, _ = run(capsys, "apply", source, "--to", mesh, "--dry-run")
    assert status == 0
    assert not (mesh / "rules.yaml").exists()
    status, said, _ = run(capsys, "apply", source, "--to", mesh)
    assert status == 0
    assert said.splitlines()[:3] == ["Service default/more created", "DestinationRule default/reviews created", "VirtualService default/reviews created"]
    assert (mesh / "below" / "more.yaml").read_bytes() == (source / "below" / "more.yaml").read_bytes()
    assert (mesh / "mesh.yaml").exists()
    assert sorted(os.listdir(mesh)) == ["below", "mesh.yaml", "rules.yaml"]  # nothing else is left
    assert run(capsys, "apply", source, "--to", mesh) == (0, "nothing changes for any proxy\n", "")

    (source / "below" / "more.yaml").unlink()
    (source / "rules.yaml").write_text(f"{RULES.replace('5s', '7s')}---\n{SUBSETS}")
    status, said, _ = run(capsys, "apply", source, "--to", mesh, "--prune")
    assert status == 0
    assert "VirtualService default/reviews configured" in said.splitlines()
    assert "Service default/more deleted" in said.splitlines()
    assert "Workload default/web deleted" in said.splitlines()
    assert REMOVED in said
    assert not (mesh / "mesh.yaml").exists()


def test_apply_of_a_file(capsys, mesh, tmp_path):
    (tmp_path / "rules.yaml").write_text(RULES)
    (mesh / "rules.yaml").write_text("# to be replaced\n")
    os.chmod(mesh / "rules.yaml", 0o640)
    assert run(capsys, "apply", tmp_path / "rules.yaml", "--to", mesh)[0] == 0
    assert (mesh / "rules.yaml").read_text() == RULES
    assert os.stat(mesh / "rules.yaml").st_mode & 0o777 == 0o640
    assert run(capsys, "apply", tmp_path / "rules.yaml", "--to", tmp_path / "new")[0] == 0
    assert (tmp_path / "new" / "rules.yaml").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RULES.replace("timeout", "timeuot"), "b.yaml: document 1 (VirtualService default/reviews): spec.http[0].timeuot: no such field"),
        (f"{RULES}---\n{{", "b.yaml: document 2"),
        ("{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {ports: [{port: 80}]}}", "Service default/db is in"),
    ],
)
def test_nothing_is_applied_if_anything_is_wrong(capsys, mesh, source, text, says):
    (source / "a.yaml").write_text(SUBSETS)
    (source / "b.yaml").write_text(text)
    status, said, why = run(capsys, "apply", source, "--to", mesh)
    assert (status, said) == (1, "")
    assert says in why
    assert os.listdir(mesh) == ["mesh.yaml"]


def test_what_was_wrong_before_does_not_stop_others(capsys, mesh, source):
    (mesh / "wrong.yaml").write_text("{")
    (source / "a.yaml").write_text(SUBSETS)
    assert run(capsys, "apply", source, "--to", mesh)[0] == 0
    (source / "wrong.yaml").write_text("{kind: X")
    assert run(capsys, "apply", source, "--to", mesh)[0] == 1


def test_calls_that_are_wrong(capsys, mesh, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for source, why in (("none", "No such file or directory"), ("none.yaml", "No such file or directory"), ("notes.txt", "documents are in files that end in")):
        status, _, said = run(capsys, "apply", tmp_path / source, "--to", mesh)
        assert status == 2
        assert f"{source}: {why}" in said
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pipe.yaml")
    for source in ("pipes", "pipes/pipe.yaml"):
        assert run(capsys, "diff", tmp_path / source, "--against", mesh) == (2, "", f"meshctl: {tmp_path}/pipes/pipe.yaml: Is not a regular file\n")
    (tmp_path / "rules.yaml").write_text(RULES)
    assert run(capsys, "apply", tmp_path / "rules.yaml", "--to", mesh, "--prune")[0] == 2
    assert run(capsys, "apply", tmp_path / "rules.yaml", "--to", tmp_path / "notes.txt")[0] == 2


# --- all at once

_OLD = {"a.yaml": "1", "b.yaml": "1", "gone.yaml": "1"}
_NEW = {"a.yaml": "2", "b.yaml": "2", "sub/new.yaml": "2"}


def _service(name: str, number: str) -> bytes:
    """A document that ends in the number."""
    return f"{{apiVersion: v1, kind: Service, metadata: {{name: {_name(name)}}}, spec: {{ports: [{{port: 80}}]}}}} # {number}".encode()


def _name(file: str) -> str:
    return f"s-{file.replace('/', '-').removesuffix('.yaml')}"


def _lay(folder, what) -> None:
    folder.mkdir()
    for name, number in what.items():
        (folder / name).write_bytes(_service(name, number))


def _said(what) -> set[str]:
    return {f"Service default/{_name(name)}={number}" for name, number in what.items()}


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Crash()], ids=["error", "crash"])
def test_wherever_it_fails_all_or_nothing_has_happened(tmp_path, monkeypatch, failure):
    """At each call that changes the disk, in turn: who reads then sees the old, or the new. The next one finishes what was decided."""
    new = {name: _service(name, number) for name, number in _NEW.items()}
    outcomes = []
    for number in range(100):
        folder = tmp_path / f"{number}"
        _lay(folder, _OLD)
        calls = 0

        def counted(function, stop=number):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls > stop:
                    raise failure
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in ("rename", "unlink", "fsync", "makedirs", "fchmod"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                files.write(str(folder), new, frozenset(["gone.yaml"]))
            except (OSError, Crash):
                done = False
            else:
                done = True
        seen = documents(folder)
        assert seen in (_said(_OLD), _said(_NEW))
        outcomes.append(seen == _said(_NEW))
        files.write(str(folder), {})
        assert documents(folder) == seen
        assert not (folder / journal.NAME).exists()
        if done:
            break
    else:
        pytest.fail("it never ended")
    assert outcomes == sorted(outcomes)  # once decided, it stays so
    assert outcomes.count(True) > 3
    assert outcomes.count(False) > 3


def test_who_reads_meanwhile_never_sees_half(tmp_path):
    """A control plane looks until the folder rests, while one content takes the place of another."""
    folder = tmp_path / "mesh"
    _lay(folder, _OLD)
    go, idle = threading.Event(), threading.Event()
    idle.set()

    def take_turns() -> None:
        for number in range(40):
            go.wait()
            go.clear()
            what, gone = (_OLD, {"sub/new.yaml"}) if number % 2 else (_NEW, {"gone.yaml"})
            files.write(str(folder), {name: _service(name, number) for name, number in what.items()}, frozenset(gone))
            idle.set()

    writer = threading.Thread(target=take_turns)
    writer.start()
    store, seen = Store(), []
    watched = Folder(str(folder), store)
    while writer.is_alive():
        if idle.is_set():  # one change at a time: who changes back at once may go unseen
            idle.clear()
            go.set()
        while watched.scan(10**20):
            pass
        store.settle()
        seen.append({f"{identity}={store.texts[identity][-1]}" for identity in store.objects})
    writer.join()
    assert all(one in (_said(_OLD), _said(_NEW)) for one in seen)
    watched.scan(10**20)
    store.settle()
    assert documents(folder) == _said(_OLD)


def test_a_journal_that_names_what_is_outside_is_refused(mesh):
    (mesh / journal.NAME).write_text(json.dumps({"put": {"../a.yaml": "b"}, "gone": []}))
    with pytest.raises(OSError, match="damaged"):
        Folder(str(mesh), Store()).scan(0)


def test_it_works_without_grpc(mesh, source):
    """`diff --against` and `apply` are for machines without a control plane, too."""
    (source / "a.yaml").write_text(SUBSETS)
    code = "import sys; sys.modules['grpc'] = None; from control.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["diff", source, "--against", mesh], ["apply", source, "--to", mesh]):
        done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == (1 if command[0] == "diff" else 0), done.stderr
