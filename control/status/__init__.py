"""What a control plane tells a cluster about its objects: conditions of the Gateway API, and Events about what is refused. One replica does, by a Lease.

`gateway_api.py` decides, and knows no network; `writer.py` writes; `lease.py` says who. Nothing of what is served depends on it.
"""
