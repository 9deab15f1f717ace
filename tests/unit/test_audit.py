"""The audit of dependencies in ``make lint`` says when and why it is skipped."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import pytest

from tests.unit.tool_modules import load_tool

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")

ROOT = Path(__file__).resolve().parents[2]
audit = load_tool("audit.py")


def test_it_is_skipped_by_name() -> None:
    assert audit.why_not(False) == "pip-audit is not installed"
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        assert "cannot be reached" in str(audit.why_not(True, address))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b'{"vulnerabilities": []}', None), (b"{}", "lists no"), (b"", "reached"), (None, "404")],
)
def test_a_database_must_list_vulnerabilities(answer: bytes | None, expected: str | None) -> None:
    """A mirror that knows packages and not their versions would have the audit pass unseen."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if answer is None else 200)
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        found = audit.why_not(True, f"http://127.0.0.1:{server.server_address[1]}/")
        thread.join()
    assert found is None if expected is None else expected in str(found)


def test_lint_runs_it() -> None:
    assert "tools/audit.py" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("part", ["dependencies", "optional-dependencies"])
def test_every_dependency_has_an_upper_bound(part: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = project[part]
    lists = [found] if isinstance(found, list) else list(found.values())
    named = [entry for entries in lists for entry in entries if not entry.startswith("svdexport")]
    assert named
    assert [entry for entry in named if "<" not in entry and "==" not in entry] == []
