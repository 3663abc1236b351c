"""TCP without HTTP: the TCP proxy (`proxy.py` is what its connections share, `session.py` is one of them) and the network filters in `filters/`."""
