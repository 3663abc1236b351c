"""Dynamic configuration: what a control plane or files say while the proxy runs. Imported, by main alone, when the configuration asks for it.

`sources.py` turns a ConfigSource into a subscription (`subscription.py`), so far to a file (`files.py`); `session.py` is the protocol of control planes,
sans-IO. `clusters.py`, `endpoints.py`, `listeners.py` and `routes.py` are what subscribes: they know what was accepted, warm what must not be used yet, and
tell the workers through `meshproxy.dynamic`, which puts it all together.
"""
