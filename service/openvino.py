"""The OpenVINO plugin: an execution provider that is registered beside those that ONNX Runtime was built with.

`onnxruntime-ep-openvino` (the extra `openvino`) brings a library, OpenVINO's CPU runtime within it. It is registered
once per process and stays: unregistering it while a session uses it would crash. It shows devices made by Intel only;
on another make of CPU it loads and offers nothing.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

import onnxruntime as ort

from service.errors import ProviderError
from service.providers import OPENVINO

_PACKAGE = "onnxruntime-ep-openvino"
_MODULE = "onnxruntime_ep_openvino"


def version() -> str:
    """Version of the installed plugin; empty if there is none."""
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def register() -> None:
    """Loads the plugin, once for the process. It costs about 20 MiB and 40 ms, so only whoever wants it calls this.

    Raises:
        ProviderError: it is not installed, or ONNX Runtime does not take it.
    """
    try:
        module = importlib.import_module(_MODULE)
        ort.register_execution_provider_library(OPENVINO, module.get_library_path())
    except ImportError as error:
        raise ProviderError(
            "OpenVINO is asked for but not installed; in Convoy's checkout, `pip install '.[openvino]'`, or choose "
            "another provider"
        ) from error
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        raise ProviderError(
            f"the OpenVINO plugin cannot be loaded: {error}; install the version of {_PACKAGE} that was made for "
            f"ONNX Runtime {ort.__version__}"
        ) from error


def device(kind: str = "CPU") -> Any:
    """The plugin's device, an `OrtEpDevice`.

    Args:
        kind: "CPU", "GPU" or "NPU".

    Raises:
        ProviderError: the plugin is missing, or has no such device here.
    """
    register()
    for found in ort.get_ep_devices():
        if found.ep_name == OPENVINO and found.device.type.name == kind:
            return found
    make = next((d.device.vendor for d in ort.get_ep_devices() if d.device.type.name == kind), "") or "unknown"
    raise ProviderError(
        f"the OpenVINO plugin offers no {kind} here: it serves Intel's devices only, and this {kind} is of the make "
        f"{make}; choose another provider"
    )
