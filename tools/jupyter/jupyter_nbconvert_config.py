"""`jupyter nbconvert --to html PAGE` keeps the alternative texts of pictures.

A page stores a picture's caption in the metadata beside it, which nbconvert's default template
does not read. `make` copies this file to where nbconvert finds it in `.venv`; elsewhere give it
with `--config`. JupyterLab loads it for its menu in `make lab`.
"""

import html
from typing import Any


def describe(notebook: Any, resources: Any) -> tuple[Any, Any]:
    """Pictures that have an alternative text, as HTML that says it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if (
                alt and "text/html" not in output.data
            ):  # a moving figure speaks for itself
                png = output.data["image/png"].replace("\n", "")
                output.data["text/html"] = (
                    f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{png}">'
                )
    return notebook, resources


c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.HTMLExporter.preprocessors = [describe]
