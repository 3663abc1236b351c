"""Replicas that tell each other of applications' health, by a folder."""

from __future__ import annotations

import json

import pytest

from control.ads.health import GRACE_S
from control.sources.reports import AGAIN_S, LEFT_S, MAX_BYTES, STALE_S, SharedReports
from tests.unit.test_control_health import KEY, Clock, Reports, report

OTHER = ("default", "b")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def replicas(tmp_path, clock):
    return SharedReports(tmp_path, clock), SharedReports(tmp_path, clock)


def test_what_one_is_told_the_other_knows(replicas):
    one, two = replicas
    one.write({KEY: False})
    two.write({OTHER: True})
    assert (one.read(), two.read()) == ({OTHER: True}, {KEY: False})
    one.write({KEY: True})
    assert two.read() == {KEY: True}


def test_it_counts_for_as_long_as_it_is_said(replicas, clock):
    one, two = replicas
    for _ in range(20):
        one.write({KEY: False})
        assert two.read() == {KEY: False}
        clock.now += AGAIN_S
    clock.now += STALE_S - AGAIN_S - 0.1
    assert two.read() == {KEY: False}  # it may be that it is only busy
    clock.now += 0.2
    assert two.read() == {}


def test_a_sidecar_that_leaves_is_remembered_as_long_as_by_its_own_replica(replicas, clock):
    one, two = replicas
    one.write({KEY: False})
    assert two.read() == {KEY: False}
    one.write({})
    assert two.read() == {KEY: False}
    clock.now += GRACE_S
    assert two.read() == {}


def test_of_two_that_disagree_the_one_that_changed_its_mind_counts(tmp_path, replicas, clock):
    one, two = replicas
    reader = SharedReports(tmp_path, clock)
    one.write({KEY: False})
    assert reader.read() == {KEY: False}
    two.write({KEY: True})
    assert reader.read() == {KEY: True}
    for _ in range(5):  # both go on saying so
        clock.now += AGAIN_S
        one.write({KEY: False})
        two.write({KEY: True})
        assert reader.read() == {KEY: True}
    for _ in range(5):  # the second one has gone
        clock.now += AGAIN_S
        one.write({KEY: False})
        reader.read()
    assert reader.read() == {KEY: False}


def test_nothing_is_written_when_nothing_is_new(replicas, tmp_path, clock):
    one, _ = replicas
    one.write({KEY: False})
    (file,) = tmp_path.iterdir()
    before = file.stat().st_ino, file.stat().st_mtime_ns
    clock.now += AGAIN_S - 0.1
    one.write({KEY: False})
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before


def test_files_that_are_nobodys_are_taken_away(replicas, tmp_path, clock):
    one, two = replicas
    one.write({KEY: False})
    two.read()
    clock.now += LEFT_S
    two.read()
    assert list(tmp_path.iterdir()) == []
    one.write({KEY: False})  # it was only asleep
    assert two.read() == {KEY: False}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ready": 1}', '{"ready": [["a"]]}', "[" * 10_000, " " * (MAX_BYTES + 1)], ids=len)
def test_what_is_no_report_says_nothing(replicas, tmp_path, text):
    (tmp_path / "x.ready.json").write_text(text)
    (tmp_path / "notes.txt").write_text("")
    assert replicas[0].read() == {}
    (tmp_path / "x.ready.json").write_text(json.dumps({"ready": [["default", "a", True]]}))
    assert replicas[0].read() == {KEY: True}


def test_a_folder_that_is_gone(replicas, tmp_path):
    tmp_path.rmdir()
    for doing in (replicas[0].read, lambda: replicas[0].write({KEY: True})):
        with pytest.raises(OSError, match="No such file"):
            doing()
    tmp_path.mkdir()


def test_who_is_asked_here_knows_best():
    here = Reports()
    here.health.elsewhere({KEY: False, OTHER: True})
    assert (here.health.unready, here.changes, here.health.reported()) == ({KEY}, 1, {})
    stream = here.come()
    here.say(stream, report(1))
    assert (here.health.unready, here.health.reported()) == (frozenset(), {KEY: True})
    here.health.elsewhere({KEY: False})
    assert here.health.unready == frozenset()
    here.health.close(stream)
    here.health.tidy()
    assert (here.health.unready, here.health.reported()) == ({KEY}, {})
    here.health.elsewhere({})
    assert here.health.unready == frozenset()  # what was known here last
