"""Claims: three-valued logic, errors of differences, and every function, against plain Python and numpy."""

from __future__ import annotations

import math
import re

import demo
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper_tables import Quantity, TableError, read_table
from paper_tables.claims import HELD, NOT_HELD, NOT_MEASURED, judge
from paper_tables.quantity import merge
from paper_tables.table import Claim

CELLS = {
    ("baseline", "bits"): Quantity(1.0, 0.01), ("attention-2", "bits"): Quantity(1.2, 0.02),
    ("attention-4", "bits"): Quantity(1.5, 0.03), ("mlp-2", "bits"): Quantity(1.4), ("mlp-4", "bits"): Quantity(1.3),
    ("baseline", "accuracy"): Quantity(0.0, 0.5), ("attention-2", "kv"): Quantity(0.875),
}  # fmt: skip
YES, NO, UNKNOWN = 'bits["baseline"] < 2', 'bits["baseline"] > 2', 'kv["baseline"] > 2'


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("claims") / "main.yaml"
    file.write_text(demo.MAIN)
    return read_table(file, "demo")


@pytest.fixture
def verdict(table):
    def judged(holds: str, cells=CELLS, scale: str = "quick", **vary):
        return judge(table, Claim("c", "text", holds, vary), scale, lambda row, column: cells.get((row, column)))

    return judged


TRUTH = {True: YES, False: NO, None: UNKNOWN}
STATUS = {True: HELD, False: NOT_HELD, None: NOT_MEASURED}


def kleene_and(a, b):
    return False if a is False or b is False else None if a is None or b is None else True


@pytest.mark.parametrize("a", TRUTH)
@pytest.mark.parametrize("b", TRUTH)
def test_and_or_not_follow_three_valued_logic(verdict, a, b):
    negated = {True: False, False: True, None: None}
    assert verdict(f"{TRUTH[a]} and {TRUTH[b]}").status == STATUS[kleene_and(a, b)]
    either = negated[kleene_and(negated[a], negated[b])]
    assert verdict(f"{TRUTH[a]} or {TRUTH[b]}").status == STATUS[either]
    assert verdict(f"not ({TRUTH[a]} or {TRUTH[b]})").status == STATUS[negated[either]]


formulas = st.recursive(
    st.sampled_from(list(TRUTH)),
    lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner) | st.tuples(st.just("not"), inner),
    max_leaves=6,
)


def write(formula) -> str:
    if not isinstance(formula, tuple):
        return TRUTH[formula]
    return (
        f"not ({write(formula[1])})"
        if formula[0] == "not"
        else f"(({write(formula[1])}) {formula[0]} " + (f"({write(formula[2])}))")
    )


def value(formula):
    if not isinstance(formula, tuple):
        return formula
    parts = [value(part) for part in formula[1:]]
    if formula[0] == "not":
        return None if parts[0] is None else not parts[0]
    decisive = formula[0] == "or"
    return decisive if decisive in parts else None if None in parts else not decisive


@given(formula=formulas)
def test_any_formula_has_the_value_of_kleene(table, formula):
    found = judge(table, Claim("c", "", write(formula)), "quick", lambda row, column: CELLS.get((row, column)))
    assert found.status == STATUS[value(formula)]


@pytest.mark.parametrize(
    ("holds", "status"),
    [
        ('bits["attention-2"] < bits["attention-4"]', HELD),
        ('bits["attention-2"] == 1.2 and bits["attention-2"] != 1.3', HELD),
        ('1 <= bits["baseline"] <= 1', HELD),
        ('1.1 < bits["baseline"] < kv["baseline"]', NOT_HELD),  # a chain is an `and`: its first part decides
        ('0.9 < bits["baseline"] < kv["baseline"]', NOT_MEASURED),
        ('increasing(bits["attention-*"])', HELD),
        ('decreasing(bits["attention-*"])', NOT_HELD),
        ('not increasing(bits["mlp-?"])', HELD),
        ("increasing(1, 1)", NOT_HELD),  # strictly
        ('increasing(kv["attention-*"])', NOT_MEASURED),  # one of the pattern's cells is missing
        ('increasing(bits["attention-2"])', NOT_MEASURED),  # one figure has no order
        ('max(bits["attention-*"]) == 1.5 and min(bits["attention-*"], 1.1) == 1.1', HELD),
        ('abs(mean(bits["mlp-*"]) - 1.35) < 1e-9 and abs(sum(bits["mlp-*"]) - 2.7) < 1e-9', HELD),
        ("abs(sqrt(16) - 4) + abs(log(exp(2)) - 2) + abs(-3 + 2 ** 2 - 1) < 1e-12", HELD),
        ('1 / accuracy["baseline"] > 0', NOT_MEASURED),  # division by zero
        ('log(accuracy["baseline"]) > 0 and bits["baseline"] > 2', NOT_HELD),  # and yet something false decides
        ("layers == 16", HELD),  # a numeric setting of the scale
        ('bits["attention-6"] > 0', NOT_MEASURED),  # a row of another scale
        ('bits["none-*"] > 0', NOT_MEASURED),
    ],
)
def test_what_an_expression_says(verdict, holds, status):
    assert verdict(holds).status == status


def test_a_claim_must_hold_for_every_value_and_one_false_decides(verdict):
    better = 'bits["attention-{n}"] < bits["mlp-{n}"]'
    found = verdict(better, n="$n")  # 1.2 < 1.4, but not 1.5 < 1.3
    assert found.status == NOT_HELD
    assert found.detail == "n=4: 1.5 < 1.3 (held: n=2: 1.2 < 1.4)"
    without_four = {k: q for k, q in CELLS.items() if k[0] != "mlp-4"}
    found = verdict(better, without_four, n="$n")
    assert (found.status, found.detail) == (NOT_MEASURED, 'n=4: no bits["mlp-4"]')
    assert verdict(better, n=[2]).status == HELD
    assert verdict(better, {}, n="$n").status == NOT_MEASURED
    assert verdict(better, m="$m").detail == "not asked at this scale"


def test_two_lists_are_multiplied_out(verdict):
    found = verdict('bits["{kind}-{n}"] > 1.25', kind=["attention", "mlp"], n="$n")
    assert found.detail.startswith("kind=attention, n=2: 1.2 > 1.25")
    assert found.detail.count(">") == 4


def test_an_empty_value_is_not_named(verdict):
    found = verdict('bits["{kind}attention-2"] > 1.1', kind=["", "no-"], n=[2])
    assert (found.status, found.detail) == (NOT_MEASURED, 'kind=no-, n=2: no bits["no-attention-2"]')
    assert verdict('bits["{kind}attention-2"] > 1.1', kind=[""], n=[2]).detail == "n=2: 1.2 > 1.1"


samples = st.lists(st.floats(0, 4).map(lambda x: round(x, 3)), min_size=3, max_size=3)


@given(a=samples, b=samples)
def test_the_allowance_for_chance_is_that_of_the_paired_differences(table, a, b):
    cells = {
        ("attention-2", "bits"): merge({s: (v, 9.0) for s, v in enumerate(a)}),
        ("baseline", "bits"): merge({s: (v, 9.0) for s, v in enumerate(b)}),
    }
    if len(set(a)) == len(set(b)) == 1:  # then seeds say nothing, and the metric's own errors add in quadrature
        oracle = math.hypot(9.0, 9.0)
    else:
        oracle = np.std(np.array(a) - np.array(b), ddof=1) / math.sqrt(3)
    difference = 'se(bits["attention-2"] - bits["baseline"])'
    claim = Claim("c", "", f"abs({difference} - {float(oracle)!r}) < 1e-6")
    assert judge(table, claim, "quick", lambda row, column: cells.get((row, column))).status == HELD


def test_numbers_of_errors_are_plain_numbers(verdict):
    assert verdict('se(bits["attention-2"]) == 0.02 and se(se(bits["attention-2"])) == 0').status == HELD
    assert verdict("se(3 * 4) == 0").status == HELD


REFUSED = {
    'bits["baseline"]': "is neither true nor false; compare it with something",
    'se(bits["baseline"])': "is neither true nor false",
    'bits["*"] > 1': "is a list; put it into min, max, mean",
    "bits > 1": '`bits` is a column; a cell is bits["row"]',
    "increasing(1, 2) > 0": "is true or false, not a figure",
    "abs(1, 2) > 0": "abs() takes one figure, found 2",
    "max() > 0": "figures or a list of them are expected",
    "max(1, key=2) > 0": "figures or a list of them are expected",
    "model > 0": "unknown name 'model'",  # a setting, but no number
    "True > 0": "numbers only",
    'bits["baseline"] in 3': "compare by < <= > >= == !=",
    "__import__('os').getpid() > 0": "is not part of the language of claims",
    "(lambda: 1)() > 0": "is not part of the language of claims",
    '"a" < "b"': "is not part of the language of claims",
    'bits["base{}"] > 1': "names",
    'bits["base{n.real.x}"] > 1': "names 'n.real.x'",
    'bits["attnetion-*"] > 1': "no row 'attnetion-*' at any scale",
    '1 / (bits["baseline"] - 1) > abs(nosuch["x"])': "no column 'nosuch'",  # behind what the stand-ins cannot compute
    f"{YES} or bits['nosuch'] > 1": "no row 'nosuch' at any scale",  # behind what is decided
    "1 < 2 < lyers": "unknown name 'lyers'; did you mean 'layers'?",
    "1 <": "not an expression",
}


@pytest.mark.parametrize("holds", REFUSED)
def test_what_is_no_claim_is_refused_when_the_table_is_read(tmp_path, holds):
    quoted = "'" + holds.replace("'", "''") + "'"
    text = demo.MAIN.replace("""'accuracy["huge"] > 95'""", quoted)
    (tmp_path / "main.yaml").write_text(text)
    with pytest.raises(TableError, match=re.escape(REFUSED[holds])) as caught:
        read_table(tmp_path / "main.yaml", "demo")
    line = text[: text.index("id: large")].count("\n") + 1
    assert str(caught.value).startswith(f"{tmp_path / 'main.yaml'}:{line}: claim large: ")


def test_the_name_of_a_claim_in_its_own_error_hides_no_place(tmp_path):
    # the id of the claim is the name that its error proposes
    text = demo.MAIN.replace("id: large,", "id: accuracy,").replace(
        """'accuracy["huge"] > 95'""", """'acuracy["huge"] > 9'"""
    )
    (tmp_path / "main.yaml").write_text(text)
    with pytest.raises(
        TableError, match=r"main\.yaml:\d+: claim accuracy: no column 'acuracy'; did you mean 'accuracy'"
    ):
        read_table(tmp_path / "main.yaml", "demo")
