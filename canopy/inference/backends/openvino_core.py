"""OpenVINO as a process may safely have it: without its telemetry, and with one Core that stays."""

from __future__ import annotations

import functools
import sys
import threading
from types import ModuleType
from typing import Any

_ONE_AT_A_TIME = threading.Lock()


def load_openvino() -> ModuleType:
    """The module `openvino`, kept from sending anything home.

    Importing it, and every conversion, would report to a web analytics service, from processes forked off
    background threads, and leave an identity in the user's home folder. Where its telemetry package cannot be
    imported, openvino and NNCF use stubs of their own that do nothing.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def core() -> Any:
    """This process's only `openvino.Core`.

    Each Core's CPU plugin gives the calling thread a signal stack of its own and unmaps it when it is
    destroyed, whichever thread that happens in and whichever stack is in use by then. After two Cores that
    were not destroyed in reverse order, the next signal (Ctrl-C, a child's end) is a segmentation fault.
    """
    with _ONE_AT_A_TIME:
        return _made()


@functools.cache
def _made() -> Any:
    return load_openvino().Core()
