"""What a TLS server says in clear at the beginning of a handshake: the group of the key exchange and, before TLS 1.3, its certificate and how it signed.

Python's ssl tells none of it, or only when the handshake is over. The bytes pass through the memory of this process anyway: those that a server sends and
those that a client receives. Sources: RFC 8446 section 4, RFC 5246 section 7.4, RFC 8422 section 5.4.
"""

from __future__ import annotations

_HANDSHAKE = 22  # record type
_SERVER_HELLO, _CERTIFICATE, _SERVER_KEY_EXCHANGE, _SERVER_HELLO_DONE = 2, 11, 12, 14
_KEY_SHARE = 51  # extension
_NAMED_CURVE = 3  # curve type
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4
_MOST = 1 << 18  # bytes; more than any certificate chain that OpenSSL takes

UNKNOWN_GROUP, UNKNOWN_SIGNATURE = "unknown_ssl_curve", "unknown_ssl_algorithm"
GROUPS = {21: "P-224", 23: "P-256", 24: "P-384", 25: "P-521", 29: "X25519", 4588: "X25519MLKEM768"}
SIGNATURES = {
    0x0201: "rsa_pkcs1_sha1",
    0x0203: "ecdsa_sha1",
    0x0401: "rsa_pkcs1_sha256",
    0x0403: "ecdsa_secp256r1_sha256",
    0x0501: "rsa_pkcs1_sha384",
    0x0503: "ecdsa_secp384r1_sha384",
    0x0601: "rsa_pkcs1_sha512",
    0x0603: "ecdsa_secp521r1_sha512",
    0x0804: "rsa_pss_rsae_sha256",
    0x0805: "rsa_pss_rsae_sha384",
    0x0806: "rsa_pss_rsae_sha512",
    0x0807: "ed25519",
}


class ServerFlight:
    """Reads a server's first flight. `group` and `signature` are names as Envoy's stats have them, "" while they are not known; `certificate` is DER.

    OpenSSL judges the same bytes: what is malformed only ends the reading here.
    """

    __slots__ = ("_messages", "_records", "certificate", "group", "signature")

    def __init__(self) -> None:
        self.group = ""
        self.signature = ""
        self.certificate = b""
        self._records = bytearray()
        self._messages = bytearray()

    def feed(self, data: bytes) -> bool:
        """More bytes of the server. True: nothing is left to be learnt, do not call again."""
        records, messages = self._records, self._messages
        records += data
        while len(records) >= _RECORD_HEADER:
            if records[0] != _HANDSHAKE or len(records) + len(messages) > _MOST:
                return True  # encrypted from here on, or an alert
            end = _RECORD_HEADER + int.from_bytes(records[3:5])
            if len(records) < end:
                return False
            messages += records[_RECORD_HEADER:end]
            del records[:end]
            if self._read_messages():
                return True
        return False

    def _read_messages(self) -> bool:
        messages = self._messages
        while len(messages) >= _MESSAGE_HEADER:
            end = _MESSAGE_HEADER + int.from_bytes(messages[1:4])
            if len(messages) < end:
                return False
            kind, body = messages[0], bytes(messages[_MESSAGE_HEADER:end])
            del messages[:end]
            if kind == _SERVER_HELLO:
                self._server_hello(body)
                if self.group:
                    return True  # TLS 1.3, or its request to begin again with this group: all else is encrypted
            elif kind == _CERTIFICATE:
                self.certificate = body[6 : 6 + int.from_bytes(body[3:6])]
            elif kind == _SERVER_KEY_EXCHANGE:
                self._key_exchange(body)
            elif kind == _SERVER_HELLO_DONE:
                return True
        return False

    def _server_hello(self, body: bytes) -> None:
        at = 2 + 32  # version, random
        at += 1 + int.from_bytes(body[at : at + 1])  # session id
        at += 2 + 1 + 2  # cipher suite, compression, length of the extensions
        while at + 4 <= len(body):
            kind, length = int.from_bytes(body[at : at + 2]), int.from_bytes(body[at + 2 : at + 4])
            if kind == _KEY_SHARE:
                self.group = _group(body[at + 4 : at + 6])
            at += 4 + length

    def _key_exchange(self, body: bytes) -> None:
        if body[:1] != bytes((_NAMED_CURVE,)):
            return
        self.group = _group(body[1:3])
        at = 4 + int.from_bytes(body[3:4])  # after the public key
        if len(body) >= at + 2:
            self.signature = SIGNATURES.get(int.from_bytes(body[at : at + 2]), UNKNOWN_SIGNATURE)


def _group(code: bytes) -> str:
    return GROUPS.get(int.from_bytes(code), UNKNOWN_GROUP)


# The algorithm identifiers of public keys, and what their owners sign with under TLS 1.3.
_EC_KEY = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"
_KEYS = (
    (_EC_KEY + b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07", "ecdsa_secp256r1_sha256"),
    (_EC_KEY + b"\x06\x05\x2b\x81\x04\x00\x22", "ecdsa_secp384r1_sha384"),
    (_EC_KEY + b"\x06\x05\x2b\x81\x04\x00\x23", "ecdsa_secp521r1_sha512"),
    (b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01", "rsa_pss_rsae_sha256"),
)


def usual_signature(certificate: bytes) -> str:
    """What the owner of a certificate (DER) signs handshakes with: for elliptic curves TLS 1.3 leaves no choice, RSA keys nearly always take SHA-256."""
    for key, name in _KEYS:
        if key in certificate:
            return name
    return "ed25519" if b"\x30\x05\x06\x03\x2b\x65\x70" in certificate else UNKNOWN_SIGNATURE
