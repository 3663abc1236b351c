"""Configurations that mean harm, given to the real command: one message and status 1, in little memory, and nothing is left running or listening."""

from __future__ import annotations

import asyncio
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1 << 30  # bytes of address space for each process; enough for everything that the interpreter and the protos map
LIMIT_S = 120.0

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
RULE = "{any: true}"
for _ in range(200):
    RULE = f"{{not_rule: {RULE}}}"


def http_filters(text: str) -> str:
    """A bootstrap with one connection manager and these HTTP filters in front of the router."""
    return f"""
static_resources:
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: l
          route_config: {{virtual_hosts: [{{name: v, domains: ["*"], routes: []}}]}}
          http_filters:
          {text}
          - {{name: r, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}
"""


def route(match: str, action: str = "direct_response: {status: 200}") -> str:
    return http_filters("").replace("routes: []", f"routes: [{{match: {match}, {action}}}]")


RBAC = (
    '- {name: rbac, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC, '
    "rules: {policies: {p: {permissions: [%s], principals: [{any: true}]}}}}}"
)
BAD: dict[str, str | bytes] = {
    "deep_json": "[" * 100_000,
    "deep_json_closed": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "deep_yaml_flow": "a: " + "[" * 20_000 + "]" * 20_000,
    "deep_yaml_block": "".join(" " * depth + "a:\n" for depth in range(3000)),
    "laughs": LAUGHS,
    "laughs_in_metadata": LAUGHS + "node: {id: x, metadata: {a: *a11}}",
    "laughs_in_a_list": LAUGHS + "static_resources: {clusters: *a11}",
    "merged_laughs": "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [*x{n - 1}, *x{n - 1}]}}\n" for n in range(1, 30)),
    "alias_of_itself": "static_resources: &a {clusters: [*a]}",
    "key_twice": "node: {id: a}\nnode: {id: b}",
    "tags": "node: !!python/object/apply:os.system [touch /tmp/hacked]",
    "utf_16": "node: {id: a}".encode("utf-16"),
    "binary": bytes(range(256)) * 100,
    "control_characters": "node: {id: \"a\x00b\"}",
    "huge_number": "admin: {address: {socket_address: {address: 1.1.1.1, port_value: " + "9" * 100_000 + "}}}",
    "huge_float": "static_resources: {clusters: [{name: a, connect_timeout: 1e999s}]}",
    "long_key": "k" * 1_000_000 + ": 1",
    "many_keys": "\n".join(f"k{number}: 1" for number in range(4000)),
    "deep_rule": http_filters(RBAC % RULE),
    "big_expression": route("{safe_regex: {regex: \"((a{100}){100}){100}\"}}"),
    "bad_expression": route("{safe_regex: {regex: \"(\"}}"),
    "header_with_line_end": route("{prefix: /}", "direct_response: {status: 200}, response_headers_to_add: [{header: {key: a, value: \"b\\r\\nc: d\"}}]"),
    "header_name_with_line_end": route("{prefix: /}", "direct_response: {status: 200}, response_headers_to_add: [{header: {key: \"a\\nb\", value: c}}]"),
    "redirect_with_line_end": route("{prefix: /}", "redirect: {path_redirect: \"/a\\r\\nx: y\"}"),
    "rewrite_with_line_end": route("{prefix: /}", "route: {cluster: a, prefix_rewrite: \"/a\\nb\"}"),
    "host_rewrite_with_line_end": route("{prefix: /}", "route: {cluster: a, host_rewrite_literal: \"a\\r\\nb\"}"),
    "direct_response_from_memory": route("{prefix: /}", "direct_response: {status: 200, body: {filename: /proc/self/mem}}"),
    "unknown_command": http_filters("").replace("stat_prefix: l", "stat_prefix: l\n          access_log: [{name: a, typed_config: {\"@type\": "
        "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null, log_format: {text_format: \"%EXEC(id)%\"}}}]"),
}  # fmt: skip


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


async def validate(folder: Path, name: str) -> tuple[int, str]:
    """Exit status of `--mode validate`, and what it says."""
    path = folder / f"{name}.yaml"
    text = BAD[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meshproxy", "--mode", "validate", "-c", str(path),
        cwd=ROOT, preexec_fn=_limit, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        return -1, "did not end"
    assert process.returncode is not None
    return process.returncode, said.decode("utf-8", "replace")


async def test_refused(tmp_path: Path):
    """All of them, a few at a time."""
    turn = asyncio.Semaphore(3)

    async def one(name: str) -> tuple[str, int, str]:
        async with turn:
            return name, *(await validate(tmp_path, name))

    wrong = []
    for name, status, said in await asyncio.gather(*map(one, BAD)):
        if status != 1 or "Traceback" in said or not said or len(said) > 2_000_000:
            wrong.append(f"{name}: status {status}: {said[:200]} ... {said[-500:]}")
    assert not wrong, "\n".join(wrong)
    assert not Path("/tmp/hacked").exists()
