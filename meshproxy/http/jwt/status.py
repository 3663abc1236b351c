"""What can be wrong with a token or with keys: Envoy's codes (`failed_status_in_metadata` shows them) and words (they are the body of the reply)."""

from __future__ import annotations

import enum
from typing import Self


class Status(enum.IntEnum):
    """A verdict. `text` is what the client is told."""

    text: str

    def __new__(cls, value: int, text: str) -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member

    OK = 0, "OK"
    MISSING = 1, "Jwt is missing"
    NOT_YET_VALID = 2, "Jwt not yet valid"
    EXPIRED = 3, "Jwt is expired"
    BAD_FORMAT = 4, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
    HEADER_BAD_BASE64 = 5, "Jwt header is an invalid Base64url encoded"
    HEADER_BAD_JSON = 6, "Jwt header is an invalid JSON"
    HEADER_BAD_ALG = 7, "Jwt header [alg] field is required and must be a string"
    HEADER_UNKNOWN_ALG = 8, "Jwt header [alg] is not supported"
    HEADER_BAD_KID = 9, "Jwt header [kid] field is not a string"
    PAYLOAD_BAD_BASE64 = 10, "Jwt payload is an invalid Base64url encoded"
    PAYLOAD_BAD_JSON = 11, "Jwt payload is an invalid JSON"
    ISS_NOT_STRING = 12, "Jwt payload [iss] field is not a string"
    SUB_NOT_STRING = 13, "Jwt payload [sub] field is not a string"
    IAT_NOT_INTEGER = 14, "Jwt payload [iat] field is not an integer"
    IAT_OUT_OF_RANGE = 15, "Jwt payload [iat] field is not a positive 64 bit integer"
    NBF_NOT_INTEGER = 16, "Jwt payload [nbf] field is not an integer"
    NBF_OUT_OF_RANGE = 17, "Jwt payload [nbf] field is not a positive 64 bit integer"
    EXP_NOT_INTEGER = 18, "Jwt payload [exp] field is not an integer"
    EXP_OUT_OF_RANGE = 19, "Jwt payload [exp] field is not a positive 64 bit integer"
    JTI_NOT_STRING = 20, "Jwt payload [jti] field is not a string"
    AUD_NOT_STRING = 21, "Jwt payload [aud] field is not a string or string list"
    SIGNATURE_BAD_BASE64 = 22, "Jwt signature is an invalid Base64url encoded"
    ED25519_WRONG_LENGTH = 23, "Jwt ED25519 signature is wrong length"
    UNKNOWN_ISSUER = 24, "Jwt issuer is not configured"
    AUDIENCE_NOT_ALLOWED = 25, "Audiences in Jwt are not allowed"
    VERIFICATION_FAILS = 26, "Jwt verification fails"
    JWKS_BAD_JSON = 28, "Jwks is an invalid JSON"
    JWKS_NO_KEYS = 29, "Jwks does not have [keys] field"
    JWKS_BAD_KEYS = 30, "[keys] in Jwks is not an array"
    JWKS_NO_VALID_KEYS = 31, "Jwks doesn't have any valid public key"
    JWKS_NO_MATCH = 32, "Jwks doesn't have key to match kid or alg from Jwt"
    RSA_PARSE = 33, "Jwks RSA [n] or [e] field is missing or has a parse error"
    EC_BAD_BASE64 = 35, "Jwks EC [x] or [y] field is an invalid Base64."
    EC_PARSE = 36, "Jwks EC [x] and [y] fields have a parse error."
    OCT_BAD_BASE64 = 37, "Jwks Oct key is an invalid Base64"
    OKP_BAD_BASE64 = 38, "Jwks OKP [x] field is an invalid Base64."
    OKP_WRONG_LENGTH = 39, "Jwks OKP [x] field is wrong length."
    FETCH_FAILED = 40, "Jwks remote fetch is failed"
    KTY_MISSING = 41, "[kty] is missing in [keys]"
    KTY_BAD = 42, "[kty] is bad in [keys]"
    KTY_UNKNOWN = 43, "[kty] is not supported in [keys]"
    RSA_BAD_ALG = 44, "[alg] is not started with [RS] or [PS] for an RSA key"
    RSA_N_MISSING = 45, "[n] field is missing for a RSA key"
    RSA_N_BAD = 46, "[n] field is not string for a RSA key"
    RSA_E_MISSING = 47, "[e] field is missing for a RSA key"
    RSA_E_BAD = 48, "[e] field is not string for a RSA key"
    EC_BAD_ALG = 49, "[alg] is not started with [ES] for an EC key"
    EC_CRV_BAD = 50, "[crv] field is not string for an EC key"
    EC_UNKNOWN = 51, "[crv] or [alg] field is not supported for an EC key"
    EC_CONTRADICTION = 52, "[crv] field specified is not compatible with [alg] for an EC key"
    EC_X_MISSING = 53, "[x] field is missing for an EC key"
    EC_X_BAD = 54, "[x] field is not string for an EC key"
    EC_Y_MISSING = 55, "[y] field is missing for an EC key"
    EC_Y_BAD = 56, "[y] field is not string for an EC key"
    OCT_BAD_ALG = 57, "[alg] does not start with [HS] for an HMAC key"
    OCT_K_MISSING = 58, "[k] field is missing for an HMAC key"
    OCT_K_BAD = 59, "[k] field is not string for an HMAC key"
    OKP_BAD_ALG = 60, "[alg] is not [EdDSA] for an OKP key"
    OKP_CRV_MISSING = 61, "[crv] field is missing for an OKP key"
    OKP_CRV_BAD = 62, "[crv] field is not string for an OKP key"
    OKP_CRV_UNKNOWN = 63, "[crv] field is not supported for an OKP key"
    OKP_X_MISSING = 64, "[x] field is missing for an OKP key"
    OKP_X_BAD = 65, "[x] field is not string for an OKP key"
    X509_PARSE = 67, "X509 parse pubkey fails"
    X509_KEY = 68, "X509 parse pubkey internal fails: get pubkey"


class Bad(Exception):
    """A token or key that is wrong; `status` says how. Raised and caught in this package alone."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.text)
        self.status = status
