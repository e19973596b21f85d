"""Convoy's public API: generated protobuf and gRPC stubs live in `convoy.v1`."""
