"""Convoy's training: from a folder of images to a model version that the service can load."""

import service  # noqa: F401  # which settles what ONNX Runtime may report
