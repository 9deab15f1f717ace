#!/usr/bin/env bash
# Prepare the environment: packages at pinned versions, and the llama.cpp that knows low-rank pairs.
set -euo pipefail
venv=${1:?usage: setup.sh VENV}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade "pip>=24"
# torch first, by its exact version: the CPU build where the index has one
pip install --quiet --constraint constraints.txt torch numpy setuptools
wheel=$("$venv/bin/python" tools/llama_cpp/build.py)
pip install --quiet --constraint constraints.txt "$wheel"
pip install --quiet --constraint constraints.txt --editable '.[dev]'
