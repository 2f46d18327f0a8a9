"""Figures of page 18: many clients, through an event loop and through HTTP.

    records = [read_recording(Path("data/serving_cpu.json"))]
    draw_shares(ax, records)

A recording that is not there yet is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from folo_lib.course.figures import (
    BLACK,
    GREY,
    HOST,
    US,
    label_lines,
    label_ticks,
)
from folo_lib.course.throughput_figures import latest

__all__ = ["draw_shares", "draw_waits", "list_serving"]

Result = dict[str, Any]
WAYS = {"async": "AsyncLLMEngine", "http": "HTTP"}


def name_machine(record: Result) -> str:
    """Short enough for a label."""
    device: str = record["setup"]["device"]
    return device.removeprefix("NVIDIA ") if "NVIDIA" in device else "CPU"


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
    through_http: list[float] = []
    for machine, made in list_recordings(records):
        for way in WAYS:
            if way not in made["speeds"]:
                continue  # the server's packages were missing
            y, share = len(names), made["speeds"][way]["of_generate"]
            look = US if way == "async" else HOST
            ax.barh(y, 100 * share, height=0.6, **look.bar)
            values = [100 * one for one in get_shares(made, way)]
            ax.plot(values, [y] * len(values), ".", color=BLACK, markersize=3)
            end = max(100 * share, *values)
            ax.text(end + 2, y, f"{share:.0%}", va="center")
            names.append(f"{machine}: {WAYS[way]}")
            if way == "http":
                through_http.append(share)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(0, 118), ylim=(len(names) - 0.4, -0.6))
    ax.set_xlabel("tokens/s, % of generate")
    said = " and ".join(f"{share:.0%}" for share in through_http)
    title = f"Through HTTP\n{said} of the speed is left" if said else "No HTTP"
    ax.set_title(title, fontsize=10)


def draw_waits(ax: Axes, records: Sequence[Result]) -> None:
    """First tokens in the open loop, as multiples of the closed loop's median."""
    ratios: list[float] = []
    for machine, made in list_recordings(records):
        colour = GREY if machine == "CPU" else US.colour
        for percentile, style in (("p50", "-"), ("p99", "--")):
            points = [
                (
                    100 * row["load"],
                    row["ttft"][percentile] / row["closed"]["ttft"]["p50"],
                )
                for row in made["loads"]
            ]
            share = "half" if percentile == "p50" else "99 %"
            ax.plot(
                *zip(*points, strict=True),
                style,
                color=colour,
                label=f"{machine}, {share}",
            )
        near = min(made["loads"], key=lambda row: abs(row["load"] - 0.95))
        ratios.append(near["ttft"]["p50"] / near["closed"]["ttft"]["p50"])
    ax.set_yscale("log")
    ax.axhline(1, linestyle=":", color=BLACK)
    ax.set(xlabel="arrivals, % of the capacity", xlim=(45, 150))
    ax.set_xticks([50, 80, 95, 110])
    ax.set_ylabel("first token, closed loop = 1")
    label_ticks(ax.yaxis, (1, 3, 10, 30))
    said = " and ".join(f"{ratio:.1f}" for ratio in ratios)
    ax.set_title(
        f"At 95 % of the capacity\nhalf wait {said} times as long", fontsize=10
    )
    label_lines(ax)


def list_serving(records: Sequence[Result]) -> list[str]:
    """The section in lines of text, and vLLM's engine where it was measured."""
    lines = []
    for record in records:
        made, theirs = latest(record, "serving"), latest(record, "vllm_serving")
        if not made:
            continue
        device, speeds = record["setup"]["device"], made["speeds"]
        lines.append(
            f"{device}, {made['date'][:10]}, {made['sizes']['streams']} streams: "
            f"generate {speeds['generate']['median']:,.0f} tokens/s"
        )
        for way, name in WAYS.items():
            if way in speeds:
                shares = get_shares(made, way)
                lines.append(
                    f"  {name}: {speeds[way]['of_generate']:.0%} of that (pairs "
                    f"{min(shares):.0%} to {max(shares):.0%}); the first token of one "
                    f"client after {1e3 * made['ttft_alone'][way]:.1f} ms"
                )
        if "outputs" in speeds["async"]:
            gaps = speeds["async"]["gaps"]
            lines.append(
                f"  a stream of {made['sizes']['stream_tokens']} tokens came in "
                f"{speeds['async']['outputs']:.0f} outputs, half of them within "
                f"{1e3 * gaps['p50']:.1f} ms of the last, 99 % within {1e3 * gaps['p99']:.1f}"
            )
        if theirs:
            lines.append(
                f"  vLLM's AsyncLLM: {theirs['tokens_per_second']:,.0f} tokens/s; "
                f"first token after {1e3 * theirs['ttft_alone']:.1f} ms"
            )
        for way, row in made.get("threads", {}).items():
            if way != "event_loop":
                lines.append(
                    f"  {way}: a step takes {row['wall']:.2f} ms; in read "
                    f"{row['read']:.2f}, else {row['step'] + row['owner']:.2f} on the "
                    f"processor, and the event loop {row['loop']:.2f}"
                )
    return lines
