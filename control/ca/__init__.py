"""The authority of the mesh: who is who, by X.509.

`authority.py` is the whole of it: it opens what `keystore.py` keeps in files, lets `rotation.py` (pure: state and time in, decisions out) say who signs and
what is trusted, and signs (`certificates.py`) what `csr.py` let through. Start reading there.
"""
