"""Documents that mesh users already have -> objects of `model`: YAML of Kubernetes, Istio and the Gateway API, and one kind of our own (`workload`).

`store` reads files and keeps the last good state of every object; `registry` knows the kinds; each other file is one family of them. A kind's parser takes
the document through `fields.Fields`, which notices what was not asked for: a field that we do not honour is refused with its path, never ignored.
"""
