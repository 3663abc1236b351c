"""Path normalisation (RFC 3986 section 6), once, before routing, access control and forwarding: all three see the same string.

As Envoy: dot segments are removed and needless percent-encoding of unreserved characters is undone (`normalize_path`), runs of slashes are merged
(`merge_slashes`), escaped slashes are treated as `path_with_escaped_slashes_action` says. A path with a fragment is refused whatever the options.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from meshproxy.api.matchers import HASH

KEEP, REJECT, UNESCAPE_AND_REDIRECT, UNESCAPE_AND_FORWARD = range(4)
PASS, REDIRECT, REFUSE = range(3)

_ESCAPED_SLASH = re.compile(rb"%(2[fF]|5[cC])")
_ESCAPED = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_SLASHES = re.compile(rb"/{2,}")


class PathOptions:
    """What to do to paths."""

    __slots__ = ("escaped_slashes", "is_plain", "merge_slashes", "normalize")

    def __init__(self, *, normalize: bool = False, merge_slashes: bool = False, escaped_slashes: int = KEEP) -> None:
        self.normalize = normalize
        self.merge_slashes = merge_slashes
        self.escaped_slashes = escaped_slashes
        # Whether a path certainly stays as it is: one C call in place of a walk through the path.
        suspicious = [rb"#"]
        if normalize:
            suspicious += [rb"%", rb"/\.", rb"\\"]
        if merge_slashes:
            suspicious.append(rb"//")
        if escaped_slashes != KEEP:
            suspicious.append(rb"%")
        search = re.compile(b"|".join(suspicious)).search
        self.is_plain: Callable[[bytes], bool] = has_no_fragment if len(suspicious) == 1 else lambda path: search(path) is None


def has_no_fragment(path: bytes) -> bool:
    """HOT code knows it, and does the same without a call."""
    return HASH not in path  # a number: for bytes, `in` first fails to take its operand for one


def normalise(path: bytes, options: PathOptions) -> tuple[bytes, int]:
    """The path to use, and what to do with it: PASS, REDIRECT the client to it, or REFUSE."""
    if b"#" in path:
        return path, REFUSE
    target, question, query = path.partition(b"?")
    verdict = PASS
    action = options.escaped_slashes
    if action != KEEP and _ESCAPED_SLASH.search(target):
        target = _ESCAPED_SLASH.sub(lambda match: b"/" if match.group(1)[:1] == b"2" else b"\\", target)
        if action == REJECT:
            return target + question + query, REFUSE
        verdict = REDIRECT if action == UNESCAPE_AND_REDIRECT else PASS
    if options.normalize:
        if b"%00" in target:
            return path, REFUSE
        target = _ESCAPED.sub(_decode_unreserved, target).replace(b"\\", b"/")
        target = _remove_dot_segments(target)
    if options.merge_slashes:
        target = _SLASHES.sub(b"/", target) if target.strip(b"/") else b"//"[: len(target)]  # as Envoy: two are left of nothing but slashes
    return target + question + query, verdict


def _decode_unreserved(match: re.Match[bytes]) -> bytes:
    byte = int(match.group(1), 16)
    return bytes((byte,)) if byte in _UNRESERVED else match.group(0)


def _remove_dot_segments(path: bytes) -> bytes:
    """RFC 3986 5.2.4 for an absolute path. `..;x` is a dot segment too: servers that know path parameters take them off first."""
    out: list[bytes] = []
    segments = path.split(b"/")[1:]
    last = len(segments) - 1
    for position, segment in enumerate(segments):
        name = segment.partition(b";")[0] if segment[:1] == b"." else segment
        if name == b".":
            if position == last:
                out.append(b"")
        elif name == b"..":
            if out:
                out.pop()
            if position == last:
                out.append(b"")
        else:
            out.append(segment)
    return b"/" + b"/".join(out)
