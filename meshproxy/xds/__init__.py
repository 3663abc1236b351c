"""Dynamic configuration: what a control plane or files say while the proxy runs. Imported, by main alone, when the configuration asks for it.

`sources.py` turns a ConfigSource into a subscription (`subscription.py`): to a file (`files.py`), or to a stream of a control plane (`client.py`, over the
protocol in `session.py`, which is sans-IO). `clusters.py`, `endpoints.py`, `listeners.py`, `routes.py`, `secrets.py` and `extensions.py` are what subscribes:
they know what was accepted, warm what must not be used yet (`needs.py`), and tell the workers through `meshproxy.dynamic`, which puts it all together.
`loads.py` reports load to a control plane.
"""
