"""Copies of the pages to write in, and JupyterLab's settings for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import pytest
from traitlets.config import Config, PyFileConfigLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import lab  # noqa: E402  tools/ is not a package


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    (folder / "data").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "a.pyc").write_text("")
    (folder / "data" / "a.json").write_text("{}")
    for name in ("00_tour", "07_sampler"):
        (folder / f"{name}.ipynb").write_text(f"{name} 1")
    return folder


@pytest.fixture
def copies(tmp_path: Path, pages: Path) -> Path:
    folder = tmp_path / "lab"
    assert lab.copy_pages(pages, folder) == []
    return folder


def test_pages_and_what_lies_beside_them_are_copied(copies: Path) -> None:
    assert lab.list_files(copies) == [
        "00_tour.ipynb",
        "07_sampler.ipynb",
        "data/a.json",
    ]


def test_a_newer_page_replaces_one_that_nobody_wrote_in(
    pages: Path, copies: Path
) -> None:
    (pages / "07_sampler.ipynb").write_text("2")
    assert lab.copy_pages(pages, copies) == []
    assert (copies / "07_sampler.ipynb").read_text() == "2"


def test_what_a_reader_wrote_stays(pages: Path, copies: Path) -> None:
    mine = copies / "07_sampler.ipynb"
    mine.write_text("mine")
    assert lab.copy_pages(pages, copies) == []  # there is no newer one
    (pages / "07_sampler.ipynb").write_text("2")
    for _ in range(2):
        assert lab.copy_pages(pages, copies) == ["07_sampler.ipynb"]
        assert mine.read_text() == "mine"


def test_one_page_is_brought_back_and_nothing_is_lost(
    pages: Path, copies: Path
) -> None:
    (copies / "07_sampler.ipynb").write_text("mine")
    (copies / "00_tour.ipynb").write_text("mine too")
    assert lab.copy_pages(pages, copies, fresh="07") == []
    assert (copies / "07_sampler.ipynb").read_text() == "07_sampler 1"
    assert (copies / "07_sampler.old1.ipynb").read_text() == "mine"
    assert (copies / "00_tour.ipynb").read_text() == "mine too"
    (copies / "07_sampler.ipynb").write_text("mine again")
    lab.copy_pages(pages, copies, fresh="07_sampler.ipynb")
    assert (copies / "07_sampler.old2.ipynb").read_text() == "mine again"


@pytest.mark.parametrize("name", ["", "99", "0"])
def test_a_page_that_is_not_one_is_refused(
    pages: Path, copies: Path, name: str
) -> None:
    if name == "0":
        (pages / "01_attention.ipynb").write_text("")
    with pytest.raises(ValueError, match="00, "):
        lab.copy_pages(pages, copies, fresh=name)


@pytest.mark.parametrize(
    ("arguments", "first", "root"),
    [
        ([], "lab/00_tour.ipynb", "."),
        (["--edit"], "notebooks/00_tour.ipynb", "."),
        (["student"], "00_tour.ipynb", "student"),
    ],
    ids=lambda value: str(value),
)
def test_what_is_opened(
    arguments: list[str],
    first: str,
    root: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pages of the course only by `--edit`, and nothing is written into them."""
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    for folder in ("notebooks", "student"):
        (tmp_path / folder).mkdir()
        nbformat.write(page, tmp_path / folder / "00_tour.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.setattr(lab, "PAGES", tmp_path / "notebooks")
    monkeypatch.setattr(lab, "COPIES", tmp_path / "lab")
    called = []
    monkeypatch.setattr(
        lab.subprocess, "call", lambda command, env: called.append((command, env)) or 0
    )
    flags = ["--", "--no-browser", "--ServerApp.port=1"]
    monkeypatch.setattr(sys, "argv", ["lab.py", *arguments, *flags])
    with pytest.raises(SystemExit) as ended:
        lab.main()
    assert ended.value.code == 0
    [(command, env)] = called
    assert f"--LabApp.default_url=/lab/tree/{first}" in command
    assert f"--ServerApp.root_dir={(tmp_path / root).resolve()}" in command
    assert command[-2:] == flags[1:]
    off = lab.COPIES / ".jupyter" / "edit"
    edits = arguments == ["--edit"]
    assert (str(off) in env["JUPYTER_CONFIG_PATH"]) is edits
    # Tabs of originals must not come back where pages are saved unasked.
    assert (f"--LabApp.workspaces_dir={off / 'workspaces'}" in command) is edits
    # Nor must those that a link of docs/ leads to be saved there.
    assert ("--CourseFiles.read_only=notebooks" in command) is (not arguments)
    assert [p.name for p in (tmp_path / "notebooks").iterdir()] == ["00_tour.ipynb"]


def test_originals_can_be_read_in_make_lab_and_not_written(tmp_path: Path) -> None:
    """Links of docs/ lead to them; JupyterLab saves what it opened, run or not."""
    pytest.importorskip("jupyter_server")
    loader = PyFileConfigLoader("jupyter_server_config.py", str(lab.SETTINGS))
    files = loader.load_config().ServerApp.contents_manager_class
    for name in ("notebooks", "lab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00_tour.ipynb").write_text("{}")
    (tmp_path / "README.md").write_text("")
    flag = Config(CourseFiles={"read_only": "notebooks"})
    for config, writable in ((flag, False), (Config(), True)):
        manager = files(root_dir=str(tmp_path), config=config)
        assert manager.is_writable("notebooks/00_tour.ipynb") is writable
        assert manager.is_writable("/lab/00_tour.ipynb")
        assert manager.is_writable("README.md") and manager.is_writable("")


def test_a_folder_without_pages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lab.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="make student"):
        lab.main()


def test_git_ignores_the_copies() -> None:
    assert "lab/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_page_is_trusted_after_it_was_signed(tmp_path: Path) -> None:
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    nbformat.write(page, tmp_path / "00_tour.ipynb")
    lab.trust(tmp_path, tmp_path)
    notary = lab.NotebookNotary(
        db_file=str(tmp_path / "signatures.db"), secret_file=str(tmp_path / "secret")
    )
    assert notary.check_signature(nbformat.read(tmp_path / "00_tour.ipynb", 4))


@pytest.mark.parametrize("autosave", [True, False])
def test_settings_are_those_of_the_course(
    autosave: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server reads them: a reader's own folder comes first, and none is written to."""
    settings_utils = pytest.importorskip("jupyterlab_server.settings_utils")
    own = tmp_path / "own" / "labconfig"
    own.mkdir(parents=True)
    plugin = "@jupyterlab/apputils-extension:notification"
    mine = {plugin: {"fetchNews": "true"}}
    (own / "default_setting_overrides.json").write_text(json.dumps(mine))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(tmp_path / "own"))
    environment = lab.make_environment(tmp_path / "state", autosave)
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", environment["JUPYTER_CONFIG_PATH"])
    found, error = settings_utils._get_overrides(str(tmp_path / "none"))
    assert not error
    assert found[plugin] == {"fetchNews": "true", "checkForUpdates": False}
    tracker = found["@jupyterlab/notebook-extension:tracker"]
    assert tracker["windowingMode"] == "none"
    saving = found["@jupyterlab/docmanager-extension:plugin"]
    assert saving.get("autosave", True) is autosave
    assert saving["defaultViewers"] == {"markdown": "Markdown Preview"}


def test_the_settings_exist_in_this_jupyterlab() -> None:
    """A setting under a name that JupyterLab does not know would be passed over in silence."""
    schemas = Path(sys.prefix) / "share/jupyter/lab/schemas"
    if not schemas.is_dir():
        pytest.skip("no JupyterLab here")
    file = lab.SETTINGS / "labconfig" / "default_setting_overrides.json"
    for name, values in json.loads(file.read_text()).items():
        package, plugin = name.split(":")
        schema = json.loads((schemas / package / f"{plugin}.json").read_text())
        for key, value in values.items():
            choices = schema["properties"][key]
            if "oneOf" in choices:
                assert value in [choice["const"] for choice in choices["oneOf"]], key
            if "enum" in choices:
                assert value in choices["enum"], key
