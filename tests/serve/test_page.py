"""The chat page in a real browser, on a server with a real engine."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava_fast as lf
from llava_fast.data.scenes import scene_at
from llava_fast.pretrained import built_in

pytest.importorskip("starlette", reason="the page needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the page's tests need the extra 'serve'")
from tests.serve.small_server import Server, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DETAIL = "What is in the picture, where, and how large?"
SENT = "#turns article"


@pytest.fixture(scope="module")
def engine() -> Iterator[lf.Engine]:
    with lf.Engine(*lf.load(built_in())) as engine:
        yield engine


@pytest.fixture
def server(engine: lf.Engine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    yield from opened(browser, server.url)


def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page that must not have met an exception, nor a refusal by its own policy."""
    context = browser.new_context(**options)
    context.set_default_timeout(10_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(url)
    until(page, "document.getElementById('model').textContent || document.querySelector('dialog[open]')")
    yield page
    context.close()
    assert faults == []


def until(page: Any, condition: str) -> None:
    """Wait for a condition in JavaScript, asked through the debugger: the policy forbids Playwright's own way."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"not within ten seconds: {condition}")


def picture(number: int = 4) -> bytes:
    file = io.BytesIO()
    scene_at(2026, number)[0].image().save(file, "PNG")
    return file.getvalue()


def drop(page: Any, data: bytes, name: str = "scene.png", kind: str = "image/png") -> None:
    transfer = page.evaluate_handle(
        """([data, name, type]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def greedy(page: Any) -> None:
    page.click("#settings")
    page.locator("#temperature").fill("0")
    page.click("text=Done")


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")


def answered(page: Any, turns: int = 1) -> str:
    """The text of the last answer, when it is complete."""
    until(page, f"document.querySelectorAll('{SENT}').length === {turns}")
    page.locator(f"{SENT}:last-child .again").wait_for()
    text = page.inner_text(f"{SENT}:last-child .answer .text")
    assert text
    return text


def expected(engine: lf.Engine, *turns: str) -> str:
    """What the engine answers without any server, and without the browser having touched the picture."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    messages[0]["content"].append({"type": "text", "text": turns[0]})
    for role, text in zip(["assistant", "user"] * len(turns), turns[1:], strict=False):
        messages.append({"role": role, "content": text})
    return engine.generate([lf.Request(messages=messages, sampling=lf.SamplingParams(max_tokens=512))])[0].text.strip()


# ---- the response


def test_one_response_that_lets_nothing_else_run(server: Server) -> None:
    with urllib.request.urlopen(server.url) as response:
        text, headers = response.read().decode(), response.headers
    policy = dict(one.split(" ", 1) for one in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        inside = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert not re.search(r"<[^>]*\son\w+=|<[^>]*\sstyle=|innerHTML|insertAdjacentHTML|\beval\(", text)
    assert set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}  # the name space of the icon
    assert headers["x-content-type-options"] == "nosniff"
    again = urllib.request.Request(server.url, headers={"If-None-Match": headers["etag"]})
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(again)


# ---- a conversation


def test_dropped_picture_is_answered_as_by_the_engine(page: Any, server: Server, engine: lf.Engine) -> None:
    server.pause = 0.02  # an answer that comes in one piece has no tokens/s
    greedy(page)
    drop(page, picture())
    page.locator("#attached li").wait_for()
    ask(page, DETAIL)
    first = answered(page)
    server.pause = 0.0
    assert first == expected(engine, DETAIL)
    assert re.search(r"\d+.tokens · .*tokens/s · first.token.\d+\.\d\d.s", page.inner_text(".figures"))
    ask(page, "How many shapes are there?")
    second = answered(page, 2)
    assert second == expected(engine, DETAIL, first, "How many shapes are there?")
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert second in page.inner_text("#status")  # said once, whole, when it is done


def test_answer_streams_stops_and_is_regenerated(page: Any, server: Server, engine: lf.Engine) -> None:
    greedy(page)
    drop(page, picture())
    page.locator("#attached li").wait_for()
    server.pause = 0.1
    ask(page, DETAIL)
    shown = page.locator(".answer .text")
    until(page, "document.querySelector('.answer .text')?.textContent.length > 8")
    early = shown.inner_text()
    assert early not in page.inner_text("#status")  # not said token by token
    until(page, f"document.querySelector('.answer .text').textContent.length > {len(early)}")
    page.keyboard.press("Escape")
    stopped = answered(page)
    whole = expected_after(server, engine)
    assert whole.startswith(stopped) and len(stopped) < len(whole)
    assert "Stopped" in page.inner_text(".remark")
    page.wait_for_timeout(300)
    assert engine.stats().running == 0
    page.click(".again")
    until(page, f"document.querySelector('.answer .text').textContent.length > {len(stopped)}")
    assert answered(page) == whole
    assert len(server.bodies) == 2 and server.bodies[0] == server.bodies[1]


def expected_after(server: Server, engine: lf.Engine) -> str:
    server.pause = 0.0
    return expected(engine, DETAIL)


def test_last_question_is_edited(page: Any, server: Server) -> None:
    ask(page, "What color is the circle?")
    answered(page)
    page.keyboard.press("ArrowUp")
    assert page.input_value("#question") == "What color is the circle?"
    ask(page, "What color is the star?")
    until(page, "document.querySelector('.asked .text').textContent.includes('star')")
    answered(page, 1)
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["What color is the star?"]


def test_conversation_outlasts_a_reload_and_begins_anew(page: Any, server: Server) -> None:
    drop(page, picture())
    page.locator("#attached li").wait_for()
    ask(page, DETAIL)
    text = answered(page)
    page.fill("#question", "a draft")
    page.reload()
    assert answered(page) == text
    assert page.input_value("#question") == "a draft"
    assert page.evaluate("document.querySelector('.pictures img').naturalWidth") == 144
    ask(page, "How many shapes are there?")
    answered(page, 2)
    assert server.bodies[-1]["messages"][0] == server.bodies[0]["messages"][0]
    page.click("#new")
    assert page.locator(SENT).count() == 0 and page.locator("#welcome").is_visible()
    page.reload()
    assert page.locator(SENT).count() == 0


def test_more_pictures_than_the_tab_can_store_outlast_a_reload_smaller(page: Any) -> None:
    noise = Image.effect_noise((1024, 1024), 90).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=95)
    for count in range(1, 9):
        drop(page, file.getvalue(), f"{count}.jpg", "image/jpeg")
        until(page, f"document.querySelectorAll('#attached li').length === {count}")
    sizes = "conversation.draft.pictures.map(picture => picture.url.length)"
    before = page.evaluate(sizes)
    assert sum(before) > 5_200_000  # or the test would show nothing
    page.reload()
    after = page.evaluate(sizes)
    assert len(after) == 8 and after[-1] == before[-1] and after[0] < before[0] / 3
    assert "smaller" in page.inner_text("#attached li >> nth=0")


@pytest.mark.parametrize("when", [" !== undefined", ".length > 8"], ids=["before the first word", "after it"])
def test_new_conversation_while_an_answer_is_on_its_way(
    page: Any, server: Server, engine: lf.Engine, when: str
) -> None:
    server.pause = 0.3
    ask(page, DETAIL)
    until(page, f"document.querySelector('.answer .text')?.textContent{when}")
    page.click("#new")
    page.wait_for_timeout(700)
    assert page.locator(SENT).count() == 0 and page.input_value("#question") == ""
    assert page.locator("#notice").is_hidden()
    assert engine.stats().running == 0
    server.pause = 0.0
    ask(page, "How many shapes are there?")
    answered(page)


def test_example_is_one_click_and_is_saved(page: Any) -> None:
    page.click("#examples button >> nth=0")
    text = answered(page)
    with page.expect_download() as download:
        page.click("#save")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["model"] == "tiny"
    assert saved["messages"][0]["content"][1]["text"] == page.inner_text(".asked .text")
    assert saved["messages"][1] == {"role": "assistant", "content": text}
    assert saved["answers"][0]["finish_reason"] == "stop" and saved["answers"][0]["completion_tokens"] > 1


def test_photo_is_turned_reduced_and_stripped(page: Any, server: Server) -> None:
    photo = Image.new("RGB", (3000, 1500), "red")
    photo.paste("blue", (0, 0, 1500, 1500))  # left half; orientation 6 is turned clockwise: blue comes to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif)
    drop(page, file.getvalue(), "photo.jpg", "image/jpeg")
    page.locator("#attached >> text=reduced to 512 \u00d7 1024").wait_for()
    ask(page, "How many shapes are there?")
    answered(page)
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert sent.size == (512, 1024) and not sent.getexif()
    top, bottom = sent.getpixel((256, 200)), sent.getpixel((256, 800))
    assert top[2] > 200 > 60 > top[0] and bottom[0] > 200 > 60 > bottom[2]


def test_picture_is_pasted(browser: Any, server: Server, engine: lf.Engine) -> None:
    """From the clipboard of the browser, with the keys that people press."""
    for page in opened(browser, server.url, permissions=["clipboard-read", "clipboard-write"]):
        page.evaluate(
            """async data => {
                const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
                const item = new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) });
                await navigator.clipboard.write([item]);
            }""",
            base64.b64encode(picture()).decode(),
        )
        page.focus("#question")
        page.keyboard.press("Control+V")
        page.locator("#attached li").wait_for()
        greedy(page)
        ask(page, DETAIL)
        assert answered(page) == expected(engine, DETAIL)


def test_photo_is_taken(browser: Any, server: Server, engine: lf.Engine, tmp_path: Path) -> None:
    """A phone opens its camera for such an input; the test hands it the photo."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(picture())
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    for page in opened(browser, server.url, **phone):
        with page.expect_file_chooser() as chosen:
            page.tap("#shoot")
        assert chosen.value.element.get_attribute("capture") == "environment"
        assert chosen.value.element.get_attribute("accept") == "image/*"
        chosen.value.set_files(photo)
        page.locator("#attached li").wait_for()
        greedy(page)
        page.fill("#question", DETAIL)
        page.tap("#send")
        assert answered(page) == expected(engine, DETAIL)


@pytest.mark.parametrize("old", [False, True], ids=["clipboard", "without one, as on plain http"])
def test_answer_is_copied(browser: Any, server: Server, old: bool) -> None:
    for page in opened(browser, server.url, permissions=["clipboard-read", "clipboard-write"]):
        if old:
            page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        ask(page, "How many shapes are there?")
        text = answered(page)
        page.click(".copy")
        page.locator(".copy >> text=Copied").wait_for()
        page.focus("#question")
        page.keyboard.press("Control+V")
        until(page, "document.getElementById('question').value")
        assert page.input_value("#question") == text


def test_models_text_stays_text(page: Any) -> None:
    evil = "<img src=x onerror=alert(1)>\nline two\n\n```html\n<b>code</b>\n```\nafter `x<y`"
    pieces = [evil[at : at + 5] for at in range(0, len(evil), 5)]
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events) + "data: [DONE]\r\n\r\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Show me")
    answered(page)
    text = page.locator(".answer .text")
    assert text.locator("img, b").count() == 0
    assert text.locator("> p").first.inner_text() == "<img src=x onerror=alert(1)>\nline two"
    assert text.locator("pre").inner_text() == "<b>code</b>"
    assert text.locator("p code").inner_text() == "x<y"


# ---- what can go wrong


def test_server_gone_puts_the_question_back(browser: Any, engine: lf.Engine) -> None:
    with serving(engine) as server:
        pages = opened(browser, server.url)
        page = next(pages)
        drop(page, picture())
        page.locator("#attached li").wait_for()
    ask(page, DETAIL)
    page.locator("#notice >> text=cannot be reached").wait_for()
    assert page.input_value("#question") == DETAIL and page.locator("#attached li").count() == 1
    assert page.locator(SENT).count() == 0
    assert next(pages, None) is None


def test_connection_lost_in_mid_answer_keeps_what_came(page: Any, server: Server) -> None:
    server.pause = 0.1
    ask(page, DETAIL)
    until(page, "document.querySelector('.answer .text')?.textContent.length > 8")
    server.cut()
    page.locator(".broken .remark >> text=broke off").wait_for()
    assert len(answered(page)) > 8
    server.pause = 0.0
    page.click(".again")
    until(page, "!document.querySelector('.broken')")
    answered(page)


def test_too_long_is_said_in_words(page: Any) -> None:
    ask(page, "word " * 1500)
    page.locator("#notice-what >> text=too long for the model").wait_for()
    assert "1024" in page.inner_text("#notice-detail")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, {"message": "cannot identify image", "code": "invalid_image"}, "refused a picture"),
        (413, {"message": "body over 32 MB"}, "more than the server takes"),
        (429, {"message": "slow down"}, "Try again in 7 seconds"),
        (503, {"message": "full", "code": "overloaded"}, "as many questions as it takes"),
        (503, {"message": "bye", "code": "shutting_down"}, "about to stop"),
        (500, {"message": "internal error"}, "The server failed"),
        (502, None, "The server failed"),
    ],
)
def test_refusals_in_words_and_another_try(page: Any, status: int, error: dict[str, str] | None, words: str) -> None:
    body = json.dumps({"error": error}) if error else "<html>Bad gateway</html>"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=status, body=body, headers={"Retry-After": "7"}),
        times=1,
    )
    ask(page, "How many shapes are there?")
    page.locator("#notice-what", has_text=words).wait_for()
    page.click("#retry")
    answered(page)
    assert page.locator("#notice").is_hidden()


def test_failed_regeneration_keeps_the_old_answer(page: Any) -> None:
    ask(page, "How many shapes are there?")
    text = answered(page)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, body="{}"), times=1)
    page.click(".again")
    page.locator("#notice").wait_for()
    assert answered(page) == text


def test_unreadable_file_is_named(page: Any) -> None:
    drop(page, b"no picture at all", "broken.jpg", "image/jpeg")
    page.locator("#notice >> text=broken.jpg cannot be read").wait_for()
    drop(page, b"text", "notes.txt", "text/plain")
    page.locator("#notice >> text=notes.txt is not a picture").wait_for()
    assert page.locator("#attached li").count() == 0


def test_key_is_asked_for_kept_in_the_tab_and_forgotten(browser: Any, engine: lf.Engine) -> None:
    with serving(engine, key="right-key") as server:
        for page in opened(browser, server.url):
            page.fill("#key", "wrong-key")
            page.click("text=Use this key")
            page.locator("#key-why >> text=not accepted").wait_for()
            page.fill("#key", "right-key")
            page.keyboard.press("Enter")
            until(page, "document.getElementById('model').textContent === 'tiny'")
            page.reload()
            until(page, "document.getElementById('model').textContent === 'tiny'")
            ask(page, "How many shapes are there?")
            answered(page)
            page.click("#settings")
            page.click("#forget")
            page.click("text=Done")
            ask(page, "Is there a star?")
            page.locator("#key-dialog").wait_for()
            page.click("#no-key")
            page.locator("#notice >> text=only with a key").wait_for()
            assert page.input_value("#question") == "Is there a star?"


def test_key_as_the_password_of_the_page(browser: Any, engine: lf.Engine) -> None:
    """The server's own keys guard the page too: the browser asks for a password, and sends it with every question."""
    with serving(engine, api_keys=("the-key-of-a-browser",)) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.url)
        assert refused.value.code == 401 and refused.value.headers["www-authenticate"].startswith("Basic ")
        assert "as the password" in json.load(refused.value)["error"]["message"]
        credentials = {"username": "anybody", "password": "the-key-of-a-browser"}
        for page in opened(browser, server.url, http_credentials=credentials):
            assert page.inner_text("#model") == "tiny" and page.locator("dialog[open]").count() == 0
            ask(page, "How many shapes are there?")
            assert answered(page)


def test_under_a_prefix(browser: Any, engine: lf.Engine) -> None:
    with serving(engine, prefix="/some/where") as server:
        for page in opened(browser, server.url):
            ask(page, "How many shapes are there?")
            assert answered(page)


# ---- for everybody


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core from the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("no npm to fetch axe-core with")
    folder = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        ["npm", "pack", "--silent", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    if packed.returncode:
        pytest.skip(f"axe-core cannot be fetched: {packed.stderr.strip()[:200]}")
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return (folder / "package" / "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844), (320, 568)], ids=str)
def test_no_serious_accessibility_fault(
    browser: Any, server: Server, axe: str, scheme: str, size: tuple[int, int]
) -> None:
    width, height = size
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, "reduced_motion": "reduce"}
    for page in opened(browser, server.url, has_touch=width < 1000, is_mobile=width < 1000, **options):
        check(page, axe)
        drop(page, picture())
        page.locator("#attached li").wait_for()
        check(page, axe)
        page.fill("#question", DETAIL)
        page.click("#send")
        answered(page)
        check(page, axe)
        page.click(".edit")
        check(page, axe)
        page.click("#keep")
        drop(page, b"x", "notes.txt", "text/plain")
        page.locator("#notice").wait_for()
        check(page, axe)
        page.click("#settings")
        check(page, axe)
        page.keyboard.press("Escape")
        page.click("#theme")
        check(page, axe)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def check(page: Any, axe: str) -> None:
    page.evaluate(axe)  # through the debugger, which the page's policy does not bind
    found = page.evaluate("async () => (await axe.run()).violations")
    faults = [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]
    assert faults == []


def test_keyboard_alone(page: Any) -> None:
    order = []
    for _ in range(7):  # from the question box, where the focus is at the start
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert order == [
        "pick",
        "send",
        "",
        "skip",
        "new",
        "settings",
        "theme",
    ]  # "": the browser; there is nothing to save
    page.focus("#question")
    page.keyboard.type("How many")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("shapes?")
    page.keyboard.press("Enter")
    answered(page)
    assert page.inner_text(".asked .text") == "How many\nshapes?"
    assert page.evaluate("document.activeElement.id") == "question"


def test_theme_follows_the_system_until_chosen(browser: Any, server: Server) -> None:
    for page in opened(browser, server.url, color_scheme="light"):
        color = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(color)
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate(color)
        assert dark != light
        page.click("#theme")
        assert page.evaluate(color) == light
        page.reload()
        assert page.evaluate(color) == light
        page.click("#theme")
        assert page.evaluate(color) == dark
