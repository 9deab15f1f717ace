"""--offline: libraries that ask for the network are refused, whatever the environment says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import os, socket, sys
from svdexport.safety import no_network
no_network(force=sys.argv[1] == "force")
print(os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"])
for ask in (
    lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2]))),
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
):
    try:
        ask()
        print("allowed")
    except PermissionError as error:
        print(error)
"""


def ask(how: str, port: int, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, how, str(port)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_offline_refuses_what_libraries_ask_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        opened = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        flags, *answers = ask("force", port, **opened)
        assert flags == "1 1"
        assert len(answers) == 3
        assert all(answer.startswith("--offline: a library asked") for answer in answers)
        assert ask("", port, **opened) == ["0 0", "allowed", "allowed", "allowed"]


def test_the_hugging_face_libraries_are_offline_by_themselves() -> None:
    environment = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "")
    code = "import os; from svdexport import cli; cli.app = lambda **_: print(dict(os.environ)); "
    code = f"import os; [os.environ.pop(n) for n in {list(environment)}]; {code} cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'HF_HUB_OFFLINE': '1'" in done.stdout
    assert "'HF_DATASETS_OFFLINE': '1'" in done.stdout
