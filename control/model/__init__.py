"""What the control plane knows: services, workloads, endpoints, routing and traffic policies, and the snapshot of all of them.

Immutable, and without behaviour beyond looking itself up. Objects that documents describe are compared by identity: a document that did not change gives the
same object again, which is how `translate` knows what it need not do twice. Imports nothing of `control` but `names`. Start with `snapshot`.
"""
