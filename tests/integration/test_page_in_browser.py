"""The page in a real browser: it loads and complains of nothing, and shows every expert, in any light, at any width.

Screenshots lie in the test's folder, or where MOE_COMPRESS_SCREENSHOTS says. Skipped where there is no Chromium.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_compress.report.page import write_page
from tests.browser import Browser, Page, find_browser, running_browser
from tests.results import made, report_of, write_result

BINARY = find_browser()
pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium here: install one, or name it with MOE_COMPRESS_BROWSER"
)

INKS = "h1, h2, h3, p, li, td, th, dt, dd, .se, .change, nav a, svg text:not(.letter), .strip .name, .said, pre, code"
# The contrast of two colours by WCAG 2.2, and the colour behind an element.
CONTRAST = """
(selector) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = channels(text).slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const ink = element instanceof SVGElement ? getComputedStyle(element).fill : getComputedStyle(element).color;
    const pair = [light(ink), light(behind(element))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
}
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BINARY is not None
    with running_browser(BINARY, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of one result, and one that compares three."""
    folder = tmp_path_factory.mktemp("results")
    one = write_result(folder / "one")
    others = [
        write_result(folder / "small", made(0.5, 0.74, 0.7)),
        write_result(folder / "worse", made(0.75, 0.7, 0.6)),
    ]
    return {"report": write_page([one]), "comparison": write_page([one, *others], folder / "comparison.html")}


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("MOE_COMPRESS_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_quiet(page: Page, file: Path) -> None:
    """Nothing on the console, no request but the page itself."""
    assert page.complaints() == []
    assert page.requests() == [file.absolute().as_uri()]


def tip(page: Page) -> str | None:
    """What the tip says, None while it is hidden."""
    shown = page.ask("getComputedStyle(document.getElementById('tip')).visibility") == "visible"
    return page.ask("document.getElementById('tip').innerText") if shown else None


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize(
    ("width", "dark", "phone"), [(1280, False, False), (1280, True, False), (390, False, True), (390, True, True)]
)
def test_the_page_is_whole_in_any_light_and_width(
    browser: Browser, pages: dict[str, Path], shots: Path, name: str, width: int, dark: bool, phone: bool
) -> None:
    page = browser.page()
    page.emulate(width, 844, dark=dark, phone=phone)
    page.open(pages[name])
    assert page.ask("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
    light = page.ask("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(light) < 60) == dark
    ratios = page.ask(f"({CONTRAST})({json.dumps(INKS)})")
    assert len(ratios) > 100 and min(ratios) >= 4.5, "WCAG AA"
    small = page.ask(
        "[...document.querySelectorAll('main *')].filter(e => e.childNodes.length && "
        "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility() && "
        "parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML.slice(0, 80))"
    )
    assert small == [], "text of less than 12 pixels"
    page.screenshot(shots / f"{name}-{'phone' if phone else 'desk'}-{'dark' if dark else 'light'}.png")
    require_quiet(page, pages[name])


def test_every_figure_is_in_the_document(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page()
    page.open(pages["report"])
    report = report_of()
    found = set(page.ask("[...document.querySelectorAll('data')].map(one => Number(one.value))"))
    for side in ("baseline", "compressed"):
        for value in report[side].values():
            assert not isinstance(value, int | float) or value in found
    assert report["ratio"]["stored_bytes"] in found
    assert report["random"][2]["tasks"]["code"]["bits_per_byte"]["value"] in found
    page.ask("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert "6,919,161,856" in page.ask("document.querySelector('#figures').innerText")


def test_pointing_at_an_expert_shows_its_figures(browser: Browser, pages: dict[str, Path], shots: Path) -> None:
    page = browser.page()
    page.emulate(1280, 900)
    page.open(pages["report"])
    page.ask("document.querySelector('svg.outer').scrollIntoView({block: 'center', behavior: 'instant'})")
    page.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # the scroll is over
    box = "document.querySelector('svg.outer').getBoundingClientRect()"
    left, top, width, height = page.ask(f"[{box}.left, {box}.top, {box}.width, {box}.height]")
    assert tip(page) is None
    page.point(left + 2.5 / 4 * width, top + 1.5 / 2 * height)
    said = tip(page) or ""
    assert said.splitlines()[0] == "Layer 3, expert 2"
    for line in ("outcome\tkept", "traffic\t30 tokens, 30.0 %", "score (reap)\t2 (rank 3 of 4)",
                 "bits per weight\t4 bits", "mean gate value\t0.5", "error at 2 bits\t0.02"):  # fmt: skip
        assert line in said
    about = "[one.getAttribute('x'), one.getAttribute('y'), one.style.visibility]"
    cursors = page.ask(f"[...document.querySelectorAll('.cursor')].map((one) => {about})")
    assert cursors == [["2", "1", "visible"]] * page.ask("document.querySelectorAll('svg.outer').length")
    page.screenshot(shots / "expert.png", whole=False)
    page.point(left + 1.5 / 4 * width, top + 0.5 / 2 * height)
    assert "outcome\tdropped" in (tip(page) or "") and "bits per weight" not in (tip(page) or "")
    page.point(5, 5)
    assert tip(page) is None
    require_quiet(page, pages["report"])


def test_touching_an_expert_shows_its_figures(browser: Browser, pages: dict[str, Path], shots: Path) -> None:
    """They stay when the finger is gone, until it touches something else."""
    page = browser.page()
    page.emulate(390, 844, phone=True)
    page.open(pages["report"])
    page.ask("document.querySelector('svg.outer').scrollIntoView({block: 'center', behavior: 'instant'})")
    page.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = "document.querySelector('svg.outer').getBoundingClientRect()"
    left, top, width, height = page.ask(f"[{box}.left, {box}.top, {box}.width, {box}.height]")
    page.touch(left + 2.5 / 4 * width, top + 1.5 / 2 * height)
    assert (tip(page) or "").startswith("Layer 3, expert 2")
    page.screenshot(shots / "expert-touched.png", whole=False)
    page.touch(left + 0.5 / 4 * width, top + 0.5 / 2 * height)
    assert (tip(page) or "").startswith("Layer 1, expert 0")
    page.touch(5, 5)
    assert tip(page) is None
    require_quiet(page, pages["report"])


def test_everything_can_be_reached_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page()
    page.emulate(1280, 900)
    page.open(pages["report"])
    focused = "((one) => one.matches('svg.outer') ? 'map' : one.id || one.tagName)(document.activeElement)"
    reached = []
    for _ in range(80):
        page.press("Tab")
        reached.append(page.ask(focused))
        if reached[-1] == "map":
            break
    assert reached[0] == "A" and "theme" in reached and reached[-1] == "map", reached
    assert (tip(page) or "").startswith("Layer 1, expert 0")
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert (tip(page) or "").startswith("Layer 3, expert 1")
    assert page.ask("document.getElementById('live').textContent").startswith("Layer 3, expert 1. Step 1: outcome kept")
    for _ in range(9):
        page.press("ArrowRight")
    assert (tip(page) or "").startswith("Layer 3, expert 3"), "the cursor stays on the map"
    page.press("Escape")
    assert tip(page) is None
    page.ask("scrollTo({top: 0, behavior: 'instant'})")
    page.ask("document.querySelector('.plane g').focus()")
    page.ask("new Promise((done) => setTimeout(done, 700))")  # it scrolls there
    assert "random pruning" in (tip(page) or ""), "the tip goes with it"
    require_quiet(page, pages["report"])


def test_the_switch_of_colours(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.page()
    page.emulate(1280, 900, dark=True)
    page.open(pages["report"])
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.ask(paper)
    page.ask("document.getElementById('theme').focus()")
    page.press("Enter")
    assert page.ask("document.getElementById('theme').textContent") == "Light" and page.ask(paper) != dark
    page.press("Enter")
    assert page.ask("document.getElementById('theme').textContent") == "Dark" and page.ask(paper) == dark
    page.press("Enter")
    assert page.ask("document.getElementById('theme').getAttribute('aria-label')") == "Colours: as the system. Change."
    assert page.ask(paper) == dark
    require_quiet(page, pages["report"])


def test_on_paper_all_is_open_and_dark_on_light(browser: Browser, pages: dict[str, Path], shots: Path) -> None:
    page = browser.page()
    page.emulate(1280, 900, dark=True)
    page.open(pages["report"])
    page.ask(
        "addEventListener('beforeprint', () => { window.opened = document.querySelectorAll('details[open]').length })"
    )
    printed = page.pdf()
    (shots / "report.pdf").write_bytes(printed)
    assert (
        printed.startswith(b"%PDF")
        and page.ask("opened") == page.ask("document.querySelectorAll('details').length") > 0
    )
    assert page.ask("document.querySelectorAll('details[open]').length") == 0, "closed again"
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.ask("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_tables_of_many_results_fit_on_paper(browser: Browser, tmp_path: Path) -> None:
    results = [write_result(tmp_path / f"result-{number}", made(0.9 - 0.05 * number, 0.7, 0.6)) for number in range(9)]
    page = browser.page()
    page.emulate(688, 900)  # A4 without its margins
    page.open(write_page(results, tmp_path / "comparison.html"))
    page.call("Emulation.setEmulatedMedia", media="print")
    page.ask("document.querySelectorAll('details').forEach(one => { one.open = true })")
    widths = page.ask("[...document.querySelectorAll('.scroll')].map(one => [one.scrollWidth, one.clientWidth])")
    assert len(widths) >= 4 and all(content <= room + 1 for content, room in widths), widths
    names = page.ask("[...document.querySelectorAll('.scroll tbody th')].map(one => one.clientWidth)")
    assert min(names) >= 50, "room for words"


def test_scripts_of_others_do_not_run(browser: Browser, tmp_path: Path) -> None:
    report = report_of()
    report["settings"]["model"] = "<img src=x onerror='window.hurt=1'><script>window.hurt=2</script>"
    file = write_page([write_result(tmp_path / "out", report)])
    page = browser.page()
    page.open(file)
    assert page.ask("window.hurt === undefined")
    assert "<script>" in page.ask("document.querySelector('h1').textContent")
    require_quiet(page, file)
    page.ask(
        "const own = document.createElement('script'); own.textContent = 'window.hurt = 3'; document.body.append(own)"
    )
    assert page.ask("window.hurt === undefined"), "not even if one got in"
    assert any("Content Security Policy" in text for text in page.complaints())
