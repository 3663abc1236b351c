"""Network filters: what decides about a connection before, or instead of, HTTP. One file each, one line in `api/registry.py`.

A filter in front of the terminal one may have `on_connection(conn)`, `on_first_data(conn)` and `on_close(conn)`; the first two answer None (go on), False
(close; `conn.local_close_reason` says why in Envoy's words, and `conn.termination_details` what else there is to say) or an awaitable of one of them. The
terminal filter makes the protocol: `create_protocol(conn)`. A connection that ends before that (its TLS handshake failed, a filter closed it) it hears of by
`missed(conn, secure=...)`, if it has that: Envoy makes its terminal filter first, so such connections count and are logged there too.
"""
