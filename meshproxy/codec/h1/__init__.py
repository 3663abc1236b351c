"""HTTP/1.1 on the wire (RFC 9112), sans-IO: bytes in, calls on a sink out; `encode` returns bytes.

Start with `parser`, whose docstring is the contract: what both directions share, that is options, the buffer, bodies. `request` and `response` read heads and
decide how a body is framed; `grammar` says what a line may be. `encode` writes messages, `header_case` spells names as clients or upstreams like them.

Strict on purpose. No message passes that two parsers could read differently: one framing header at the most, digits only, CRLF only, no white space
before a colon, no folding. Each distinct header line is validated once and remembered (`grammar.HeaderLines`), which is what makes strictness cheap.
"""
