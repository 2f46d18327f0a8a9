"""Lets JupyterLab find the course's style sheet; a reader's own goes before it."""

from pathlib import Path

from jupyter_core.paths import jupyter_config_dir
from jupyter_server.serverapp import ServerApp

HERE = Path(__file__).resolve().parent
ServerApp.static_custom_path.tag(config=True)  # of those that can be set it is not one
c = get_config()  # noqa: F821
c.ServerApp.static_custom_path = [
    str(Path(jupyter_config_dir()) / "custom"),
    str(HERE / "custom"),
]
# "Save and Export Notebook As" is nbconvert.
load_subconfig(str(HERE / "jupyter_nbconvert_config.py"))  # noqa: F821
