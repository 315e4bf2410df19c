"""The page in headless Chromium, as a reader uses it."""

import json
import os
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import page_service
import pytest

pytest.importorskip("fastapi", reason="ctclip[page] is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

import uvicorn
from playwright import sync_api
from scans import chest_hu, save

from ctclip.retrieval.page import ServeConfig, build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 120_000
"""Software rendering on a busy machine is slow; nothing here measures time."""


@pytest.fixture(scope="module")
def address(archive):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    service = page_service.open_service(*archive)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build(service, ServeConfig(port=port))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, address):
    """A page that fails its test if it complains or asks for anything elsewhere."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")
    context.set_default_timeout(PATIENCE_MS)
    tab = context.new_page()
    complaints = []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    foreign = []
    tab.on("request", lambda r: foreign.append(r.url) if not is_ours(r.url, address) else None)
    tab.goto(address)
    tab.wait_for_selector("#main:not([hidden])")
    yield tab
    context.close()
    assert complaints == []
    assert foreign == []


def is_ours(url, address):
    return url.startswith((address, "data:", "blob:"))


def search_study(tab, study="phantom_00003_a"):
    tab.fill("#study", study)
    tab.click("#search")
    tab.wait_for_selector("#cases li h3")
    both_shown(tab)


def until(tab, expression):
    """Wait for something to become true; Playwright's own way needs eval, which we forbid."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, f"never became true: {expression}"
        tab.wait_for_timeout(100)


def both_shown(tab):
    until(
        tab,
        "page.viewers && ['query', 'case'].every(s => page.viewers.view[s]?.volumes.length > 0)",
    )


def position(tab, side):
    return tab.evaluate(f"Array.from(page.viewers.view.{side}.scene.crosshairPos)")


def screenshot(tab, name):
    """For the README, where somebody asked for it."""
    if folder := os.environ.get("CTCLIP_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / name)


def test_slices_of_query_and_case_scroll_together(tab):
    search_study(tab)
    before = position(tab, "query")

    tab.focus("#cases li")
    for _ in range(5):
        tab.keyboard.press("ArrowUp")

    assert position(tab, "query")[2] > before[2]
    assert position(tab, "case") == pytest.approx(position(tab, "query"), abs=1e-3)
    tab.click("#query-canvas", position={"x": 60, "y": 60})
    until(
        tab,
        "Math.abs(page.viewers.view.query.scene.crosshairPos[0]"
        " - page.viewers.view.case.scene.crosshairPos[0]) < 1e-3",
    )
    assert position(tab, "query")[0] != pytest.approx(before[0], abs=1e-3)
    screenshot(tab, "page.png")


def test_window_plane_heat_map_and_case_follow_the_keyboard(tab):
    search_study(tab)
    tab.focus("#cases li")

    tab.keyboard.press("w")
    tab.keyboard.press("p")
    tab.keyboard.press("h")
    until(tab, "page.viewers.view.case.volumes.length === 2")
    assert tab.input_value("#window") == "mediastinum"
    assert tab.evaluate("page.viewers.view.case.volumes[0].cal_min") == -160
    assert tab.input_value("#plane") == "coronal"
    assert tab.is_visible("#heat-note")
    until(tab, "page.viewers.view.query.volumes.length === 2")
    tab.keyboard.press("3")
    assert tab.get_attribute("#cases li >> nth=2", "aria-current") == "true"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "text"


def test_both_viewers_go_to_a_finding_and_stay_together(tab):
    search_study(tab)
    tab.evaluate("page.before = String(page.viewers.position())")

    tab.click("#bars li >> nth=3 >> button")

    until(tab, "String(page.viewers.position()) !== page.before")
    assert position(tab, "case") == pytest.approx(position(tab, "query"), abs=1e-6)
    tab.keyboard.press("ArrowUp")
    assert position(tab, "case") == pytest.approx(position(tab, "query"), abs=1e-6)


def test_a_text_finds_cases_and_has_a_permanent_link(tab, address):
    tab.fill("#text", "bilateral pleural effusion with compressive atelectasis")
    tab.click("summary")
    tab.select_option("#field-sex", "F")
    tab.focus("#text")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#cases li h3")
    studies = tab.locator("#cases h3").all_inner_texts()

    handle = tab.evaluate("page.result.id")
    tab.goto(f"{address}/#{handle}")
    tab.reload()
    tab.wait_for_selector("#cases li h3")
    assert tab.locator("#cases h3").all_inner_texts() == studies
    assert tab.inner_text("#asked").endswith("compressive atelectasis” · Filters: sex: F")
    assert tab.input_value("#text") == "bilateral pleural effusion with compressive atelectasis"
    assert tab.input_value("#field-sex") == "F"
    tab.click("#search")
    until(tab, f"page.result.id !== '{handle}'")
    assert tab.locator("#cases h3").all_inner_texts() == studies
    with tab.expect_download() as download:
        tab.click("#as-html")
    assert "For research only" in Path(download.value.path()).read_text(encoding="utf-8")


def test_filters_and_examples_change_the_answer(tab):
    search_study(tab)
    first = tab.locator("#cases h3").first.inner_text()

    tab.click("summary")
    tab.select_option("#field-sex", "F")
    tab.click("#search")
    until(tab, "page.result.question.where.sex === 'F'")
    shown = tab.locator("#cases li").all_inner_texts()
    assert shown
    assert all("sex F" in text for text in shown)
    tab.select_option("#field-sex", "")
    tab.locator("#cases button").nth(1).click()
    until(tab, "page.result.question.less.length === 1")
    assert tab.locator("#cases h3").first.inner_text() != first


def test_the_page_speaks_chinese_and_says_on_every_screen_what_it_is_for(tab):
    search_study(tab)
    assert "research only" in tab.inner_text("#research")

    tab.click("#language")

    assert "仅供研究使用" in tab.inner_text("#research")
    assert "肺结节" in tab.inner_text("#bars")
    assert tab.get_attribute("html", "lang") == "zh"
    assert tab.is_visible("#research")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_everything_fits_the_screen(tab, width, height):
    tab.set_viewport_size({"width": width, "height": height})
    search_study(tab)

    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#drop", "#search", "#query-canvas", "#case-canvas", "#bars", "#cases li"):
        box = tab.locator(selector).first.bounding_box()
        assert box["width"] > 100 or selector == "#cases li"
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1
    screenshot(tab, f"page-{width}.png")


def test_an_unusable_file_is_explained_and_the_page_goes_on(tab, tmp_path):
    path = tmp_path / "notes.zip"
    path.write_text("not a scan")
    tab.set_input_files("#file", path)
    tab.wait_for_selector("#status.bad")
    assert "neither NIfTI nor a zip of DICOM" in tab.inner_text("#status")
    search_study(tab)


def upload_and_wait(tab, path):
    before = tab.evaluate("page.result?.id ?? null")
    tab.set_input_files("#file", path)
    until(
        tab,
        f"(page.result?.id ?? null) !== {json.dumps(before)}"
        " || document.querySelector('#status.bad') !== null",
    )
    assert tab.locator("#status.bad").count() == 0, tab.inner_text("#status")
    both_shown(tab)
    assert tab.locator("#bars li").count() == 18
    assert tab.locator("#cases li h3").count() > 0


def test_a_slab_is_shown_with_a_warning_that_the_next_answer_takes_away(tab, tmp_path):
    upload_and_wait(tab, save(tmp_path / "slab.nii.gz", chest_hu((12, 44, 64))))
    assert "only a part of a chest" in tab.inner_text("#warnings")
    tab.click("#language")
    assert "只包含部分胸部" in tab.inner_text("#warnings")

    tab.click("#language")
    search_study(tab)
    assert tab.inner_text("#warnings") == ""


def test_a_real_ct_and_a_real_dicom_series_are_scored_and_find_cases(tab, test_data, tmp_path):
    upload_and_wait(tab, test_data / "data/real/volumes/lidc_0002_part.nii.gz")
    series = test_data / "data/real/dicom/lidc_0001_ge_evrle"
    archive = tmp_path / "series.zip"
    with zipfile.ZipFile(archive, "w") as container:
        for path in sorted(series.rglob("*")):
            if path.is_file():
                container.write(path, path.relative_to(series))
    upload_and_wait(tab, archive)
    screenshot(tab, "page-upload.png")
