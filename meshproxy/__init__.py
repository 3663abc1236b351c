"""meshproxy: an Envoy-compatible service mesh sidecar in pure Python.

Start reading at `cli.py` (flags), then `supervisor.py` (the main process) and `worker.py` (a process that moves traffic). A package imports only from
the packages above it in this list, which is also the order in which bytes travel:

codec     bytes <-> messages, sans-IO
api       the Envoy API as we use it: bootstrap, constraints, matchers, registry
observe   stats, access logs, formats
net       listeners, connections, TLS, timers
upstream  clusters, hosts, pools, balancing, health
http      connection manager, routes, router, filters
tcp       TCP proxy and network filters
xds       dynamic configuration
admin     Envoy's admin endpoints
"""

__version__ = "0.1.0"
