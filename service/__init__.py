"""Convoy's service: image classifiers over gRPC, on ONNX Runtime."""
