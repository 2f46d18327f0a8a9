"""The documentation site: `make docs` builds it in build/docs, without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))

import folo_lib  # noqa: E402

project = "FoloVLLM"
author = "FoloVLLM contributors"
copyright = "FoloVLLM contributors. Code: Apache-2.0. Prose and figures: CC BY 4.0"
version = release = folo_lib.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "course_pages",  # these six lie in _ext/
    "course_api",
    "course_docstrings",
    "course_tables",
    "course_benchmark",
    "course_formulas",
]
exclude_patterns = ["_ext", "_static", "_templates"]
templates_path = ["_templates"]

# Pages. What they show was saved in them; nothing is executed here, and no page asks for
# JavaScript or a font of somebody else's.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"
nb_output_stderr = "remove-warn"
nb_code_prompt_show = "Show code"
nb_code_prompt_hide = "Hide code"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [
    ("html", "image/png", 0),  # a widget's picture stands for the widget
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "application/javascript", None),
]
myst_enable_extensions = ["attrs_block", "dollarmath"]
html_math_renderer = "course_formulas"
myst_heading_anchors = 3
highlight_language = "none"  # of fences that name no language

# API reference.
viewcode_follow_imported_members = False  # else it lists `builtins`, which has no page
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_param = False  # "query, key: ..." describes two at once
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

# Looks.
html_theme = "furo"
html_title = "FoloVLLM"
pygments_dark_style = "a11y-dark"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_domain_indices = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": {
        "color-brand-primary": "#005a8d",
        "color-brand-content": "#005a8d",
        "color-brand-visited": "#005a8d",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4f0",
        "color-brand-content": "#7cc4f0",
        "color-brand-visited": "#7cc4f0",
    },
}
