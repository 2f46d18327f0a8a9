#!/usr/bin/env bash
# nbconvert's default template leaves out the alternative text of a picture, which is in its metadata.
#
# Versions:  nbconvert 7.17.2
# Expected:  `alt` in the metadata of an output's image/png becomes the `alt` of the `<img>`, in every
#            HTML template, as `width` and `height` do that stand beside it.
# Behaviour: the template `classic` writes it. `lab`, the default, does not read it, and the exporter
#            then fills the empty place.
# Seen:      classic: "A red kite."; lab: "No description has been provided for this image"
# Instead:   --config tools/jupyter/jupyter_nbconvert_config.py, which `make` puts where nbconvert looks and
#            `make lab` loads for JupyterLab's menu, or --template classic; the site has all alternative texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q nbconvert==7.17.2
"$folder/venv/bin/python" - <<'PYTHON'
import re

import nbconvert
import nbformat.v4 as v4

png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
output = v4.new_output(
    "display_data", {"image/png": png}, metadata={"image/png": {"alt": "A red kite.", "width": 8}}
)
notebook = v4.new_notebook(cells=[v4.new_code_cell("kite", outputs=[output])])
seen = {}
for name in ("classic", "lab"):
    exporter = nbconvert.HTMLExporter(template_name=name)
    [picture] = re.findall(r"<img[^>]*>", exporter.from_notebook_node(notebook)[0])
    seen[name] = re.search(r'alt="([^"]*)"', picture)[1]
    assert re.search(r'width="?8', picture), picture
print(nbconvert.__version__, seen)
assert seen["classic"] == "A red kite.", seen
assert seen["lab"] == "No description has been provided for this image", seen
PYTHON
