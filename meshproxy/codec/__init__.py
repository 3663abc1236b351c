"""Bytes to messages and back, sans-IO: no asyncio, sockets or clocks. Imports nothing else of ours.

Start with `h1` (HTTP/1.1 both ways; parsers push what they read to a sink) and `headers` (the heads that everybody passes around). `hpack` is the header
compression of HTTP/2. `grpc` knows gRPC's statuses and framing; `metering` counts bytes as Envoy's logs do. `client_hello` and `proxy_protocol` read what may
come before a protocol on a connection.
"""
