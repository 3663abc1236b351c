"""Sockets: listening, inspecting, TLS, dialling, moving bytes. Knows nothing of HTTP.

Downstream, in the order of a connection: `sockets` (main binds), `listener` (a worker accepts), `inspect` (listener filters peek), `filter_chain_match` and
`filter_chain` (which chain, compiled), `tls` with `tls_config`, `tls_verify` and `tls_stats` (handshakes), `gates` (network filters that must decide first),
then the terminal filter's protocol. `connection` is what is known of it all.
Upstream: `dial` connects, with the same `sockets` and `tls`.
For both: `splice` and `relay` move bytes, `certificate` reads X.509, `timers`, `tasks`, `drain`, `token_bucket`, `shared` (numbers that workers share).

Imports `observe`, `api` and `codec` only.
"""
