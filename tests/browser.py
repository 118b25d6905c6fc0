"""Headless Chromium for tests that look at pages: finds one, and gets one.

    python tests/browser.py .venv/browser

Looked for: $CHROMIUM, the usual names on the PATH, what playwright has, and the folder above.
Got, if none is there, without root: by `playwright install`; where its server cannot be reached, by
npm, as the package @sparticuz/chromium. Nothing is written outside the folder but npm's cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The newest that unpacks itself under Node 20.
PACKAGE = "@sparticuz/chromium@147.0.0"
UNPACK = "import('@sparticuz/chromium').then((m) => m.default.executablePath())"


def find_browser(folder: Path | None = None) -> str | None:
    """A Chromium that starts, or None.

    Args:
      folder: where `get_browser` put one; by default beside the interpreter's environment.
    """
    folder = folder or Path(sys.prefix) / "browser"
    installed = sorted(folder.glob("chromium*/*/*headless*shell"))
    candidates = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)]
    candidates += [str(path) for path in (*installed, folder / "chromium")]
    return next((path for path in candidates if path and _starts(path)), None)


def _starts(path: str) -> bool:
    command = [path, "--headless", "--no-sandbox", "--version"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        return done.returncode == 0 and b"Chrom" in done.stdout
    return False


def get_browser(folder: Path) -> str | None:
    """Find a Chromium, or get one into `folder`; None if that is impossible here."""
    folder.mkdir(parents=True, exist_ok=True)
    found = find_browser(folder)
    if found is None:
        environment = {"PLAYWRIGHT_BROWSERS_PATH": str(folder.resolve())}
        playwright = [sys.executable, "-m", "playwright", "install", "chromium-headless-shell"]
        _try(playwright, folder, environment)
        found = find_browser(folder)
    if found is None and shutil.which("npm"):
        _try(["npm", "install", "--no-audit", "--no-fund", "--prefix", ".", PACKAGE], folder, {})
        # It unpacks into what it takes for the folder of temporary files.
        _try(["node", "--eval", UNPACK], folder, {"TMPDIR": str(folder.resolve())})
        found = find_browser(folder)
    return found


def _try(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command that may fail; whether it helped is seen afterwards."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )


if __name__ == "__main__":
    browser = get_browser(Path(sys.argv[1]))
    print(f"browser: {browser or 'none can be had; tests that look at pages will be skipped'}")
