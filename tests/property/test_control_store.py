"""What is decided about the files that changed is what would be decided about all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control.kinds import registry
from control.kinds.store import Store

FILES = ("a.yaml", "b.yaml", "c.yaml")
OBJECTS = ("kubernetes: Service default/one", "kubernetes: Service default/two")


def service(name: str, state: int) -> dict:
    """Another one for each state; a wrong one for 0."""
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": [{"port": state or "none"}]}}


def text(pieces: list[tuple[str, int]]) -> bytes:
    return b"\n---\n".join(str(service(*one)).encode() if one[0] != "no YAML" else b"{" for one in pieces)


PIECES = st.lists(st.tuples(st.sampled_from(("one", "two", "three", "no YAML")), st.integers(0, 3)), max_size=3)
STEPS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(FILES), PIECES),
    st.tuples(st.just("unreadable"), st.sampled_from(FILES)),
    st.tuples(st.just("remove"), st.sampled_from((*FILES, *OBJECTS))),
    st.tuples(st.just("place"), st.sampled_from(OBJECTS), st.integers(0, 3)),
    st.tuples(st.just("settle")),
)


class Whole(Store):
    """Looks at everything each time."""

    def settle(self) -> bool:
        self._contested = True
        return super().settle()


def values(store: Store) -> dict:
    return {identity: value.ports[0].number for identity, value in store.objects.items()}


@given(st.lists(STEPS, max_size=20))
def test_the_same_as_with_a_look_at_everything(steps):
    stores = (Store(), Whole())
    for kind, *rest in [*steps, ("settle",)]:
        told = []
        for store in stores:
            if kind == "put":
                store.put(rest[0], text(rest[1]))
            elif kind == "unreadable":
                store.unreadable(rest[0], "no")
            elif kind == "remove":
                store.remove(rest[0])
            elif kind == "place":
                name = rest[0].rpartition("/")[2]
                store.place(rest[0], store.read_object(rest[0], str(rest[1]), service(name, rest[1])))
            else:
                before = dict(store.objects)
                changed = store.settle()
                assert changed == (before.keys() != store.objects.keys() or any(before[one] is not store.objects[one] for one in before))
                told.append(sorted(map(str, store.troubles)))
        assert len({str(one) for one in told}) <= 1
        if kind == "settle":
            assert values(stores[0]) == values(stores[1])


def test_a_field_that_is_newer_than_we_are():
    document = service("one", 80)
    document["spec"]["fromTheFuture"] = {"a": 1}
    assert [problem.path for problem in registry.parse(document)[1]] == ["spec.fromTheFuture"]
    made, problems = registry.parse(document, pruned=True)
    assert made.host == "one.default.svc.cluster.local"
    assert problems == []
