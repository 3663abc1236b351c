"""The xDS server: `session` is the server's side of one stream, sans-IO; `hub` knows all streams and the current snapshot; `server` speaks gRPC (grpc.aio);
`status` tells what each proxy has. Start with `session`.
"""
