"""(proxy, snapshot) -> xDS resources, purely: whatever decides about a resource is an argument of the function that makes it.

`translator` is the whole: which resources a proxy gets, each made once for all proxies that get the same. `clusters`, `endpoints`, `listeners`, `routes` and
`http_route` make one kind each, as plain values in protobuf's JSON form, which `resource` turns into bytes. Start with `translator`.
"""
