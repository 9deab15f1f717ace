"""Known vulnerabilities of the installed packages, by pip-audit; part of ``make lint``.

Skipped, by name, where pip-audit is not installed (``pip install 'pip-audit>=2.7,<3'``) or its
database cannot be reached. Exit 1 where a package has a known vulnerability.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request

# What pip-audit asks for each package. A mirror may know packages and not their versions: pip-audit
# then passes over every one, says "No known vulnerabilities found" and exits 0.
DATABASE = "https://pypi.org/pypi/pip/24.0/json"
SECONDS = 10


def why_not(installed: bool, database: str = DATABASE) -> str | None:
    """Why the audit is skipped, or None where it can run."""
    if not installed:
        return "pip-audit is not installed"
    try:
        with urllib.request.urlopen(database, timeout=SECONDS) as answer:
            known = "vulnerabilities" in json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        return f"its database cannot be reached ({error})"
    return None if known else "its database lists no vulnerabilities (a mirror?)"


def main() -> None:
    reason = why_not(importlib.util.find_spec("pip_audit") is not None)
    if reason is not None:
        print(f"pip-audit: skipped, {reason}")
        return
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable"]
    sys.exit(subprocess.run([*command, "--progress-spinner", "off"], check=False).returncode)


if __name__ == "__main__":
    main()
