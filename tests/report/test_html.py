"""A page of one file: figures within, numbers as people read them, a list of its parts where there are many."""

import base64

from nemo_longctx.report.html import Section, write_page


def test_a_page_holds_each_part_in_its_order_and_makes_its_folder(tmp_path):
    (tmp_path / "a<b.png").write_bytes(b"\x89PNG")
    drawn = base64.b64encode(b"\x89PNG").decode()
    full = Section(
        heading="One", note="n < m", figures=[tmp_path / "a<b.png"], table=[["name", "x"], ["r", 1234567], ["s", 0.00012345],
        ["t", float("nan")]], code="a & b"
    )  # fmt: skip
    page = write_page(tmp_path / "new" / "folder" / "page.html", "T", [full, Section(heading="Two"), Section(heading="Three")])
    assert page == tmp_path / "new" / "folder" / "page.html"
    text = page.read_text(encoding="utf-8")
    parts = [
        "<title>T</title>", "<h1>T</h1>", '<nav><a href="#s0">One</a><a href="#s1">Two</a><a href="#s2">Three</a></nav>',
        '<h2 id="s0">One</h2>', '<p class="note">n &lt; m</p>',
        f'<img alt="a&lt;b" src="data:image/png;base64,{drawn}">',
        "<tr><th>name</th><th>x</th></tr>", "<tr><td>r</td><td>1,234,567</td></tr>", "<tr><td>s</td><td>0.0001234</td></tr>",
        "<tr><td>t</td><td>–</td></tr>", "<details><summary>show</summary><pre>a &amp; b</pre></details>",
        '<h2 id="s1">Two</h2>', '<h2 id="s2">Three</h2>',
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert all(text.count(tag) == 1 for tag in ("<table>", "<details>", "<figure>", 'class="note"'))


def test_two_parts_need_no_list_of_them(tmp_path):
    sections = [Section(heading="One"), Section(heading="Two")]
    assert "<nav>" not in write_page(tmp_path / "page.html", "T", sections).read_text(encoding="utf-8")
