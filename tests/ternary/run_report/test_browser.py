"""A run's page in a real browser: wide and narrow, light and dark, its sliders moved."""

from __future__ import annotations

import contextlib
import datetime
import io

import numpy as np
import pytest
from PIL import Image

from ternary.config import QuantConfig
from ternary.policy import Policy
from ternary.run_report.folder import read_run
from ternary.run_report.layers import inspect_student
from ternary.run_report.page import render, write_page
from ternary.run_report.scores import read_evaluations
from ternary.storage.rounding import quantize_checkpoint
from tests.browser import find_browser
from tests.small_pipeline import small_folder
from tests.ternary.run_report.run_folder import PROMPTS, evaluate, make_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: python tests/browser.py .venv/browser gets one"
)
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page with all parts."""
    folder = tmp_path_factory.mktemp("browser")
    teacher = small_folder(folder / "teacher")
    quantize_checkpoint(teacher, folder / "student", QuantConfig(), Policy())
    run = read_run(make_run(folder / "run"))
    evaluate(run.folder, teacher=1.0, student=0.5, rounded=0.25)
    layers, distances = inspect_student(folder / "student", str(teacher))
    now = datetime.datetime.now(datetime.UTC)
    page = folder / "page.html"
    write_page(page, render(run, read_evaluations(run), layers, distances, now=now))
    return page.as_uri()


@contextlib.contextmanager
def opened(address, *, width=1280, scheme="light", **options):
    """The page, and what went wrong on it; a browser of its own."""
    wrong: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=BROWSER, args=["--hide-scrollbars", "--disable-gpu", "--in-process-gpu"]
        )
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **options
        )
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page, wrong
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked)


def seen(target) -> np.ndarray:
    """A screenshot as (H, W, 3) bytes."""
    with Image.open(io.BytesIO(target.screenshot())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def slide(page, gallery: int = 0) -> None:
    """Chooses the slider."""
    page.locator(".gallery").nth(gallery).get_by_role("radio", name="slider").check()


@pytest.mark.parametrize("mode", ["side by side", "slider"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_overflows_and_nothing_goes_wrong(address, width, scheme, mode):
    with opened(address, width=width, scheme=scheme) as (page, wrong):
        for radio in page.get_by_role("radio", name=mode).all():
            radio.check()
        page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        # Nor is anything wider than its card, but for tables that scroll.
        outside = page.evaluate(
            "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, svg, .y')"
            " && e.getBoundingClientRect().right > innerWidth).map((e) => e.className)"
        )
        assert outside == []
        picture = seen(page)
        assert wrong == []
    brightness = np.median(picture)
    assert brightness > 200 if scheme == "light" else brightness < 60
    # Ink on it: not an empty page.
    assert np.std(picture) > 10


def both_are_whole(page) -> None:
    """That each picture of every pair has a place of its own, and is all that is seen there."""
    for compare in page.locator(".compare").all():
        boxes = [image.bounding_box() for image in compare.locator("img").all()]
        natural = compare.locator("img").first.evaluate(
            "(image) => image.naturalWidth / image.naturalHeight"
        )
        for box in boxes:
            assert box["width"] / box["height"] == pytest.approx(natural, rel=0.02)
        assert boxes[0]["width"] == pytest.approx(boxes[1]["width"], abs=0.1)
        assert boxes[0]["width"] > 100
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
        assert boxes[0]["y"] == boxes[1]["y"]
    for kind, rgb in (("teacher", RED), ("student", BLUE)):
        picture = seen(page.locator(f".compare img.{kind}").first)
        # But for the corners, and the label in one of them.
        assert (np.abs(picture - rgb).max(axis=2) < 40).mean() > 0.85


@pytest.mark.parametrize("width", [1280, 360])
def test_both_pictures_are_seen_whole_and_named(address, width):
    with opened(address, width=width) as (page, wrong):
        both_are_whole(page)
        pair = page.locator(".compare").first
        for kind in ("teacher", "student"):
            label, box = (pair.locator(f"{e}.{kind}").bounding_box() for e in (".label", "img"))
            assert pair.locator(f".label.{kind}").text_content() == kind
            assert box["x"] <= label["x"]
            assert label["x"] + label["width"] <= box["x"] + box["width"]
        # Nothing to slide, nor to stop at on the way through by keyboard.
        assert not page.locator("input[type=range]").first.is_visible()
        assert not page.get_by_text("drag it, or use the arrow keys").first.is_visible()
        assert wrong == []


@pytest.mark.parametrize("width", [1280, 360])
def test_without_a_script_both_pictures_are_seen(address, width):
    with opened(address, width=width, java_script_enabled=False) as (page, wrong):
        both_are_whole(page)
        assert page.locator(".compare img").count() == 4 * len(PROMPTS)
        # What would do nothing is not there.
        assert not any(each.is_visible() for each in page.locator(".controls").all())
        assert wrong == []


def test_the_slider_is_a_choice_by_keyboard(address):
    with opened(address) as (page, wrong):
        page.locator("select").first.focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.value") == "side by side"
        page.keyboard.press("ArrowRight")
        assert halves(page) == pytest.approx(0.5, abs=0.05)
        labels = [page.locator(f".label.{kind}").first for kind in ("teacher", "student")]
        teacher, student = (label.bounding_box() for label in labels)
        assert teacher["x"] + teacher["width"] < student["x"]
        # Next are the lines, all and then each.
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "all-lines"
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert page.locator(".compare input").first.input_value() == "51"
        # The other gallery stays as it is.
        assert not page.locator(".compare input").last.is_visible()
        page.get_by_role("radio", name="slider").first.focus()
        page.keyboard.press("ArrowLeft")
        both_are_whole(page)
        assert wrong == []


def halves(page) -> float:
    """The share of the first pair's picture that is the teacher's red; the rest is blue."""
    picture = seen(page.locator(".compare").first)
    # Away from the round corners, and from the handle in the middle.
    row = picture[picture.shape[0] // 4, 10:-10]
    red = np.abs(row - RED).max(axis=1) < 40
    blue = np.abs(row - BLUE).max(axis=1) < 40
    assert (red | blue).mean() > 0.95
    assert red.any() != blue.any() or np.flatnonzero(red).max() < np.flatnonzero(blue).min()
    return float(red.mean())


def test_the_slider_moves_what_is_seen(address):
    with opened(address) as (page, wrong):
        slide(page)
        assert halves(page) == pytest.approx(0.5, abs=0.05)
        slider = page.locator(".compare input").first
        # By keyboard,
        slider.focus()
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        assert halves(page) == pytest.approx(0.8, abs=0.05)
        # by pointer,
        box = slider.bounding_box()
        page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 0.7 * box["height"])
        assert halves(page) == pytest.approx(0.2, abs=0.08)
        # and all at once.
        page.locator(".all-lines").first.fill("0")
        assert halves(page) < 0.05
        page.locator(".all-lines").first.fill("100")
        assert halves(page) > 0.95
        assert wrong == []


def test_the_slider_follows_a_finger(address):
    with opened(address, width=360, has_touch=True) as (page, wrong):
        slide(page)
        slider = page.locator(".compare input").first
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        page.touchscreen.tap(box["x"] + 0.8 * box["width"], box["y"] + 0.7 * box["height"])
        assert halves(page) == pytest.approx(0.8, abs=0.1)
        assert wrong == []


def test_another_student_is_chosen(address):
    with opened(address) as (page, wrong):
        drawn, scored = page.locator(".gallery").all()
        note = drawn.locator(".verdict").first
        assert note.text_content() == "50.0 dB"
        image = drawn.locator("img.student").first
        last = image.get_attribute("src")
        drawn.locator("select").select_option("step 0")
        assert note.text_content() == "10.0 dB"
        assert image.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 32
        assert image.get_attribute("alt") == f"student: {PROMPTS[0]}"
        # The scored pictures have a choice of their own, and are named by it.
        scored.locator("select").select_option("plain rounding")
        assert note.text_content() == "10.0 dB"
        assert scored.locator(".label.student").first.text_content() == "plain rounding"
        other = scored.locator("img.student").first
        assert other.get_attribute("alt") == f"plain rounding: {PROMPTS[0]}"
        assert other.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 256
        assert "plain rounding fails" in (scored.locator(".verdict").first.text_content() or "")
        # And back, to what the page came with.
        drawn.locator("select").select_option("step 40")
        assert image.get_attribute("src") == last
        assert wrong == []


def test_charts_are_read_by_pointer_and_by_keys(address):
    with opened(address) as (page, wrong):
        chart = page.locator(".chart").first
        plot, reading = chart.locator(".plot"), chart.locator(".reading")
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert reading.text_content() == "step 1: loss 1"
        page.keyboard.press("ArrowRight")
        assert reading.text_content() == "step 2: loss 0.5"
        box = plot.bounding_box()
        page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 20)
        assert reading.text_content() == "step 40: loss 0.025"
        assert chart.locator(".cursor").is_visible()
        assert wrong == []


def test_paper_shows_both_pictures_whole(address):
    with opened(address) as (page, wrong):
        slide(page)
        page.emulate_media(media="print")
        boxes = [
            page.locator(".compare").first.locator("img").nth(i).bounding_box() for i in (0, 1)
        ]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        assert not page.locator(".compare input").first.is_visible()
        assert wrong == []
