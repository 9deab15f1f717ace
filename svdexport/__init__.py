"""svdexport: compress language models into low-rank pairs and export them, measured.

Importing this package makes transformers' ``from_pretrained`` load compressed checkpoints.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_HOOKED = "transformers.quantizers.auto"


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Registers the quantizer right after transformers' registry is imported.

    transformers takes seconds to import; the command line must not pay that for ``--help``.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # Registers itself. Where that module is what imports transformers, it is underway already.
    importlib.import_module("svdexport.models.hf")


if _HOOKED in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
