"""Records behave as the dataclasses that they stand for."""

from __future__ import annotations

import pytest

from meshproxy.record import Record, field, replace


class Point(Record, frozen=True):
    x: int
    y: int = 0


class Path(Record):
    name: str = ""
    points: list[Point] = field(default_factory=list)


class Thing(Record, eq=False):
    number: int = 0


def test_fields_are_taken_in_order_and_by_name():
    assert (Point(1, 2).x, Point(1, 2).y) == (1, 2)
    assert (Point(y=2, x=1).x, Point(1, y=2).y) == (1, 2)
    assert Point(1).y == 0


def test_a_factory_makes_a_value_for_each():
    one, other = Path(), Path()
    one.points.append(Point(1))
    assert other.points == []


@pytest.mark.parametrize(
    "make", [lambda: Point(), lambda: Point(1, 2, 3), lambda: Point(1, x=1), lambda: Point(1, z=1)], ids=["missing", "too many", "twice", "unknown"]
)
def test_wrong_arguments_are_refused(make):
    with pytest.raises(TypeError):
        make()


def test_there_are_no_other_attributes():
    with pytest.raises(AttributeError):
        Path().other = 1


def test_frozen_records_do_not_change():
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2
    with pytest.raises(AttributeError):
        del point.x
    assert point.x == 1


def test_records_are_equal_by_value():
    assert Point(1, 2) == Point(1, 2) != Point(1, 3)
    assert Path("a") == Path("a") != Path("b")
    assert Point(1) != Thing(1)
    assert Thing(1) != Thing(1)
    assert {Point(1): "one"}[Point(1)] == "one"
    with pytest.raises(TypeError):
        hash(Path())
    assert hash(Thing(1)) is not None


def test_replace_copies_with_changes():
    point = Point(1, 2)
    assert replace(point, y=3) == Point(1, 3)
    assert point == Point(1, 2)


def test_a_record_shows_its_fields():
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"
