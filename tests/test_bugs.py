"""The bug laboratory: every bug does what it says, where it says, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from folo_lib.course import story as plain
from folo_lib.course.story import continue_story, load_story
from folo_lib.course.widgets import BUGS, bug_laboratory
from folo_lib.course.widgets.bugs import (
    NOTHING,
    bug_figure,
    examine_bug,
    find_difference,
    measure_errors,
)

ALL = [(page, i + 1) for page, bugs in BUGS.items() for i in range(len(bugs))]
HARMLESS = {"positions begin at 1", "eps is forgotten"}


def test_the_right_model_has_no_symptom() -> None:
    right, same = examine_bug("01", 0)
    assert load_story().tokenizer.decode(right.ids) == continue_story()
    assert float(measure_errors(right, same).max()) == 0
    assert len(right.streams) == 1 + 2 * load_story().config.num_hidden_layers


def test_the_parts_are_right_but_for_their_bug() -> None:
    from folo_lib.course.widgets.bugs import (
        attend_with,
        mlp_with,
        norm_with,
        read_cache_with,
        root_mean_square,
        rotate_with,
    )

    right = examine_bug("01", 0)[0]
    for parts in (
        attend_with(),
        norm_with(root_mean_square),
        mlp_with(torch.nn.functional.silu),
        rotate_with(),
        read_cache_with(),
    ):
        told = plain.forward(right.ids, load_story(), **parts)  # type: ignore[arg-type]
        wanted = plain.forward(right.ids, load_story())
        torch.testing.assert_close(told, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("page", "number"), ALL)
def test_a_bug_begins_where_it_is_planted(page: str, number: int) -> None:
    bug = BUGS[page][number - 1]
    right, wrong = examine_bug(page, number)
    errors = measure_errors(right, wrong).tolist()
    begins = next((i for i, error in enumerate(errors) if error > NOTHING), None)
    if bug.name == "positions begin at 1":
        assert begins is None
    else:
        assert begins == (2 if "mlp" in bug.plant() else 1)
    if bug.name in HARMLESS:
        assert find_difference(right.ids, wrong.ids) is None and max(errors) < 1e-3
    else:
        assert max(errors) > 0.03
    prompt = len(load_story().ids)
    if page == "06":  # the prompt is read as it should be
        assert wrong.ids[prompt] == right.ids[prompt]
        torch.testing.assert_close(
            wrong.streams[:, :prompt], right.streams[:, :prompt], atol=1e-4, rtol=1e-4
        )


def test_the_name_is_hidden_until_it_is_asked_for() -> None:
    widget = bug_laboratory("03")
    name = BUGS["03"][0].name
    assert name not in widget.alt_text() and "Which bug is it?" in widget.alt_text()
    first = widget.picture()
    widget.controls["named"].value = True
    assert name in widget.alt_text() and widget.picture() != first
    widget.controls["number"].value = 0
    assert widget.alt_text().startswith("This is the right model.")


@pytest.mark.parametrize("page", BUGS)
def test_every_story_has_room(page: str) -> None:
    for number in range(len(BUGS[page]) + 1):
        figure, sentence = bug_figure(page, number, named=True)
        assert len(sentence) < 420
        texts = figure.axes[0].texts
        assert all(text.get_text().count("\n") < 2 for text in texts)
        width, height = figure.get_size_inches()
        assert width <= 8 and height < 5


def test_a_page_without_bugs() -> None:
    with pytest.raises(
        ValueError, match=r"no bugs for page '02': choose one of \['01'"
    ):
        bug_laboratory("02")


def test_what_the_pages_say_of_the_story() -> None:
    """Four of five on page 01, four of six on 03, all but bug 3 on 04, the last on 06."""
    same = {
        page: [
            number
            for number in range(1, len(bugs) + 1)
            if find_difference(*(x.ids for x in examine_bug(page, number))) is None
        ]
        for page, bugs in BUGS.items()
    }
    assert same == {"01": [1], "03": [4, 6], "04": [3], "06": [5]}
