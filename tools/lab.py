"""Open the pages in JupyterLab: copies of them to read and to write in, or the pages themselves.

    python tools/lab.py               copies in lab/, which git ignores
    python tools/lab.py --edit        the pages in notebooks/
    python tools/lab.py --fresh 07    page 07 in lab/ as it was at first
    python tools/lab.py FOLDER        the pages in another folder, such as a student edition

What follows `--` goes to JupyterLab. Its settings for the course are in tools/jupyter; they
come before nobody's own, and nothing is written into a reader's own folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "notebooks"
COPIES = ROOT / "lab"
SETTINGS = ROOT / "tools" / "jupyter"
FIRST = "00_tour.ipynb"
# The contents of a page at its left, and no list of files.
LAYOUT = {
    "collapsed": False,
    "visible": True,
    "current": "@jupyterlab/toc:plugin",
    "widgets": ["filebrowser", "running-sessions", "@jupyterlab/toc:plugin"],
}
WORKSPACE = {
    "data": {
        "layout-restorer:data": {
            "main": {"dock": None},
            "down": {"size": 0, "widgets": []},
            "left": LAYOUT,
            "right": {"collapsed": True, "visible": True, "widgets": []},
            "relativeSizes": [0.22, 0.78, 0],
        }
    },
    "metadata": {"id": "default"},
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_files(folder: Path) -> list[str]:
    """What the pages need beside them, and the pages, as names relative to the folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in found
        if "__pycache__" not in name.parts
        and not any(part.startswith(".") for part in name.parts)
    )


def copy_pages(pages: Path, copies: Path, fresh: str | None = None) -> list[str]:
    """Makes `copies` what `pages` is, but for what was written in it since.

    Args:
        pages: the originals.
        copies: the folder for the reader, made if need be.
        fresh: the beginning of a page's name, "07" or "07_sampler": what was written in it
            goes to a file beside it.

    Returns:
        The names of files that were left as the reader has them though the original is another
        by now.

    Raises:
        ValueError: if no page's name begins with `fresh`.
    """
    names = list_files(pages)
    notes = copies / ".jupyter" / "copied.json"
    copied = json.loads(notes.read_text()) if notes.is_file() else {}
    if fresh is not None:
        stem = fresh.removesuffix(".ipynb")
        chosen = [n for n in names if n.endswith(".ipynb") and n.startswith(stem)]
        if not stem or len(chosen) != 1:
            known = ", ".join(
                n.partition("_")[0] for n in names if n.endswith(".ipynb")
            )
            raise ValueError(f"no page, or several, begin with {fresh!r}: {known}")
        keep_aside(copies / chosen[0])
        copied.pop(chosen[0], None)
    kept = []
    for name in names:
        original, copy = pages / name, copies / name
        now = digest(original)
        if copy.is_file() and digest(copy) != copied.get(name, now):
            if copied.get(name) != now:
                kept.append(name)
            continue
        if not copy.is_file() or digest(copy) != now:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)
        copied[name] = now
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(copied, indent=1), encoding="utf-8")
    return kept


def keep_aside(page: Path) -> Path | None:
    """Renames a page that the reader gives up, so that nothing is lost; the new name."""
    if not page.is_file():
        return None
    number = 1
    while (aside := page.with_name(f"{page.stem}.old{number}.ipynb")).exists():
        number += 1
    page.rename(aside)
    return aside


def trust(folder: Path, state: Path) -> None:
    """Signs the pages, so that their moving figures move before a cell is run."""
    notary = NotebookNotary(
        db_file=str(state / "signatures.db"), secret_file=str(state / "secret")
    )
    for page in folder.glob("*.ipynb"):
        notary.sign(nbformat.read(page, as_version=4))
    notary.store.close()


def make_command(root: Path, first: str, state: Path, flags: list[str]) -> list[str]:
    """JupyterLab on the files under `root`, with `first` open; what it keeps goes to `state`."""
    return [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        f"--NotebookNotary.db_file={state / 'signatures.db'}",
        f"--NotebookNotary.secret_file={state / 'secret'}",
        f"--LabApp.default_url=/lab/tree/{first}",
        f"--LabApp.workspaces_dir={state / 'workspaces'}",
        "--LabApp.custom_css=True",
        *flags,
    ]


def make_environment(state: Path, autosave: bool) -> dict[str, str]:
    """Ours, and the course's settings behind the reader's own."""
    paths = [str(SETTINGS)]
    if not autosave:
        folder = state / "labconfig"
        folder.mkdir(parents=True, exist_ok=True)
        off = {"@jupyterlab/docmanager-extension:plugin": {"autosave": False}}
        file = folder / "default_setting_overrides.json"
        file.write_text(json.dumps(off), encoding="utf-8")
        paths.insert(0, str(state))
    if others := os.environ.get("JUPYTER_CONFIG_PATH"):
        paths.insert(0, others)
    return os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(paths)}


def seed_workspace(state: Path) -> None:
    """The panels of the first visit; later ones find what the reader left."""
    from jupyterlab_server.workspaces_handler import WorkspacesManager

    folder = state / "workspaces"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        WorkspacesManager(str(folder)).save("default", json.dumps(WORKSPACE))


def main() -> None:
    parser = argparse.ArgumentParser(description="Open the pages in JupyterLab.")
    parser.add_argument("folder", type=Path, nargs="?", help="default: lab/, copies")
    parser.add_argument("--edit", action="store_true", help="the pages themselves")
    parser.add_argument(
        "--fresh", metavar="PAGE", help="bring a page of lab/ back, such as 07; no more"
    )
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    if options.fresh is not None:
        try:
            copy_pages(PAGES, COPIES, options.fresh)
        except ValueError as error:
            sys.exit(str(error))
        print(
            f"{options.fresh} is as it was. What you wrote is beside it, *.old*.ipynb."
        )
        return
    root, pages = ROOT, COPIES
    if options.edit:
        pages = PAGES
    elif options.folder:
        root = pages = options.folder.resolve()
        if not (pages / FIRST).is_file():
            sys.exit(
                f"{pages} has no {FIRST}: make student writes one into build/student"
            )
    else:
        for name in copy_pages(PAGES, COPIES):
            page = name.endswith(".ipynb")
            way = (
                f"make fresh PAGE={name.partition('_')[0]}" if page else "delete yours"
            )
            print(
                f"lab/{name}: there is a newer one, and you wrote in yours. To have it: {way}"
            )
    # --edit has its own: a tab left open there would come back in `make lab`, and be saved unasked.
    state = COPIES / ".jupyter" / "edit" if options.edit else pages / ".jupyter"
    seed_workspace(state)
    trust(pages, state)
    first = (pages / FIRST).relative_to(root).as_posix()
    flags = arguments[at + 1 :]
    if pages == COPIES:  # docs/ has links to the originals
        flags = [f"--CourseFiles.read_only={PAGES.relative_to(ROOT)}", *flags]
    command = make_command(root, first, state, flags)
    sys.exit(
        subprocess.call(command, env=make_environment(state, autosave=not options.edit))
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit()
