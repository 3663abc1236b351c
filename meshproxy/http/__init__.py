"""HTTP: from a downstream connection through filters to an upstream one, and back. Imports upstream and what is below it; filters import nothing of their
siblings.

Start with `manager` (what all connections of a connection manager share), then `connection` (one of them, the codec's sink; `http2_connection` and
`http2_exchange` for HTTP/2, `downstream` for what both do, `exchange` for what both are to a request), `stream` (one request on its way through the
filters) and `router` (its way upstream: `retry`, `timeouts`, `mirror`). `plan` has the shorter ways that most requests take to the same end.

`routes` is the route table; `virtual_host`, `route_index` and `route_match` find a route, `route` is a compiled one, and what it does is in
`route_rewrite`, `route_replies`, `header_mutations`, `weighted_clusters`, `hash_policy`, `mirror_policy`, `rate_limits`. `request_head` is what happens to a
head before it is routed. Each filter is one file in `filters/`.
"""
