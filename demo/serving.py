"""One process: models, page and server."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import gradio as gr
from starlette.middleware import Middleware

from demo.guard import Guard
from demo.loading import Models, load_models
from demo.options import DemoOptions
from demo.page import CSS, HEAD, THEME, build_page
from vision_moe import InputError


@dataclass(frozen=True)
class RunningDemo:
    """A demo that answers at ``url`` until it is closed; its users' files go with it."""

    page: gr.Blocks
    url: str
    files: Path

    def __enter__(self) -> RunningDemo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and remove what was uploaded."""
        self.page.close(verbose=False)
        shutil.rmtree(self.files, ignore_errors=True)


def run_demo(options: DemoOptions) -> None:
    """Serve until interrupted."""
    # A terminated demo ends like an interrupted one: nobody's pictures stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print("loading the models", file=sys.stderr)
    started = time.perf_counter()
    with start_demo(options) as running:
        print(
            f"ready after {time.perf_counter() - started:.1f} s at {running.url} (Ctrl-C ends)",
            file=sys.stderr,
        )
        running.page.block_thread()


def start_demo(options: DemoOptions, models: Models | None = None) -> RunningDemo:
    """Load the models and serve the page from threads of this process.

    Args:
        options: All that can be chosen.
        models: Already loaded ones, instead of those that the options name.

    Raises:
        InputError: A model or file is damaged, or the port is taken.
    """
    auth = read_auth_file(options.auth_file) if options.auth_file else None
    models = models or load_models(options)
    # A folder of this process's own, which only its user can read: Gradio serves what lies in it.
    files = Path(tempfile.mkdtemp(prefix="mllm-demo-")).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    page = build_page(models, options, files / "examples")
    page.queue(max_size=options.queue_size)
    try:
        _, url, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            auth=auth,
            max_file_size=options.max_upload_megabytes * 2**20,
            theme=THEME,
            css=CSS,
            head=HEAD,
            app_kwargs={"middleware": [Middleware(Guard)]},
            footer_links=["api", "settings"],
            state_session_capacity=1000,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=False,
            prevent_thread_lock=True,
            quiet=True,
        )
    except BaseException as error:  # an interrupt too: nothing stays behind
        shutil.rmtree(files, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(f"cannot listen on {options.host}: {error}") from error
    return RunningDemo(page, page.share_url or url, files)


def read_auth_file(file: Path) -> list[tuple[str, str]]:
    """Users and passwords, a ``user:password`` a line; empty lines and ``#`` lines are skipped.

    Raises:
        InputError: The file cannot be read, or a line is something else.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    users = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, password = line.strip().partition(":")
        if not (user and colon and password):
            raise InputError(f"{file}, line {number}: not of the form user:password")
        users.append((user, password))
    if not users:
        raise InputError(f"{file}: holds no user")
    return users
