"""A server that gRPC's own xDS client configures: NAME ADDRESS. It answers with its name, who called, and the serial number of the caller's certificate.

A process of its own because gRPC reads GRPC_XDS_BOOTSTRAP once. It ends with its standard input. Connections are short, so that certificates are used.
"""

from __future__ import annotations

import json
import sys
from concurrent import futures

import grpc
from cryptography import x509

_OPTIONS = [("grpc.max_connection_age_ms", 300), ("grpc.max_connection_age_grace_ms", 10_000)]


def _answer(name: str, context: grpc.ServicerContext) -> bytes:
    found = context.auth_context()
    pem = found.get("x509_pem_cert")
    serial = x509.load_pem_x509_certificate(pem[0]).serial_number if pem else 0
    return json.dumps({"name": name, "caller": [one.decode() for one in context.peer_identities() or ()], "serial": serial}).encode()


def main() -> None:
    name, address = sys.argv[1:]
    server = grpc.server(futures.ThreadPoolExecutor(4), xds=True, options=_OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(lambda _request, context: _answer(name, context))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("t.Who", {"Are": handler})])
    server.add_secure_port(address, grpc.xds_server_credentials(grpc.insecure_server_credentials()))
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


if __name__ == "__main__":
    main()
