"""The HTML pages in a headless Chromium: what a reader sees, hovers, selects and types."""


def test_errors_and_requests_of_a_page_are_noticed(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<img src="http://127.0.0.1:9/image.png"><script>throw Error("broken")</script>')
    page = browser.open(path, width=400, dark=True)
    problems = browser.problems()
    assert any("broken" in problem for problem in problems)
    assert "http://127.0.0.1:9/image.png" in problems
    assert page.execute_script("return [innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [400, True]
