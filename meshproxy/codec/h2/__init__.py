"""HTTP/2 on the wire (RFC 9113), sans-IO: bytes in, calls on streams out; what is to be sent collects in `Session.out`.

`session.py` is one connection, seen from either side; `stream.py` one request on it, the base class of what owners make of it. `frames.py` has the frames,
`fields.py` what a list of fields has to be like to be a message, `settings.py` what configuration says, `errors.py` how peers can fail us.
"""
