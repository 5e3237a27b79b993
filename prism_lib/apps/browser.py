"""`prism explore`: the explorer in a browser, served by Voila from a notebook that is written for it."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from traitlets import List
from traitlets.config import Config
from voila.app import Voila

from prism_lib import paths
from prism_lib.apps.profiles import UsageError
from prism_lib.models.published import locate

# Nothing is fetched from elsewhere: Voila's page asks a public server for fonts that it has itself.
POLICY = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws: wss:"}
MAX_MESSAGE = 512 * 2**20  # bytes: an upload that is too large reaches the explorer, which says so


class _Kernels(KernelSpecManager):
    """The kernel of this interpreter, whatever kernels are installed; it does not warn about encryption."""

    kernel_dirs: Any = List([])

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        spec = super().get_kernel_spec(kernel_name)
        return KernelSpec(**spec.to_dict() | {"argv": [*spec.argv, "--IPKernelApp.log_level=CRITICAL"]})


class _Server(Voila):
    """Voila that gives and opens the address with its token."""

    def __init__(self, show: Callable[[str], None], **more: object) -> None:
        self._show = show
        super().__init__(**more)

    def launch_browser(self) -> None:
        self._show(f"The explorer is at {self.display_url} until you press Ctrl+C.")
        if self.browser != "none":
            threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        if not webbrowser.open(self.display_url):
            self._show("There is no browser here: open that address in one.")


def serve(model: str, judge: str, data: str, ip: str, port: int, browser: bool, show: Callable[[str], None]) -> None:
    """Serve `explore(model, judge, data=data)` until Ctrl+C; port 0 is any free one. UsageError before anything starts.

    `show` gets the address. The process that computes starts when a page is opened, and ends with it.
    """
    try:
        if model:
            locate(model)
        if judge and not (paths.weights() / judge / "model.safetensors").is_file():
            raise UsageError(f"there is no judge {judge!r} in {paths.weights()}")
    except ValueError as error:
        raise UsageError(str(error)) from None
    folders = [Path(data).expanduser().resolve(), paths.data() / data]
    if data and not (found := [str(folder) for folder in folders if folder.is_dir()]):
        raise UsageError(f"there is no folder {data}, neither here nor in {paths.data()}")
    try:
        with socket.create_server((ip, port)) as free:
            port = free.getsockname()[1]
    except OSError as error:
        raise UsageError(f"port {port} of {ip} cannot be used: {os.strerror(error.errno or 0)}") from None
    call = f"explore({model!r}, {judge!r}, data={found[0] if data else ''!r})"
    lines = ["import os", f"os.chdir({str(Path.cwd())!r})", "from prism_lib.apps import explore", call]
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        notebook = Path(folder) / "PRISM explorer.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))]), notebook)
        settings = {"websocket_max_message_size": MAX_MESSAGE, "ws_ping_timeout": 30_000, "headers": POLICY}
        config = Config(VoilaConfiguration={"kernel_spec_manager_class": _Kernels, "show_tracebacks": True})
        place = {"ip": ip, "port": port, "port_retries": 0, "browser": "" if browser else "none"}
        quiet = {"auto_token": True, "log_level": "ERROR", "tornado_settings": settings, "config": config}
        server = _Server(show, notebook_path=str(notebook), **place, **quiet)
        server.initialize([])
        server.start()
