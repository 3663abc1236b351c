"""Traces: what a context in headers says (`context`), spans (`span`), and those who take them: OpenTelemetry (`opentelemetry`) and Zipkin (`zipkin`).

A tracer is what a provider compiles to:

    tracer.start(head, name, client=..., traced=..., at=...)  # -> Span, or None where a head says what cannot be understood
    span.inject(head)  # before the request goes upstream
    span.child(name, at=...)
    span.finish(at=...)  # sends it if it is sampled

The connection manager's side, with the decision whether a request is traced, is `http.tracing`.
"""
