"""The gRPC face of the service: it translates, and decides nothing."""
