"""A program that calls a service by gRPC's own xDS client, as often as it is told to: a line "TARGET METADATA COUNT" of standard input, a line of JSON back.

It is a process of its own because gRPC reads GRPC_XDS_BOOTSTRAP once. METADATA is KEY=VALUE or -. With the argument `secure` it speaks TLS where the control
plane says so.
"""

from __future__ import annotations

import json
import sys

import grpc


def main() -> None:
    channels: dict[str, grpc.Channel] = {}
    credentials = grpc.xds_channel_credentials() if sys.argv[1:] == ["secure"] else None
    for line in sys.stdin:
        target, metadata, count = line.split()
        if target not in channels:
            channels[target] = grpc.secure_channel(target, credentials) if credentials is not None else grpc.insecure_channel(target)
        call = channels[target].unary_unary("/t.Who/Are")
        pairs = [] if metadata == "-" else [tuple(metadata.split("=", 1))]
        answers = []
        for _ in range(int(count)):
            try:
                answers.append(call(b"", metadata=pairs, wait_for_ready=False, timeout=90).decode())
            except grpc.RpcError as error:
                answers.append(error.code().name)
                print(error.details(), file=sys.stderr)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
