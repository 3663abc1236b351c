"""Work that hostile input of a given size causes, to be counted under callgrind.

Everything is made first; then `ready` is said, and each line `name number` has the work of that probe done for its first or second size, so that only the work
is counted.
"""

from __future__ import annotations

import base64
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from envoy.config.route.v3 import route_components_pb2 as routes
from envoy.type.matcher.v3 import regex_pb2

from meshproxy.admin.message import Request
from meshproxy.api import matchers
from meshproxy.api.uri_template import UriTemplate
from meshproxy.codec import client_hello, proxy_protocol
from meshproxy.codec.h1.parser import Options
from meshproxy.codec.h1.request import RequestParser
from meshproxy.codec.h1.response import ResponseParser
from meshproxy.codec.headers import RequestHead
from meshproxy.http.hash_policy import cookie_value
from meshproxy.http.header_mutations import append_header
from meshproxy.http.jwt.locations import ParameterLocation
from meshproxy.http.jwt.status import Bad
from meshproxy.http.jwt.token import Jwt
from meshproxy.http.paths import UNESCAPE_AND_FORWARD, PathOptions, normalise
from meshproxy.http.request_head import _REFERER, _from_right
from meshproxy.observe import json_text
from meshproxy.observe.format import compile_header_value
from tests.property.test_observe import stream

Work = Callable[[], Any]
_ACCESS_TOKEN = ParameterLocation(b"access_token")


class Sink:
    """Takes everything and keeps nothing."""

    def ignore(self, *_: Any) -> None:
        """Whatever was read."""

    on_known = on_whole = on_headers = on_data = on_trailers = ignore


HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def request(data: bytes, step: int = 0) -> Work:
    """Parse requests, fed in one piece or in steps."""

    def work() -> None:
        parser = RequestParser(Sink(), Options(max_head_bytes=1 << 20))
        for at in range(0, len(data), step or len(data)):
            parser.feed(data[at : at + (step or len(data))])
        while parser.done and parser.buffer:
            parser.next_message()

    return work


def response(data: bytes, step: int = 0) -> Work:
    def work() -> None:
        parser = ResponseParser(Sink(), Options(max_head_bytes=1 << 20))
        for at in range(0, len(data), step or len(data)):
            parser.feed(data[at : at + (step or len(data))])

    return work


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def token(data: bytes) -> Work:
    def work() -> None:
        with contextlib.suppress(Bad):
            Jwt(data)

    return work


def path(data: bytes) -> Work:
    options = PathOptions(normalize=True, merge_slashes=True, escaped_slashes=UNESCAPE_AND_FORWARD)
    return lambda: normalise(data, options)


def regex(pattern: str, text: bytes) -> Work:
    matches = matchers.compile_regex(regex_pb2.RegexMatcher(regex=pattern))
    return lambda: matches(text)


def rewrite(pattern: str, text: bytes) -> Work:
    proto = regex_pb2.RegexMatchAndSubstitute(substitution=r"\1")
    proto.pattern.regex = pattern
    substitute = matchers.compile_substitution(proto)
    return lambda: substitute(text)


def repeated(name: bytes, count: int) -> Work:
    """Many lines of one header, asked for and added to."""

    def work() -> None:
        head = RequestHead(b"GET", b"/", b"a", [(name, b"v")] * count)
        head.joined(name)
        head.get_all(name)
        append_header(head, name, b"w", request=True)
        head.remove(name)

    return work


def header_matcher(count: int) -> Work:
    proto = routes.HeaderMatcher(name="x")
    proto.string_match.contains = "aaaaaaaaaaaaaaab"
    matches = matchers.compile_header(proto)
    return lambda: matches(RequestHead(b"GET", b"/", b"a", [(b"x", b"a" * count)]))


def formatted(text: str, value: bytes) -> Work:
    render = compile_header_value(text)
    assert callable(render)
    made = stream(request=RequestHead(b"GET", b"/?q=" + value, b"a", [(b"x", value)]))
    return lambda: render(made)


def _hello_in_records(count: int) -> bytes:
    body = b"\x01" + (count - 4).to_bytes(3, "big") + b"\x03\x03" + bytes(count - 6)
    return b"".join(b"\x16\x03\x01\x00\x01" + body[at : at + 1] for at in range(count - 10))


def _tlvs(count: int) -> bytes:
    body = b"\x0a\x00\x00\x01\x0a\x00\x00\x02\x00\x01\x00\x02" + b"\xe0\x00\x00" * count
    return b"\r\n\r\n\x00\r\nQUIT\n\x21\x11" + len(body).to_bytes(2, "big") + body


def _names(count: int) -> list[bytes]:
    """Header names of which nobody would think that they collide."""
    return [b"x-%d" % number for number in range(count)]


def _colliding(count: int) -> list[bytes]:
    """Header names whose hashes agree in their last eight bits in an interpreter whose hash seed is known; ours has a secret one."""
    code = f"print(*[name for name in range(300 * {count}) if hash(b'x-%d' % name) & 255 == 7][:{count}])"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True)
    return [b"x-" + number.encode() for number in done.stdout.split()]


def _named(names: list[bytes]) -> Work:
    return request(HEAD + b"".join(name + b": v\r\n" for name in names) + b"\r\n")


PROBES: dict[str, Callable[[int], Work]] = {
    "head in bytes": lambda n: request(HEAD + b"X: " + b"y" * n + b"\r\n\r\n", 1),
    "head in bytes, first line done": lambda n: request(b"GET /" + b"p" * n + b" HTTP/1.1\r\nHost: a\r\nX: " + b"y" * n + b"\r\n\r\n", 1),
    "long header": lambda n: request(HEAD + b"X: " + b" y" * n + b"\r\n\r\n"),
    "connection tokens": lambda n: request(HEAD + b"Connection: " + b"," * n + b"close\r\n\r\n"),
    "empty lines": lambda n: request(b"\r\n" * n + HEAD + b"\r\n"),
    "pipelined": lambda n: request((HEAD + b"\r\n") * (n // 16)),
    "chunks of one byte": lambda n: request(CHUNKED + b"1\r\nx\r\n" * n + b"0\r\n\r\n"),
    "chunks in bytes": lambda n: request(CHUNKED + b"1;ext=1\r\nx\r\n" * (n // 8) + b"0\r\n\r\n", 1),
    "path of dots": lambda n: path(b"/." * n),
    "path of parents": lambda n: path(b"/a" * n + b"/.." * n),
    "path of escapes": lambda n: path(b"/" + b"%2e%2F" * n),
    "path of parameters": lambda n: path(b"/..;" * n),
    "nested repetition": lambda n: regex("/(a+)+b", b"/" + b"a" * n),
    "many dots": lambda n: regex("(.*a){12}", b"a" * n),
    "backtracking rewrite": lambda n: rewrite("^(a*)*b|(x)", b"a" * n),
    "template": lambda n: partial(UriTemplate("/{x=*}/a/{y=**}").matches, b"/a" * n),
    "cookies": lambda n: partial(cookie_value, RequestHead(b"GET", b"/", b"h", [(b"cookie", b"a;" * n)]), b"a"),
    "query parameters": lambda n: partial(matchers.parse_query, b"/?" + b"&".join(b"%d=v" % at for at in range(n))),
    "admin query": lambda n: partial(Request.from_target, "GET", "/?" + "%41=%ff&" * n),
    "admin path": lambda n: partial(Request.from_target, "GET", "/" + "//%2f" * n),
    "forwarded for": lambda n: partial(_from_right, b"1.2.3.4," * n, 1),
    "referer": lambda n: partial(_REFERER, b"a" * n + b"/" + b"a" * n + b"\0"),
    "header of many lines": lambda n: repeated(b"x-many", n // 16),
    "contains": header_matcher,
    "formatted header": lambda n: formatted("%REQ(X)%", b"\xff\"\n" * n),
    "formatted query parameter": lambda n: formatted("%QUERY_PARAM(none)%", b"&=%zz" * n),
    "json": lambda n: partial(json_text.quote, b'"\\\xff\x01' * n),
    "records of one byte": lambda n: partial(client_hello.parse, _hello_in_records(n)),
    "names": lambda n: _named(_names(n)),
    "tokens of dots": lambda n: token(b"." * n),
    "tokens in base64": lambda n: token(b"a" * n + b".a.a"),
    "tokens of JSON": lambda n: token(b64(b'{"alg":"RS256","x":"' + b"[{" * n + b'"}') + b".e30.a"),
    "tokens of brackets": lambda n: token(b64(b'{"x":' + b"[" * n) + b".e30.a"),
    "tokens of names": lambda n: token(b64(b"{" + b",".join(b'"%d":0' % at for at in range(n)) + b"}") + b".e30.a"),
    "tokens of digits": lambda n: token(b64(b'{"x":' + b"9" * n + b"}") + b".e30.a"),
    "parameters before a token": lambda n: partial(_ACCESS_TOKEN.find, RequestHead(b"GET", b"/?" + b"%61=b&" * n, b"h")),
    "colliding names": lambda n: _named(_colliding(n)),
    "empty TLVs": lambda n: partial(proxy_protocol.parse, _tlvs(n)),
}  # fmt: skip


def sizes(name: str) -> tuple[int, ...]:
    """The sizes for which a probe is made: one is four times the other. Small ones for what costs much for each byte, or is limited."""
    if "names" in name:
        return (90,)
    size = 250 if re.search("in bytes|one byte|path of|pipelined|referer|admin|parameter|TLV", name) else 2000
    return size, size * 4


def main() -> None:
    for probe in PROBES.values():
        probe(16)()  # what is made once is made now
    works = {name: [probe(size) for size in sizes(name)] for name, probe in PROBES.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, number = line.strip().rpartition(" ")
        works[name][int(number)]()
        print("done", flush=True)


if __name__ == "__main__":
    main()
