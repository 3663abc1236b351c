"""The control plane of the mesh: the `meshctl` command.

It reads documents about services and policies (`kinds`) from where they are kept (`sources`), makes one immutable snapshot of them (`model`), translates
that into Envoy v3 resources (`translate`) and serves those to every proxy (`ads`). `app` wires the parts of the running process together; start reading
there. Of the data plane it imports `meshproxy.api` (the Envoy API as this project uses it) and nothing else; import-linter holds that.
"""
