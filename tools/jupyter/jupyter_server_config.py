"""The course's style sheet, behind a reader's own, and pages that a reader cannot write in."""

from pathlib import Path

from jupyter_core.paths import jupyter_config_dir
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from traitlets import Unicode

HERE = Path(__file__).resolve().parent
ServerApp.static_custom_path.tag(config=True)  # of those that can be set it is not one
c = get_config()  # noqa: F821
c.ServerApp.static_custom_path = [
    str(Path(jupyter_config_dir()) / "custom"),
    str(HERE / "custom"),
]


class CourseFiles(AsyncLargeFileManager):
    """Shows the pages of one folder as read-only, so that JupyterLab never saves them unasked.

    In `make lab` these are the originals, to which links in docs/ and in the README lead.
    """

    read_only = Unicode("", help="a folder, seen from the root").tag(config=True)

    def is_writable(self, path: str) -> bool:
        folder = path.strip("/").partition("/")[0]
        return folder != (self.read_only or None) and super().is_writable(path)


c.ServerApp.contents_manager_class = CourseFiles
# "Save and Export Notebook As" is nbconvert.
load_subconfig(str(HERE / "jupyter_nbconvert_config.py"))  # noqa: F821
