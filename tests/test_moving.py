"""Figures that move without a kernel: what is drawn, and what is left without the script."""

from __future__ import annotations

import json
import re
import struct
from xml.etree import ElementTree

import pytest

from folo_lib.course.figures import CACHE, DECODE, PREFILL
from folo_lib.course.moving import MovingFigure, Piece, State, move_requests

STATES = [
    State([Piece("a", 0, 0, text="A <1>", look=PREFILL)], "A </script> waits & waits."),
    State([Piece("a", 2, 1, text="A <1>", look=PREFILL)], "A moves."),
    State(
        [Piece("a", 2, 1, text="A", look=DECODE), Piece("b", 0, 0, look=CACHE)],
        "B comes.",
    ),
]


def make_figure() -> MovingFigure:
    return MovingFigure(STATES, (4, 2), still=[Piece("head", 0, 0, text="waiting")])


def read(html: str) -> tuple[ElementTree.Element, str]:
    """What is left where scripts are taken out, and the script."""
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script
    rest = html.replace(script[0], "").replace(" hidden>", ' hidden="">')
    rest = re.sub(r"<(input [^>]*)>", r"<\1/>", rest)
    return ElementTree.fromstring(rest), script[1]


def test_without_the_script_the_first_state_is_seen() -> None:
    root, _ = read(make_figure().to_html())
    groups = root.findall("svg/g")
    shown = ["".join(g.itertext()) for g in groups if g.get("opacity") != "0"]
    assert shown == ["waiting", "A <1>"]
    assert len(groups) == 4  # the head, A, A that looks otherwise, B
    assert root.findall("p")[0].text == STATES[0].caption
    assert root.findall("p")[1].get("hidden") == ""


def test_the_script_knows_all_places() -> None:
    _, script = read(make_figure().to_html())
    found = re.search(r"const moments = (.*);\n", script)
    assert found
    moments = json.loads(found[1])
    assert [moment["says"] for moment in moments] == [s.caption for s in STATES]
    assert [moment["at"] for moment in moments] == [
        {"0": [0, 0]},
        {"0": [88, 44]},
        {"1": [88, 44], "2": [0, 0]},
    ]


def test_nothing_is_fetched() -> None:
    html = make_figure().to_html()
    assert not re.search(r"https?:|src=|href=|import|fetch", html)


def test_hatches_belong_to_the_figure() -> None:
    html = make_figure().to_html()
    defined = set(re.findall(r'<pattern id="([^"]+)"', html))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= defined


def test_the_same_states_give_the_same_html_and_others_another_name() -> None:
    html = make_figure().to_html()
    assert make_figure().to_html() == html
    other = MovingFigure(STATES[:2], (4, 2)).to_html()
    names = [re.findall(r'id="(folo-\w+)"', text) for text in (html, other)]
    assert names[0] != names[1]


def test_a_picture_for_where_html_is_not_shown() -> None:
    bundle = make_figure()._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    width, height = struct.unpack(">II", bundle["image/png"][16:24])
    assert (width, height) == (880, 440)
    assert bundle["text/plain"] == "a figure of 3 states, which moves in JupyterLab"


def test_bad_states() -> None:
    with pytest.raises(ValueError, match="at least one state"):
        MovingFigure([], (1, 1))
    twice = State([Piece("a", 0, 0), Piece("a", 1, 0)], "Twice.")
    with pytest.raises(ValueError, match=r"'Twice.' these keys come twice: \['a'\]"):
        MovingFigure([twice], (1, 1))


def test_requests_wait_run_and_are_done() -> None:
    plans = [{"A": 4}, {"A": 1}, {"A": 1, "B": 3}, {"B": 1}]
    figure = move_requests(plans, {"A": 0, "B": 1})
    columns = [{p.key: p.x for p in state.pieces} for state in figure.states]
    assert [at.get("A") for at in columns] == [3, 3, 3, 14]
    assert [at.get("B") for at in columns] == [None, 0.5, 3, 3]
    looks = [{p.key: p.look for p in state.pieces} for state in figure.states]
    assert looks[0]["A runs"] == PREFILL
    assert looks[1]["A runs"] == DECODE
    assert figure.states[1].caption == "Step 2 runs 1 token: A 1. Waiting: B."


def test_another_state_may_be_pictured() -> None:
    figure = MovingFigure(
        [
            State([Piece("a", 0, 0, text="A"), Piece("b", 1, 0, text="B")], "first"),
            State([Piece("a", 0, 2, text="A")], "second"),
        ],
        (3, 3),
        pictured=-1,
    )
    page = figure.to_html()
    assert '<p class="says" aria-live="polite">second</p>' in page
    assert 'data-k="0" transform="translate(0 88)">' in page
    assert 'data-k="1" transform="translate(44 0)" opacity="0"' in page
