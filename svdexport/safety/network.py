"""Keeping libraries off the network: everything svdexport reads is on the disk."""

from __future__ import annotations

import os

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


def no_network() -> None:
    """Tell the Hugging Face libraries to stay offline; to be called before they are imported."""
    os.environ.update(_OFFLINE)
