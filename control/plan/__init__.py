"""What a change of documents will do, before it is done: `meshctl diff` and `meshctl apply`.

`compare` knows resources of proxies, `files` folders; `show` prints, `commands` wires them together.
"""
