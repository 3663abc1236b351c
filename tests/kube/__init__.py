"""Kubernetes for tests: an API server in memory, and the real one where its programs are at hand. Tests that take either keep the first one honest."""
