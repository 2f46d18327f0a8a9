"""Figure 3 of page 17: many clients, through an event loop and through HTTP.

    records = [read_recording(Path("data/serving_cpu.json"))]
    draw_shares(ax, records)

A recording that is not there yet is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import GREY, US
from folo_lib.course.throughput_figures import DOTS, latest

__all__ = ["draw_shares"]

Result = dict[str, Any]
WAYS = {"async": "AsyncLLMEngine", "http": "HTTP"}
HATCHES = {"async": "", "http": "//"}


def name_machine(record: Result) -> str:
    """Short enough for a label."""
    device: str = record["setup"]["device"]
    return device.removeprefix("NVIDIA ") if "NVIDIA" in device else "CPU"


def colour_of(machine: str) -> str:
    return GREY if machine == "CPU" else US.colour


def list_recordings(records: Sequence[Result]) -> list[tuple[str, Result]]:
    """Each machine that was recorded, with its last `serving`."""
    found = [(record, latest(record, "serving")) for record in records]
    return [(name_machine(record), made) for record, made in found if made]


def get_shares(made: Result, way: str) -> list[float]:
    """Of each run, the speed as a share of `generate` in the same turn."""
    speeds = made["speeds"]
    pairs = zip(speeds[way]["values"], speeds["generate"]["values"], strict=True)
    return [served / alone for served, alone in pairs]


def draw_shares(ax: Axes, records: Sequence[Result]) -> None:
    """What is left of the tokens per second of `generate`, run by run."""
    names: list[str] = []
    for machine, made in list_recordings(records):
        for way in WAYS:
            if way not in made["speeds"]:
                continue  # the server's packages were missing
            y, share = len(names), made["speeds"][way]["of_generate"]
            look = US._replace(colour=colour_of(machine), hatch=HATCHES[way])
            ax.barh(y, 100 * share, height=0.6, **look.bar)
            values = [100 * one for one in get_shares(made, way)]
            ax.plot(values, [y] * len(values), "o", **DOTS)
            end = max(100 * share, *values)
            ax.text(end + 4, y, f"{share:.0%}", va="center")
            names.append(f"{machine}: {WAYS[way]}")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 118), ylim=(len(names) - 0.4, -0.6))
    ax.set_xlabel("tokens/s, % of generate")
    ax.set_title("The streams cost little, HTTP a fifth", fontsize=10)
