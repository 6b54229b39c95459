"""The page of `emu2 serve` in a real browser, used by what is written on it, with a keyboard and files.

Answers are given by the test: what reaches the model is compared with what `emu2 generate` would have given it.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import browser
import pytest
import weights
from browser import expect

from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.inference.model import Prompt
from emu2_megatron.inference.prompt import CONCISE, chat, encode
from emu2_megatron.inference.search import Options

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Served = Callable[..., AbstractContextManager[str]]
DOG, CAT = (weights.TOKENIZER.parent / "images" / f"gc_{name}.jpg" for name in ("dog", "cat"))
CHAT = weights.shallow(2, vocab_size=1274)


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    with browser.chromium() as opened:
        yield opened


class Model:
    """Says what it is told to say, and remembers what it was asked."""

    def __init__(self, is_chat: bool) -> None:
        self.config = CHAT if is_chat else weights.TINY
        self.tokenizer = Tokenizer(weights.TOKENIZER, is_chat)
        self.says: list[str | list[int]] = []
        self.asked: list[tuple[Prompt, Options]] = []
        self.may_go_on = Event()
        self.may_go_on.set()

    def answer(self, prompt: Prompt, options: Options) -> list[int]:
        self.asked.append((prompt, options))
        assert self.may_go_on.wait(30)
        text = self.says.pop(0)
        return self.tokenizer.encode(text) if isinstance(text, str) else text

    def was_given(self, parts: Any) -> bool:
        """Whether the last prompt was this, to the token and the pixel."""
        wanted, found = encode(parts, self.tokenizer, self.config), self.asked[-1][0]
        same = all((a == b).all() for a, b in zip(wanted.pictures, found.pictures, strict=True))
        return same and wanted.tokens == found.tokens


@pytest.fixture
def opened(chromium: "Browser", serve_app: Served) -> Callable[..., Any]:
    """Opens the page of a Model; with `clean`, nothing may have gone wrong with it in the end."""

    @contextmanager
    def opened(is_chat: bool = True, clean: bool = True, **context: Any) -> "Iterator[tuple[Page, Model]]":
        model = Model(is_chat)
        with serve_app(model.answer, model.tokenizer, model.config) as address:
            with browser.page_of(chromium, f"http://{address}/", **context) as (page, problems):
                page.goto(f"http://{address}/")
                expect(page.get_by_role("button", name="Send")).to_be_enabled()
                yield page, model
                assert not clean or problems == []

    return opened


def attach(page: "Page", *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(files)
    for file in files:
        expect(page.get_by_role("button", name=f"Remove {file.name}")).to_be_visible()


def message(page: "Page") -> Any:
    return page.get_by_label("Message", exact=True)


def say(page: "Page", text: str) -> None:
    message(page).fill(text)
    message(page).press("Enter")


def answers(page: "Page") -> Any:
    return page.locator("article.model p:not(.facts):not(.dots)")


def test_a_conversation(opened: Any) -> None:
    """Two pictures and a question, and another that hangs on the first answer."""
    with opened() as (page, model):
        expect(page).to_have_title("tiny · Emu2")
        attach(page, CAT, DOG)
        page.get_by_role("button", name="Remove gc_cat.jpg").click()
        message(page).press_sequentially("What is it?")
        model.says = ["A brown dog.", "Yes.\n<img src=x onerror=alert(1)> & more"]
        model.may_go_on.clear()
        message(page).press("Enter")
        expect(page.get_by_role("button", name="Computing…")).to_be_disabled()
        expect(page.get_by_text("computing", exact=True)).to_be_visible()
        model.may_go_on.set()
        expect(answers(page)).to_have_text(["A brown dog."])
        assert model.was_given(chat([([DOG, "What is it?"], None)]))
        expect(page.get_by_role("img", name="gc_dog.jpg")).to_have_count(1)
        expect(message(page)).to_be_focused()

        message(page).press_sequentially("Is it")
        message(page).press("Shift+Enter")
        message(page).press_sequentially("young?")
        page.get_by_role("button", name="Send").click()
        expect(answers(page)).to_have_text(["A brown dog.", "Yes. <img src=x onerror=alert(1)> & more"])
        turns = [([DOG, "What is it?"], "A brown dog."), (["Is it\nyoung?"], None)]
        assert model.was_given(chat(turns))
        count = f"{len(model.asked[-1][0].tokens)} + {len(model.tokenizer.encode('Yes.'))}"
        expect(page.locator("article.model .facts").last).to_contain_text(count.split(" +")[0])

        page.get_by_role("button", name="Start over").click()
        expect(page.locator("article")).to_have_count(0)
        model.says = ["Hello."]
        say(page, "Hi")
        expect(answers(page)).to_have_text(["Hello."])
        assert model.was_given(chat([(["Hi"], None)]))


def test_settings(opened: Any) -> None:
    with opened() as (page, model):
        model.says = [""] * 4
        say(page, "a")
        expect(answers(page)).to_have_text(["(nothing: the model ended at once)"])
        assert model.asked[-1][1] == Options()
        page.get_by_text("Settings").click()
        page.get_by_label("Answers are").select_option("the likeliest, token by token")
        page.get_by_label("Tokens at most").fill("9")
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_role("button", name="Start over").click()
        say(page, "b")
        expect(answers(page)).to_have_count(1)
        assert model.asked[-1][1] == Options(max_new_tokens=9, beams=1)
        assert model.was_given(chat([(["b"], None)], "Be brief."))
        page.get_by_label("Answers are").select_option("drawn at random")
        page.get_by_label("Temperature").fill("1.5")
        page.get_by_label("Seed").fill("11")
        say(page, "c")
        expect(page.get_by_text("seed 11")).to_be_visible()
        assert model.asked[-1][1] == Options(max_new_tokens=9, beams=1, temperature=1.5, seed=11)
        page.get_by_label("Temperature").fill("-1")
        say(page, "d")
        expect(page.get_by_role("alert")).to_contain_text("Temperature: ")
        assert len(model.asked) == 3


def test_boxes_are_drawn_where_they_are(opened: Any) -> None:
    with opened() as (page, model):
        corners = [model.tokenizer.ids[f"<patch_index_{n:04d}>"] for n in (28, 56, 112, 168)]
        names = [model.tokenizer.ids[name] for name in ("<phrase>", "</phrase>", "<object>", "</object>")]
        model.says = [[names[0], *model.tokenizer.encode("the dog"), *names[1:3], *corners, names[3]]]
        attach(page, DOG)
        page.get_by_label("Ask for boxes").check()
        say(page, "Where is it?")
        expect(answers(page)).to_have_text(["the dog"])
        assert model.was_given(chat([([DOG, "Where is it?"], None)], CONCISE, grounding=True))
        box = page.get_by_title("the dog")
        expect(box).to_have_text("the dog")
        picture = page.get_by_role("img", name="gc_dog.jpg with boxes").bounding_box()
        found = box.bounding_box()
        shares = [(found["x"] - picture["x"]) / picture["width"], (found["y"] - picture["y"]) / picture["height"],
                  found["width"] / picture["width"], found["height"] / picture["height"]]  # fmt: skip
        assert shares == pytest.approx([0.125, 0.25, 0.375, 0.5], abs=0.01)  # a pixel of some hundred


def _transfer(page: "Page", event: str, file: Path, kind: str = "image/jpeg") -> None:
    data = base64.b64encode(file.read_bytes()).decode()
    page.evaluate(
        """([event, data, name, type]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
          const made = event === "paste" ? new ClipboardEvent(event, { clipboardData: transfer, bubbles: true })
            : new DragEvent(event, { dataTransfer: transfer, bubbles: true });
          document.getElementById("text").dispatchEvent(made);
        }""",
        [event, data, file.name, kind],
    )


def test_a_base_model_goes_on(opened: Any) -> None:
    """With what is dropped and pasted; all of it is one document."""
    with opened(is_chat=False) as (page, model):
        model.says = ["a dog.", "cat on a"]
        _transfer(page, "dragover", DOG)
        _transfer(page, "drop", DOG)
        expect(page.get_by_role("button", name="Remove gc_dog.jpg")).to_be_visible()
        _transfer(page, "paste", CAT)
        expect(page.get_by_role("button", name="Remove gc_cat.jpg")).to_be_visible()
        page.get_by_text("Settings").click()
        expect(page.get_by_label("System message")).to_be_hidden()
        page.get_by_role("button", name="Send").click()
        expect(answers(page)).to_have_text(["a dog."])
        assert model.was_given([DOG, CAT])
        say(page, "And a")
        expect(answers(page)).to_have_text(["a dog.", "cat on a"])
        assert model.was_given([DOG, CAT, "a dog. And a"])


def test_errors_are_said_and_nothing_is_lost(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "note.txt").write_text("no picture")
    with opened(clean=False) as (page, model):  # Chromium reports answers of 400 in the console
        _transfer(page, "drop", tmp_path / "note.txt", "text/plain")
        expect(page.get_by_role("alert")).to_contain_text("note.txt is no JPEG, PNG, WebP or GIF.")
        attach(page, DOG, tmp_path / "broken.png")
        expect(page.get_by_role("alert")).to_be_hidden()
        say(page, "What is it?")
        expect(page.get_by_role("alert")).to_contain_text("picture 2: picture cannot be decoded")
        expect(message(page)).to_have_value("What is it?")
        expect(page.locator("article")).to_have_count(0)
        page.get_by_role("button", name="Remove broken.png").click()
        model.says = ["A dog."]
        page.get_by_role("button", name="Send").click()
        expect(answers(page)).to_have_text(["A dog."])
        assert model.was_given(chat([([DOG, "What is it?"], None)]))
        page.route("**/api/generate", lambda route: route.abort())
        say(page, "And now?")
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        page.get_by_role("button", name="Dismiss the error").click()
        expect(page.get_by_role("alert")).to_be_hidden()


def test_the_policy_holds(opened: Any) -> None:
    """What got into the page all the same could neither run nor call home."""
    with opened(clean=False) as (page, _):
        blocked = page.evaluate(
            """async () => {
              const blocked = [];
              document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
              const script = document.createElement("script");
              script.textContent = "window.ran = true";
              document.body.append(script);
              document.body.insertAdjacentHTML("beforeend", "<p style='color: red' onclick='window.ran = true'>x</p>");
              document.body.lastChild.click();
              new Image().src = "https://other.example/x.png";
              await fetch("https://other.example/").catch(() => {});
              await new Promise((resolve) => setTimeout(resolve, 100));
              return [window.ran === undefined, ...new Set(blocked)];
            }"""
        )
        assert blocked[0] is True
        assert set(blocked[1:]) == {"script-src-elem", "script-src-attr", "style-src-attr", "img-src", "connect-src"}


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1200, "dark")])
def test_it_fits_the_screen(width: int, scheme: str, opened: Any) -> None:
    with opened(viewport={"width": width, "height": 800}, color_scheme=scheme) as (page, model):
        model.says = ["word " * 80, "x" * 400]
        attach(page, DOG, CAT)
        page.get_by_text("Settings").click()
        for text in ("y" * 300, "b"):
            say(page, text)
            expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(answers(page)).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.getElementById('scroll').scrollWidth") <= width
        for name in ("Send", "Add pictures", "Start over"):
            place = page.get_by_role("button", name=name).bounding_box()
            assert place["x"] >= 0 and place["x"] + place["width"] <= width and place["y"] + place["height"] <= 800
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
        assert light == (scheme == "light")
