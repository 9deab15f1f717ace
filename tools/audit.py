"""Known vulnerabilities of the installed packages, by pip-audit; part of ``make lint``.

Skipped, by name, where pip-audit is not installed (``pip install 'pip-audit>=2.7,<3'``) or its
database cannot be reached. Exit 1 where a package has a known vulnerability.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import urllib.error
import urllib.request

DATABASE = "https://pypi.org/pypi/pip/json"
SECONDS = 10


def why_not(installed: bool, database: str = DATABASE) -> str | None:
    """Why the audit is skipped, or None where it can run."""
    if not installed:
        return "pip-audit is not installed"
    try:
        with urllib.request.urlopen(database, timeout=SECONDS):
            return None
    except (urllib.error.URLError, OSError) as error:
        return f"its database cannot be reached ({error})"


def main() -> None:
    reason = why_not(importlib.util.find_spec("pip_audit") is not None)
    if reason is not None:
        print(f"pip-audit: skipped, {reason}")
        return
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable"]
    sys.exit(subprocess.run([*command, "--progress-spinner", "off"], check=False).returncode)


if __name__ == "__main__":
    main()
