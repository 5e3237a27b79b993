"""`prism explore`: the explorer in a browser, served by Voila from a notebook that is written for it."""

import secrets
import socket
import tempfile
import threading
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from tornado.web import RequestHandler
from traitlets import List
from traitlets.config import Config
from voila.app import Voila

from prism_lib import paths
from prism_lib.apps.profiles import UsageError
from prism_lib.models.classifier import find_classifier
from prism_lib.models.published import locate

# Nothing is fetched from elsewhere: Voila's page asks a public server for fonts that it has itself. No page frames it.
SOURCES = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws: wss:"
POLICY = {"Content-Security-Policy": f"{SOURCES}; frame-ancestors 'self'"}
IDLE = 3600  # seconds: after them the process of a page ends that did not say that it was closed
MAX_MESSAGE = 512 * 2**20  # bytes: an upload that is too large reaches the explorer, which says so


class _Kernels(KernelSpecManager):
    """The kernel of this interpreter, whatever kernels are installed; it does not warn about encryption."""

    kernel_dirs: Any = List([])

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        spec = super().get_kernel_spec(kernel_name)
        return KernelSpec(**spec.to_dict() | {"argv": [*spec.argv, "--IPKernelApp.log_level=CRITICAL"]})


class _Server(Voila):
    """Voila that gives, and opens, the address with its token."""

    ticket = secrets.token_urlsafe()  # for one use: all users of a machine can read the command line of the browser

    def init_handlers(self) -> Any:
        return [(f"/once/{self.ticket}", _Once, {"server": self}), *super().init_handlers()]

    def launch_browser(self) -> None:
        self.show(f"The explorer is at {self.display_url} until you press Ctrl+C.")
        if not self.quiet:
            threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        if not webbrowser.open(f"{self.display_url.partition('?')[0]}once/{self.ticket}"):
            self.show("There is no browser here: open that address in one.")


class _Once(RequestHandler):
    """Leads the first caller to the address with the token, and later ones to a page that asks for it."""

    def initialize(self, server: _Server) -> None:
        self.server = server

    def get(self) -> None:
        used, self.server.ticket = self.server.ticket, ""
        self.redirect(self.server.display_url if used else "/")


def serve(options: Namespace, show: Callable[[str], None]) -> None:
    """Serve the explorer by the options of `prism explore` until Ctrl+C; UsageError before anything starts.

    `show` gets the address. The process that computes starts when a page is opened, and ends with it.
    """
    data, judge, ip = options.data, options.judge, options.ip
    folders = [Path(data).expanduser().resolve(), paths.data() / data]
    if data and not (folders := [folder for folder in folders if folder.is_dir()]):
        raise UsageError(f"there is no folder {data}, neither here nor in {paths.data()}")
    found = find_classifier(judge)
    if judge and ":" not in judge and not (found.is_file() or (found / "config.json").is_file()):
        raise UsageError(f"there is no judge {judge!r} in {paths.weights()}")
    try:
        if "/" not in (model := locate(options.model or paths.SHIPPED)):  # a hub id has an owner
            raise UsageError(f"there is no model {model!r}, here or below {paths.runs()}")
        with socket.create_server((ip, options.port)) as free:
            port = free.getsockname()[1]
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        if error.errno is None:  # of `locate`
            raise
        why = str(error.strerror).partition(" (while")[0]
        raise UsageError(f"port {options.port} of {ip} cannot be used: {why}") from None
    call = f"explore({options.model!r}, {judge!r}, data={str(folders[0]) if data else ''!r})"
    cell = f"import os\nos.chdir({str(Path.cwd())!r})\nfrom prism_lib.apps import explore\n{call}"
    with tempfile.TemporaryDirectory(prefix="prism-") as folder:
        notebook = Path(folder) / "PRISM explorer.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), notebook)
        settings = {"websocket_max_message_size": MAX_MESSAGE, "ws_ping_timeout": 30_000, "headers": POLICY}
        config = Config(VoilaConfiguration={"kernel_spec_manager_class": _Kernels, "show_tracebacks": True})
        config.MappingKernelManager = Config(cull_idle_timeout=IDLE, cull_interval=IDLE // 10)
        place = {"notebook_path": str(notebook), "ip": ip, "port": port, "port_retries": 0, "auto_token": True}
        server = _Server(**place, tornado_settings=settings, config=config, log_level="ERROR")
        server.show, server.quiet = show, options.no_browser
        server.initialize([])
        server.start()
