"""The authority's gRPC API: Istio's CreateCertificate, so that its agents work, and SPIFFE's FetchX509Bundles for whoever wants to know of new roots at once.

The answer's `cert_chain` is the leaf, its intermediates, and last, in one text, every root to be trusted: Istio's agent takes that for its ROOTCA.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from control.ca import certificates
from control.ca.attestation import Attestor, AttestorUnavailable, Caller, PeerCredentials, Rejected
from control.ca.authority import Authority, CannotSign, Denied, Issued
from control.ca.csr import BadRequest, parse_csr
from control.ca.keystore import StoreError
from control.peers import is_private
from meshproxy.api import identity_protos
from meshproxy.api.renewal import CHAIN_HEADER, SIGNATURE_HEADER

log = logging.getLogger("meshctl.ca")

PeerOf = Callable[[str], PeerCredentials | None]


class CertificateService:
    """Answers calls. `peer_of`: of what gRPC calls the peer, its Unix credentials (see `server.UnixFront`)."""

    def __init__(self, authority: Authority, attestors: Sequence[Attestor], peer_of: PeerOf = lambda _: None) -> None:
        self._authority = authority
        self._attestors = attestors
        self._peer_of = peer_of
        self._watchers: set[asyncio.Event] = set()
        authority.on_bundle.append(self._bundle_changed)

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """For `add_generic_rpc_handlers` of a grpc.aio server."""
        return (
            _handler(identity_protos.CREATE_CERTIFICATE, grpc.unary_unary_rpc_method_handler, self._create, "istio.v1.auth.IstioCertificateRequest"),
            _handler(identity_protos.FETCH_X509_BUNDLES, grpc.unary_stream_rpc_method_handler, self._bundles, "X509BundlesRequest"),
        )

    async def sign(self, caller: Caller, life_s: float) -> Issued:
        """One request from end to end: read, attest, sign. Raises BadRequest, Rejected, Denied, AttestorUnavailable, CannotSign, StoreError."""
        request = parse_csr(caller.csr)
        for attestor in self._attestors:
            allowed = await attestor.attest(caller, request)
            if allowed is not None:
                return self._authority.issue(request, allowed, life_s)
        raise Rejected("the call proves nothing about who makes it: it needs a token, a certificate, or a Unix socket")

    async def _create(self, request: Any, context: grpc.aio.ServicerContext) -> bytes:
        caller = self._caller(request.csr, context)
        try:
            if not is_private(caller.address, context.auth_context()):
                raise Rejected("whoever is on the way could read a token: connect by TLS")
            issued = await self.sign(caller, float(request.validity_duration))
        except BadRequest as error:
            code, why = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except Rejected as error:
            code, why = grpc.StatusCode.UNAUTHENTICATED, str(error)
        except Denied as error:
            code, why = grpc.StatusCode.PERMISSION_DENIED, str(error)
        except (AttestorUnavailable, CannotSign, StoreError) as error:
            code, why = grpc.StatusCode.UNAVAILABLE, str(error)
        else:
            log.info("signed for %s (%s) until %.0f", issued.identity, caller.address, issued.not_after)
            response = identity_protos.message("istio.v1.auth.IstioCertificateResponse")()
            response.cert_chain.extend(certificates.pem(one) for one in issued.chain)
            response.cert_chain.append(certificates.pem(*issued.bundle))
            return bytes(response.SerializeToString())
        log.warning("not signed for %s: %s", caller.address, why)
        await context.abort(code, why)
        raise AssertionError

    def _caller(self, csr: str, context: grpc.aio.ServicerContext) -> Caller:
        metadata = list(context.invocation_metadata() or ())
        found = dict(metadata)
        certificate = context.auth_context().get("x509_pem_cert", [b""])[0]
        chain, proof = found.get(CHAIN_HEADER, b""), found.get(SIGNATURE_HEADER, b"")
        return Caller(
            tokens=tuple(str(value)[7:].strip() for key, value in metadata if key == "authorization" and str(value)[:7].lower() == "bearer "),
            peer=self._peer_of(context.peer()),
            certificate=certificate.decode("latin-1"),
            proof_chain=chain.decode("latin-1") if isinstance(chain, bytes) else "",
            proof=proof if isinstance(proof, bytes) else b"",
            csr=csr,
            address=context.peer(),
        )

    # -- bundles

    async def _bundles(self, _: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        if identity_protos.WORKLOAD_HEADER not in [(key, value) for key, value in context.invocation_metadata() or ()]:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                response = identity_protos.message("X509BundlesResponse")()
                der = b"".join(one.public_bytes(Encoding.DER) for one in self._authority.bundle())
                response.bundles[f"spiffe://{self._authority.trust_domain}"] = der
                yield response.SerializeToString()
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def _bundle_changed(self) -> None:
        for changed in self._watchers:
            changed.set()


def _handler(method: str, kind: Any, function: Any, request: str) -> grpc.GenericRpcHandler:
    _, service, name = method.split("/")
    return grpc.method_handlers_generic_handler(service, {name: kind(function, request_deserializer=identity_protos.message(request).FromString)})
