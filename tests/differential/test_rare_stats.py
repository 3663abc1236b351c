"""`stats_config`: which statistics there are, their tags, and the buckets of histograms, as /stats and /stats/prometheus show them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.differential.xds_rig import Site, compare, goes_to, http_listener, static
from tests.polling import until

# Depend on time and on the length of dates: names alone are compared. How many connections one event brought, the event loop does not tell us.
_UNSTABLE = re.compile(r"_(ms|time|bytes)(?![a-z])|bytes_total|\.assignment_|max_host_weight")
_UNTOLD = re.compile(r"per_socket_event")
_NUMBER = re.compile(r"(?<=[ (,:])(\d+(\.\d+)?(e[-+]\d+)?|nan)\b")
OURS = "^(http[.]in|cluster[.](one|two)|listener[.]in)[.]"


def values(text: str) -> list[str]:
    """Lines of a text, without the values that may differ."""
    lines = [line for line in text.splitlines() if not _UNTOLD.search(line)]
    return sorted(_NUMBER.sub("N", line) if _UNSTABLE.search(line) else line for line in lines)


def stats_config(name: str, config: dict[str, Any], *, seen: str = "cluster.one.upstream_rq_time") -> Any:
    """What is shown after two requests. `seen`: a histogram to wait for, if there is one."""

    async def scenario(site: Site) -> None:
        await site.origin("a")
        clusters = [static("one", "a"), static("two", "a", alt_stat_name="two.three")]
        listeners = [http_listener("in", goes_to("one"))]
        await site.start({"static_resources": {"clusters": clusters, "listeners": listeners}, "stats_config": config, "stats_flush_interval": "0.1s"})
        client = await site.connect("in")
        site.note(await client.get(), await client.get())

        async def recorded() -> bool:
            return (await site.stat(seen)).startswith("P")

        if seen:
            await until(recorded)
        for path in (f"/stats?filter={OURS}", f"/stats?filter={OURS}&type=Counters&format=json", f"/stats/prometheus?filter={OURS}",
                     f"/stats?filter={OURS}&type=Histograms&histogram_buckets=cumulative", f"/stats?filter={OURS}&type=Histograms&histogram_buckets=disjoint",
                     f"/stats?filter={OURS}&histogram_buckets=summary&usedonly&type=Counters"):  # fmt: skip
            status, text = await site.proxy.admin("GET", path)
            site.note(path, status, values(text.replace("},{", "},\n{")))

    return pytest.param(scenario, id=name)


def one(**pattern: Any) -> dict[str, Any]:
    return {"patterns": [pattern]}


def matching(**matcher: Any) -> dict[str, Any]:
    return {"stats_matcher": matcher}


ALL = {"stats_matcher": {"exclusion_list": one(exact="none")}}
CASES = [
    stats_config("everything", ALL),
    stats_config("reject_all", matching(reject_all=True), seen=""),
    stats_config("reject_nothing", matching(reject_all=False)),
    stats_config("exclusion_prefix", matching(exclusion_list=one(prefix="http.in.downstream_rq"))),
    stats_config("exclusion_of_clusters", matching(exclusion_list=one(prefix="cluster.")), seen="http.in.downstream_rq_time"),
    stats_config("exclusion_several", matching(exclusion_list={"patterns": [
        {"suffix": "_total"}, {"safe_regex": {"regex": "http\\..*_rq_\\dxx"}}, {"exact": "cluster.one.upstream_cx_active"}, {"contains": "ssl"}]})),
    stats_config("exclusion_ignoring_case", matching(exclusion_list=one(prefix="CLUSTER.ONE.UPSTREAM_CX", ignore_case=True))),
    stats_config("inclusion_prefix", matching(inclusion_list=one(prefix="cluster.one.upstream_rq"))),
    stats_config("inclusion_of_nothing", matching(inclusion_list=one(exact="x")), seen=""),
    stats_config("inclusion_several", matching(inclusion_list={"patterns": [
        {"suffix": "_total"}, {"safe_regex": {"regex": "cluster\\.one\\.upstream_rq_.*"}}, {"contains": "downstream_rq_2xx"}]})),
    stats_config("no_default_tags", {"use_all_default_tags": False}),
    stats_config("default_tags", {"use_all_default_tags": True}),
    stats_config("fixed_values", {"stats_tags": [{"tag_name": "where", "fixed_value": "here"}, {"tag_name": "b.c-d", "fixed_value": 'a "quoted\\" v'}]}),
    stats_config("fixed_value_alone", {"use_all_default_tags": False, "stats_tags": [{"tag_name": "where", "fixed_value": "here"}]}),
    stats_config("own_tags", {"stats_tags": [
        {"tag_name": "direction", "regex": "^http\\.in\\.((down)stream_).*"}, {"tag_name": "kind", "regex": "_((cx|rq))_"},
        {"tag_name": "none", "regex": "nowhere(.)"}]}),
    stats_config("own_tags_alone", {"use_all_default_tags": False, "stats_tags": [{"tag_name": "cluster", "regex": "^cluster\\.((.+?)\\.)"}]}),
    stats_config("a_default_by_name", {"use_all_default_tags": False, "stats_tags": [
        {"tag_name": "envoy.cluster_name"}, {"tag_name": "envoy.response_code_class"}]}),
    stats_config("buckets", {"histogram_bucket_settings": [{"match": {"prefix": "cluster."}, "buckets": [0.5, 1, 1000, 60000]}]}),
    stats_config("buckets_of_several", {"histogram_bucket_settings": [
        {"match": {"suffix": "upstream_rq_time"}, "buckets": [10, 20.25]}, {"match": {"prefix": "cluster.one"}, "buckets": [7]},
        {"match": {"safe_regex": {"regex": "http.*"}}, "buckets": [0.001, 3e9]}]}),
    stats_config("bins", {"histogram_bucket_settings": [{"match": {"prefix": "cluster."}, "bins": 5}]}),
]  # fmt: skip


@pytest.mark.parametrize("scenario", CASES)
def test_stats_config(scenario: Any) -> None:
    compare(scenario)
