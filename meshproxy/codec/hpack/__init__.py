"""HPACK (RFC 7541), the header compression of HTTP/2, sans-IO. Imports nothing of ours but `codec.headers`.

`decoder.Decoder` turns header blocks into `Fields`, `encoder.Encoder` fields into blocks; one of each per connection. `tables` has the static table,
`huffman` the Huffman code; `memos`, `layout`, `scan` and `foresight` are the decoder's. Both directions work by memos: what repeats costs a look-up, and
decision 0008 says what the rest costs.
"""
