"""The spelling of header names towards downstreams: the same as towards upstreams, see `codec.header_case`."""

from meshproxy.codec.header_case import compile, proper_case  # noqa: A004  used as header_case.compile

__all__ = ["compile", "proper_case"]
