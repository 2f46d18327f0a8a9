"""The figure of page 05 shows what is in the file."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from safetensors import safe_open

from folo_lib import bundled_model_path
from folo_lib.course.checkpoint_figures import draw_safetensors
from folo_lib.course.figures import QUERIES


def test_tensors_stand_where_they_are_in_the_file() -> None:
    path = bundled_model_path() / "model.safetensors"
    _, axes = plt.subplots(3)
    draw_safetensors(axes, path)
    shown = "".join(text.get_text() for text in axes[0].texts)
    with path.open("rb") as file:
        beginning = file.read(24)
    assert shown == beginning[:8].hex() + beginning[8:].decode()

    boxes = [box for box in axes[2].patches if isinstance(box, Rectangle)]
    header = int.from_bytes(beginning[:8], "little")
    assert boxes[-1].get_width() == 8 + header  # the header is drawn last, over all
    queries = [b for b in boxes if b.get_facecolor() == to_rgba(QUERIES.colour)]
    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if "q_proj" in name]  # noqa: SIM118
        sizes = [2 * weights.get_tensor(name).numel() for name in names]
    assert [box.get_width() for box in queries] == sizes
    with path.open("rb") as file:
        file.seek(8)
        places = json.loads(file.read(header))
    begins = [8 + header + places[name]["data_offsets"][0] for name in names]
    assert [box.get_x() for box in queries] == sorted(begins)
    last = max(box.get_x() + box.get_width() for box in boxes)
    assert last <= path.stat().st_size
    plt.close("all")
