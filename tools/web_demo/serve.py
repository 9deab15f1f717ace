"""Serve the page with a dense and a compressed ONNX folder; or drive it once and photograph it.

    npm install --ignore-scripts --prefix tools/web_demo
    python tools/web_demo/serve.py --dense DENSE --compressed COMPRESSED        # then open the page
    python tools/web_demo/serve.py ... --photograph page.png                    # headless Chromium

Only this computer is asked for anything: the libraries come from ``node_modules`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

HERE = Path(__file__).parent
LIBRARIES = {
    "ort.wasm.bundle.min.mjs": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers.mjs": "@huggingface/tokenizers/dist/tokenizers.mjs",
    "jinja.js": "@huggingface/jinja/dist/index.js",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def libraries(modules: Path) -> dict[str, Path]:
    """Name in the page -> file. SystemExit where npm has not installed them."""
    found = {name: modules / path for name, path in LIBRARIES.items()}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise SystemExit(
            f"{missing[0]} is missing: npm install --ignore-scripts --prefix tools/web_demo"
        )
    return found


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the page, its libraries and the two models; takes the page's result."""

    def __init__(self, server: PageServer, *args: Any) -> None:
        self.page = server
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/") or "index.html"
        file = self.page.file(path)
        if path == "index.html" and "auto=" in self.path:
            # The window is not loaded, and no picture taken, before this is answered.
            text = (HERE / "index.html").read_text(encoding="utf-8")
            self._send(text.replace("</main>", '<img src="done" alt=""></main>').encode(), path)
        elif path == "done":
            self.page.finished.wait(timeout=self.page.patience)
            self._send(b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>', "a.svg")
        elif file is None or not file.is_file():
            self.send_error(404)
        else:
            self._send(file.read_bytes(), path)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/result" or not length.isdecimal():
            self.send_error(400)
            return
        self.page.result = json.loads(self.rfile.read(int(length)))
        self._send(b"{}", "a.json")
        self.page.finished.set()

    def _send(self, body: bytes, name: str) -> None:
        kinds = {"html": "text/html", "mjs": "text/javascript", "js": "text/javascript"}
        kinds |= {"wasm": "application/wasm", "json": "application/json", "svg": "image/svg+xml"}
        kind = kinds.get(name.rpartition(".")[2], "application/octet-stream")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # What WebAssembly needs before it gets more than one thread.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


class PageServer(http.server.ThreadingHTTPServer):
    """The page's server, on a free port of this computer."""

    daemon_threads = True

    def __init__(
        self, dense: Path, compressed: Path, modules: Path, port: int = 0, patience: float = 300
    ) -> None:
        self.models = {"dense": dense, "compressed": compressed}
        self.libraries = libraries(modules)
        self.result: dict[str, Any] | None = None
        self.finished = threading.Event()
        self.patience = patience
        super().__init__(("127.0.0.1", port), functools.partial(Handler, self))

    def file(self, path: str) -> Path | None:
        parts = path.split("/")
        if path in ("index.html", "demo.mjs"):
            return HERE / path
        if parts[0] == "lib" and len(parts) == 2:
            return self.libraries.get(parts[1])
        if parts[0] == "models" and len(parts) == 3 and parts[1] in self.models:
            return self.models[parts[1]] / Path(parts[2]).name
        return None


def photograph(
    server: PageServer, picture: Path, question: str, tokens: int = 48, threads: int = 2
) -> dict[str, Any]:
    """Drive the page once in headless Chromium; gives what it measured and saves a picture.

    Raises RuntimeError where there is no browser, or the page did not finish.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise RuntimeError(f"none of {', '.join(BROWSERS)} is installed")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    query = f"auto={quote(question)}&tokens={tokens}&threads={threads}"
    url = f"http://127.0.0.1:{server.server_address[1]}/?{query}"
    with tempfile.TemporaryDirectory(prefix="svdexport-browser-") as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}"]
        # A proxy that does not exist for every other address: the page has no network.
        command += ["--proxy-server=127.0.0.1:9", "--proxy-bypass-list=127.0.0.1"]
        command += ["--window-size=1040,560", f"--screenshot={picture.resolve()}", url]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=server.patience + 30, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the page did not finish in {server.patience:.0f} s") from None
        finally:
            server.shutdown()
    if server.result is None:
        raise RuntimeError(f"the page gave no result: {done.stderr[-500:]}")
    return server.result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--compressed", type=Path, required=True)
    parser.add_argument("--modules", type=Path, default=HERE / "node_modules")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--photograph", type=Path)
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    port = 0 if args.photograph else args.port
    try:
        server = PageServer(args.dense, args.compressed, args.modules, port)
    except OSError as error:
        sys.exit(f"port {port}: {error.strerror}; give another --port")
    if args.photograph:
        try:
            found = photograph(server, args.photograph, args.question, args.tokens, args.threads)
        except RuntimeError as error:
            sys.exit(str(error))
        print(json.dumps(found, indent=1))
        sys.exit("error" in found)
    print(f"http://127.0.0.1:{server.server_address[1]}/")
    server.serve_forever()


if __name__ == "__main__":
    main()
