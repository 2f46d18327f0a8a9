"""Widgets of the pages: attention, cache memory, sampling, planted bugs, a generation.

    from folo_lib.course.widgets import kv_memory_calculator

    kv_memory_calculator()  # the last expression of a cell

Each function returns a `CourseWidget`, which shows itself: controls and a picture in JupyterLab,
the picture alone where no kernel runs. `controls` holds the controls by name, so that Python
can turn them too: `widget.controls["batch"].value = 8`.
"""

try:
    import ipywidgets as _ipywidgets  # noqa: F401
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"folo_lib.course.widgets needs ipywidgets and matplotlib ({error}): "
        'pip install "folo-lib[notebooks] @ git+https://github.com/folovllm/FoloVLLM"'
    ) from error

from folo_lib.course.widgets.attention import (
    attention_explorer,
    attention_weights,
    copying_scores,
)
from folo_lib.course.widgets.base import CourseWidget, Explorer
from folo_lib.course.widgets.bugs import BUGS, bug_laboratory
from folo_lib.course.widgets.generation import LiveGeneration, live_generation
from folo_lib.course.widgets.memory import (
    MODEL_SHAPES,
    ModelShape,
    kv_memory_calculator,
)
from folo_lib.course.widgets.sampling import (
    next_token_distributions,
    sampling_playground,
)

__all__ = [
    "BUGS",
    "MODEL_SHAPES",
    "CourseWidget",
    "Explorer",
    "LiveGeneration",
    "ModelShape",
    "attention_explorer",
    "attention_weights",
    "bug_laboratory",
    "copying_scores",
    "kv_memory_calculator",
    "live_generation",
    "next_token_distributions",
    "sampling_playground",
]
