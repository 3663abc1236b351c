"""TCP without HTTP: the TCP proxy (`proxy.py` is what its connections share, `session.py` is one of them) and the network filters in `filters/`.

A connection that travels in an HTTP request to the upstream is in `tunnel.py`, what such requests have in common in `tunneling.py`.
"""
