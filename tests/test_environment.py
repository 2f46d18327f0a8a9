"""pyproject.toml, environment.yml and constraints.txt say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import folo_lib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PYPI_NAME = {"pytorch": "torch"}


def parse(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by canonical PyPI name; `pytorch >=2.11` reads as `torch>=2.11`."""
    requirements = [Requirement(line) for line in lines]
    names = [
        PYPI_NAME.get(req.name, canonicalize_name(req.name)) for req in requirements
    ]
    assert len(set(names)) == len(names), "a package is listed twice"
    return dict(zip(names, requirements, strict=True))


def extra(name: str) -> list[str]:
    """The requirements of an extra, with those of the extras that it names."""
    found: list[str] = []
    for line in PROJECT["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            found += [inner for other in requirement.extras for inner in extra(other)]
        else:
            found.append(line)
    return found


def make_installs() -> dict[str, Requirement]:
    """What `make` and conda install on every system: runtime, notebooks and test."""
    lines = PROJECT["dependencies"] + extra("notebooks") + extra("test")
    return parse([line for line in lines if Requirement(line).marker is None])


def conda_packages() -> dict[str, Requirement]:
    return parse([line for line in CONDA["dependencies"] if isinstance(line, str)])


def constraints(name: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return parse([line for line in lines if line and not line.startswith("#")])


def test_runtime_dependencies_are_the_four() -> None:
    assert set(parse(PROJECT["dependencies"])) == {
        "torch",
        "transformers",
        "safetensors",
        "tqdm",
    }


def test_triton_comes_with_test_on_linux_alone() -> None:
    [line] = [line for line in extra("test") if line.startswith("triton")]
    triton = Requirement(line)
    assert triton.marker is not None and not triton.specifier
    assert triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})
    assert not triton.marker.evaluate({"sys_platform": "win32"})


def test_conda_lists_the_packages_of_pyproject() -> None:
    assert set(conda_packages()) - {"python", "pip"} == set(make_installs())


def test_conda_has_the_bounds_of_pyproject() -> None:
    packages = conda_packages()
    bounds = {name: req.specifier for name, req in make_installs().items()}
    assert {name: packages[name].specifier for name in bounds} == bounds
    assert str(packages["python"].specifier) == PROJECT["requires-python"]


def test_conda_takes_only_our_package_through_pip() -> None:
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]
    sections = [entry for entry in CONDA["dependencies"] if not isinstance(entry, str)]
    assert sections == [{"pip": ["-e ."]}]


def test_constraints_are_exact_and_within_the_bounds() -> None:
    pins = constraints()
    for name, pin in pins.items():
        assert str(pin.specifier).startswith("=="), f"{name} is not pinned"
        assert "+" not in str(pin.specifier), f"{name} names a local build"
    for name, wanted in make_installs().items():
        version = next(iter(pins[name].specifier)).version
        assert wanted.specifier.contains(version), f"{name}=={version} against {wanted}"


def test_constraints_leave_gpu_packages_to_torch() -> None:
    pins = constraints()
    assert str(pins["torch"].specifier) == "==2.13.0"
    gpu = [name for name in pins if name.startswith(("nvidia", "cuda", "triton"))]
    assert gpu == [] and PROJECT["name"] not in pins


def test_oldest_constraints_are_the_lower_bounds() -> None:
    """`transformers>=5.0` is tested on 5.0.0, and each bound of a runtime package or page is."""
    bounded = parse(PROJECT["dependencies"] + extra("pages"))
    floors = {name: req for name, req in bounded.items() if req.specifier}
    pins = constraints("constraints-oldest.txt")
    assert set(floors) == {"torch", "transformers", "ipywidgets"}
    assert set(pins) == {*floors, "ipykernel", "numpy"}
    for name, requirement in floors.items():
        [bound], [pin] = requirement.specifier, pins[name].specifier
        assert (bound.operator, pin.operator) == (">=", "==")
        assert pin.version.startswith(f"{bound.version}."), name


def test_a_notebook_server_comes_with_notebooks_alone() -> None:
    """Colab and Kaggle have one, and install `pages`."""
    serve = {"fastapi", "uvicorn", "prometheus-client"}
    assert set(parse(extra("serve"))) == serve
    assert set(parse(extra("pages"))) == {"matplotlib", "ipywidgets", *serve}
    assert set(parse(extra("notebooks"))) > {"jupyterlab", *parse(extra("pages"))}
    assert "jupyterlab" not in parse(PROJECT["dependencies"] + extra("pages"))


def test_what_make_test_leaves_out_is_run_by_make_test_more_and_ci() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.count('pytest -m "not more"') == 2  # of test and test-oldest
    assert makefile.count("pytest -m more") == 1
    *_, others, last = (ROOT / ".ci" / "run").read_text("utf-8").split("\n")[:-1]
    assert others.startswith("make ") and "test-more" in others.split()
    assert last == "make test" and "test-oldest" not in others


def test_version_is_the_same_in_package_and_project() -> None:
    assert folo_lib.__version__ == PROJECT["version"]


def test_workflows_run_what_there_is() -> None:
    """They cannot be run here; what they call is there at least."""
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    targets |= {"test-more"}  # which shares its settings with others
    found = []
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            found += [step["run"] for step in job["steps"] if "run" in step]
    made = [line.split()[1] for line in found if line.startswith("make ")]
    assert {"run", "test", "test-more", "docs"} == {*made} <= targets
    for line in found:
        for word in line.split():
            if word.endswith(".py") or word == "constraints.txt":
                assert (ROOT / word).is_file(), line
    extras = {name for line in found for name in re.findall(r"\[([\w,]+)\]", line)}
    for name in ",".join(extras).split(","):
        assert name in PROJECT["optional-dependencies"]
