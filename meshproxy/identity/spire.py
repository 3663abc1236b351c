"""An identity from a SPIRE agent (or any other SPIFFE Workload API): the agent pushes certificates and keys before they expire; we listen.

Source: the SPIFFE Workload API standard: the security header, the first SVID as the default one, reconnecting with back-off except after InvalidArgument.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from meshproxy.api import identity_protos
from meshproxy.api.spiffe import SpiffeId
from meshproxy.identity import schedule
from meshproxy.identity.calls import CallFailed, Calls
from meshproxy.identity.svid import BadSvid, Svid, checked, read_der, read_key
from meshproxy.record import replace

log = logging.getLogger("meshproxy.identity")

_INVALID_ARGUMENT = 3


class SpireSource:
    """Runs until cancelled. `identity`: which of several SVIDs to take; None: the first, which the standard calls the default."""

    def __init__(
        self,
        calls: Calls,
        identity: SpiffeId | None = None,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._calls = calls
        self._identity = identity
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self.svid: Svid | None = None
        self.failures = 0  # in a row

    async def run(self, publish: Callable[[Svid], None]) -> None:
        """Call `publish` with each new certificate. Raises CallFailed when the agent says that we ask wrongly: trying again would not help."""
        request = identity_protos.message("X509SVIDRequest")().SerializeToString()
        while True:
            try:
                async for answer in self._calls.stream(identity_protos.FETCH_X509_SVID, request, [identity_protos.WORKLOAD_HEADER]):
                    self._received(answer, publish)
                why: Exception | str = "the agent ended the stream"
            except CallFailed as error:
                if error.code == _INVALID_ARGUMENT:
                    raise
                why = error
            except OSError as error:
                why = error
            self.failures += 1
            log.log(logging.WARNING if self.failures == 1 else logging.DEBUG, "the SPIRE agent is away: %s; going on with %r", why, self.svid)
            await self._sleep(schedule.back_off(self.failures, self._chance))

    def _received(self, answer: bytes, publish: Callable[[Svid], None]) -> None:
        try:
            svid = self._read(answer)
        except BadSvid as error:
            log.error("the SPIRE agent sent what cannot be used (%s); going on with %r", error, self.svid)
            return
        self.failures = 0
        self.svid = svid
        publish(svid)

    def _read(self, answer: bytes) -> Svid:
        try:
            response = identity_protos.message("X509SVIDResponse").FromString(answer)
        except DecodeError as error:
            raise BadSvid("it is no X509SVIDResponse") from error
        chosen = self._choose(response.svids)
        svid = checked(read_key(chosen.x509_svid_key), read_der(chosen.x509_svid), read_der(chosen.bundle), self._clock())
        if str(svid.identity) != chosen.spiffe_id:
            raise BadSvid(f"the certificate of {svid.identity} is called {chosen.spiffe_id}")
        federated = tuple((name, tuple(read_der(bundle))) for name, bundle in sorted(response.federated_bundles.items()))
        return replace(svid, federated=federated)

    def _choose(self, svids: Any) -> Any:
        for one in svids:
            if self._identity is None or one.spiffe_id == str(self._identity):
                return one
        raise BadSvid("there is no SVID in it" if not svids else f"there is no SVID of {self._identity} in it")

    def __repr__(self) -> str:
        return f"<SpireSource {self.svid!r}>"
