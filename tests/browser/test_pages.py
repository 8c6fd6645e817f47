"""The pages as people meet them: in a real browser, dark and light, on a phone, in print, by keyboard, read aloud."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import synthetic
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from gameday import record
from gameday.model import Timeline, Verdict
from reports import html

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")
QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    " --disable-sync --host-resolver-rules=MAP*~NOTFOUND"
)

MADE: dict[str, Callable[[], Timeline]] = {
    "zone_outage": synthetic.timeline,
    "hostile": lambda: synthetic.timeline(evil=True),
    "broken": synthetic.broken,
    "blind": synthetic.blind,
    "dirty": synthetic.dirty,
}
VERDICTS = {
    "zone_outage": Verdict.PASS,
    "hostile": Verdict.PASS,
    "broken": Verdict.FAIL,
    "blind": Verdict.INCONCLUSIVE,
    "dirty": Verdict.ERROR,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the later one with an experiment of each verdict."""
    runs = tmp_path_factory.mktemp("browsed")
    day_before = replace(synthetic.ABOUT, epoch_wall=synthetic.ABOUT.epoch_wall - 86_400)
    earlier = replace(synthetic.timeline(), about=day_before)
    html.write(synthetic.write(runs / "20261123-090000-7419" / "zone_outage", earlier))
    made = runs / "20261124-090000-7419"
    for name, timeline in MADE.items():
        one = timeline()
        html.write(synthetic.write(made / name, replace(one, about=replace(one.about, experiment=name))))
    html.write_index(made)
    return made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for the module: the library's event loop must not be there for other tests."""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET.split(), chromium_sandbox=False)
        yield browser
        browser.close()


@dataclass
class Seen:
    """A page that was opened, and what it said and asked for meanwhile."""

    page: Page
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1200, "height": 900}}


@contextmanager
def opened(browser: Browser, path: Path, *, phone: bool = False, dark: bool = False, js: bool = True) -> Iterator[Seen]:
    scheme = "dark" if dark else "light"
    context = browser.new_context(**(PHONE if phone else DESK), color_scheme=scheme, java_script_enabled=js)
    page = context.new_page()
    seen = Seen(page)

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            seen.console.append(message.text)

    def asked(request: Request) -> None:
        seen.requests.append(request.url)

    page.on("console", heard)
    page.on("pageerror", lambda error: seen.console.append(str(error)))
    page.on("request", asked)
    page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
    try:
        page.goto(path.as_uri())
        if js and path.name == html.REPORT:
            page.wait_for_selector('html[data-charts="drawn"]')
            page.wait_for_function("Bokeh.documents.every((one) => one.is_idle)")
        yield seen
    finally:
        context.close()


def test_each_page_is_of_the_verdict_that_it_stands_for(root: Path) -> None:
    for name, verdict in VERDICTS.items():
        assert record.read_verdict(root / name).verdict is verdict, name


@pytest.mark.parametrize("name", [*MADE, ""])
def test_it_draws_asks_nobody_and_complains_of_nothing(chromium: Browser, root: Path, name: str) -> None:
    path = root / name / html.REPORT if name else root / html.INDEX
    with opened(chromium, path, phone=True) as seen:
        for size in (PHONE["viewport"], DESK["viewport"]):
            for scheme in ("light", "dark"):
                seen.page.set_viewport_size(size)
                seen.page.emulate_media(color_scheme=scheme)
                looks_right(seen.page, dark=scheme == "dark")
        assert seen.requests == [path.as_uri()]
        assert seen.console == []
        assert seen.dialogs == []


def looks_right(page: Page, *, dark: bool) -> None:
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "it scrolls sideways"
    first = page.locator("h1 .verdict")
    assert first.is_visible() and first.bounding_box()["y"] < 120
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(c) for c in paper[4:-1].split(",")) < 150) is dark, paper


@pytest.mark.parametrize("dark", [False, True])
def test_every_chart_has_ink(chromium: Browser, root: Path, dark: bool) -> None:
    with opened(chromium, root / "broken" / html.REPORT, dark=dark) as seen:
        charts = seen.page.locator(".chart").all()
        assert len(charts) == 7
        for chart in charts:
            colours = Image.open(io.BytesIO(chart.screenshot())).convert("RGB").getcolors(1 << 20)
            assert colours is not None and len(colours) > 20, chart.get_attribute("id")
            papery = max(colours)[1]
            assert (sum(papery) < 150) is dark, "the chart's ground is that of the page"


@pytest.mark.parametrize("page", ["broken/report.html", "index.html"])
def test_no_barrier_that_axe_knows(chromium: Browser, root: Path, page: str) -> None:
    with opened(chromium, root / page) as seen:
        seen.page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        for size, scheme in ((DESK, "light"), (DESK, "dark"), (PHONE, "light")):
            seen.page.set_viewport_size(size["viewport"])
            seen.page.emulate_media(color_scheme=scheme)
            found = Axe().run(seen.page)
            assert found.violations_count == 0, found.generate_report()


def test_axe_sees_a_barrier(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "zone_outage" / html.REPORT) as seen:
        seen.page.evaluate("document.querySelector('.soft').style.color = '#cccccc'")
        assert Axe().run(seen.page).violations_count > 0


def test_it_is_read_aloud_in_order(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "broken" / html.REPORT) as seen:
        aloud = seen.page.locator("body").aria_snapshot()
    wanted = ('heading "FAIL broken" [level=1]', "recovered only by the heal", 'heading "Findings"',
              'heading "Timeline"', 'figure "Requests"', 'figure "Recovery, stage by stage"',
              'heading "Healed"', 'heading "Reproduce"')  # fmt: skip
    places = [aloud.find(one) for one in wanted]
    assert -1 not in places, dict(zip(wanted, places, strict=True))
    assert places == sorted(places)
    assert "img" not in aloud


def test_figures_are_described_and_their_pictures_hidden(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "zone_outage" / html.REPORT) as seen:
        for figure in seen.page.locator("figure").all():
            said = seen.page.locator(f"#{figure.get_attribute('aria-describedby')}").inner_text()
            assert len(said) > 20
        focusable = "[aria-hidden=true] :is(a,button,input,select,textarea,[tabindex]:not([tabindex='-1']))"
        assert seen.page.locator(focusable).count() == 0


def shown(page: Page) -> tuple[float, float]:
    """The part of the timeline that is shown."""
    script = "(() => { const r = Bokeh.documents[0].roots()[0].x_range; return [r.start, r.end]; })()"
    start, end = page.evaluate(script)
    return start, end


def test_the_keyboard_is_enough(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "zone_outage" / html.REPORT) as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0, "it is seen once it has the focus"
        page.keyboard.press("Enter")
        assert page.url.endswith("#timeline")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "zoom-all"
        whole = shown(page)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        near = shown(page)
        assert near[0] > whole[0] and near[1] < whole[1] and near[0] < 0 < near[1]
        assert page.locator("#zoom-fault").get_attribute("aria-pressed") == "true"
        page.keyboard.press("+")
        closer = shown(page)
        assert closer[1] - closer[0] == pytest.approx((near[1] - near[0]) / 2)
        page.keyboard.press("ArrowRight")
        assert shown(page)[0] > closer[0]
        for _ in range(60):
            page.keyboard.press("ArrowLeft")
        assert shown(page)[0] == pytest.approx(whole[0]), "it stops at the edge"
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("details").first.get_attribute("open") is not None


def test_all_charts_move_together(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "zone_outage" / html.REPORT) as seen:
        seen.page.locator("#zoom-fault").click()
        script = """Bokeh.documents[0].roots().filter((r) => r.x_range.bounds !== null)
                    .map((r) => [r.x_range.start, r.x_range.end].join())"""
        ranges = seen.page.evaluate(script)
        assert len(ranges) >= 6 and len(set(ranges)) == 1


def test_what_hovers_is_text(chromium: Browser, root: Path) -> None:
    """Names and errors of the run in the tooltips cannot become elements."""
    with opened(chromium, root / "hostile" / html.REPORT) as seen:
        chart = seen.page.locator("#chart-latency")
        chart.scroll_into_view_if_needed()
        script = """(() => {
            const plot = Bokeh.documents[0].roots().find((r) => r.id === JSON.parse(
                document.getElementById("charts").textContent).roots.latency);
            const view = Bokeh.index.find_one(plot);
            const drawn = plot.renderers.find((r) => r.name === "failed");
            const data = drawn.data_source.data, i = 0;
            const box = view.canvas_view.el.getBoundingClientRect();
            return [box.x + view.frame.x_scale.compute(data.x[i]), box.y + view.frame.y_scale.compute(data.y[i])];
        })()"""
        x, y = seen.page.evaluate(script)
        seen.page.mouse.move(x - 3, y)
        seen.page.mouse.move(x, y)
        tooltip = seen.page.locator("text=alert('pod')").first
        tooltip.wait_for(state="visible")
        assert seen.page.locator("img").count() == 0
        assert seen.dialogs == [] and seen.console == []


def test_in_print_everything_is_open_and_on_white_paper(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "broken" / html.REPORT, dark=True) as seen:
        page = seen.page
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator(".buttons").is_visible()
        assert page.locator("details.print:not([open])").count() == 0
        assert page.get_by_text("kind: NetworkChaos").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details.print[open]").count() == 0
        paper = page.pdf(format="A4")
        assert paper.startswith(b"%PDF") and len(paper) > 50_000


def test_without_javascript_the_words_and_tables_are_there(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / "broken" / html.REPORT, js=False) as seen:
        text = seen.page.locator("body").inner_text()
        assert "FAIL" in text and "recovered only by the heal" in text and "The charts need JavaScript" in text
        assert seen.page.locator("figure table").count() >= 6


def test_the_index_leads_to_every_report_and_back(chromium: Browser, root: Path) -> None:
    with opened(chromium, root / html.INDEX) as seen:
        page = seen.page
        page.get_by_role("link", name="broken", exact=True).click()
        page.wait_for_selector('html[data-charts="drawn"]')
        assert page.locator("h1").inner_text().split() == ["FAIL", "broken"]
        page.get_by_role("link", name="run 20261124-090000-7419").click()
        assert page.url == (root / html.INDEX).as_uri()
        page.locator("svg.trend a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector('html[data-charts="drawn"]')
        assert "20261123-090000-7419" in page.url
