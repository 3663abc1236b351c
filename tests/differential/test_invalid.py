"""Requests that must not pass: smuggling, bad framing, bad bytes, limits. Where a case says `stricter`, Envoy lets it pass and we answer 400 by decision.

Bad responses of upstreams are in test_bad_upstreams.py.
"""

from tests.differential.harness import Case, Response, bootstrap, check_cases, cluster, get, http, req, to

CONFIG = bootstrap(
    http("main", to("a")),
    http(
        "lenient",
        [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    {"match": {"path": "/bad"}, "direct_response": {"status": 400, "body": {"inline_string": "bad"}}},
                    {"match": {"prefix": "/"}, "route": {"cluster": "a"}},
                ],
            }
        ],
        stream_error_on_invalid_http_message=True,
    ),
    http("small_head", to("a"), max_request_headers_kb=1),
    http("few_headers", to("a"), common_http_protocol_options={"max_headers_count": 4}),
    clusters=[cluster("a")],
)


def raw(text: str) -> bytes:
    r"""Request text with \r\n written as it goes over the wire."""
    return text.encode("latin-1")


def head(*lines: str) -> bytes:
    """A GET with these header lines after Host."""
    return raw("GET / HTTP/1.1\r\nHost: a.test\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n")


def post(*lines: str, body: str = "") -> bytes:
    return raw("POST / HTTP/1.1\r\nHost: a.test\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n" + body)


CHUNKS = "5\r\nhello\r\n0\r\n\r\n"


def refused(name: str, request: bytes, **fields: object) -> Case:
    """A case whose connection ends."""
    return Case(name, [request, Response()], then="closed", **fields)


def stricter(name: str, request: bytes, **fields: object) -> Case:
    """Envoy lets it pass (or waits for more); we answer 400 and close."""
    return Case(name, [request, Response()], stricter=400, **fields)


def chunked(name: str, body: str) -> Case:
    """A bad chunk; whether the upstream connection is there when it is met depends on timing."""
    return refused(f"chunk_{name}", post("Transfer-Encoding: chunked", body=body), skip=("upstream",))


def chunked_stricter(name: str, body: str) -> Case:
    return stricter(f"chunk_{name}", post("Transfer-Encoding: chunked", body=body), may_begin=True)


CASES = [
    # ---- Content-Length and Transfer-Encoding
    refused("length_and_chunked", post("Content-Length: 5", "Transfer-Encoding: chunked", body=CHUNKS)),
    refused("chunked_and_length", post("Transfer-Encoding: chunked", "Content-Length: 5", body=CHUNKS)),
    refused("length_twice_different", post("Content-Length: 5", "Content-Length: 6", body="hello")),
    refused("length_twice_equal", post("Content-Length: 5", "Content-Length: 5", body="hello")),
    refused("length_list_equal", post("Content-Length: 5, 5", body="hello")),
    refused("length_list_different", post("Content-Length: 5, 6", body="hello")),
    *[
        refused(f"length_{name}", post(f"Content-Length: {value}", body="hello"))
        for name, value in {
            "plus": "+5", "minus": "-5", "minus_zero": "-0", "hex": "0x5", "inner_space": "5 5", "underscore": "1_0", "float": "5.0", "letters": "abc",
            "quoted": '"5"',
            "2_64": "18446744073709551616", "huge": "9" * 40, "comma": "5,", "semicolon": "5;a", "nul": "5\0",
        }.items()
    ],
    refused("length_empty", post("Content-Length:")),
    stricter("length_leading_zeros", post("Content-Length: 005", body="hello")),
    Case("length_padded_with_space", post("Content-Length:  5  ", body="hello")),
    stricter("length_zero_padded_zero", post("Content-Length: 00")),
    *[
        refused(f"coding_{name}", post(f"Transfer-Encoding: {value}", body=CHUNKS))
        for name, value in {
            "identity": "identity", "gzip": "gzip", "gzip_chunked": "gzip, chunked", "chunked_identity": "chunked, identity",
            "chunked_twice": "chunked, chunked",
            "x_chunked": "xchunked", "chunked_x": "chunkedx", "leading_comma": ",chunked", "trailing_comma": "chunked,", "parameter": "chunked;q=1",
            "quoted": '"chunked"', "vertical_tab": "\x0bchunked", "form_feed": "chunked\x0c", "nul": "chunked\0", "empty": "", "bel": "\x07chunked",
        }.items()
    ],
    refused("coding_twice", post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=CHUNKS)),
    refused("coding_identity_then_chunked", post("Transfer-Encoding: identity", "Transfer-Encoding: chunked", body=CHUNKS)),
    stricter("coding_folded", post("Transfer-Encoding:\r\n chunked", body=CHUNKS)),
    refused("coding_space_before_colon", post("Transfer-Encoding : chunked", body=CHUNKS)),
    Case("coding_padded_with_spaces", post("Transfer-Encoding:  chunked  ", body=CHUNKS)),
    Case("coding_padded_with_tab", post("Transfer-Encoding:\tchunked\t", body=CHUNKS)),
    refused("coding_in_http_1_0", raw("POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS)),
    refused("coding_underscore_name", post("Transfer_Encoding: chunked", "Content-Length: x", body=CHUNKS)),
    # ---- chunks
    chunked("size_not_hex", "g\r\nhello\r\n0\r\n\r\n"),
    chunked("size_empty", "\r\nhello\r\n0\r\n\r\n"),
    chunked("size_negative", "-5\r\nhello\r\n0\r\n\r\n"),
    chunked("size_plus", "+5\r\nhello\r\n0\r\n\r\n"),
    chunked("size_0x", "0x5\r\nhello\r\n0\r\n\r\n"),
    chunked("size_underscore", "1_0\r\nhello\r\n0\r\n\r\n"),
    chunked("size_leading_space", " 5\r\nhello\r\n0\r\n\r\n"),
    chunked_stricter("size_trailing_space", "5 \r\nhello\r\n0\r\n\r\n"),
    chunked_stricter("size_17_digits", "00000000000000005\r\nhello\r\n0\r\n\r\n"),
    chunked("size_overflow", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    chunked("size_2_64", "10000000000000000\r\nhello\r\n0\r\n\r\n"),
    chunked("size_line_bare_lf", "5\nhello\r\n0\r\n\r\n"),
    chunked("size_line_bare_cr", "5\rhello\r\n0\r\n\r\n"),
    chunked("size_line_cr_cr_lf", "5\r\r\nhello\r\n0\r\n\r\n"),
    chunked_stricter("no_crlf_after_data", "5\r\nhelloX7\r\n0\r\n\r\n"),
    chunked_stricter("lf_after_data", "5\r\nhello\n0\r\n\r\n"),
    chunked_stricter("longer_than_size", "3\r\nhello\r\n0\r\n\r\n"),
    chunked("extension_bare_lf", "5;a=b\nhello\r\n0\r\n\r\n"),
    chunked("extension_bare_cr", "5;a\rb\r\nhello\r\n0\r\n\r\n"),
    chunked_stricter("last_line_bare_lf", "5\r\nhello\r\n0\r\n\n"),
    chunked_stricter("trailer_bare_lf", "5\r\nhello\r\n0\r\na: b\n\r\n"),
    Case("chunk_extension_not_forwarded", post("Transfer-Encoding: chunked", body='5;name="va\\"lue";x\r\nhello\r\n0;last\r\n\r\n')),
    Case("chunk_size_upper_and_lower_hex", post("Transfer-Encoding: chunked", body="a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n")),
    # ---- header lines
    refused("header_space_before_colon", head("X-A : b")),
    refused("header_tab_before_colon", head("X-A\t: b")),
    refused("header_without_colon", head("X-A")),
    refused("header_empty_name", head(": b")),
    stricter("header_folded", head("X-A: b\r\n c")),
    stricter("header_folded_with_tab", head("X-A: b\r\n\tc")),
    refused("header_first_line_with_space", raw("GET / HTTP/1.1\r\n Host: a.test\r\n\r\n")),
    *[
        refused(f"header_name_{name}", head(f"X{char}A: b"))
        for name, char in {
            "nul": "\0", "space": " ", "tab": "\t", "slash": "/", "paren": "(", "at": "@", "brace": "{", "quote": '"', "obs_text": "\xe9", "del": "\x7f",
        }.items()
    ],
    Case("header_name_all_tchars", head("!#$%&'*+-.^_`|~0aZ: 1")),
    *[
        refused(f"header_value_{name}", head(f"X-A: b{char}c"))
        for name, char in {"nul": "\0", "bel": "\x07", "escape": "\x1b", "del": "\x7f", "vt": "\x0b"}.items()
    ],
    stricter("header_value_lone_cr", head("X-A: b\rc")),
    stricter("header_value_leading_lone_cr", head("X-A:\rc")),
    stricter("header_line_cr_cr_lf", head("X-A: b\r")),
    stricter("header_line_bare_lf", raw("GET / HTTP/1.1\r\nHost: a.test\nX-A: b\r\n\r\n")),
    stricter("all_lines_bare_lf", raw("GET / HTTP/1.1\nHost: a.test\n\n")),
    stricter("request_line_bare_lf", raw("GET / HTTP/1.1\nHost: a.test\r\n\r\n")),
    stricter("end_of_head_bare_lf", raw("GET / HTTP/1.1\r\nHost: a.test\r\n\n")),
    refused("header_line_bare_cr", raw("GET / HTTP/1.1\r\nHost: a.test\rX-A: b\r\n\r\n")),
    # ---- request line
    *[
        refused(f"line_{name}", raw(f"{line}\r\nHost: a.test\r\n\r\n"))
        for name, line in {
            "no_version": "GET /", "lower_case_version": "GET / http/1.1", "version_1_2": "GET / HTTP/1.2", "version_1_32": "GET / HTTP/1.32",
            "version_2_0": "GET / HTTP/2.0", "version_0_9": "GET / HTTP/0.9", "version_3_0": "GET / HTTP/3.0", "version_1": "GET / HTTP/1",
            "version_1_dot": "GET / HTTP/1.", "version_01_1": "GET / HTTP/01.1", "other_protocol": "GET / XTTP/1.1", "space_in_path": "GET /a b HTTP/1.1",
            "method_only": "GET", "empty_method": " / HTTP/1.1", "method_bracket": "G[T / HTTP/1.1", "method_colon": "GE:T / HTTP/1.1",
            "method_obs_text": "G\xe9T / HTTP/1.1", "path_nul": "GET /\0 HTTP/1.1", "path_tab": "GET /a\tb HTTP/1.1", "path_del": "GET /\x7f HTTP/1.1",
            "path_control": "GET /\x01 HTTP/1.1", "relative_path": "GET a/b HTTP/1.1", "query_only": "GET ?a=b HTTP/1.1",
            "method_of_100_bytes": "M" * 100 + " / HTTP/1.1", "scheme_only": "GET http:// HTTP/1.1", "no_authority": "GET http:///x HTTP/1.1",
        }.items()
    ],
    *[
        stricter(f"line_{name}", raw(f"{line}\r\nHost: a.test\r\n\r\n"))
        for name, line in {
            "double_space_before_path": "GET  / HTTP/1.1", "double_space_after_path": "GET /  HTTP/1.1", "trailing_space": "GET / HTTP/1.1 ",
            "tabs": "GET\t/\tHTTP/1.1", "lone_cr": "GET /\r HTTP/1.1",
        }.items()
    ],
    Case("line_fragment", get("/a#b")),
    Case("line_backslash", get("/a\\b")),
    Case("line_quote_and_braces", get('/a"b<c>{d}|e^f`g')),
    refused("leading_space", b" GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
    refused("leading_nul", b"\0GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
    stricter("leading_lone_cr", b"\rGET / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
    stricter("leading_bare_lf", b"\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
    refused("tls_client_hello", bytes.fromhex("16030100c8010000c40303") + b"\x01" * 60),
    refused("random_binary", bytes(range(128, 255)) + b"\r\n\r\n"),
    refused("smtp", b"EHLO there\r\n"),
    # ---- Host
    refused("host_missing", b"GET / HTTP/1.1\r\n\r\n"),
    stricter("host_empty", get(host="")),
    stricter("host_twice_equal", head("Host: a.test")),
    stricter("host_twice_different", head("Host: b.test")),
    *[
        Case(f"host_{name}", [get(host=host), Response()])
        for name, host in {
            "comma": "a.test, b.test",
            "space": "a. test", "slash": "a.test/x", "at": "user@a.test", "obs_text": "a\xe9.test", "bad_port": "a.test:x",
            "two_ports": "a.test:80:80",
            "port_99999": "a.test:99999", "underscore": "a_b.test", "bracket": "[::1", "percent": "a%41.test",
            "trailing_dot": "a.test.", "quote": 'a".test', "query": "a.test?x", "hash": "a.test#x", "backslash": "a\\b",
        }.items()
    ],
    # ---- CONNECT and asterisk
    refused("connect_not_enabled", raw("CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n")),
    refused("connect_without_port", raw("CONNECT a.test HTTP/1.1\r\nHost: a.test\r\n\r\n")),
    refused("connect_path", raw("CONNECT /x HTTP/1.1\r\nHost: a.test\r\n\r\n")),
    # ---- limits
    Case("head_of_50_kb", get("/", "X-Big: " + "v" * 50_000)),
    refused("head_of_61_kb", get("/", "X-Big: " + "v" * 61_500)),
    refused("path_of_61_kb", get("/" + "p" * 61_500)),
    refused("method_of_61_kb", raw("M" * 61_500 + " / HTTP/1.1\r\nHost: a.test\r\n\r\n")),
    Case("headers_99", get("/", *[f"X-{n}: {n}" for n in range(98)])),
    Case("headers_100", get("/", *[f"X-{n}: {n}" for n in range(99)])),
    refused("headers_101", get("/", *[f"X-{n}: {n}" for n in range(100)])),
    Case("small_head_fits", get("/", "X-Big: " + "v" * 900), on="small_head"),
    refused("small_head_over", get("/", "X-Big: " + "v" * 1100), on="small_head"),
    refused("small_head_path", get("/" + "p" * 1100), on="small_head"),
    Case("few_headers_4", get("/", "A: 1", "B: 2", "C: 3"), on="few_headers"),
    refused("few_headers_5", get("/", "A: 1", "B: 2", "C: 3", "D: 4"), on="few_headers"),
    Case(
        "trailers_too_many",
        [req("POST", "/", "Transfer-Encoding: chunked", body=b"1\r\nx\r\n0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\nE: 5\r\n\r\n"), Response()],
        on="few_headers", stricter=431, may_begin=True,
    ),
    # ---- the option to keep the connection after an invalid message
    Case("lenient_header", [head("X A: b"), Response()], on="lenient", then="closed"),
    Case("lenient_host_missing", [b"GET / HTTP/1.1\r\n\r\n", Response()], on="lenient"),
    Case("lenient_bad_request", get("/bad"), on="lenient"),
    Case("lenient_invalid_url", [get("a b"), Response()], on="lenient", then="closed"),
]  # fmt: skip

test_case = check_cases(CASES)
