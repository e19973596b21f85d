"""Convoy's service: image classifiers over gRPC, on ONNX Runtime."""

import os

# ONNX Runtime's builds for Linux report their use to Microsoft, for which they keep an identifier below HOME, and write
# a warning where they cannot. Nobody who serves pictures has agreed to that: it is on only where the variable says 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
