"""The public API is the one that was written down, and a change of it is told."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import folo_lib
from folo_lib import EngineConfig, SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = ROOT / "tools" / "api_snapshot.py"
    spec = importlib.util.spec_from_file_location("api_snapshot", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["api_snapshot"] = module
    spec.loader.exec_module(module)
    return module


def test_the_public_api_is_the_one_written_down(tool: ModuleType) -> None:
    changes = tool.find_changes(tool.read_snapshot(), tool.read_api())
    assert not changes, (
        "The public API is not that of tests/api.txt:\n"
        + "\n".join(changes)
        + "\nIf users are to live with that, say so in CHANGELOG.md under the first heading, and "
        "accept it by `make api` (tools/api_snapshot.py --write)."
    )


def test_it_is_what_an_import_finds(tool: ModuleType) -> None:
    """The text is read off the source; here the modules are asked."""
    lines = tool.read_api()
    names = [tool.get_name(line) for line in lines]
    assert len(names) > 500
    package = {n.removeprefix("folo_lib.") for n in names if n.startswith("folo_lib.")}
    assert package == set(folo_lib.__all__)
    by_module: dict[str, set[str]] = {}
    for module, name, *_ in (name.split(".") for name in names):
        by_module.setdefault(module, set()).add(name)
    del by_module["folo_lib"]
    for stem, found in by_module.items():
        try:
            module = importlib.import_module(f"folo_lib.{stem}")
        except ModuleNotFoundError as missing:  # of an extra, or Triton
            assert not str(missing.name).startswith("folo_lib"), missing
            continue
        assert found == set(module.__all__), stem


def test_options_are_listed_with_their_defaults(tool: ModuleType) -> None:
    lines = tool.read_api()
    for owner in (EngineConfig, SamplingParams):
        prefix = f"{owner.__module__.removeprefix('folo_lib.')}.{owner.__name__}."
        listed = [n for n in map(tool.get_name, lines) if n.startswith(prefix)]
        fields = owner.__dataclass_fields__
        assert [n.removeprefix(prefix) for n in listed][: len(fields)] == list(fields)
    assert "sampling_params.SamplingParams.max_tokens: int | None = 16" in lines


@pytest.mark.parametrize(
    ("source", "changed", "name"),
    [
        (
            "def step(self, n: int=1) -> int:",
            "def step(self, n: int=2) -> int:",
            "step",
        ),
        ("def step(self, n: int) -> int:", "def step(self, n: str) -> int:", "step"),
        ("def step(self) -> int:", "async def step(self) -> int:", "step"),
        ("def step(self) -> int:", "@property\n    def step(self) -> int:", "step"),
        ("def step(self) -> int:", "def _step(self) -> int:", "step"),
        ("def __init__(self, x):", "def __init__(self, y):", "LLMEngine"),
        ("size: int = 1", "size: int = 2", "size"),
        ("size: int = 1", "size: float = 1", "size"),
    ],
)
def test_a_change_is_seen_and_must_be_told(
    tool: ModuleType, tmp_path: Path, source: str, changed: str, name: str
) -> None:
    def read(body: str) -> list[str]:
        body += "\n        ..." if body.endswith(":") else ""
        text = f'__all__ = ["LLMEngine"]\n\nclass LLMEngine:\n    {body}\n'
        (tmp_path / "engine.py").write_text(text, encoding="utf-8")
        (tmp_path / "__init__.py").write_text(
            '__all__ = [*()]\n_MODULE_OF = {"LLMEngine": "engine"}\n', encoding="utf-8"
        )
        lines: list[str] = tool.read_api(tmp_path)
        return lines

    changes = tool.find_changes(read(source), read(changed))
    assert changes
    said = f"# Changelog\n\n## Next\n\n- `{name}` is another.\n\n## 0.1\n\n"
    assert tool.find_unnamed(changes, said) == []
    silent = f"# Changelog\n\n## Next\n\n- Faster.\n\n## 0.1\n\n- `{name}` is new.\n"
    assert tool.find_unnamed(changes, silent) == [name]


def test_a_change_inside_a_module_need_not_be_told(tool: ModuleType) -> None:
    changes = ["- def engine.take_outputs(table)", "+ def engine.take_outputs(tables)"]
    assert tool.find_unnamed(changes, "# Changelog\n\n## Next\n\n") == []
