"""A peer's X.509 certificate, read from its DER bytes.

A reader of our own, for the few fields that identities, logs and headers need: importing a cryptography library costs each worker 8 MB. Nothing here
verifies anything; OpenSSL has done so before. Names and values are compared as the full bytes that the certificate holds, embedded NUL included, so that
no shorter text can pass for a longer one.

Structure: RFC 5280 section 4.1; names as text: RFC 2253 as OpenSSL's XN_FLAG_RFC2253 prints them.
"""

from __future__ import annotations

import base64
import calendar
from collections.abc import Iterator

_SAN_OID = b"\x55\x1d\x11"
_EMAIL, _DNS, _URI, _IP, _OTHER = 1, 2, 6, 7, 0

_ATTRIBUTES = {
    b"\x55\x04\x03": "CN",
    b"\x55\x04\x04": "SN",
    b"\x55\x04\x05": "serialNumber",
    b"\x55\x04\x06": "C",
    b"\x55\x04\x07": "L",
    b"\x55\x04\x08": "ST",
    b"\x55\x04\x09": "street",
    b"\x55\x04\x0a": "O",
    b"\x55\x04\x0b": "OU",
    b"\x55\x04\x0c": "title",
    b"\x55\x04\x2a": "GN",
    b"\x55\x04\x2b": "initials",
    b"\x55\x04\x2e": "dnQualifier",
    b"\x55\x04\x41": "pseudonym",
    b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x01": "UID",
    b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19": "DC",
    b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x01": "emailAddress",
}


class DerError(ValueError):
    """The bytes are not the DER of a certificate."""


class Certificate:
    """One certificate. The fields are parsed together when the first of them is asked for; DerError when `der` is not a certificate.

    `subject` and `issuer` are RFC 2253 text; `serial` is lower-case hexadecimal; `not_before` and `not_after` are Unix times. The SANs are tuples of text
    (Latin-1, so that text and bytes correspond one to one); `ip_sans` are 4 or 16 raw bytes each.
    """

    __slots__ = ("_fields", "der")

    def __init__(self, der: bytes) -> None:
        self.der = der
        self._fields: _Fields | None = None

    @property
    def _parsed(self) -> _Fields:
        fields = self._fields
        if fields is None:
            fields = self._fields = _Fields(self.der)
        return fields

    @property
    def subject(self) -> str:
        """RFC 2253 text: `CN=leaf,O=Example`."""
        return name_text(self._parsed.subject)

    @property
    def issuer(self) -> str:
        """RFC 2253 text of the issuer's name."""
        return name_text(self._parsed.issuer)

    @property
    def serial(self) -> str:
        """Serial number in lower-case hexadecimal, whole bytes without leading zero bytes, as Envoy's TLS library writes it."""
        number = int.from_bytes(self._parsed.serial, "big", signed=True)
        digits = f"{abs(number):x}"
        return f"{'-' if number < 0 else ''}{'0' if number and len(digits) % 2 else ''}{digits}"

    @property
    def not_before(self) -> int:
        """Unix time."""
        return self._parsed.not_before

    @property
    def not_after(self) -> int:
        """Unix time."""
        return self._parsed.not_after

    @property
    def uri_sans(self) -> tuple[str, ...]:
        """URI subject alternative names, in the order of the certificate."""
        return self._texts(_URI)

    @property
    def dns_sans(self) -> tuple[str, ...]:
        """DNS subject alternative names."""
        return self._texts(_DNS)

    @property
    def email_sans(self) -> tuple[str, ...]:
        """E-mail subject alternative names."""
        return self._texts(_EMAIL)

    @property
    def ip_sans(self) -> tuple[bytes, ...]:
        """IP address subject alternative names as raw bytes."""
        return tuple(value for tag, value in self._parsed.sans if tag == _IP)

    @property
    def other_sans(self) -> tuple[tuple[str, bytes], ...]:
        """otherName subject alternative names: dotted object identifier, and the text of the value's string."""
        return tuple(_other_name(value) for tag, value in self._parsed.sans if tag == _OTHER)

    @property
    def spki_sha256(self) -> bytes:
        """SHA-256 of the subject public key info: what `verify_certificate_spki` pins."""
        import hashlib

        return hashlib.sha256(self._parsed.spki).digest()

    @property
    def sha256(self) -> str:
        """Fingerprint in lower-case hexadecimal."""
        import hashlib

        return hashlib.sha256(self.der).hexdigest()

    @property
    def sha1(self) -> str:
        """SHA-1 fingerprint in lower-case hexadecimal."""
        import hashlib

        return hashlib.sha1(self.der, usedforsecurity=False).hexdigest()

    @property
    def pem(self) -> str:
        """PEM text, ending in a newline."""
        text = base64.b64encode(self.der).decode("ascii")
        lines = [text[at : at + 64] for at in range(0, len(text), 64)]
        return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])

    def _texts(self, wanted: int) -> tuple[str, ...]:
        return tuple(value.decode("latin-1") for tag, value in self._parsed.sans if tag == wanted)

    def __repr__(self) -> str:
        return f"<certificate {self.subject}>"


class _Fields:
    """The parts of a certificate as slices of its DER."""

    __slots__ = ("issuer", "not_after", "not_before", "sans", "serial", "spki", "subject")

    def __init__(self, der: bytes) -> None:
        tbs = list(_elements(_only(_only(der, 0x30), 0x30)))
        if tbs and tbs[0][0] == 0xA0:  # [0] EXPLICIT version
            del tbs[0]
        if len(tbs) < 6:
            raise DerError("a certificate has too few fields")
        self.serial = tbs[0][1]
        self.issuer = tbs[2][1]
        validity = list(_children(tbs[3][1]))
        if len(validity) != 2:
            raise DerError("a validity is not two times")
        self.not_before, self.not_after = (_time(tag, value) for tag, value in validity)
        self.subject = tbs[4][1]
        self.spki = tbs[5][2]
        self.sans: tuple[tuple[int, bytes], ...] = ()
        for tag, value, _ in tbs[6:]:
            if tag == 0xA3:
                self.sans = _subject_alt_names(value)


def pem_certificates(pem: bytes) -> list[Certificate]:
    """Every certificate of a PEM text, in order; text around them is ignored."""
    found = []
    for part in pem.split(b"-----BEGIN CERTIFICATE-----")[1:]:
        body, end, _ = part.partition(b"-----END CERTIFICATE-----")
        if not end:
            raise DerError("a PEM certificate has no end line")
        try:
            found.append(Certificate(base64.b64decode(b"".join(body.split()), validate=True)))
        except ValueError as error:
            raise DerError("a PEM certificate is not base64") from error
    return found


def name_text(name: bytes) -> str:
    """A distinguished name (the content of its SEQUENCE) as RFC 2253 text: last part first."""
    rdns = []
    for _, rdn in _children(name):
        pairs = []
        for _, attribute in _children(rdn):
            parts = list(_children(attribute))
            if len(parts) != 2:
                raise DerError("a name's attribute is not a type and a value")
            pairs.append(_attribute_text(parts[0][1], *parts[1]))
        rdns.append("+".join(reversed(pairs)))
    return ",".join(reversed(rdns))


def _attribute_text(oid: bytes, tag: int, value: bytes) -> str:
    name = _ATTRIBUTES.get(oid)
    if name is None:
        return f"{_dotted(oid)}=#{bytes((tag,)).hex().upper()}{_length_bytes(len(value)).hex().upper()}{value.hex().upper()}"
    return f"{name}={_escape(_utf8(tag, value))}"


def _utf8(tag: int, value: bytes) -> bytes:
    """A string's bytes as UTF-8, whatever ASN.1 string type it has."""
    try:
        if tag == 0x1E:  # BMPString
            return value.decode("utf-16-be").encode()
        if tag == 0x1C:  # UniversalString
            return value.decode("utf-32-be").encode()
    except UnicodeError as error:
        raise DerError("a wide string is malformed") from error
    if tag == 0x0C:  # UTF8String
        return value
    return value.decode("latin-1").encode()


def _escape(value: bytes) -> str:
    last = len(value) - 1
    out = []
    for at, byte in enumerate(value):
        if byte < 0x20 or byte >= 0x7F:
            out.append(f"\\{byte:02X}")
        elif byte in b',+"\\<>;' or (byte == 0x20 and at in (0, last)) or (byte == 0x23 and at == 0):
            out.append("\\" + chr(byte))
        else:
            out.append(chr(byte))
    return "".join(out)


def _subject_alt_names(extensions: bytes) -> tuple[tuple[int, bytes], ...]:
    for _, extension in _children(_only(extensions, 0x30)):
        parts = list(_children(extension))
        if len(parts) >= 2 and parts[0][1] == _SAN_OID:
            names = _only(parts[-1][1], 0x30)
            return tuple((tag & 0x1F, value) for tag, value in _children(names))
    return ()


def _other_name(value: bytes) -> tuple[str, bytes]:
    parts = list(_children(value))
    if len(parts) != 2:
        raise DerError("an otherName is not a type and a value")
    inner = list(_children(parts[1][1]))
    return _dotted(parts[0][1]), inner[0][1] if inner else b""


def _dotted(oid: bytes) -> str:
    numbers: list[int] = []
    number = 0
    for byte in oid:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    if not numbers:
        raise DerError("an object identifier is empty")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _time(tag: int, value: bytes) -> int:
    """UTCTime (0x17: two-digit year, 1950 to 2049) or GeneralizedTime (0x18), both in UTC (RFC 5280 section 4.1.2.5)."""
    text = value.decode("latin-1")
    if tag == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    digits = text[:-1]
    if tag not in (0x17, 0x18) or len(digits) != 14 or text[-1] != "Z" or not (digits.isascii() and digits.isdigit()):
        raise DerError("a time is malformed")
    year, rest = int(digits[:4]), [int(digits[at : at + 2]) for at in range(4, 14, 2)]
    try:
        return calendar.timegm((year, *rest, 0, 0, 0))
    except ValueError:  # the 13th month
        raise DerError("a time does not exist") from None


def _length_bytes(length: int) -> bytes:
    if length < 0x80:
        return bytes((length,))
    size = (length.bit_length() + 7) // 8
    return bytes((0x80 | size,)) + length.to_bytes(size, "big")


def _only(data: bytes, wanted: int) -> bytes:
    """The content of the first element of `data`, whose tag must be `wanted`."""
    for tag, value, _ in _elements(data):
        if tag == wanted:
            return value
        break
    raise DerError(f"expected an element with tag {wanted:#x}")


def _children(data: bytes) -> Iterator[tuple[int, bytes]]:
    for tag, value, _ in _elements(data):
        yield tag, value


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Tag, content and whole encoding of each element of `data`. Tags above 30 do not occur in what is read here."""
    at, end = 0, len(data)
    while at < end:
        start = at
        if at + 2 > end:
            raise DerError("an element is cut short")
        tag, length = data[at], data[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            if not 0 < size <= 4 or at + size > end:
                raise DerError("a length is malformed")
            length = int.from_bytes(data[at : at + size], "big")
            at += size
        if at + length > end:
            raise DerError("an element is cut short")
        yield tag, data[at : at + length], data[start : at + length]
        at += length
