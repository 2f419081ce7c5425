"""The HTML pages in a headless Chromium: what a reader sees, hovers, selects and types."""

import time
from pathlib import Path

import numpy as np
import pytest

from gpt.inference.explanation import Explanation

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains, Keys


def test_errors_and_requests_of_a_page_are_noticed(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<img src="http://127.0.0.1:9/image.png"><script>throw Error("broken")</script>')
    page = browser.open(path, width=400, dark=True)
    problems = browser.problems()
    assert any("broken" in problem for problem in problems)
    assert "http://127.0.0.1:9/image.png" in problems
    assert page.execute_script("return [innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [400, True]


PIECES = ["O", " Romeo", "\n", "</script>", "e\u0301", "\u202e"]


def reading(pieces: list[str], layers: int = 2, heads: int = 2, window: int | None = None) -> Explanation:
    """Returns an explanation with random weights, losses and predictions."""
    rng, length = np.random.default_rng(0), len(pieces)
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    is_visible = (distance >= 0) & (distance < (window or length))
    weights = np.exp(3 * rng.normal(size=(layers, heads, length, length))) * is_visible
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    losses = np.concatenate([[np.nan], np.linspace(0.5, 8, length - 1)])
    ranks = np.concatenate([[0], np.arange(2, length + 1)])
    expected = [
        [("thou", 0.5), (piece, float(np.exp(-loss)))] for piece, loss in zip(pieces[1:], losses[1:], strict=True)
    ]
    visible = np.tile(is_visible.sum(axis=-1), (layers, 1))
    return Explanation(pieces, losses, ranks, expected, weights, visible)


def opened(browser, path: Path, explanation: Explanation, **options):
    """Opens the page of an explanation and waits until it has drawn the attention weights."""
    path.write_text(explanation.page("How it reads"), encoding="utf-8")
    page = browser.open(path, **options)
    eventually(page, "return source !== null && cell > 0", True)
    return page


def eventually(page, script: str, wanted: object) -> None:
    """Waits until a script returns a value. Fails with what it returns at last."""
    deadline = time.monotonic() + 20
    while (found := page.execute_script(script)) != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == wanted


def text_of(page, name: str) -> str:
    return page.find_element("id", name).text


def hover(page, element, x: float | None = None, y: float | None = None) -> None:
    """Moves the pointer to the middle of an element, or to a place from its left upper corner."""
    x, y = (0 if at is None else at - element.size[side] / 2 for at, side in ((x, "width"), (y, "height")))
    ActionChains(page).move_to_element_with_offset(element, round(x), round(y)).perform()


def hover_cell(page, query: int, key: int):
    """Moves the pointer to a cell of the map, which is scrolled to it."""
    place = "view.margin + ({0} + .5) * cell - at('scroll').{1}"
    script = f"return [{place.format(key, 'scrollLeft')}, {place.format(query, 'scrollTop')}]"
    hover(page, page.find_element("id", "map"), *page.execute_script(script))


def test_a_head_is_selected_and_its_weights_are_read(browser, tmp_path):
    seen = reading(PIECES)
    page = opened(browser, tmp_path / "page.html", seen)
    assert text_of(page, "head") == "Layer 2, mean of the heads"
    hover_cell(page, 4, 1)
    mean = seen.attention_LxHxTxT[1].mean(axis=0)
    assert text_of(page, "read") == f"“e\u0301” (token 5) → “·Romeo” (token 2): {mean[4, 1]:.3f}"

    page.find_element("css selector", "[aria-label^='layer 1, head 2:']").click()
    eventually(page, "return at('head').textContent", "Layer 1, head 2")
    entropy = seen.entropy_LxH[0, 1]
    share = entropy / np.log([1, 2, 3, 4, 5, 6]).mean()
    assert text_of(page, "entropy") == f"entropy {entropy:.2f} nats, {100 * share:.0f} % of the largest possible"
    assert [x.get_attribute("aria-label")[:15] for x in page.find_elements("css selector", "[aria-pressed=true]")] == [
        "layer 1, head 2"
    ]
    for query, key in ((3, 0), (3, 3), (5, 2)):
        hover_cell(page, query, key)
        wanted = f"(token {key + 1}): {seen.attention_LxHxTxT[0, 1, query, key]:.3f}"
        eventually(page, f"return at('read').textContent.endsWith({wanted!r})", True)
    hover_cell(page, 1, 4)
    assert text_of(page, "read").endswith("not visible, because it comes later")

    page.find_element("id", "map").click()  # in its middle
    selected = page.execute_script("return state.token")
    assert page.current_url.endswith(f"#layer=1&head=2&token={selected + 1}")
    shades = "return spans.map(span => span.style.boxShadow != 'none')"
    assert page.execute_script(shades) == [key <= selected for key in range(6)]


def test_the_hash_and_the_arrow_keys_select(browser, tmp_path):
    path = tmp_path / "page.html"
    opened(browser, path, reading(PIECES))
    page = browser.open(path.as_uri() + "#layer=1&head=1&token=3")
    eventually(page, "return at('head').textContent", "Layer 1, head 1")
    assert text_of(page, "note").startswith("Token 3 of 6: “⏎”")
    page.find_element("css selector", "#text [aria-selected=true]").send_keys(Keys.ARROW_RIGHT)
    assert text_of(page, "note").startswith("Token 4 of 6: “</script>”")
    page.find_element("css selector", "#overview [aria-pressed=true]").send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert text_of(page, "head") == "Layer 2, head 2"
    page.find_element("id", "map").send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    eventually(page, "return at('read').textContent.startsWith('“⏎” (token 3) → “·Romeo” (token 2): 0.')", True)


def test_a_token_shows_its_loss_and_predictions(browser, tmp_path):
    page = opened(browser, tmp_path / "page.html", reading(PIECES))
    tokens = page.find_elements("css selector", "#text > span")
    hover(page, tokens[1])
    note = text_of(page, "note")
    assert "loss 0.500 nats · probability 60.7 % · rank 2" in note
    assert "“thou” 50.0 %" in note
    assert page.find_element("css selector", "#note .hit").text == "“·Romeo” 60.7 %"
    hover(page, tokens[0])
    assert "The first token has no loss" in text_of(page, "note")
    # Only the direction mark has no text that could be copied; in its place, the page shows its name.
    assert [x.get_property("textContent") for x in tokens] == [*PIECES[:5], ""]
    assert tokens[5].find_element("tag name", "i").get_attribute("data-mark") == "‹U+202E›"


@pytest.mark.parametrize("pieces", [PIECES, ["a", "b"], [" word"] * 1000], ids=["short", "two", "long"])
@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1280, True)])
def test_pages_fit_narrow_screens_and_dark_schemes(browser, tmp_path, pieces, width, dark):
    layers, heads = (1, 1) if len(pieces) == 2 else (2, 2)
    page = opened(browser, tmp_path / "page.html", reading(pieces, layers, heads), width=width, dark=dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script("return at('map').offsetWidth") <= width
    last = page.find_element("css selector", "#text [aria-selected=true]")
    box = page.find_element("id", "text")
    assert last.rect["y"] + last.rect["height"] <= box.rect["y"] + box.rect["height"]
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")


def test_a_thousand_tokens_with_a_window_are_read_in_the_enlarged_map(browser, tmp_path):
    seen = reading([f" w{i}" for i in range(1000)], layers=1, window=200)
    page = opened(browser, tmp_path / "page.html", seen)
    assert (tmp_path / "page.html").stat().st_size < 1_500_000  # of three maps, with the mean
    page.find_element("css selector", "[aria-label^='layer 1, head 1:']").click()
    eventually(page, "return at('entropy').textContent.endsWith('window of 200 tokens')", True)
    page.execute_script("select({token: 699, key: 619})")
    for _ in range(5):
        page.find_element("id", "more").click()
    hover_cell(page, 699, 620)
    assert (
        text_of(page, "read")
        == f"“·w699” (token 700) → “·w620” (token 621): {seen.attention_LxHxTxT[0, 0, 699, 620]:.3f}"
    )
    page.execute_script("select({token: 699, key: 499})")
    assert text_of(page, "read").endswith("outside the window")
