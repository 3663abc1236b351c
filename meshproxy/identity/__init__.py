"""Who this workload is: a certificate with its key, and whom it trusts, kept fresh.

`svid.py` is what is held. A source gets it and keeps it from expiring: `workload.py` from an authority with Istio's API, with a key that is made here and
never leaves memory; `spire.py` from a SPIRE agent. `provider.py` hands it out as the secrets that Envoy configurations name (`default` and `ROOTCA`), to
whoever watches: this proxy's own TLS contexts, or an SDS server beside another proxy. `schedule.py` says when to renew and how long to wait after a failure.

Knows no network: calls are made by what implements `calls.Calls`. Imports `meshproxy.api` only, so that the control plane's agent can use it as well.
Imported by main, never by workers: the cryptography library takes memory.
"""
