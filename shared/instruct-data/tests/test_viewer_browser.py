"""The viewer's page in headless Chromium: what a reader sees, clicks and types."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from itertools import pairwise
from urllib.parse import parse_qsl

import pytest
from viewer_chromium import CHROMIUM, Tab

from instruct_data.viewer import write_page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.timeout(300),
]


def records(count=60):
    """Scored, selected and unscored records with ties, in an order that is none of the columns'."""
    rng = random.Random(3)
    rows = []
    for n in range(count):
        score = None if n % 10 == 7 else rng.choice([0.25, 0.5, 0.75, 1.0, rng.random()])
        status = "ok" if score is not None else ("failed", "no_answer")[n % 20 > 9]
        rows.append({
            "id": f"r{n}", "instruction": f"Explain {rng.choice(['fire', 'Water', 'air'])} to {n}",
            "response": f"It is {n}.",
            "ifd_ppl": score, "status": status, "selected": score is not None and score > 0.7,
            "n_cond": rng.randrange(9), "task": rng.choice(["code", "math", "prose"]),
        })  # fmt: skip
    return rows


def by_score(rows, down=True):
    there = [row for row in rows if row["ifd_ppl"] is not None]
    there.sort(key=lambda row: -row["ifd_ppl"] if down else row["ifd_ppl"])
    return there + [row for row in rows if row["ifd_ppl"] is None]


def ids(tab):
    """The ids of all rows that pass, in the order of the list."""
    return tab.js("[...result.view].map(row => valueOf(data.byName.get('id'), row))")


def same_ids(tab, rows):
    assert ids(tab) == [row["id"] for row in rows]
    assert tab.text("#count").split(" ")[0] == str(len(rows)) or len(rows) == 60
    return True


def test_the_list_is_sorted_by_score_and_says_what_was_not_scored(show):
    tab = show(records(), width=1000)
    expected = by_score(records())
    assert ids(tab) == [row["id"] for row in expected]
    assert tab.column(1)[:3] == [f"{row['ifd_ppl']:.4f}" for row in expected[:3]]
    assert tab.column(2)[:3] == ["ok"] * 3
    tab.js("$('list').scrollTop = 1e9")
    tab.wait("document.querySelector('#row-57')")
    assert tab.column(1)[-6:] == ["not scored"] * 6
    assert set(tab.column(2)[-6:]) == {"failed", "no_answer"}
    assert "NaN" not in tab.js("document.body.innerText")
    assert tab.text("#none") == "6 not scored"


@pytest.mark.parametrize("name", ["ifd_ppl", "n_cond", "id", "task", "selected", "instruction", "length:response"])
def test_sorting_by_any_column_both_ways(show, name):
    rows = records()
    tab = show(rows)
    tab.js(f"$('sort').value = {name!r}; $('sort').dispatchEvent(new Event('change'))")
    key = {"id": lambda row: int(row["id"][1:]), "length:response": lambda row: len(row["response"]),
           "selected": lambda row: "yes" if row["selected"] else "no",
           "instruction": lambda row: [int(w) if w.isdigit() else w.lower() for w in row["instruction"].split()],
           "ifd_ppl": lambda row: row["ifd_ppl"]}.get(name, lambda row: row[name])  # fmt: skip
    there = [row for row in rows if key(row) is not None]
    none = [row for row in rows if key(row) is None]
    up, down = sorted(there, key=key) + none, sorted(there, key=key, reverse=True) + none
    numeric = name in ("ifd_ppl", "n_cond", "length:response")
    same_ids(tab, down if numeric else up)
    tab.click("#direction")
    same_ids(tab, up if numeric else down)


def test_a_click_on_a_head_sorts_and_turns_round(show):
    tab = show(records())
    heads = "#columns [role=columnheader]"
    assert tab.js(f"document.querySelector('{heads}').ariaSort") == "descending"
    tab.click(f"{heads}:first-child button")
    same_ids(tab, by_score(records(), down=False))
    assert tab.text(f"{heads}:first-child") == "ifd_ppl↑"


def test_filters_by_range_category_and_brush_agree_with_the_rows(show):
    rows = by_score(records())
    tab = show(records())

    def typed(low, high):
        tab.js(f"$('low').value = '{low}'; $('high').value = '{high}'; $('low').dispatchEvent(new Event('change'))")

    def inside(low, high):
        return [row for row in rows if row["ifd_ppl"] is not None and low <= row["ifd_ppl"] <= high]

    typed(0.5, 0.75)
    same_ids(tab, inside(0.5, 0.75))
    typed("", 0.5)
    same_ids(tab, inside(0, 0.5))
    tab.click("#facets [data-column=task] input[value='1']")
    task = tab.js("data.byName.get('task').names[1]")
    some = [row for row in inside(0, 0.5) if row["task"] == task]
    same_ids(tab, some)
    counts = tab.js(
        "[...document.querySelectorAll('#facets [data-column=task] label')]"
        ".map(({ children: [, name, count] }) => [name.textContent, +count.textContent])"
    )
    assert dict(counts) == dict(Counter(row["task"] for row in inside(0, 0.5)))  # its own choice does not count
    assert tab.js("[...document.querySelectorAll('#chips button')].length") == 3
    tab.click("#chips button:last-child")
    same_ids(tab, rows)
    tab.click("#none")
    same_ids(tab, [row for row in rows if row["ifd_ppl"] is None])
    tab.click("#none")
    tab.click("#facets [data-column=selected] input")
    same_ids(tab, [row for row in rows if row["selected"]])
    tab.click("#facets [data-column=selected] input")
    tab.drag("#plot svg", 0.3, 0.6)
    low, high = tab.js("[+$('low').value, +$('high').value]")
    least, most = rows[len(inside(-1, 9)) - 1]["ifd_ppl"], rows[0]["ifd_ppl"]
    assert (low - least) / (most - least) == pytest.approx(0.3, abs=0.03)
    assert (high - least) / (most - least) == pytest.approx(0.6, abs=0.03)
    same_ids(tab, inside(low, high))
    tab.drag("#plot svg", 0.5, 1.0)
    assert tab.js("$('high').value") == ""  # open where the last bar may hold all beyond
    tab.drag("#plot svg", 0.5, 0.5)
    same_ids(tab, rows)


def test_search_from_the_keyboard(show):
    rows = records()
    rows[5] |= {
        "instruction": "ÉTUDE of Fire",
        "response": [{"from": "human", "value": "שלום"}, {"from": "gpt", "value": "by fire"}],
    }
    tab = show(rows)

    def found(query):
        tab.js("$('list').focus()")
        tab.key("/")  # goes there and chooses what stands there, so that typing replaces it
        tab.type(query)
        tab.wait(f"state.query === {query!r} && !$('count').textContent.startsWith('Searching')")
        return set(ids(tab))

    def holding(word):
        return {row["id"] for row in rows if word in str(row["instruction"]).lower()}

    assert found("WATER") == holding("water")
    tab.key("ArrowDown")  # in the search box: to the first record found
    assert tab.js("document.activeElement.id") == "list"
    tab.wait("document.querySelector('#detail mark')?.textContent === 'Water'")
    assert found("fire explain") == holding("fire") - {"r5"}
    assert found('"by fire"') == found("étude") == found("שלום") == {"r5"}
    assert found("human") == found("r5x") == set()  # keys and names of turns are no text
    assert tab.js("$('empty').hidden") is False
    tab.key("Escape")
    tab.wait("result.view.length === 60")
    assert tab.js("document.activeElement.id") == "search"
    tab.key("Escape")
    assert tab.js("document.activeElement.id") == "list"


def test_arrows_move_through_the_records_and_the_detail_follows(show):
    tab = show(records())
    order = [row["id"] for row in by_score(records())]
    for key, place in [("ArrowDown", 1), ("j", 2), ("ArrowUp", 1), ("End", 59), ("ArrowDown", 59)]:
        tab.key(key)
        tab.wait(f"document.querySelector('#detail .id')?.textContent === {order[place]!r}")
        box, frame = (tab.js(f"(b => [b.top, b.bottom])({e}.getBoundingClientRect())") for e in
                      ("document.querySelector('.row.active')", "$('list')"))  # fmt: skip
        assert frame[0] <= box[0] < box[1] <= frame[1] + 1
    tab.key("Escape")
    assert tab.js("$('detail').hidden") is True
    assert tab.js("location.hash") == ""


HOSTILE = (
    "</script><img src=x onerror='window.pwned=1'><script>pwned=1</script> & &amp; \u2028 \ud800 \u202eabc\n\n  end"
)


@pytest.mark.parametrize("width", [400, 1400])
def test_a_record_is_shown_as_it_is_whatever_its_text(show, width):
    turns = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "مرحبا"}]
    row = {"id": HOSTILE, "instruction": HOSTILE, "response": turns, "history": [[HOSTILE, "b"]],
           "tree": {"<b>": [1, None]}, "ifd_ppl": None,
           "status": "<i>no</i>", "__proto__": "kept", "n": 0.1 + 0.2}  # fmt: skip
    tab = show([row], hash="#row=0", title=HOSTILE, summary={HOSTILE: HOSTILE, "n": 12345}, width=width)
    shown = HOSTILE.replace("\ud800", "\ufffd")
    assert tab.text("h1") == shown
    words = tab.js("[...document.querySelectorAll('#detail .words')].map(e => e.textContent)")
    assert [w.encode("utf-16", "surrogatepass") for w in words] == [
        w.encode("utf-16", "surrogatepass") for w in (HOSTILE, HOSTILE, "مرحبا", HOSTILE, HOSTILE, "b")
    ]
    assert json.loads(tab.text("#detail pre")) == {"<b>": [1, None]}
    side = dict(
        tab.js("[...document.querySelectorAll('#detail tr')].map(r => [...r.children].map(c => c.textContent))")
    )
    assert {k: side[k] for k in ("ifd_ppl", "status", "__proto__", "n")} == {
        "ifd_ppl": "not scored", "status": "<i>no</i>", "__proto__": "kept", "n": "0.3000",
    }  # fmt: skip
    assert tab.js("[...document.querySelectorAll('#detail tr bdi')].map(e => e.title)")[-1] == "0.30000000000000004"
    assert tab.js("window.pwned ?? document.querySelector('img')") is None
    arabic = "getComputedStyle([...document.querySelectorAll('#detail .words')][2]).direction"
    assert tab.js(arabic) == "rtl"


def test_the_address_keeps_the_choices_and_survives_nonsense(show):
    query = "r.ifd_ppl=0.25..0.75&f.status=ok&f.task=code&f.task=math&q=explain&sort=%2Bn_cond&row=3&plot=n_cond"
    tab = show(records(), hash=f"#{query}")
    some = [r for r in records() if r["status"] == "ok" and r["task"] != "prose" and 0.25 <= r["ifd_ppl"] <= 0.75]
    same_ids(tab, sorted(some, key=lambda row: row["n_cond"]))
    assert tab.text("#detail .id") == "r3"
    tab.js("writeHash()")
    assert dict(parse_qsl(query)) == dict(parse_qsl(tab.js("location.hash.slice(1)")))
    tab.js("location.hash = '#r.gone=1..2&f.status=gone&row=9999&sort=-gone&columns=[&r.ifd_ppl=x..y&%E0'")
    tab.wait("result.view.length === 60")
    same_ids(tab, by_score(records()))


def test_the_filtered_list_comes_down_as_jsonl(show, browser, tmp_path):
    rows = [*records(), {"ifd_ppl": 0.5, "response": ["\ud800", {"a": None}], "extra": None}]
    tab = show(rows, hash="#r.ifd_ppl=0.5..", title="Été: 1/2")
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.click("#download")
    expected = [row for row in by_score(rows) if row["ifd_ppl"] is not None and row["ifd_ppl"] >= 0.5]
    file = tmp_path / f"été-1-2-{len(expected)}.jsonl"
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == expected


def kept(a, b):
    """Number of words in the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_word_diff_is_lossless_and_shortest(show):
    rng = random.Random(1)
    texts = [
        [
            "".join(rng.choices(["a", "b", "cc", ",", " ", "\n", "漢", "字", "\ud800"], k=rng.randrange(25)))
            for _ in "ab"
        ]
        for _ in range(300)
    ]
    texts += [["", ""], ["same text", "same text"], ["", "new"], ["漢字かな", "漢字カナ"]]
    tab = show([])
    code = """.map(([before, after]) => {
      const [a, b] = [before, after].map(text => text.match(WORDS) || []);
      return [wordDiff(before, after), a, b, shortest(a, b).filter(({ kind }) => kind === "same").length];
    })"""
    for (before, after), (pieces, a, b, same) in zip(texts, tab.js(json.dumps(texts) + code)):
        assert "".join(piece["text"] for piece in pieces if piece["kind"] != "new") == before
        assert "".join(piece["text"] for piece in pieces if piece["kind"] != "old") == after
        assert all(one["kind"] != two["kind"] for one, two in pairwise(pieces))
        assert same == kept(a, b)
    far = "wordDiff('a '.repeat(9000) + 'a', 'b '.repeat(9000) + 'b').map(piece => piece.kind)"
    assert tab.js(far) == ["old", "new"]


def test_a_change_is_marked_beside_and_by_itself(show):
    tab = show(
        [{"before": "the old answer", "after": "the new answer", "ifd_ppl": 1}, {"before": "same", "after": "same"}]
    )
    pieces = "[...document.querySelectorAll('#detail del, #detail ins')].map(e => [e.tagName, e.textContent])"
    assert tab.js(pieces) == [["DEL", "old"], ["INS", "new"]]
    views = {}
    for view in ("marked", "beside", "before", "after"):
        tab.click(f"#detail [data-view={view}]")
        views[view] = tab.js("[...document.querySelectorAll('#detail .words')].map(e => e.textContent)")
    old, new = "the old answer", "the new answer"
    assert views == {"marked": ["the oldnew answer"], "beside": [old, new], "before": [old], "after": [new]}
    tab.click("#detail [data-view=marked]")
    tab.key("ArrowDown")
    tab.wait("document.querySelector('#detail .body .soft')?.textContent === 'Unchanged.'")


@pytest.mark.parametrize(("width", "columns"), [(400, 1), (900, 2), (1600, 3)])
def test_nothing_runs_out_of_the_window(show, width, columns):
    tab = show(records(), width=width, summary={"model": "m" * 300, "settings": {"a": [1, 2]}}, title="t" * 200)
    parts = "[...document.querySelectorAll('header, #tools > *, main > *')]"
    inside = f"{parts}.every(e => e.getBoundingClientRect().right <= innerWidth + 1)"
    assert tab.js(f"document.documentElement.scrollWidth <= innerWidth && {inside}")
    apart = """[...document.querySelectorAll('#tools > *')].map(e => e.getBoundingClientRect()).filter(b => b.width)
      .every((a, i, all) => all.slice(i + 1).every(b => a.right <= b.left || b.right <= a.left || a.bottom <= b.top))"""
    assert tab.js(apart)
    assert tab.js("$('sort').getBoundingClientRect().width") > 80
    below = "document.querySelector('.row .text').offsetTop - document.querySelector('.row .score').offsetTop"
    assert (tab.js(below) > 15) == (width == 400)  # two lines a record where it is narrow
    seen = "[...document.querySelectorAll('main > *')].filter(e => e.getClientRects().length).length"
    assert tab.js(seen) == columns
    tab.click(".row")
    tab.wait("document.querySelector('#detail .words')")
    covers = tab.js("document.elementFromPoint(innerWidth - 30, 400).closest('#detail') !== null")
    assert covers
    tab.click("#detail header button")
    assert tab.js("document.elementFromPoint(innerWidth - 30, 400).closest('#list') !== null")


def test_columns_can_be_chosen(show):
    tab = show(records())
    tab.js("$('choose').open = true")
    tab.wait("document.querySelector('#choose label')")
    tab.js("[...document.querySelectorAll('#choose label')].find(l => l.textContent === 'n_cond').click()")
    heads = tab.js("[...document.querySelectorAll('#columns button')].map(b => b.firstChild.textContent)")
    assert heads == ["ifd_ppl", "status", "selected", "n_cond", "instruction"]
    assert tab.column(4)[:2] == [str(row["n_cond"]) for row in by_score(records())[:2]]


def test_an_empty_result_and_one_without_a_score(show):
    tab = show([])
    assert tab.text("#count") == "0 records"
    assert tab.js("$('download').disabled") is True
    tab = show([{"instruction": "a", "response": "b"}] * 3, score=None)
    assert tab.text("#count") == "3 records"
    assert tab.column(1) == ["a"] * 3


def test_an_older_browser_unpacks_too_or_says_what_it_lacks(show):
    assert ids(show(records(), before="delete Uint8Array.fromBase64")) == [row["id"] for row in by_score(records())]
    tab = show(records(), before="delete window.DecompressionStream")
    assert tab.text("#count").startswith("The page could not be read: this browser cannot unpack the data")


@pytest.mark.slow
def test_fifty_thousand_records_open_in_under_two_seconds(browser, tmp_path):
    """From navigation to the first rows and the first record's text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 10))) for _ in range(5000)]

    def rows():
        for n in range(50_000):
            score = None if n % 50 == 0 else rng.gauss(0.8, 0.2)
            yield {"id": f"r{n}", "instruction": " ".join(rng.choices(words, k=12)), "input": "", "ifd_ppl": score,
                   "response": " ".join(rng.choices(words, k=100)), "ifd_loss": rng.random(), "n_cond": n % 500,
                   "status": "ok" if score else "failed", "selected": bool(score and 0.9 < score < 1)}  # fmt: skip

    path = write_page(rows(), tmp_path / "large.html", title="Fifty thousand")
    times = []
    for _ in range(3):
        tab = Tab(browser, path)
        times.append(tab.js("Number(document.body.dataset.ready)"))
        assert tab.text("#count") == "50\u202f000 records"
        assert 15 < len(tab.column(1)) < 60  # only rows in sight exist
        assert tab.text("#detail .words")
        tab.js("$('list').scrollTop = 1e9")
        tab.wait("document.querySelector('.row:last-child').ariaRowIndex === '50001'")
        assert tab.js("search('zz', () => {}).then(done => done && result.hits.length)") == 50_000
        assert tab.errors() == []
        tab.close()
    print(f"{path.stat().st_size / 1e6:.0f} MB opened in {times} ms")
    assert min(times) < 2000, times
