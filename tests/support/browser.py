"""A real browser without a window: what a page becomes once its program has run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """Without a browser the test is skipped, on CI it fails: .ci/run installs one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "no chromium or google-chrome in the PATH (Debian: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def run(chromium: str, address: str, profile: Path, *options: str, width: int = 1280, height: int = 600) -> str:
    """Open an address; what the browser prints. Fails on any message in the page's console."""
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    done = subprocess.run(
        [chromium, *words, f"--window-size={width},{height}", f"--user-data-dir={profile}", *options, address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def dom(chromium: str, page: Path, profile: Path, fragment: str = "", width: int = 1280, seconds: float = 2.0) -> str:
    """The page's elements after its program has run, without JSON blocks, programs and styles."""
    budget = f"--virtual-time-budget={round(1000 * seconds)}"
    text = run(chromium, page.as_uri() + fragment, profile, budget, "--dump-dom", width=width)
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def screenshot(chromium: str, page: Path, profile: Path, out: Path, *, width: int, height: int) -> Path:
    options = ("--virtual-time-budget=4000", "--allow-file-access-from-files", f"--screenshot={out}")
    run(chromium, page.as_uri(), profile, *options, width=width, height=height)
    return out
