"""Envoy's admin endpoints, served by main through our own HTTP stack.

`endpoints.py` is the table: what exists, what it takes, what /help says. A handler is a function of (`Request`, `Server`) that returns a `Response` or an
awaitable of one; it may ask the workers. Texts and JSON are Envoy's to the byte where a tool could depend on them. `listener.py` puts the table behind an
HTTP connection manager. Handlers import what only they need when they run: most sidecars are never asked for most endpoints.
"""
