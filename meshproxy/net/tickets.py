"""Keys of session tickets that every worker has, whenever a context was made: a session that one began, any other resumes.

OpenSSL makes up the keys of each context, and Python's ssl cannot say others. Contexts that workers inherit with the fork have the same for that reason
(net.tls.compile_downstream); those of listeners and certificates that come later are made in each worker, and get keys that are derived from what all
inherited. OpenSSL is called by ctypes for that, in the library that Python's ssl itself is linked to; where it cannot be found for certain, workers keep
keys of their own, and the other ones shake hands in full.
"""

from __future__ import annotations

import ctypes
import hmac
import ssl
import sys
from functools import cache
from typing import Any

_SET_KEYS, _GET_KEYS = 59, 58  # SSL_CTRL_SET_TLSEXT_TICKET_KEYS, SSL_CTRL_GET_TLSEXT_TICKET_KEYS
_SIZE = 80  # bytes, of OpenSSL 1.1.1 and later: a name, a key of HMAC, a key of AES
SEED_SIZE = 32


def share(context: ssl.SSLContext, seed: bytes, identity: bytes) -> bool:
    """Give a context the keys that follow from `seed`, a secret of all workers, and from what it is; whether that could be done."""
    control = _control()
    if control is None:
        return False
    pointer = _pointer(context)
    keys = b"".join(hmac.digest(seed, bytes((part,)) + identity, "sha512") for part in (0, 1))[:_SIZE]
    return bool(control(pointer, _SET_KEYS, _SIZE, keys) == 1)


def keys_of(context: ssl.SSLContext) -> bytes:
    """The keys that a context has; empty when nobody can tell."""
    control = _control()
    if control is None:
        return b""
    found = ctypes.create_string_buffer(_SIZE)
    return found.raw if control(_pointer(context), _GET_KEYS, _SIZE, found) == 1 else b""


def _pointer(context: ssl.SSLContext) -> int:
    """The SSL_CTX: the first field of Python's object, after what all objects begin with."""
    return int(ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value or 0)


@cache
def _control() -> Any:
    """SSL_CTX_ctrl of the OpenSSL that `ssl` uses; None when this is not certain."""
    if sys.implementation.name != "cpython":
        return None
    try:
        import _ssl

        # The name of an extension module finds what it is linked to, and nothing else of that name; a static one has all in the program.
        library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        version, options, control = library.OpenSSL_version_num, library.SSL_CTX_get_options, library.SSL_CTX_ctrl
    except (ImportError, OSError, AttributeError):
        return None
    version.restype = ctypes.c_ulong
    if version() != ssl.OPENSSL_VERSION_NUMBER:
        return None
    options.restype, options.argtypes = ctypes.c_uint64, (ctypes.c_void_p,)
    control.restype, control.argtypes = ctypes.c_long, (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_void_p)
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    probe.options |= ssl.OP_NO_TICKET
    pointer = _pointer(probe)
    if not pointer or options(pointer) & 0xFFFF_FFFF != int(probe.options) & 0xFFFF_FFFF:
        return None
    return control
