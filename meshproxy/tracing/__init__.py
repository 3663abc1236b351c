"""Traces: what a context in headers says (`context`), spans (`span`), what waits to be sent (`batch`) and how it is written (`otlp`).

A tracer is what a provider compiles to (`opentelemetry`, with its ways out in `http.opentelemetry`; `http.zipkin`):

    tracer.start(head, name, client=..., traced=..., at=...)  # -> Span, or None where a head says what cannot be understood
    span.inject(head)  # before the request goes upstream
    span.child(name, at=...)
    span.finish(at=...)  # sends it if it is sampled

The connection manager's side, with the decision whether a request is traced, is `http.tracing`.
"""
