"""``mllm bench demo``: how soon the page answers, and what it stands when many ask at once.

The first token is timed as a browser sees it, its picture uploaded before, beside a bare
``generate`` of one token on the same picture and question. Under load every client has a picture
and a question of its own; what comes back is held against what the model says to them when nobody
else asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch
from gradio_client import Client, handle_file
from tqdm import tqdm

from demo.conversation import Exchange, answer
from demo.loading import Models, load_models
from demo.options import DemoOptions
from demo.pictures import open_upload
from demo.routing import route
from demo.serving import start_demo
from mllm.bench import BenchReport, interleave, parse_options
from mllm.chat import Sampling
from mllm.scenes import ScenesDataset, SceneWorld

_QUESTION = "what shape is in the image?"
_MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class DemoBenchOptions:
    """Options of ``mllm bench demo``.

    Attributes:
        checkpoint: Any MLLM.
        repeats: Of the first token.
        clients: At once, under load.
        seconds: Of load.
    """

    checkpoint: str = "quickstart/mllm"
    repeats: int = 9
    clients: int = 32
    seconds: float = 120.0


def run(overrides: Sequence[str] = ()) -> BenchReport:
    """Measure; see the head of this file."""
    options = parse_options(DemoBenchOptions, overrides)
    report = BenchReport("demo", vars(options))
    page_options = DemoOptions(options.checkpoint, queue_size=4 * options.clients)
    started = time.perf_counter()
    models = load_models(page_options)
    with TemporaryDirectory() as folder, start_demo(page_options, models) as running:
        report.facts["seconds to the open page"] = round(time.perf_counter() - started, 2)
        pictures = _write_pictures(Path(folder), options.clients)
        _time_first_token(report, running.url, models, pictures[0], options.repeats)
        load = Load(running.url, models, pictures, options.seconds)
        report.facts.update(load.run())
    return report


def _write_pictures(folder: Path, number: int) -> list[Path]:
    """Scenes, each a file of one and the same name."""
    scenes = ScenesDataset(SceneWorld(), "test", number)
    files = [folder / str(index) / "photo.png" for index in range(number)]
    for index, file in enumerate(files):
        file.parent.mkdir()
        scenes[index].image.save(file)
    return files


class Browser:
    """Asks as the page's own script does: the picture is there before the question is sent.

    gradio's client would upload it within the time of the question.
    """

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}gradio_api/", timeout=60)
        described = self._http.get("info").raise_for_status().json()
        parameters = described["named_endpoints"]["/chat"]["parameters"]
        self._defaults = {one["parameter_name"]: one.get("parameter_default") for one in parameters}

    def upload(self, picture: Path) -> dict[str, Any]:
        """What stands for the picture in a question."""
        files = {"files": (picture.name, picture.read_bytes())}
        (path,) = self._http.post("upload", files=files).raise_for_status().json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def first_text(self, pictures: list[dict[str, Any]], question: str) -> None:
        """Ask, and come back with the first words."""
        asked = dict(zip(self._defaults, (pictures, question), strict=False))
        values = {**self._defaults, **asked, "temperature": 0}
        sent = self._http.post("call/chat", json={"data": list(values.values())})
        event = sent.raise_for_status().json()["event_id"]
        with self._http.stream("GET", f"call/chat/{event}") as stream:
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    assert line in ("event: generating", "event: complete"), line
                    return


def _time_first_token(
    report: BenchReport, url: str, models: Models, picture: Path, repeats: int
) -> None:
    model, processor = models.chat.model, models.chat.processor
    browser = Browser(url)
    uploaded = [browser.upload(picture)]
    content: Any = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )

    def generate() -> None:
        image = open_upload(picture, 10**7).image
        inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def ask() -> None:
        models.chat.forget_images()  # as if the picture were new
        browser.first_text(uploaded, _QUESTION)

    def answer_alone() -> None:
        models.chat.forget_images()
        asked = (Exchange(_QUESTION, (str(picture),)),)
        next(answer(models.chat, asked, Sampling(), 10**7))

    times = interleave(
        {
            "bare generate": generate,
            "first token, in the process": answer_alone,
            "first token, through the page": ask,
        },
        repeats,
        description="first token",
    )
    report.add_repeats(times)
    for label in ("first token, in the process", "first token, through the page"):
        report.compare(f"{label} / bare generate", label, "bare generate", "<=", 1.5)


@dataclass
class Load:
    """Clients that ask for a while, each about its own picture; every fifth request is left."""

    url: str
    models: Models
    pictures: list[Path]
    seconds: float
    num_right: int = 0
    num_left: int = 0
    highest_rank: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> dict[str, Any]:
        """Ask, and count."""
        expected = [self._expected(number) for number in range(len(self.pictures))]
        process = psutil.Process()
        memory = [process.memory_info().rss / 2**20]
        end = time.monotonic() + self.seconds
        threads = [
            threading.Thread(target=self._talk, args=(number, expected[number], end))
            for number in range(len(self.pictures))
        ]
        for thread in threads:
            thread.start()
        with tqdm(total=int(self.seconds), desc="load", unit="s") as bar:
            while time.monotonic() < end:
                time.sleep(1)
                bar.update()
                memory.append(process.memory_info().rss / 2**20)
        for thread in threads:
            thread.join(120)
        alive = self._ask(Client(self.url, verbose=False), 0) == expected[0]
        middle = memory[len(memory) // 2]
        return {
            "clients": len(self.pictures),
            "right answers": self.num_right,
            "wrong answers and faults": len(self.wrong),
            "first fault": self.wrong[0] if self.wrong else "none",
            "requests left by their clients": self.num_left,
            "highest place in the queue that a client was told": self.highest_rank,
            "memory before, halfway, at the end (MiB)": [round(memory[0]), round(middle),
                                                         round(memory[-1])],
            "alive and right at the end": alive,
        }  # fmt: skip

    def _question(self, number: int) -> str:
        return f"how many objects are there, {number}?"

    def _expected(self, number: int) -> tuple[str, Any]:
        file = self.pictures[number]
        asked = (Exchange(self._question(number), (str(file),)),)
        sampling = Sampling(top_p=0.9, max_new_tokens=_MAX_NEW_TOKENS)
        *_, last = answer(self.models.chat, asked, sampling, 10**7)
        return last[-1].answer, route(self.models.chat, open_upload(file, 10**7).image).as_json()

    def _ask(self, client: Client, number: int) -> tuple[str, Any]:
        file = handle_file(str(self.pictures[number]))
        job = client.submit(
            [file],
            self._question(number),
            temperature=0,
            max_new_tokens=_MAX_NEW_TOKENS,
            api_name="/chat",
        )
        while not job.done():
            rank = job.status().rank
            if rank is not None:
                with self.lock:
                    self.highest_rank = max(self.highest_rank, rank + 1)
            time.sleep(0.05)
        return job.result(), client.predict(file, api_name="/route")

    def _talk(self, number: int, expected: tuple[str, Any], end: float) -> None:
        try:
            client = Client(self.url, verbose=False)
            turn = number
            while time.monotonic() < end:
                turn += 1
                if turn % 5 == 0:
                    job = client.submit([], self._question(number), api_name="/chat")
                    time.sleep(0.2)
                    job.cancel()
                    with self.lock:
                        self.num_left += 1
                    continue
                found = self._ask(client, number)
                with self.lock:
                    if found == expected:
                        self.num_right += 1
                    else:
                        self.wrong.append(f"client {number}: {found[0]!r}, not {expected[0]!r}")
        except Exception as error:
            with self.lock:
                self.wrong.append(f"client {number}: {type(error).__name__}: {error}")
