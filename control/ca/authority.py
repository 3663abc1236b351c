"""The authority: a trust domain's roots and intermediates in a folder, and the signing of leaves.

    authority = Authority("/var/lib/meshctl/ca", "cluster.local", Settings())      # made on first run
    issued = authority.issue(parse_csr(text), [identity], life_s=3600)

It keeps serving with what it has in memory when the folder cannot be read or written any more (disk full): only changes fail then, and are tried again
by the next `tick`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from control.ca import certificates, rotation
from control.ca.certificates import AuthorityKey, BadCertificate, LeafKey
from control.ca.csr import SigningRequest
from control.ca.keystore import KeyStore, StoreError
from control.ca.rotation import Intermediate, Root, Settings, State, Validity
from meshproxy.api import spiffe
from meshproxy.api.spiffe import SpiffeId
from meshproxy.record import Record, replace

log = logging.getLogger("meshctl.ca")

_STATE = "state.json"
_MIN_LIFE_S = 1.0


class Denied(Exception):
    """The caller may not have the identity that it asks for."""


class CannotSign(Exception):
    """There is nothing to sign with now; trying again later may help."""


class Issued(Record, frozen=True):
    """A leaf with its chain (without the root), what its holder shall trust, and Unix times."""

    identity: SpiffeId
    chain: tuple[x509.Certificate, ...]
    bundle: tuple[x509.Certificate, ...]
    not_before: float
    not_after: float


class _Signer(Record, frozen=True):
    """An intermediate (first of `chain`) with its key, in memory."""

    chain: tuple[x509.Certificate, ...]
    key: AuthorityKey


class Authority:
    """See above. `clock`: seconds since 1970. Raises StoreError when the folder cannot be used, BadCertificate when what is in it does not fit together.

    `root`: PEM of certificate and key of a root to begin with instead of making one.
    """

    def __init__(
        self, folder: str, trust_domain: str, settings: Settings | None = None, *, root: tuple[str, str] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        spiffe.check_trust_domain(trust_domain)
        self.trust_domain = trust_domain
        self.settings = settings or Settings()
        self._clock = clock
        self._store = KeyStore(folder)
        self._roots: dict[str, x509.Certificate] = {}
        self._signers: dict[str, _Signer] = {}
        self._version = (0, 0)
        self.on_bundle: list[Callable[[], None]] = []  # called when `bundle` may have changed
        self._said: tuple[x509.Certificate, ...] = ()
        with self._store.locked():
            self._store.clean()
            if _STATE in self._store:
                self._load()
            else:
                self._begin(root)
            if self._state.longest_life_s < self.settings.max_life_s:
                self._save(replace(self._state, longest_life_s=self.settings.max_life_s))
        self._said = self.bundle()

    # -- signing

    def issue(self, request: SigningRequest, allowed: Iterable[SpiffeId], life_s: float = 0.0) -> Issued:
        """Sign a leaf for the identity that `request` asks for, or, if it asks for none, for the only one that is allowed. Raises Denied and CannotSign.

        `life_s`: 0 for the default; what is longer than the settings allow is cut.
        """
        return self._sign(request.public_key, self._choose(request, tuple(allowed)), life_s)

    def issue_own(self, public_key: LeafKey, identity: SpiffeId, names: Sequence[x509.GeneralName] = ()) -> Issued:
        """A leaf for the control plane itself, which asks nobody. Raises CannotSign."""
        return self._sign(public_key, identity, 0.0, names)

    def _sign(self, public_key: LeafKey, identity: SpiffeId, life_s: float, names: Sequence[x509.GeneralName] = ()) -> Issued:
        self._refresh()
        now = self._clock()
        found = rotation.signer(self._state, now)
        if found is None:
            self.tick()
            found = rotation.signer(self._state, now)
            if found is None:
                raise CannotSign(self._why_not(now))
        signer = self._signers[found.id]
        life = min(max(life_s, _MIN_LIFE_S) if life_s > 0 else self.settings.life_s, self.settings.max_life_s)
        leaf = certificates.make_leaf(public_key, signer.chain[0], signer.key, identity, now, life, names)
        return Issued(identity, (leaf, *signer.chain), self.bundle(), certificates.not_before(leaf), certificates.not_after(leaf))

    def bundle(self) -> tuple[x509.Certificate, ...]:
        """The roots to be trusted now, oldest first."""
        return tuple(self._roots[root.id] for root in rotation.trusted(self._state, self._clock()))

    def _choose(self, request: SigningRequest, allowed: Sequence[SpiffeId]) -> SpiffeId:
        wanted = request.identity
        if wanted is None:
            if len(allowed) != 1:
                raise Denied("the request names no identity, and the caller has " + ("none" if not allowed else "several"))
            wanted = allowed[0]
        if wanted not in allowed:
            raise Denied(f"the caller may not be {wanted}")
        if wanted.trust_domain != self.trust_domain or not wanted.path:
            raise Denied(f"{wanted} is no workload of the trust domain {self.trust_domain}")
        return wanted

    def _why_not(self, now: float) -> str:
        root = rotation.signing_root(self._state, now)
        if now < root.validity.begin:
            return "the clock is before the root's beginning: it must have been set back"
        if now >= root.validity.end:
            return "the root has expired: bring or make another one (or set the clock right)"
        return "no intermediate is valid now" + ("" if root.has_key else ": bring another one")

    # -- rotation

    def tick(self) -> None:
        """Do what is due: intermediates, roots. Failures are logged, and what is due stays so. Call it from time to time, a few times in a leaf's life."""
        try:
            self._refresh()
            now = self._clock()
            if rotation.needs_root(self._state, self.settings, now) or rotation.needs_intermediate(self._state, self.settings, now):
                with self._store.locked():
                    self._reload()
                    self._rotate(now)
        except (StoreError, BadCertificate) as error:
            log.error("the authority could not be rotated, and goes on with what it has: %s", error)
        bundle = self.bundle()
        if bundle != self._said:
            self._said = bundle
            for call in tuple(self.on_bundle):
                call()

    def rotate_intermediate(self) -> str:
        """Make a new intermediate for the root that signs, now. Returns its id."""
        with self._store.locked():
            self._reload()
            root = rotation.signing_root(self._state, self._clock())
            if not root.has_key:
                raise BadCertificate("the root's key is not here: bring the new intermediate")
            return self._add_intermediate(root).id

    def rotate_root(self, settle_s: float | None = None) -> str:
        """Make a new root that signs after `settle_s` (default: when every workload must know it). Returns its id."""
        key = certificates.new_key()
        now = self._clock()
        with self._store.locked():
            self._reload()
            made = self._add_root(certificates.make_root(key, self.trust_domain, now, self.settings.root_life_s), key, self._signs_at(settle_s))
        self.tick()
        return made.id

    def bring_root(self, certificate_pem: str, key_pem: str, settle_s: float | None = None) -> str:
        """The same with a root that was made elsewhere. Raises BadCertificate."""
        certificate, key = _read_root(certificate_pem, key_pem, self._clock())
        with self._store.locked():
            self._reload()
            made = self._add_root(certificate, key, self._signs_at(settle_s))
        self.tick()
        return made.id

    def bring_intermediate(self, chain_pem: str, key_pem: str, roots_pem: str, settle_s: float | None = None) -> str:
        """An intermediate that was made elsewhere (Istio's ca-cert.pem with cert-chain.pem, ca-key.pem, root-cert.pem), whose root's key stays there.

        It signs at once when its root is known already, otherwise after `settle_s`. Returns its id. Raises BadCertificate.
        """
        chain, roots = list(read_certificates(chain_pem)), list(read_certificates(roots_pem))
        key = read_key(key_pem)
        certificates.check_authority(chain[0], key, path_length=0)
        for depth, one in enumerate(chain[1:], 1):
            certificates.check_authority(one, None, path_length=depth)
        root = certificates.check_chain(chain, roots)
        chain = [one for one in chain if one != root]
        certificates.check_authority(root, None, path_length=len(chain))
        now = self._clock()
        for one in (*chain, root):
            _check_time(one, now)
        with self._store.locked():
            self._reload()
            id = _id(chain[0])
            made = Intermediate(id, _validity(chain[0]), _id(root))
            self._write_signer(made, _Signer(tuple(chain), key))
            if any(known.id == made.root for known in self._state.roots):
                self._save(rotation.with_intermediate(self._state, made))
            else:
                self._store.write(f"root-{made.root}.pem", certificates.pem(root).encode())
                self._roots[made.root] = root
                self._save(rotation.with_root(self._state, Root(made.root, _validity(root), self._signs_at(settle_s), has_key=False), made))
        self.tick()
        return id

    def _signs_at(self, settle_s: float | None) -> float:
        newest = self._state.roots[-1]
        if self._clock() < newest.validity.begin:
            raise BadCertificate(f"root {newest.id} begins later than now: the clock was or is wrong, and the order of roots is that of their times")
        return self._clock() + (self._state.longest_life_s if settle_s is None else settle_s)

    def _rotate(self, now: float) -> None:
        if rotation.needs_root(self._state, self.settings, now):
            key = certificates.new_key()
            made = self._add_root(certificates.make_root(key, self.trust_domain, now, self.settings.root_life_s), key, self._signs_at(None))
            log.info("root %s is trusted from now on, and signs from %.0f on", made.id, made.signs_at)
        for root in rotation.needs_intermediate(self._state, self.settings, now):
            log.info("intermediate %s signs for root %s", self._add_intermediate(root).id, root.id)
        kept = rotation.forget(self._state, now)
        if kept != self._state:
            gone = {one.id for one in self._state.roots} - {one.id for one in kept.roots}
            old = {one.id for one in self._state.intermediates} - {one.id for one in kept.intermediates}
            self._save(kept)
            for name in (*(f"root-{id}" for id in gone), *(f"intermediate-{id}" for id in old)):
                self._store.remove(f"{name}.key")
                self._store.remove(f"{name}.pem")

    def _add_root(self, certificate: x509.Certificate, key: AuthorityKey, signs_at: float) -> Root:
        """Make an intermediate below a new root, and put both into the folder; the state file, written last, makes it so. Under the lock."""
        root = Root(_id(certificate), _validity(certificate), signs_at, has_key=True)
        if any(known.id == root.id for known in self._state.roots):
            raise BadCertificate(f"root {root.id} is known already")
        self._store.write(f"root-{root.id}.key", _key_pem(key))
        self._store.write(f"root-{root.id}.pem", certificates.pem(certificate).encode())
        self._roots[root.id] = certificate
        intermediate = self._make_intermediate(root, certificate, key)
        self._save(rotation.with_root(self._state, root, intermediate))
        return root

    def _add_intermediate(self, root: Root) -> Intermediate:
        made = self._make_intermediate(root, self._roots[root.id], read_key(self._store.read(f"root-{root.id}.key").decode()))
        self._save(rotation.with_intermediate(self._state, made))
        return made

    def _make_intermediate(self, root: Root, certificate: x509.Certificate, root_key: AuthorityKey) -> Intermediate:
        key = certificates.new_key()
        made = certificates.make_intermediate(key, certificate, root_key, self.trust_domain, self._clock(), self.settings.intermediate_life_s)
        intermediate = Intermediate(_id(made), _validity(made), root.id)
        self._write_signer(intermediate, _Signer((made,), key))
        return intermediate

    def _write_signer(self, intermediate: Intermediate, signer: _Signer) -> None:
        self._store.write(f"intermediate-{intermediate.id}.key", _key_pem(signer.key))
        self._store.write(f"intermediate-{intermediate.id}.pem", certificates.pem(*signer.chain).encode())
        self._signers[intermediate.id] = signer

    # -- the folder

    def _begin(self, root: tuple[str, str] | None) -> None:
        now = self._clock()
        self._state = State(self.trust_domain, self.settings.max_life_s)
        if root is None:
            key: AuthorityKey = certificates.new_key()
            certificate = certificates.make_root(key, self.trust_domain, now, self.settings.root_life_s)
        else:
            certificate, key = _read_root(*root, now)
        made = self._add_root(certificate, key, 0.0)
        log.info("the authority of %s begins with root %s", self.trust_domain, made.id)

    def _refresh(self) -> None:
        """Another process may have changed the folder. What cannot be read any more is served from memory."""
        if self._store.version(_STATE) not in (self._version, (0, 0)):
            try:
                self._load()
            except StoreError as error:
                log.error("the authority goes on with what it has: %s", error)

    def _reload(self) -> None:
        if self._store.version(_STATE) != self._version:
            self._load()

    def _load(self) -> None:
        version = self._store.version(_STATE)
        try:
            state = _of_json(json.loads(self._store.read(_STATE)))
        except (ValueError, KeyError, TypeError) as error:
            raise BadCertificate(f"{self._store.folder}/{_STATE} is damaged: {error!r}") from None
        if state.trust_domain != self.trust_domain:
            raise BadCertificate(f"{self._store.folder} is the authority of {state.trust_domain}, not of {self.trust_domain}")
        for root in state.roots:
            if root.id not in self._roots:
                self._roots[root.id] = next(iter(read_certificates(self._store.read(f"root-{root.id}.pem").decode())))
        for one in state.intermediates:
            if one.id not in self._signers:
                chain = tuple(read_certificates(self._store.read(f"intermediate-{one.id}.pem").decode()))
                key = read_key(self._store.read(f"intermediate-{one.id}.key").decode())
                certificates.check_authority(chain[0], key, path_length=0)
                certificates.check_chain(chain, [self._roots[one.root]])
                self._signers[one.id] = _Signer(chain, key)
        self._state, self._version = state, version

    def _save(self, state: State) -> None:
        self._store.write(_STATE, (json.dumps(_to_json(state), indent=1) + "\n").encode())
        self._state, self._version = state, self._store.version(_STATE)

    # -- what people see

    def statistics(self) -> dict[str, Any]:
        """What there is, for `meshctl certs` and status pages: plain values, times as seconds since 1970."""
        now = self._clock()
        trusted, signer = rotation.trusted(self._state, now), rotation.signer(self._state, now)
        signing = rotation.signing_root(self._state, now)
        return {
            "trust_domain": self.trust_domain,
            "roots": [
                {
                    "id": root.id,
                    "subject": self._roots[root.id].subject.rfc4514_string(),
                    "status": "signing" if root == signing else "trusted" if root in trusted else "retired",
                    "not_before": root.validity.begin,
                    "not_after": root.validity.end,
                    "signs_at": root.signs_at,
                    "key": root.has_key,
                }
                for root in self._state.roots
            ],
            "intermediates": [
                {
                    "id": one.id,
                    "root": one.root,
                    "status": "signing" if one == signer else "spare" if one.validity.begin <= now < one.validity.end else "expired",
                    "not_before": one.validity.begin,
                    "not_after": one.validity.end,
                }
                for one in self._state.intermediates
            ],
        }

    def __repr__(self) -> str:
        return f"<Authority of {self.trust_domain}: {len(self._state.roots)} roots, {len(self._state.intermediates)} intermediates>"


def trust_domain_of(folder: str) -> str:
    """Whose authority a folder holds. Raises StoreError, also when it holds none."""
    store = KeyStore(folder)
    if _STATE not in store:
        raise StoreError(f"{folder} holds no authority")
    try:
        return str(json.loads(store.read(_STATE))["trust_domain"])
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{folder}/{_STATE} is damaged") from None


def read_certificates(pem: str) -> Iterable[x509.Certificate]:
    """Of a PEM text, one at least. Raises BadCertificate."""
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise BadCertificate(f"there is no PEM certificate, or a damaged one: {error}") from None


def read_key(pem: str) -> AuthorityKey:
    """A private key without a password. Raises BadCertificate, which says nothing of the key."""
    try:
        key = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise BadCertificate("there is no PEM private key, a damaged one, or one with a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise BadCertificate("an authority's key must be ECDSA or RSA")
    return key


def _read_root(certificate_pem: str, key_pem: str, now: float) -> tuple[x509.Certificate, AuthorityKey]:
    found = list(read_certificates(certificate_pem))
    if len(found) != 1:
        raise BadCertificate(f"a root is one certificate, not {len(found)}: a chain is brought as an intermediate")
    key = read_key(key_pem)
    certificates.check_authority(found[0], key, path_length=1)
    if not certificates.signed_by(found[0], found[0]):
        raise BadCertificate("the root is not signed by itself: bring it as an intermediate, with its root")
    _check_time(found[0], now)
    return found[0], key


def _check_time(certificate: x509.Certificate, now: float) -> None:
    if not certificates.not_before(certificate) <= now < certificates.not_after(certificate):
        raise BadCertificate(f"{certificate.subject.rfc4514_string()}: it is not valid now")


def _key_pem(key: AuthorityKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _id(certificate: x509.Certificate) -> str:
    return certificates.fingerprint(certificate)[:16]


def _validity(certificate: x509.Certificate) -> Validity:
    return Validity(certificates.not_before(certificate), certificates.not_after(certificate))


def _to_json(state: State) -> dict[str, Any]:
    def times(validity: Validity) -> dict[str, float]:
        return {"not_before": validity.begin, "not_after": validity.end}

    return {
        "version": 1,
        "trust_domain": state.trust_domain,
        "longest_life_s": state.longest_life_s,
        "roots": [{"id": one.id, **times(one.validity), "signs_at": one.signs_at, "has_key": one.has_key} for one in state.roots],
        "intermediates": [{"id": one.id, **times(one.validity), "root": one.root} for one in state.intermediates],
    }


def _of_json(document: Any) -> State:
    def validity(one: Any) -> Validity:
        return Validity(float(one["not_before"]), float(one["not_after"]))

    if document["version"] != 1:
        raise ValueError(f"version {document['version']} is not known to this meshctl")
    roots = tuple(Root(str(one["id"]), validity(one), float(one["signs_at"]), has_key=bool(one["has_key"])) for one in document["roots"])
    if not roots:
        raise ValueError("there is no root")
    intermediates = tuple(Intermediate(str(one["id"]), validity(one), str(one["root"])) for one in document["intermediates"])
    return State(str(document["trust_domain"]), float(document["longest_life_s"]), roots, intermediates)
