"""What keeps strangers in their place: uploads alone, no other host, faults told and logged."""

from __future__ import annotations

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import gradio as gr
from gradio import utils
from gradio_client import utils as client_utils

from vision_moe import InputError

logger = logging.getLogger("demo")

# Scripts of the page build functions from templates, and its styles are inline: what counts is that
# nothing is fetched from, or sent to, any other host.
_CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:;"
    " font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-src 'none'"
)
_HEADERS = {
    b"content-security-policy": _CONTENT_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
# Gradio's server fetches addresses that stand in these places.
_FETCHES = re.compile(r"/(file=|proxy=)[\s/]*[a-z][a-z0-9+.\-]*:", re.IGNORECASE)
_MAX_BODY_BYTES = 4_000_000  # of anything but an upload, for which Gradio has a limit of its own


class Guard:
    """ASGI middleware: no fetching for strangers, no large bodies, a content policy on all."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(scope)
        if refusal is not None:
            await _respond(send, *refusal)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _refusal(scope: Any) -> tuple[int, str] | None:
    path = unquote(scope["path"])
    if _FETCHES.search(path) or "/proxy=" in path:
        return 403, "This server fetches nothing from other hosts."
    if scope["method"] == "POST" and not path.rstrip("/").endswith("/upload"):
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, "The length of the request is missing."
        if int(length) > _MAX_BODY_BYTES:
            return 413, "The request is too large; pictures are uploaded, not pasted into it."
    return None


async def _respond(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


class GuardedBlocks(gr.Blocks):
    """Blocks whose inputs may hold uploaded files, and neither paths nor addresses."""

    # As Gradio names the class itself in the page's configuration.
    is_template = True

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        """Refuse foreign files before Gradio copies or fetches them."""
        for value in inputs:
            _check_files(value)
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _check_files(value: Any) -> None:
    def check(file: dict[str, Any]) -> dict[str, Any]:
        path = file.get("path")
        if not isinstance(path, str) or re.match(r"\s*[a-z][a-z0-9+.\-]*:", path, re.IGNORECASE):
            raise gr.Error("Upload the picture itself: this server fetches no addresses.")
        if not utils.is_in_or_equal(path, utils.get_upload_folder()):
            raise gr.Error("Upload the picture itself: this server opens no other file.")
        return file

    client_utils.traverse(value, check, _names_a_file)


def _names_a_file(value: Any) -> bool:
    return isinstance(value, dict) and "path" in value


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as an event's: faults of the input are told in the page, others logged."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except GeneratorExit:
                raise
            except BaseException as error:
                raise _told(error) from error

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            raise _told(error) from error

    return call


def _told(error: BaseException) -> BaseException:
    if isinstance(error, InputError):
        logger.info("refused: %s", error)
        # The page takes messages as HTML; names of files are in them.
        text = html.escape(str(error), quote=False)
        return gr.Error(text[:1].upper() + text[1:] + ".", print_exception=False)
    if isinstance(error, gr.Error) or not isinstance(error, Exception):
        return error
    logger.error("an event of the page failed", exc_info=error)
    return gr.Error(
        f"The demo failed ({type(error).__name__}); what happened is in the server's log.",
        print_exception=False,
    )
