"""Keeping libraries off the network: everything svdexport reads is on the disk."""

from __future__ import annotations

import os
import sys

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}


def no_network(*, force: bool) -> None:
    """Keep the Hugging Face libraries offline; to be called before they are imported.

    Args:
        force: also against the environment's settings, and refuse every connection that Python
            code of this process asks for, from now on.
    """
    if not force:
        for name, value in _OFFLINE.items():
            os.environ.setdefault(name, value)
        return
    os.environ.update(_OFFLINE)
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Unix sockets, whose address is a path, stay allowed."""
    if event not in _EVENTS:
        return
    address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    if event == "socket.getaddrinfo" or isinstance(address, tuple):
        raise PermissionError(f"--offline: a library asked for the network ({address!r})")
