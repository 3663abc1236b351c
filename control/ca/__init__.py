"""The authority of the mesh: who is who, by X.509.

`authority.py` is the whole of it: it opens what `keystore.py` keeps in files, lets `rotation.py` (pure: state and time in, decisions out) say who signs and
what is trusted, and signs (`certificates.py`) what `csr.py` let through. Start reading there. `service.py` is its gRPC API, Istio's; before it stand the
attestors of `attestation.py`, `tokens.py` and `kubernetes.py`, which say who a caller is. `server.py` listens. `agent.py` and `sds.py` hold an identity (from
`meshproxy.identity`) for a proxy that cannot do so itself, such as the real Envoy.
"""
