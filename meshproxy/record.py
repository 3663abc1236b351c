"""Classes that are records: annotated fields with defaults, kept in slots.

What `dataclasses` does, without compiling source code for every class: that takes a millisecond a class, and a sidecar shows its start-up time to its
users (docs/decisions/0005-start-up.md). Making an instance is slower than a dataclass's, so records are for what is made once, not for every request.

>>> class Point(Record, frozen=True):
...     x: int
...     y: int = 0
...     names: list[str] = field(default_factory=list)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, dataclass_transform

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, TypeVar

    _R = TypeVar("_R", bound="Record")  # whose bound would be compiled, as source

_set = object.__setattr__


class _Factory:
    """The default of a field that is made anew for each record."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], Any]) -> Any:
    """A field whose default is what `default_factory` returns."""
    return _Factory(default_factory)


@dataclass_transform(field_specifiers=(field,))
class _RecordType(type):
    """Makes the class: annotations become slots, values given to them defaults. `frozen`: attributes cannot be set, and records are hashed by value."""

    _fields: tuple[str, ...]
    _defaults: dict[str, Any]

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, frozen: bool = False, eq: bool = True) -> Any:
        fields = tuple(namespace.get("__annotations__", ()))
        defaults = {one: namespace.pop(one) for one in fields if one in namespace}
        namespace["__slots__"] = fields
        if frozen:
            namespace["__setattr__"] = namespace["__delattr__"] = _refuse
        if bases and eq:
            namespace["__eq__"] = _equal
            namespace["__hash__"] = _hash if frozen else None
        made = super().__new__(cls, name, bases, namespace)
        made._fields = fields
        made._defaults = defaults
        return made


class Record(metaclass=_RecordType):
    """Base of all records; a record cannot be the base of another one. `__init__` takes the fields in order, or by name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = self.__class__
        fields, defaults = cls._fields, cls._defaults
        if len(args) > len(fields):
            raise TypeError(f"{cls.__name__} has {len(fields)} fields, not {len(args)}")
        for name, value in zip(fields, args, strict=False):
            _set(self, name, value)
        given = len(kwargs)
        for name in fields[len(args) :]:
            if name in kwargs:
                value = kwargs[name]
                given -= 1
            elif name in defaults:
                value = defaults[name]
                if value.__class__ is _Factory:
                    value = value.make()
            else:
                raise TypeError(f"{cls.__name__} needs {name!r}")
            _set(self, name, value)
        if given:
            raise TypeError(f"{cls.__name__} has no such fields, or they are given twice: {', '.join(kwargs)}")

    def __repr__(self) -> str:
        return f"{self.__class__.__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__class__._fields)})"


def replace(record: _R, **changes: Any) -> _R:
    """A copy of the record with other values in some fields."""
    cls = record.__class__
    return cls(**{name: getattr(record, name) for name in cls._fields} | changes)


def _values(record: Record) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in record.__class__._fields)


def _equal(self: Record, other: object) -> Any:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Record) -> int:
    return hash(_values(self))


def _refuse(self: Record, name: str, *_: object) -> NoReturn:
    raise AttributeError(f"{self.__class__.__name__} is frozen: {name!r} cannot be changed")
