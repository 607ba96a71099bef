"""The playground in a browser, over `trimtab serve` and PrefWorld: knobs turned, two answers side by side, errors in
place, and open to everyone."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from offered import offer, words
from served import NEWER, SERVES, Served, served

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives a browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a browser: no chromium on the path", allow_module_level=True)
if not SERVES:
    pytest.skip(NEWER, allow_module_level=True)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

expect = playwright.expect
SHOWN = Path(__file__).parents[1] / "build" / "playground"
"""Where pictures of the page go, for people to look at, when the environment variable SCREENSHOTS is set."""
KEY = "open-sesame-open-sesame"
LONG = "answers-as-a-careful-accountant-would_v2"
HOSTILE = '<img src="x" onerror="document.title = 1">' + "y" * 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The knobs math and concise, which are tuned, and plain, which is not, and the panels careful and short."""
    folder = tmp_path_factory.mktemp("offered")
    offer(folder)
    return folder


@pytest.fixture(scope="module")
def playground(folder: Path) -> Iterator[str]:
    """Serve them."""
    with served(*words(folder)) as server:
        yield f"{server.url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def blank(browser: Browser) -> Iterator[Page]:
    """A page where nothing is loaded yet, so that a test can change what the server will say."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        yield page
        page.unroute_all(behavior="ignoreErrors")


@pytest.fixture
def page(blank: Page, playground: str) -> Page:
    return opened(blank, playground)


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    page.wait_for_selector(".knob")
    return page


def slider(page: Page, name: str = "math") -> Locator:
    return page.get_by_role("slider", name=f"{name}, strength")


def field(page: Page, name: str = "math") -> Locator:
    return page.get_by_role("spinbutton", name=f"{name}, strength as a number")


def send(page: Page) -> None:
    page.get_by_role("button", name="Send").click()


def answered(page: Page) -> None:
    send(page)
    expect(page.locator("#announce")).to_contain_text("Both answers are complete.")


def give_key(page: Page, key: str) -> None:
    """Enter a key, and wait until everything is loaded anew with it."""
    old = page.locator(".knob").first.element_handle()
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Enter")
    page.wait_for_function("old => !old.isConnected", arg=old)


def text(page: Page, answer: str) -> str:
    return page.locator(f"#{answer} .text").inner_text()


def altered(page: Page, path: str, change: Callable[[Any], Any]) -> None:
    """Let a list of the server's pass through `change`."""

    def answer(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json=change(reply.json()))

    page.route(re.compile(path + "$"), answer)


def refusing(page: Page, status: int, error: dict[str, Any], **headers: str) -> None:
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=status, json={"error": error}, headers=headers)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_a_slider_that_is_moved_changes_the_answer(
    blank: Page, playground: str, width: int, scheme: Any, tmp_path: Path
) -> None:
    asked: list[str] = []
    said: list[str] = []
    blank.on("request", lambda request: asked.append(request.url))
    blank.on("console", lambda message: said.append(message.text))
    blank.on("pageerror", lambda error: said.append(str(error)))
    blank.set_viewport_size({"width": width, "height": 800})
    blank.emulate_media(color_scheme=scheme)
    opened(blank, playground)
    answered(blank)
    bare = text(blank, "base")
    assert bare
    assert text(blank, "steered") == bare
    drag(blank, slider(blank), 1.0)
    expect(blank.locator("#steered .setting")).to_have_text("math 1")
    expect(blank.locator("#announce")).to_contain_text("The steered answer is complete.")
    assert text(blank, "base") == bare
    worked = text(blank, "steered")
    assert worked.count("=") > bare.count("=")  # the knob lets the model show its work
    expect(blank.locator("#peek")).to_have_text(worked)
    expect(blank.locator("#peek")).to_be_visible(visible=width == 360)  # where the answers are out of sight
    photograph(blank, f"{width}-{scheme}", tmp_path)
    assert {urlsplit(url).hostname for url in asked if not url.startswith("data:")} == {"127.0.0.1"}
    assert len(asked) > 10
    assert said == []
    assert violations(blank) == []


def drag(page: Page, thumb: Locator, strength: float) -> None:
    """Move a slider with the mouse."""
    thumb.scroll_into_view_if_needed()
    where = thumb.bounding_box()
    assert where is not None
    least, most = (float(thumb.get_attribute(end) or "") for end in ("min", "max"))
    y, room, edge = where["y"] + where["height"] / 2, where["width"] - 18, where["x"] + 9
    page.mouse.move(edge + room * (float(thumb.input_value()) - least) / (most - least), y)
    page.mouse.down()
    page.mouse.move(edge + room * (strength - least) / (most - least), y, steps=5)
    page.mouse.up()


def photograph(page: Page, name: str, otherwise: Path) -> None:
    place = SHOWN if os.environ.get("SCREENSHOTS") else otherwise
    picture = page.screenshot(path=place / f"{name}.png", full_page=True)
    assert len(picture) > 20_000  # which no empty page has


def test_both_answers_are_asked_for_together_and_compared(page: Page) -> None:
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    field(page).fill("1")
    page.get_by_label("System line").fill("Be kind.")
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.locator("#announce")).to_contain_text("Both answers are complete.")
    base, steered = sorted(bodies, key=lambda body: len(body["knobs"]))
    assert (base.pop("knobs"), steered.pop("knobs")) == ({}, {"math": 1})
    assert base == steered
    assert [message["role"] for message in base["messages"]] == ["system", "user"]
    assert (base["stream"], base["projections"]) == (True, True)
    assert (base["temperature"], base["seed"], base["max_tokens"]) == (0, 0, 128)
    assert text(page, "base") != text(page, "steered")
    expect(page.locator("#steered .meta")).to_have_text(re.compile(r"^complete, \d\d+ tokens$"))
    expect(page.locator("#base .setting")).to_have_text("all knobs off")
    expect(page.locator("#steered .setting")).to_have_text("math 1")
    assert page.locator("#difference ins, #difference del").count() > 0
    assert re.search(r"\[(added|removed): ", page.locator("#difference-text").text_content() or "")


def test_a_knob_turned_by_keyboard_writes_the_steered_answer_anew(page: Page) -> None:
    answered(page)
    base = text(page, "base")
    assert text(page, "steered") == base  # no knob is turned yet
    expect(page.locator("#difference-text")).to_have_text("The answers are the same.")
    slider(page).focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    expect(slider(page)).to_have_value("1")
    expect(field(page)).to_have_value("1")
    expect(page.locator("#announce")).to_contain_text("The steered answer is complete.")
    expect(page.locator("#steered .setting")).to_have_text("math 1")
    assert text(page, "steered") != base
    assert text(page, "base") == base


def test_a_knob_that_is_turned_waits_for_send_where_a_person_wants_that(page: Page) -> None:
    answered(page)
    page.get_by_label("Re-run as I turn").uncheck()
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    slider(page).press("End")
    page.wait_for_timeout(800)  # twice the pause after which the answer would be written anew
    assert asked == []
    answered(page)
    assert len(asked) == 2


def test_a_panel_sets_the_sliders(page: Page) -> None:
    panels = page.get_by_role("group", name="Panels")
    expect(panels.get_by_role("button", name="All off")).to_have_attribute("aria-pressed", "true")
    panels.get_by_role("button", name="careful").click()
    expect(field(page, "math")).to_have_value("1")
    expect(slider(page, "math")).to_have_value("1")
    expect(field(page, "concise")).to_have_value("-0.5")
    expect(panels.get_by_role("button", name="careful")).to_have_attribute("aria-pressed", "true")
    slider(page, "concise").press("ArrowLeft")
    expect(panels.get_by_role("button", name="careful")).to_have_attribute("aria-pressed", "false")
    panels.get_by_role("button", name="All off").click()
    expect(field(page, "math")).to_have_value("0")
    expect(field(page, "concise")).to_have_value("0")


def test_a_panel_is_marked_in_whichever_order_it_names_its_knobs(blank: Page, playground: str) -> None:
    altered(blank, "/v1/panels", lambda reply: {"data": [{"id": "odd", "knobs": {"concise": 0.5, "math": 0.5}}]})
    opened(blank, playground).get_by_role("button", name="odd").click()
    expect(blank.get_by_role("button", name="odd")).to_have_attribute("aria-pressed", "true")


def test_a_panel_says_what_of_it_cannot_be_set(blank: Page, playground: str) -> None:
    knobs = {"math": 0.5, "plain": 1, "gone": 1, "concise": -3}
    altered(blank, "/v1/panels", lambda reply: {"data": [{"id": "odd", "knobs": knobs}]})
    opened(blank, playground).get_by_role("button", name="odd").click()
    expect(field(blank)).to_have_value("0.5")
    expect(field(blank, "concise")).to_have_value("-1")
    far, none = "odd turns concise to −3, farther than", "odd also turns plain, gone, which cannot be"
    expect(blank.locator("#panel-note")).to_have_text(f"{far} can be set here. {none} turned here.")
    blank.get_by_role("button", name="All off").click()
    expect(blank.locator("#panel-note")).to_be_empty()


def test_a_knob_ends_at_its_safe_range_whatever_is_typed(page: Page) -> None:
    low, high = page.evaluate("fetch('v1/knobs/math').then(r => r.json()).then(knob => knob.safe_range)")
    slider(page).press("End")
    assert high - 0.05 < float(slider(page).input_value()) <= high
    slider(page).press("Home")
    assert low <= float(slider(page).input_value()) < low + 0.05
    for typed, taken in (("99", high), ("-99", low), ("", 0.0), ("0.123", 0.123)):
        field(page).fill(typed)
        field(page).blur()
        assert float(field(page).input_value()) == pytest.approx(taken, abs=1e-4)


def test_a_range_off_the_steps_still_has_its_zero(blank: Page, playground: str) -> None:
    altered(blank, "/v1/knobs/math", lambda knob: knob | {"safe_range": [-0.98, 1.03]})
    opened(blank, playground)
    slider(blank).press("End")
    expect(field(blank)).to_have_value("1")
    for _ in range(20):
        slider(blank).press("ArrowLeft")
    expect(field(blank)).to_have_value("0")
    field(blank).fill("5")
    field(blank).blur()
    expect(field(blank)).to_have_value("1.03")


def test_a_knob_without_a_safe_range_is_disabled_and_says_why(page: Page) -> None:
    expect(slider(page, "plain")).to_be_disabled()
    expect(field(page, "plain")).to_be_disabled()
    expect(page.get_by_role("article", name="plain")).to_contain_text("No safe range is known for this knob")


def test_where_doses_are_free_a_knob_turns_as_far_as_it_was_measured(blank: Page, playground: str) -> None:
    altered(blank, "/v1/knobs", lambda reply: reply | {"dose": "free"})
    altered(blank, "/v1/knobs/math", lambda knob: knob | {"dose_response": measured([-3.0, 0.0, 4.0])})
    opened(blank, playground)
    for name, low, high in (("math", "-3", "4"), ("plain", "-2", "2")):
        slider(blank, name).press("End")
        expect(field(blank, name)).to_have_value(high)
        slider(blank, name).press("Home")
        expect(field(blank, name)).to_have_value(low)


def measured(strengths: list[float], rails: tuple[str, ...] = (), **kl: list[float]) -> dict[str, Any]:
    """A dose-response of which nothing but `kl` changes with the strength."""
    flat = [0.5] * len(strengths)
    return {
        "strengths": strengths,
        "score": flat,
        "guardrails": dict.fromkeys(rails, flat),
        "broken": flat,
        "kl": flat,
    } | kl


def test_the_chart_has_a_text_and_a_table(page: Page) -> None:
    curve = page.evaluate("fetch('v1/knobs/math').then(r => r.json()).then(knob => knob.dose_response)")
    chart = page.get_by_role("img", name=re.compile("^Dose-response of math, from strength"))
    assert chart.locator("path.line").count() == 3 + len(curve["guardrails"])
    before = chart.locator("line.now").get_attribute("x1")
    slider(page).press("End")
    assert chart.locator("line.now").get_attribute("x1") != before
    thumb = page.evaluate(  # the marker stands over the slider's thumb
        "() => { const s = document.querySelector('input[type=range]'), r = s.getBoundingClientRect();"
        " const c = document.querySelector('.chart').getBoundingClientRect();"
        " return r.left + 9 + (r.width - 18) * (s.value - s.min) / (s.max - s.min) - c.left }"
    )
    assert float(chart.locator("line.now").get_attribute("x1") or 0) == pytest.approx(thumb, abs=1)
    page.get_by_role("article", name="math").get_by_text("As a table").click()
    table = page.get_by_role("group", name="Dose-response of math")
    assert table.locator("tbody tr").count() == len(curve["strengths"])
    assert table.locator("thead th").all_inner_texts() == ["strength", "score", *curve["guardrails"], "broken", "KL"]


def test_points_that_were_not_measured_leave_a_gap(blank: Page, playground: str) -> None:
    def without_middle(knob: dict[str, Any]) -> dict[str, Any]:
        knob["dose_response"] |= {"strengths": [0, 0.5, 1, 1.5], "score": [0, 0.5, None, 1], "guardrails": {}}
        return knob | {"dose_response": knob["dose_response"] | {"broken": [None] * 4, "kl": [None] * 4}}

    altered(blank, "/v1/knobs/math", without_middle)
    chart = opened(blank, playground).get_by_role("img", name=re.compile("^Dose-response of math"))
    assert chart.locator("path.line").count() == 1
    assert (chart.locator("path.line").get_attribute("d") or "").count("M") == 2
    assert chart.locator("path.mark").count() == 3


def test_every_token_has_its_projection_on_every_knob_on_one_scale(page: Page) -> None:
    field(page).fill("1")
    answered(page)
    knobs = page.evaluate(
        "fetch('v1/knobs').then(r => r.json()).then(all => all.data.filter(k => k.projects).map(k => k.id))"
    )
    colours: dict[str, set[str]] = {}
    for answer in ("base", "steered"):
        strips = page.locator(f"#{answer} .strip")
        assert strips.locator("summary").all_inner_texts() == knobs
        for i, knob in enumerate(knobs):
            cells = strips.nth(i).locator("span")
            tokens = [cell.replace("↵", "\n") for cell in cells.all_text_contents()]
            assert "".join(tokens).strip() == (page.locator(f"#{answer} .text").text_content() or "").strip()
            first = cells.first
            assert re.match(rf"{knob} −?\d\.\d\d\d at \"", first.get_attribute("title") or "")
            for title, colour in cells.evaluate_all(
                "all => all.map(c => [c.title, getComputedStyle(c).backgroundColor])"
            ):
                colours.setdefault(title.split()[1], set()).add(colour)
            assert strips.nth(i).get_by_role("img", name=re.compile(f"^Projections on {knob}: mean")).count() == 1
        page.locator(f"#{answer}").get_by_text("Projections as a table").click()
        assert (
            page.locator(f"#{answer} tbody tr").count()
            == page.locator(f"#{answer} .strip").first.locator("span").count()
        )
    assert len(colours) > 5
    assert len({colour for seen in colours.values() for colour in seen}) > 5
    low, high = page.locator("#scale-low").inner_text(), page.locator("#scale-high").inner_text()
    assert low == f"−{high}"


def test_stop_ends_both_answers(page: Page) -> None:
    waiting: list[Route] = []
    page.route("**/v1/chat/completions", lambda route: waiting.append(route))
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    send(page)
    expect(page.locator("#steered .meta")).to_have_text("waiting")
    page.get_by_role("button", name="Stop").click()
    for answer in ("base", "steered"):
        expect(page.locator(f"#{answer} .meta")).to_have_text("stopped")
    expect(page.locator("#announce")).to_have_text("Stopped.")
    assert len(waiting) == 2


def test_a_knob_turned_while_answers_are_written_drops_the_steered_one_only(page: Page) -> None:
    held: list[Route] = []

    def hold_all_that_are_not_steered(route: Route) -> None:
        if (route.request.post_data_json or {})["knobs"]:
            route.continue_()
        else:
            held.append(route)

    page.route("**/v1/chat/completions", hold_all_that_are_not_steered)
    send(page)
    expect(page.locator("#steered .meta")).to_have_text("waiting")
    page.get_by_role("button", name="careful").click()
    expect(page.locator("#steered .meta")).to_contain_text("complete")
    expect(page.locator("#base .meta")).to_have_text("waiting")
    expect(page.locator("#difference")).to_be_hidden()
    for route in held:
        route.continue_()
    expect(page.locator("#base .meta")).to_contain_text("complete")
    expect(page.locator("#difference")).to_be_visible()
    expect(page.locator("#steered .setting")).to_have_text("math 1, concise −0.5")


def test_an_answer_that_is_dropped_says_no_more(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    send(page)
    expect(page.locator("#steered .meta")).to_have_text("waiting")
    page.locator("#steered .meta").evaluate(
        "meta => { window.said = []; new MutationObserver(() => said.push(meta.textContent))"
        ".observe(meta, { childList: true }) }"
    )
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_role("button", name="careful").click()
    page.wait_for_timeout(100)  # for what must not happen
    assert page.evaluate("said") == ["waiting"]


def test_a_prompt_that_is_too_long_is_refused_in_the_servers_words(page: Page) -> None:
    page.get_by_label("Prompt").fill("pens " * 2000)
    send(page)
    expect(page.locator("#ask-error")).to_contain_text("room for 1024")
    expect(page.locator("#steered .meta")).to_have_text("no answer")
    page.get_by_label("Prompt").fill("How many pens?")
    answered(page)
    assert page.locator(".error:not(:empty)").count() == 0


@pytest.mark.parametrize(
    ("status", "param", "place", "words"),
    [
        (400, "knobs", "#knobs-error", "Said so."),
        (400, "temperature", "#ask-error", "Said so."),
        (400, None, "#steered .error", "Said so."),
        (401, None, "#key-error", "This server wants an API key."),
        (403, None, "#steered .error", "Said so."),
        (429, None, "#ask-error", "The server is busy: try again in 99 s. Said so."),
        (503, None, "#ask-error", "The server takes no requests now: try again in 99 s. Said so."),
    ],
)
def test_an_error_stands_where_it_belongs(page: Page, status: int, param: str | None, place: str, words: str) -> None:
    refusing(page, status, {"message": "Said so.", "param": param}, **{"Retry-After": "99"})
    send(page)
    expect(page.locator(place)).to_have_text(words)
    expect(page.locator(place)).to_have_role("alert")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n',
            "The answer broke off: the server closed the connection.",
        ),
        ('data: {"error": {"message": "The engine stopped."}}\n\n', "The engine stopped."),
        (None, "The server cannot be reached. Is it still running?"),
    ],
)
def test_an_answer_that_breaks_off_says_so(page: Page, body: str | None, words: str) -> None:
    def answer(route: Route) -> None:
        if body is None:
            route.abort()
        else:
            route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    send(page)
    for column in ("base", "steered"):
        expect(page.locator(f"#{column} .error")).to_have_text(words)
    expect(page.locator("#difference")).to_be_hidden()


def test_a_server_with_keys_gets_the_key_which_only_this_tab_keeps(blank: Page, guarded: Served) -> None:
    blank.goto(guarded.url)
    expect(blank.locator("#key-error")).to_have_text("This server wants an API key.")
    blank.get_by_label("API key").fill("sesame")
    blank.get_by_label("API key").press("Enter")
    expect(blank.locator("#key-error")).to_have_text("This server does not know this key.")
    blank.get_by_label("API key").fill(KEY)
    blank.get_by_label("API key").press("Enter")
    blank.wait_for_selector(".knob")
    expect(blank.locator("#key-error")).to_be_empty()
    answered(blank)
    assert blank.evaluate("Object.values(sessionStorage)") == [KEY]
    assert blank.evaluate("localStorage.length + document.cookie.length") == 0
    blank.reload()
    blank.wait_for_selector(".knob")
    assert KEY not in guarded.said


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve whoever has `KEY`, one request at a time."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    keys.chmod(0o600)
    with served(*words(folder), "--keys", str(keys), "--concurrency", "1") as server:
        yield server


def test_a_server_that_takes_one_request_at_a_time_is_waited_for(blank: Page, guarded: Served) -> None:
    refused: list[int] = []
    blank.on("response", lambda response: refused.append(response.status) if not response.ok else None)
    blank.add_init_script(f"sessionStorage.setItem('trimtab-api-key', '{KEY}')")
    opened(blank, guarded.url)
    blank.get_by_role("button", name="careful").click()
    for _ in range(3):
        answered(blank)
        assert text(blank, "base")
        assert text(blank, "steered")
    assert set(refused) == {429}


def test_a_busy_server_is_asked_again_when_it_says_until_somebody_stops(page: Page) -> None:
    asked: list[Route] = []

    def be_busy(route: Route) -> None:
        asked.append(route)
        route.fulfill(status=429, json={"error": {"message": "Busy."}}, headers={"Retry-After": "1"})

    page.route("**/v1/chat/completions", be_busy)
    send(page)
    expect(page.locator("#base .meta")).to_have_text("waiting, the server is busy: next try in 1 s")
    with page.expect_request("**/v1/chat/completions", timeout=3000):
        pass
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#base .meta")).to_have_text("stopped")
    count = len(asked)
    assert count in (3, 4)
    page.wait_for_timeout(1500)  # for what must not happen
    assert len(asked) == count
    page.unroute("**/v1/chat/completions")
    answered(page)


def test_a_server_that_is_busy_when_the_page_loads_is_waited_for(blank: Page, playground: str) -> None:
    busy = [True]

    def answer(route: Route) -> None:
        if busy.pop() if busy else False:
            route.fulfill(status=429, json={"error": {"message": "Busy."}}, headers={"Retry-After": "2"})
        else:
            route.continue_()

    blank.route("**/v1/knobs", answer)
    blank.goto(playground)
    expect(blank.locator("#dose-note")).to_have_text("Loading, the server is busy: next try in 2 s.")
    blank.wait_for_selector(".knob")
    expect(blank.locator("#dose-note")).to_contain_text("refuses")


def test_where_a_server_clamps_the_page_shows_what_was_applied(blank: Page, folder: Path) -> None:
    with served(*words(folder), "--dose", "clamp") as server:
        # As after a knob was loaded anew, with a smaller range than the page has seen.
        altered(blank, "/v1/knobs/math", lambda knob: knob | {"safe_range": [-1.0, 3.0]})
        opened(blank, server.url)
        expect(blank.locator("#dose-note")).to_contain_text("nearest end")
        slider(blank).press("End")
        expect(field(blank)).to_have_value("3")
        answered(blank)
        expect(blank.locator("#steered .setting")).to_have_text("math 1.5 (3 was asked for)")
        expect(blank.locator("#base .setting")).to_have_text("all knobs off")


def test_many_knobs_and_an_answer_that_does_not_end(blank: Page, folder: Path, tmp_path: Path) -> None:
    more = [
        word for name in ("a", "b", "c", "d", LONG) for word in ("--knob", f"{name}={folder / 'plain.safetensors'}")
    ]
    with served(*words(folder), *more, "--dose", "free") as server:
        opened(blank, server.url)
        expect(blank.locator("#dose-note")).to_contain_text("takes any strength")
        slider(blank, "plain").press("End")
        blank.get_by_label("Max tokens").fill("900")
        send(blank)
        expect(blank.locator("#base .meta")).to_contain_text("complete")
        expect(blank.locator("#steered .meta")).to_have_text("writing")
        blank.get_by_role("button", name="Stop").click()
        expect(blank.locator("#steered .meta")).to_have_text(re.compile(r"^stopped, \d+ tokens$"))
        assert len(text(blank, "steered")) > 20
        open_strips = "all => all.filter(strip => strip.open).map(strip => strip.firstChild.textContent)"
        for answer in ("base", "steered"):
            strips = blank.locator(f"#{answer} .strip")
            expect(strips).to_have_count(8)
            assert strips.evaluate_all(open_strips) == ["plain"]
        blank.locator("#base .strip summary", has_text=LONG).click()
        for answer in ("base", "steered"):
            expect(blank.locator(f"#{answer} .strip[open]")).to_have_count(2)
        blank.set_viewport_size({"width": 360, "height": 800})
        photograph(blank, "many-knobs-360", tmp_path)
        assert blank.evaluate("document.documentElement.scrollWidth") == 360
        assert violations(blank) == []

        assert server.stop() == 0
        send(blank)
        for answer in ("base", "steered"):
            expect(blank.locator(f"#{answer} .error")).to_have_text(
                "The server cannot be reached. Is it still running?"
            )


@pytest.mark.parametrize("key", ["", "sesame"])
def test_the_request_is_copied_as_a_command_and_as_a_program_without_the_key(
    page: Page, playground: str, key: str
) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if key:
        give_key(page, key)
    prompt = 'What\'s "two"\nand $HOME?'
    page.get_by_label("Prompt").fill(prompt)
    field(page).fill("0.8")
    field(page).blur()

    def copied(button: str) -> str:
        page.get_by_role("button", name=button).click()
        expect(page.locator("#copied")).to_have_text("Copied.")
        return page.evaluate("navigator.clipboard.readText()")

    command = copied("Copy as curl")
    words = shlex.split(command)
    assert words[:2] == ["curl", f"{playground}v1/chat/completions"]
    assert ("Authorization: Bearer $TRIMTAB_API_KEY" in words) == bool(key)
    body = json.loads(words[words.index("-d") + 1])
    assert body["knobs"] == {"math": 0.8}
    assert body["messages"] == [{"role": "user", "content": prompt}]

    program = copied("Copy as Python")
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call) and len(node.keywords) > 2]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in calls[0].keywords}
    assert given.pop("extra_body") == {"knobs": body.pop("knobs")}
    assert given == body
    assert f'base_url="{playground}v1"' in program
    assert ('os.environ["TRIMTAB_API_KEY"]' in program) == bool(key)
    assert "sesame" not in command + program


def test_a_key_that_is_given_late_turns_no_knob_back(page: Page) -> None:
    field(page).fill("0.8")
    give_key(page, "sesame")
    expect(field(page)).to_have_value("0.8")


def test_where_the_clipboard_is_closed_the_text_is_shown(blank: Page, playground: str) -> None:
    blank.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    opened(blank, playground).get_by_role("button", name="Copy as curl").click()
    assert blank.get_by_label("Copy this text").input_value().startswith("curl ")


def test_numbers_have_as_many_digits_as_say_something(page: Page) -> None:
    given = {
        0: "0", 1: "1", -1: "−1", 0.983: "0.98", 1.25: "1.25", -0.5: "−0.5", 0.0125: "0.013", 0.002265: "0.0023",
        -0.000041: "−0.000041", 0.99999: "1", 2.7: "2.7", 1e-9: "1e−9",
    }  # fmt: skip
    shown = page.evaluate(
        "given => import('/playground/dom.js').then(({number}) => given.map(n => number(n)))", [*given]
    )
    assert shown == [*given.values()]
    fixed = "given => import('/playground/dom.js').then(({fixed}) => given.map(n => fixed(n)))"
    assert page.evaluate(fixed, [0.5, -0.0123, -0.0001, 12, None]) == ["0.500", "−0.012", "0.000", "12.000", ""]


def test_a_chart_that_is_wide_has_round_labels_and_guardrails_that_look_different(blank: Page, playground: str) -> None:
    rails = ("facts", "copying", "sorting", "mmlu_redux_generative")
    curve = measured([-1.0, 0.0, 1.0], rails, kl=[0.00001, 0.0, 0.00002])
    altered(blank, "/v1/knobs/math", lambda knob: knob | {"dose_response": curve, "safe_range": [-1.0, 1.0]})
    blank.set_viewport_size({"width": 900, "height": 800})
    opened(blank, playground)
    chart = blank.get_by_role("img", name=re.compile("^Dose-response of math"))
    labels = chart.locator("text[text-anchor=middle]").all_text_contents()
    assert labels[9:12] == ["−0.1", "0", "0.1"]
    assert chart.locator("text[text-anchor=start]").all_text_contents() == ["0", "0.00001", "0.00002", "share"]
    lines = chart.locator("path.line.guardrail").evaluate_all(
        "all => all.map(line => getComputedStyle(line)).map(look => look.stroke + look.strokeDasharray)"
    )
    assert len({*lines}) == len(rails)


def test_what_is_known_of_a_knob_stands_in_rows(page: Page) -> None:
    card = page.get_by_role("article", name="math")
    card.get_by_text("About").click()
    rows = card.get_by_role("group", name="About math").locator("tr")
    expect(rows.filter(has=page.get_by_role("rowheader", name="safe range", exact=True))).to_contain_text("-1 to 1.5")
    assert rows.count() > 8


def test_names_cards_and_answers_are_text_and_never_html(blank: Page, playground: str) -> None:
    altered(blank, "/v1/knobs/math", lambda knob: knob | {"id": HOSTILE, "card": HOSTILE, "method": HOSTILE})
    altered(blank, "/v1/models", lambda reply: {"data": [{"id": HOSTILE, "panel": None}]})
    altered(blank, "/v1/panels", lambda reply: {"data": [{"id": HOSTILE, "knobs": {}}]})
    along = {"tokens": [HOSTILE], "knobs": {HOSTILE: [0.5]}}
    chunk = {"knobs": {HOSTILE: 1}, "choices": [{"delta": {"content": HOSTILE}, "projections": along}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    blank.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    opened(blank, playground)
    blank.set_viewport_size({"width": 320, "height": 700})
    answered(blank)
    assert blank.locator("main").inner_text().count("<img") > 8
    assert blank.locator("main img").count() == 0
    assert blank.locator("#base .strip").count() == 1  # other knobs are not in the answer
    assert blank.title() == "Trimtab playground"
    assert blank.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_stands_in_the_way_of_people_who_use_other_means(page: Page, width: int, scheme: Any) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector(".knob")
    assert violations(page) == []
    page.get_by_role("button", name="careful").click()
    answered(page)
    open_all(page)
    assert page.locator("#difference ins, #difference del").count() > 0
    assert violations(page) == []
    refusing(page, 400, {"message": "Said so.", "param": "knobs"})
    send(page)
    expect(page.locator("#knobs-error")).to_be_visible()
    assert violations(page) == []


def open_all(page: Page) -> None:
    page.locator("details").evaluate_all("all => all.forEach(details => (details.open = true))")


def violations(page: Page) -> list[str]:
    """Return what axe finds that is serious or critical."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in found
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("width", [320, 768, 1920])
def test_nothing_is_wider_than_the_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.get_by_role("button", name="careful").click()
    answered(page)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_difference_leads_from_one_text_to_the_other(page: Page) -> None:
    texts = [
        "",
        "a",
        "a b c",
        "a x c d",
        "12 + 13 = 25. The answer is 25.",
        "The answer is 25.",
        "b\n\na b  a",
        "二十五です",
    ]
    program = (
        "texts => import('/playground/texts.js')"
        ".then(({difference}) => texts.map(a => texts.map(b => difference(a, b))))"
    )
    for before, row in zip(texts, page.evaluate(program, texts), strict=True):
        for after, steps in zip(texts, row, strict=True):
            assert "".join(step["text"] for step in steps if step["kind"] != "removed") == after
            left = "".join(step["text"] for step in steps if step["kind"] != "added")
            assert left.split() == before.split() or before.replace(" ", "") == left.replace(" ", "")
            assert (before == after) == all(step["kind"] == "same" for step in steps)
    kinds = [(step["kind"], step["text"]) for step in page.evaluate(program, ["a b c", "a x c"])[0][1]]
    assert kinds == [("same", "a "), ("removed", "b "), ("added", "x "), ("same", "c")]


def test_texts_too_long_to_compare_are_not(page: Page) -> None:
    program = (
        "import('/playground/texts.js').then(({difference}) => difference('a b '.repeat(5000), 'c d '.repeat(5000)))"
    )
    assert page.evaluate(program) is None
