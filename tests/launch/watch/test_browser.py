"""The page in a real browser: its script runs under the page's own policy, and it fits a desk and a telephone."""

from __future__ import annotations

import io
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.watch.server import Server
from tests.launch.watch.runs import eventful

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2500")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(eventful(tmp_path_factory.mktemp("runs") / "demo").root)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.url
    server.shutdown()
    thread.join()
    server.server_close()


def show(browser: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [browser, *FLAGS, profile, "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_script_refreshes_the_page_and_breaks_no_policy(browser: str, url: str, tmp_path: Path) -> None:
    shown = show(browser, tmp_path, "--dump-dom", url)
    assert 'data-live="yes"' in shown.stdout and "As of " in shown.stdout
    assert "<title>demo: running</title>" in shown.stdout and "905 of 1,000 steps" in shown.stdout
    assert shown.stdout.count("<svg") >= 10
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_light_and_dark_and_nothing_is_wider_than_the_window(
    browser: str, url: str, tmp_path: Path, width: int, dark: bool
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which comes with matplotlib, is not installed")
    picture = tmp_path / "page.png"
    look = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    show(browser, tmp_path, look, f"--window-size={width},1600", f"--screenshot={picture}", url)
    pixels = np.asarray(image.open(io.BytesIO(picture.read_bytes())).convert("RGB"), np.int64)
    assert pixels.shape[1] == width
    paper = pixels[2, 2]
    assert (paper.max() < 60) if dark else (paper.min() > 230)
    margins = np.concatenate([pixels[:, :10], pixels[:, -10:]], 1)
    assert (margins == paper).all(), "something sticks out at the side"
    assert (np.abs(pixels - paper).max(2) > 40).mean() > 0.01, "the page is empty"
