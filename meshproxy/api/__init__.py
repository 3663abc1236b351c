"""The Envoy v3 API as this proxy uses it: from YAML or JSON to checked protobuf messages, and the parts of it that many compile alike.

Start at `bootstrap`: it loads (`document`: text to plain values, `convert`: plain values to messages) and validates (`rules`: constraints that the protos
declare, `support`: what is honoured, `semantics`: what only the whole shows). `registry` knows which module compiles which extension, `messages` finds
message types by name. Shared by many: `errors`, `matchers`, `san` (names in certificates), `datasource`, `runtime`.

Imports nothing from the rest of meshproxy; modules of extensions are imported by name, through the registry.
"""
