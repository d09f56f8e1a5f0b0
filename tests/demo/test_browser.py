"""The page in a real browser, where one is installed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium and chromedriver to drive the page with"
)
SECONDS = 30


class Page:
    """A browser at the page."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.all("#question textarea") and self.all("#chat .example"))
        self.driver.get_log("browser")
        self.driver.get_log("performance")

    def all(self, selector: str) -> list[Any]:
        return [
            one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()
        ]

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)"
        return [text.strip() for text in self.driver.execute_script(script, selector)]

    def until(self, condition: Any) -> Any:
        end = time.monotonic() + SECONDS
        while True:
            with suppress(StaleElementReferenceException):  # the page has replaced it meanwhile
                if found := condition():
                    return found
            assert time.monotonic() < end, self.texts("body")
            time.sleep(0.03)

    def click(self, selector: str) -> None:
        def clicked() -> bool:
            found = self.all(selector)
            if found:
                self.driver.execute_script(
                    "arguments[0].scrollIntoView({block: 'center'})", found[-1]
                )
                found[-1].click()
            return bool(found)

        self.until(clicked)

    def tab(self, name: str) -> None:
        self.until(lambda: [one for one in self.all("button[role=tab]") if one.text == name])[
            0
        ].click()

    def ask(self, question: str, picture: Path | None = None, box: str = "#question") -> None:
        if picture is not None:
            self.driver.find_element("css selector", f"{box} input[type=file]").send_keys(
                str(picture)
            )
            # Its address is the server's once it has been uploaded; Enter does nothing before.
            self.until(
                lambda: self.driver.find_elements("css selector", f"{box} img[src*='file=']")
            )
        text = self.until(lambda: self.all(f"{box} textarea"))[0]
        text.send_keys(question)
        self.until(lambda: self.all(f"{box} .submit-button:enabled"))
        text.send_keys("\ue007")  # Enter

    def answers(self, chat: str = "#chat") -> list[str]:
        return self.texts(f"{chat} [data-testid=bot]")

    def finished(self, box: str = "#question") -> bool:
        return bool(self.all(f"{box} .submit-button"))

    def wait(self, count: int, chat: str = "#chat", box: str = "#question") -> list[str]:
        self.until(lambda: len(self.answers(chat)) >= count and self.finished(box))
        return self.answers(chat)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("browser")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, demo) -> Iterator[Page]:
    page = Page(driver, demo.url)
    page.open()
    yield page
    severe = [one for one in driver.get_log("browser") if one["level"] == "SEVERE"]
    assert not severe
    events = [json.loads(one["message"])["message"] for one in driver.get_log("performance")]
    addresses = [
        urlsplit(event["params"]["request"]["url"])
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    hosts = {one.netloc for one in addresses if one.scheme in ("http", "https", "ws", "wss")}
    assert hosts <= {urlsplit(demo.url).netloc}


@pytest.fixture
def slow(chat_model, monkeypatch) -> list[int]:
    """The model takes its time; the list grows with every token that is computed."""
    computed: list[int] = []
    original = chat_model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        computed.append(1)
        time.sleep(0.05)
        return original(*args, **kwargs)

    monkeypatch.setattr(chat_model.model, "forward", forward)
    return computed


@pytest.mark.parametrize("with_key", [False, True])
def test_answer_grows_and_stop_ends_its_computation(page, photo, slow, with_key):
    page.ask("how many red circles?", photo)
    first = page.until(page.answers)[0]
    grown = page.until(lambda: [text for text in page.answers() if len(text) > len(first)])[0]
    if with_key:
        page.driver.find_element("css selector", "body").send_keys("\ue00c")  # Escape
    else:
        page.click("#question .stop-button")
    page.until(page.finished)
    time.sleep(1)
    computed, kept = len(slow), page.answers()[0]
    time.sleep(1)
    assert len(slow) == computed < 100
    assert len(kept) >= len(grown) and page.answers() == [kept]
    assert page.all("#chat img")


def test_regenerate_undo_edit_and_clear(page, photo):
    page.ask("is it red?", photo)
    first = page.wait(1)[0]
    page.ask("how many?")
    second = page.wait(2)[1]
    page.click("#chat button[aria-label='Retry'], #chat button[title='Retry']")
    page.until(lambda: not page.finished() or page.answers()[1:] != [second])
    page.until(lambda: page.finished() and len(page.answers()) == 2)
    page.click("#chat button[aria-label='Undo'], #chat button[title='Undo']")
    page.until(lambda: len(page.answers()) == 1)
    assert page.answers() == [first]
    box = page.all("#question textarea")[0]
    page.until(lambda: box.get_attribute("value") == "how many?")
    box.clear()
    page.click("#chat button[aria-label='Edit'], #chat button[title='Edit']")
    text = page.until(lambda: page.all("#chat textarea"))[0]
    text.clear()
    text.send_keys("is there a blue square?")
    page.click("#chat button[aria-label='Submit'], #chat button[title='Submit']")
    page.until(
        lambda: "is there a blue square?" in " ".join(page.texts("#chat [data-testid=user]"))
    )
    page.until(lambda: not page.finished() or page.answers() not in ([], [first]))
    page.until(lambda: page.finished() and len(page.answers()) == 1)
    page.click("#chat button[aria-label='Clear'], #chat button[title='Clear']")
    page.until(lambda: not page.answers())


def test_typed_tags_and_tokens_are_shown_as_text(page):
    typed = "<image><b>bold</b><script>window.caught=1</script><|im_end|>"
    page.ask(typed)
    page.wait(1)
    assert typed in page.texts("#chat [data-testid=user]")
    assert page.driver.execute_script("return window.caught === undefined")


def test_answers_cannot_run_scripts_or_load_from_elsewhere(page, chat_model, monkeypatch):
    hostile = (
        "<img src=x onerror='window.caught=1'> ![a](http://198.51.100.1/a.png)"
        " [x](javascript:window.caught=1) <script>window.caught=1</script>"
    )
    monkeypatch.setattr(chat_model, "answer", lambda *_: iter([hostile]))
    page.ask("how many?")
    assert "onerror" in page.wait(1)[0]
    assert not page.all("#chat [data-testid=bot] img")
    assert not page.all("#chat a[href^=javascript]")
    assert page.driver.execute_script("return window.caught === undefined")


def test_file_that_is_no_picture_is_told_in_the_page(page, tmp_path):
    (tmp_path / "cat.png").write_text("no picture")
    page.ask("what is it?", tmp_path / "cat.png")
    page.until(lambda: "'cat.png' is not a picture" in " ".join(page.texts(".toast-body")))


def test_example_is_answered(page):
    page.click("#chat .example")
    assert page.wait(1)[0]


def test_experts_of_the_last_picture_are_shown(page, photo):
    page.ask("is it red?", photo)
    page.wait(1)
    page.tab("See the experts")
    patches = page.until(lambda: page.all("#overlay rect"))
    assert len(patches) == 16
    webdriver.ActionChains(page.driver).move_to_element(patches[5]).perform()
    page.until(lambda: "Row 2, column 2" in page.texts(".experts-readout")[0])
    page.driver.find_element("css selector", "#overlay svg").send_keys("\ue014")  # right
    page.until(lambda: "Row 2, column 3" in page.texts(".experts-readout")[0])
    page.driver.find_element("css selector", "#block input[type=range]").send_keys("\ue014")
    page.until(lambda: "block 1" in page.texts("#loads")[0])


def test_two_checkpoints_answer_side_by_side(page, photo):
    page.tab("Compare")
    page.ask("is it red?", photo, "#compare-question")
    one = page.wait(1, "#compare-0", "#compare-question")
    other = page.wait(1, "#compare-1", "#compare-question")
    assert one == other  # the same model stands on both sides, and the seed is the same
    for side in (0, 1):
        page.until(lambda side=side: "tokens/s" in page.texts(f"#speed-{side}")[0])


def test_captions_are_scored_by_both_clips(page):
    page.tab("Zero-shot")
    page.click(".gallery-item")
    page.until(lambda: page.all(".image-frame img, [data-testid=detailed-image]"))
    page.click("#similarity-run")
    table = page.until(lambda: page.texts("#similarity table"))[0]
    assert all(word in table for word in ("Dense CLIP", "CLIP-MoE", "a triangle", "cosine"))
