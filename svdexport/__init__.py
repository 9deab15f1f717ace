"""svdexport: compress language models into low-rank pairs and export them, measured."""

__version__ = "0.1.0"
