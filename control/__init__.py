"""The control plane of the mesh: the `meshctl` command, still to be built.

It will read documents about services and policies, translate them into Envoy v3 resources and serve those over ADS to every sidecar. It may import
`meshproxy.api` (the Envoy API as this project uses it) and nothing else of the data plane; import-linter holds that.
"""
