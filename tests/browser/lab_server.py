"""JupyterLab as `make lab` starts it, with folders and a copy of the pages of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "notebooks"
sys.path.insert(0, str(ROOT / "tools"))
import lab as course  # noqa: E402  tools/ is not a package


@dataclass
class Lab:
    """A running JupyterLab.

    Attributes:
        url: of its root, without a slash at the end.
        folder: what it serves, a copy of `notebooks/` without outputs.
    """

    url: str
    folder: Path

    def ask(self, path: str, method: str = "GET") -> Any:
        """What the server answers."""
        request = urllib.request.Request(f"{self.url}/{path}", method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or "null")

    def shut_down_kernels(self) -> None:
        """Makes room for the next page."""
        for kernel in self.ask("api/kernels"):
            self.ask(f"api/kernels/{kernel['id']}", "DELETE")


@contextmanager
def run_lab() -> Iterator[Lab]:
    """JupyterLab, until the block is left; its kernels end with it."""
    with tempfile.TemporaryDirectory(prefix="folo-lab-") as name:
        home = Path(name)
        folder = home / "notebooks"
        hidden = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(PAGES, folder, ignore=hidden)
        for page in folder.glob("*.ipynb"):
            clear_outputs(page)
        course.seed_workspace(home)
        course.trust(folder, home)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = home / "log"
        with log.open("w") as sink:
            server = subprocess.Popen(
                make_command(port, folder, home),
                env=make_environment(home),
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            lab = Lab(f"http://127.0.0.1:{port}", folder)
            wait_for(lab, server, log)
            yield lab
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def make_command(port: int, folder: Path, home: Path) -> list[str]:
    """Open to whoever is on this machine, for as long as the test runs."""
    flags = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.disable_check_xsrf=True",
        "--IdentityProvider.token=",
    ]
    return course.make_command(folder, course.FIRST, home, flags)


def make_environment(home: Path) -> dict[str, str]:
    """Ours, but for Jupyter's folders: nobody's settings, and nothing left behind."""
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    own = {variable: str(home / name) for variable, name in folders.items()}
    own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    foreign = ("FOLO_MODEL", "COLAB_RELEASE_TAG", "JUPYTER_TOKEN", "JUPYTER_PATH")
    ours = course.make_environment(home, autosave=True)
    return {name: value for name, value in ours.items() if name not in foreign} | own


def wait_for(lab: Lab, server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.poll() is None:
        try:
            lab.ask("api")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def clear_outputs(page: Path) -> None:
    """What a test then sees in a page is what it ran."""
    notebook = nbformat.read(page, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, page)
