"""External authorisation: a service says of each request (or connection) whether it may go on, and how it is to be changed.

The filters are `http.filters.ext_authz` and `tcp.filters.ext_authz`. What is said of a request to the service: `attributes.py`; the ways to it:
`grpc_service.py`, `http_service.py`; what it says: `verdict.py`; what becomes of the request and its response: `mutations.py`.
"""
