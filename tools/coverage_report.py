"""How much of the engine its unit tests run: lines and branches, by module.

    make coverage

reads what `coverage run` has recorded, and fails below 95 % of the lines or 90 % of the branches.
What only a GPU runs is told apart: `[tool.folo.coverage]` in pyproject.toml names it, each with its
reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def read_settings() -> dict[str, Any]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings: dict[str, Any] = tomllib.loads(text)["tool"]["folo"]["coverage"]
    return settings


def find_modules(settings: Mapping[str, Any]) -> list[str]:
    """Modules of the engine: all that lie in `folo_lib/`, but for those of the benchmark."""
    names = [path.stem for path in sorted((ROOT / "folo_lib").glob("*.py"))]
    others = settings["not_engine"]
    return [name for name in names if not any(name.startswith(one) for one in others)]


def read_regions(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """`module.Class.method` and what of it ran; "" stands for the rest of a module."""
    for path, file in record["files"].items():
        if Path(path).parent.name != "folo_lib":
            continue  # exercises bear the names of modules
        for name, region in file["functions"].items():
            yield f"{Path(path).stem}.{name}", region


def is_named(name: str, names: Mapping[str, str]) -> bool:
    """Whether a region is one of these, or lies in one of them."""
    return any(name == one or name.startswith(f"{one}.") for one in names)


def share(done: int, total: int) -> float:
    return 100.0 if total == 0 else 100 * done / total


def summarize(
    record: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]], list[str]]:
    """Counts by module, counts by what needs a GPU, and names of the latter that are nowhere."""
    modules = {name: Counter[str]() for name in find_modules(settings)}
    on_gpu = {name: Counter[str]() for name in settings["gpu_only"]}
    for name, region in read_regions(record):
        stem = name.split(".")[0]
        if stem not in modules:
            continue
        counts = {key: region["summary"][key] for key in COUNTS}
        owner = next((one for one in on_gpu if is_named(name, {one: ""})), None)
        (modules[stem] if owner is None else on_gpu[owner]).update(counts)
    unknown = [name for name, counts in on_gpu.items() if not counts]
    return modules, on_gpu, unknown


def describe(name: str, counts: Counter[str]) -> str:
    lines = share(counts["covered_lines"], counts["num_statements"])
    branches = share(counts["covered_branches"], counts["num_branches"])
    missed = counts["num_statements"] - counts["covered_lines"]
    return f"{name:<44} {lines:6.1f} % {branches:6.1f} % {missed:6}"


def report(record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Prints the table; what is not as it has to be, one sentence each."""
    modules, on_gpu, unknown = summarize(record, settings)
    print(f"{'module':<44} {'lines':>8} {'branches':>8} {'missed':>6}")
    total = Counter[str]()
    for name, counts in modules.items():
        total.update(counts)
        print(describe(name, counts))
    print(describe("the engine", total))
    print("\nrun by a GPU alone, and not counted above:")
    for name, counts in on_gpu.items():
        print(f"{describe(name, counts)}  {settings['gpu_only'][name]}")
    faults = [
        f"{name} is named in pyproject.toml, and nowhere else" for name in unknown
    ]
    for part, done, of in (
        ("lines", "covered_lines", "num_statements"),
        ("branches", "covered_branches", "num_branches"),
    ):
        reached, least = share(total[done], total[of]), settings[f"least_{part}"]
        if reached < least:
            faults.append(f"{reached:.1f} % of the {part} are run, and not {least} %")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Report what the engine's tests run.")
    parser.add_argument("--data", default=".coverage", help="of `coverage run`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(out)]
        command += ["--data-file", options.data]
        if subprocess.run(command, cwd=ROOT).returncode:
            sys.exit("There is no record: `make coverage` makes one.")
        record = json.loads(out.read_text(encoding="utf-8"))
    if faults := report(record, read_settings()):
        sys.exit("\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
