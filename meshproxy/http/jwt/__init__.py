"""JSON Web Tokens (RFC 7519) as Envoy's jwt_authn filter judges them.

A token is parsed (`token`), its claims are checked and its signature is verified with the keys of its provider (`keys`, `provider`), which may have to be
fetched first (`remote`). Where tokens stand in a request is in `locations`, which providers a request needs in `requirements`, what can be wrong in `status`.

The order of the checks and their verdicts are those of Envoy's jwt_verify library; keys and signatures themselves are PyJWT's and cryptography's business
(decision 0013). Imported only by configurations that have the filter. Start with `requirements.py`.
"""
