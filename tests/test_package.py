"""The package from outside: what an import costs, what it needs, how the pages look."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import folo_lib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("notebooks/*.ipynb"))
# `course` stands beside the table: they may import all, none imports it.
MODULES = sorted(ROOT.glob("folo_lib/*.py"))

# Design section 1: a module imports only modules above it. Those of the pages are in the
# order of the pages; those written by hand stand where they are first used, and what only
# the command line of the benchmark needs comes last. `__init__` names all, imports none.
TABLE = (
    "vllm_names",
    "sampling_params",
    "checkpoint_checks",
    "platform",
    "attention",
    "rope",
    "layers",
    "model_weights",
    "qwen3",
    "backend_choice",
    "checkpoint",
    "kv_cache",
    "ragged_attention",
    "config",
    "model_source",
    "sampling_rows",
    "sampler",
    "token_logprobs",
    "runner",
    "request",
    "inputs",
    "engine_stats",
    "progress",
    "engine",
    "scheduler",
    "block_pool",
    "tile_sizes",
    "early_start",
    "last_merge",
    "paged_checks",
    "paged_attention",
    "sampling_kernels",
    "cuda_graph",
    "fused_attention",
    "fused_checks",
    "fused_decode",
    "parallel_checks",
    "tensor_parallel",
    "ticket_sums",
    "symmetric_memory",
    "summed_layers",
    "fused_vectors",
    "fused_shards",
    "serving",
    "server_protocol",
    "server_metrics",
    "server",
    "benchmark",
    "benchmark_workloads",
    "benchmark_systems",
    "benchmark_bench",
    "benchmark_batch",
    "benchmark_throughput",
    "benchmark_starts",
    "benchmark_waterfall",
    "benchmark_timeline",
    "benchmark_latency",
    "benchmark_floor",
    "benchmark_tpot",
    "benchmark_clients",
    "benchmark_threads",
    "benchmark_serving",
    "benchmark_tensor_parallel",
    "benchmark_sections",
    "benchmark_records",
    "benchmark_vllm",
    "benchmark_cli",
    "cli",
    "__main__",
)

# The pages of design section 1; the number of a page is its place.
COURSE = (
    "tour",
    "attention",
    "rope",
    "layers",
    "qwen3",
    "checkpoint",
    "kv_cache",
    "sampler",
    "runner",
    "request",
    "engine",
    "scheduler",
    "block_pool",
    "paged_attention",
    "cuda_graph",
    "fused_decode",
    "tensor_parallel",
    "serving",
    "benchmark",
)
TO_BE_WRITTEN: set[str] = set()

# The extra `serve`, with what comes with FastAPI.
OF_THE_SERVER = {"fastapi", "starlette", "pydantic", "pydantic_core"}
OF_THE_SERVER |= {"uvicorn", "prometheus_client"}

FORBIDDEN = (
    "transformers",
    "huggingface_hub",
    "triton",
    "IPython",
    "ipywidgets",
    "matplotlib",
    "fastapi",
    "uvicorn",
    "nbdev",
    "fastcore",
)


def python(code: str, *flags: str) -> str:
    """What a fresh interpreter prints, run elsewhere than in the repository."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(sys.executable).parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestImport:
    def test_loads_nothing_but_itself_and_the_standard_library(self) -> None:
        """Not even torch, so that it is quick: counted, because timing is noisy."""
        code = (
            "import sys; before = set(sys.modules); import folo_lib; "
            "print(*sorted({n.split('.')[0] for n in set(sys.modules) - before}))"
        )
        loaded = set(python(code).split()) - sys.stdlib_module_names
        assert loaded == {"folo_lib"}

    def test_every_public_name_resolves_and_loads_nothing_forbidden(self) -> None:
        code = f"""
import sys
from folo_lib import Qwen3ForCausalLM
forbidden = {FORBIDDEN}
def loaded():
    return [name for name in forbidden if name in sys.modules]
assert "torch" in sys.modules
assert not loaded(), f"one name loads {{loaded()}}"
import folo_lib
for name in folo_lib.__all__:
    assert getattr(folo_lib, name) is not None, name
assert folo_lib.Qwen3ForCausalLM is Qwen3ForCausalLM
assert not loaded(), f"all names load {{loaded()}}"
from folo_lib import *
"""
        python(code)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="'folo_lib' has no attribute 'Foo'"):
            _ = folo_lib.Foo
        assert not hasattr(folo_lib, "_MODULE")
        with pytest.raises(ImportError, match="Foo"):
            from folo_lib import Foo  # noqa: F401

    def test_dir_lists_the_public_names_and_the_modules(self) -> None:
        modules = {path.stem for path in MODULES if not path.stem.startswith("_")}
        assert dir(folo_lib) == sorted({*folo_lib.__all__, *modules, "course"})
        assert len(set(folo_lib.__all__)) == len(folo_lib.__all__)

    def test_modules_are_attributes(self) -> None:
        code = """
import sys, folo_lib
assert "torch" not in sys.modules
assert folo_lib.sampling_params.SamplingParams is folo_lib.SamplingParams
assert "torch" not in sys.modules
assert folo_lib.engine.LLMEngine is folo_lib.LLM is folo_lib.LLMEngine
assert not hasattr(folo_lib, "__main__") and not hasattr(folo_lib, "nothing")
"""
        python(code)

    def test_a_module_whose_extra_is_missing_says_which(self) -> None:
        """As an AttributeError, since `help` and `hasattr` ask for every name."""
        code = """
import sys, folo_lib
sys.modules["fastapi"] = None  # as if it were not installed
try:
    folo_lib.server
except AttributeError as error:
    print(error)
"""
        assert "no attribute 'server': " in (said := python(code))
        assert "fastapi" in said

    def test_help_begins_with_an_example(self) -> None:
        lines = python("import folo_lib; help(folo_lib)").splitlines()
        start = next(i for i, line in enumerate(lines) if line == "DESCRIPTION")
        shown = [line.strip() for line in lines[start : start + 5]]
        assert ">>> from folo_lib import LLM, SamplingParams" in shown

    def test_is_quick(self) -> None:
        """No clock, which a busy machine would upset: a few modules of the standard library."""
        code = (
            "import sys, importlib, pathlib, typing; old = {*sys.modules}; import folo_lib; "
            "print(*sorted({*sys.modules} - old))"
        )
        assert python(code).split() == ["folo_lib"]

    def test_names_are_those_that_the_modules_export(self) -> None:
        for name, module in folo_lib._MODULE_OF.items():
            name = folo_lib._ALIASES.get(name, name)
            assert name in exported_names(ROOT / "folo_lib" / f"{module}.py")

    def test_type_checkers_see_the_same_names(self) -> None:
        tree = ast.parse((ROOT / "folo_lib" / "__init__.py").read_text("utf-8"))
        typed = {
            alias.asname: (node.module or "").removeprefix("folo_lib.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname
        }
        aliases = {
            ast.unparse(node.targets[0]): ast.unparse(node.value)
            for block in tree.body
            if isinstance(block, ast.If)
            for node in block.body
            if isinstance(node, ast.Assign)
        }
        assert aliases == folo_lib._ALIASES
        typed |= {name: typed[meant] for name, meant in aliases.items()}
        assert typed == folo_lib._MODULE_OF

    def test_version(self) -> None:
        assert folo_lib.__version__ == metadata.version("folo-lib")


def exported_names(path: Path) -> list[str]:
    """`__all__` of a module, read and not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def runtime_distributions() -> set[str]:
    """folo-lib, what it requires without extras, what those require, and so on."""
    found: set[tuple[str, str]] = set()
    waiting = [("folo-lib", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                waiting += [(needed, e) for e in ("", *requirement.extras)]
    return {name for name, _ in found}


class TestRuntimeDependencies:
    def test_bundled_model_runs_without_any_extra(self) -> None:
        """Everything else that is installed here is hidden from the interpreter."""
        wanted = runtime_distributions()
        assert {"torch", "transformers", "safetensors", "tqdm"} <= wanted
        hidden = [
            module
            for module, names in metadata.packages_distributions().items()
            if not wanted & {canonicalize_name(name) for name in names}
        ]
        assert {"pytest", "nbdev", "fastcore", "matplotlib", "IPython"} <= set(hidden)
        code = f"""
import sys
at_start = set(sys.modules)  # setuptools' own, in an environment of old packages
hidden = set({hidden!r})
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
for name in ("nbdev", "IPython", "matplotlib"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} is not hidden")

import torch
from folo_lib import bundled_model_path, load_model
from folo_lib.checkpoint import load_tokenizer
tokenizer = load_tokenizer(bundled_model_path())
model = load_model(bundled_model_path(), device="cpu", use_tqdm=False)
ids = tokenizer.encode("Once upon a time", return_tensors="pt")
with torch.inference_mode():
    for _ in range(5):
        logits = model.compute_logits(model(ids)[:, -1:])
        ids = torch.cat([ids, logits.argmax(-1)], dim=1)
print(tokenizer.decode(ids[0]))
found = hidden & {{name.split(".")[0] for name in set(sys.modules) - at_start}}
assert not found, found
"""
        text = python(code)
        assert text.startswith("Once upon a time")
        assert len(text.strip()) > len("Once upon a time")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Modules that a module imports, `folo_lib.x` in full; is it when imported itself?"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(node)
        for top in ast.walk(tree)
        if isinstance(top, ast.FunctionDef)
        or (isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING")
        for node in ast.walk(top)
    }
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"folo_lib.{node.module or ''}" if node.level else node.module or ""
            base = base.rstrip(".")
            if base == "folo_lib":  # a module, or a name that __init__ looks up
                of = folo_lib._MODULE_OF
                names = [f"{base}.{of.get(a.name, a.name)}" for a in node.names]
            else:
                names = [base]
        found += [(name, id(node) not in late) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
class TestModules:
    def test_imports_only_what_is_above_it(self, path: Path) -> None:
        assert path.stem in (*TABLE, "__init__"), "add it to TABLE, in order"
        if path.stem == "__init__":
            assert not any(
                name.startswith("folo_lib") for name, early in imports_of(path) if early
            )
            return
        above = TABLE[: TABLE.index(path.stem)]
        for name, early in imports_of(path):
            root, _, module = name.partition(".")
            if root == "folo_lib" and module not in (
                "bundled_model_path",
                "__version__",
            ):
                # These two name classes that they look up in a table.
                only_types = path.stem in ("config", "qwen3") and not early
                assert only_types or module.split(".")[0] in above, name

    def test_imports_early_only_what_the_design_allows(self, path: Path) -> None:
        allowed = sys.stdlib_module_names | {"torch", "safetensors", "folo_lib"}
        # Looked up by name, when they are wanted.
        with_kernels = {"paged_attention", "sampling_kernels"}
        with_kernels |= {"fused_attention", "fused_decode", "fused_shards"}
        with_kernels |= {"fused_vectors", "ticket_sums"}
        with_kernels |= {"early_start", "summed_layers"}
        with_kernels |= {"last_merge", "paged_checks"}
        with_kernels |= {"benchmark_floor"}
        if path.stem in with_kernels:
            allowed = allowed | {"triton"}
        if path.stem.startswith("server"):
            allowed = allowed | OF_THE_SERVER
        early = {name.split(".")[0] for name, early in imports_of(path) if early}
        assert early <= allowed

    def test_imports_late_only_runtime_dependencies(self, path: Path) -> None:
        runtime = {"torch", "safetensors", "folo_lib", "transformers"}
        runtime |= {"huggingface_hub", "tqdm", "triton", "tokenizers", "jinja2"}
        if path.stem.startswith("server") or path.stem == "benchmark_serving":
            runtime |= OF_THE_SERVER
        anywhere = {name.split(".")[0] for name, _ in imports_of(path)}
        assert anywhere <= sys.stdlib_module_names | runtime

    def test_docstring_is_the_summary_of_its_page(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text))
        assert docstring
        pages = [p for p in PAGES if p.stem.partition("_")[2] == path.stem]
        for page in pages:
            assert f"> {docstring}\n" in source(cells(page)[0]) + "\n"
        assert len(pages) == ("AUTOGENERATED" in text)


def test_the_command_names_a_function() -> None:
    """Read from pyproject.toml, since an installed command may be an older one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [(name, where)] = project["project"]["scripts"].items()
    assert name == "folo"
    assert callable(pkgutil.resolve_name(where))


class TestPackageData:
    def test_py_typed(self) -> None:
        assert resources.files("folo_lib").joinpath("py.typed").is_file()

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ],
    )
    def test_bundled_checkpoint(self, name: str) -> None:
        folder = resources.files("folo_lib").joinpath("assets", "tiny-qwen3")
        assert folder.joinpath(name).is_file()
        assert (folo_lib.bundled_model_path() / name).is_file()

    def test_no_strangers(self) -> None:
        """What lies in the package is shipped with it."""
        known = {".py", ".typed", ".json", ".safetensors", ".jinja", ".md", ".html"}
        files = [p for p in (ROOT / "folo_lib").rglob("*") if p.is_file()]
        files = [p for p in files if p.suffix != ".pyc"]
        assert {p.suffix or f".{p.name}" for p in files} <= known


def cells(page: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return found


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(page: Path) -> list[dict[str, Any]]:
    return [cell for cell in cells(page) if cell["cell_type"] == "code"]


def test_there_are_pages() -> None:
    exported = {path.stem for path in MODULES if "AUTOGENERATED" in path.read_text()}
    assert {page.stem.partition("_")[2] for page in PAGES} >= {*exported, "tour"}


def test_every_page_has_its_number() -> None:
    stems = [page.stem for page in PAGES if page.stem[0].isdigit()]
    expected = [f"{i:02}_{name}" for i, name in enumerate(COURSE)]
    assert stems == [stem for stem in expected if stem[3:] not in TO_BE_WRITTEN]


def test_modules_are_in_the_order_of_their_pages() -> None:
    names = [page.stem[3:] for page in PAGES if page.stem[0].isdigit()]
    modules = [name for name in names if name in TABLE]
    assert modules == sorted(modules, key=TABLE.index)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestPages:
    def test_begins_with_title_and_summary(self, page: Path) -> None:
        first = cells(page)[0]
        assert first["cell_type"] == "markdown"
        title, blank, summary, after = [*source(first).split("\n"), ""][:4]
        assert title.startswith("# ")
        assert not blank
        assert summary.startswith("> ")
        assert summary.endswith(".")
        assert not after.startswith(">"), "the summary is one line"

    def test_has_one_title(self, page: Path) -> None:
        lines = [
            line
            for cell in cells(page)
            if cell["cell_type"] == "markdown"
            for line in source(cell).split("\n")
        ]
        assert sum(line.startswith("# ") for line in lines) == 1
        assert any(line.startswith("## 1. ") for line in lines)

    def test_sections_are_numbered(self, page: Path) -> None:
        numbers = [
            int(line.split()[1].rstrip("."))
            for cell in cells(page)
            if cell["cell_type"] == "markdown"
            for line in source(cell).split("\n")
            if line.startswith("## ") and line.split()[1].rstrip(".").isdigit()
        ]
        assert numbers == list(range(1, len(numbers) + 1))

    def test_was_executed_in_order(self, page: Path) -> None:
        counts = [c["execution_count"] for c in code_cells(page) if source(c).strip()]
        assert counts == list(range(1, len(counts) + 1))

    def test_has_no_error_and_no_stderr(self, page: Path) -> None:
        for cell in code_cells(page):
            raises = "raises-exception" in cell["metadata"].get("tags", [])
            for output in cell["outputs"]:
                assert raises or output["output_type"] != "error", source(cell)
                assert output.get("name") != "stderr", source(cell)

    def test_code_is_narrow(self, page: Path) -> None:
        wide = [
            line
            for cell in code_cells(page)
            for line in source(cell).split("\n")
            if len(line) > 88
        ]
        assert not wide

    def test_cell_ids_are_unique(self, page: Path) -> None:
        ids = [cell["id"] for cell in cells(page)]
        assert len(set(ids)) == len(ids)

    def test_exports_the_module_of_its_name(self, page: Path) -> None:
        exports = [
            line.split()[-1]
            for cell in code_cells(page)
            for line in source(cell).split("\n")
            if line.startswith("#| default_exp")
        ]
        name = page.stem.partition("_")[2]
        is_module = (ROOT / "folo_lib" / f"{name}.py").exists()
        assert exports == ([name] if is_module else [])

    def test_outputs_hold_nothing_of_this_machine(self, page: Path) -> None:
        for cell in code_cells(page):
            text = json.dumps(cell["outputs"])
            for part in ("/home/", "/root/", "/Users/", "/work/", "/tmp/"):
                assert part not in text, source(cell)
