"""Dynamic configuration: what a control plane or files say while the proxy runs. Imported, by main alone, when the configuration asks for it.

`session.py` is the protocol, sans-IO. `sources.py` turns a ConfigSource into a subscription: to a file (`files.py`) or to a stream of a control plane
(`client.py`, with `mux.py` between a stream and those who subscribed). `store.py` holds what was accepted, warms what must not be used yet, and tells the
workers. Start reading there.
"""
