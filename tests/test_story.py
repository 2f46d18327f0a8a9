"""The naive model of the story: the real model's logits, in sixty lines."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from folo_lib import LLMEngine, SamplingParams, bundled_model_path, load_model
from folo_lib.course import story as course
from folo_lib.course.story import NUM_NEW_TOKENS, STORY, Story, continue_story, forward

ROOT = Path(__file__).resolve().parent.parent

# The story, and a longer text in which every sentence must see far back.
TEXTS = (
    STORY,
    "Once upon a time there was a girl named Mira. " * 8 + STORY,
)


@pytest.fixture(scope="module")
def story() -> Story:
    return course.load_story()


@pytest.fixture(scope="module")
def hugging_face() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        bundled_model_path(), dtype=torch.float32, attn_implementation="eager"
    )


def compare(logits: Tensor, reference: Tensor) -> None:
    tolerance = max(1e-5, 1e-5 * float(reference.std()))
    torch.testing.assert_close(logits, reference, atol=tolerance, rtol=0)
    assert torch.equal(logits.argmax(-1), reference.argmax(-1))


class TestForward:
    @pytest.mark.parametrize("text", TEXTS, ids=["story", "longer"])
    @torch.inference_mode()
    def test_has_the_logits_of_hugging_face_and_of_the_engine(
        self, text: str, story: Story, hugging_face: Any
    ) -> None:
        ids = story.tokenizer.encode(text).ids
        logits = forward(ids, story)
        assert logits.shape == (len(ids), story.config.vocab_size)
        batch = torch.tensor([ids])
        compare(logits, hugging_face(batch).logits[0])
        ours = load_model(bundled_model_path(), device="cpu", dtype=torch.float32)
        compare(logits, ours.compute_logits(ours(batch))[0])

    @torch.inference_mode()
    def test_every_part_can_be_replaced(self, story: Story) -> None:
        calls: Counter[str] = Counter()

        def counted(name: str) -> Any:
            part = getattr(course, name)

            def call(*args: Any) -> Any:
                calls[name] += 1
                return part(*args)

            return call

        names = ("norm", "rotate", "attend", "mlp", "choose")
        text = continue_story(story, **{name: counted(name) for name in names})
        assert text == continue_story(story)
        layers = story.config.num_hidden_layers
        per_step = {"rotate": 2 * layers, "attend": layers, "mlp": layers, "choose": 1}
        per_step["norm"] = 4 * layers + 1
        assert calls == {name: NUM_NEW_TOKENS * n for name, n in per_step.items()}

    def test_the_whole_model_and_the_writing_can_be_replaced(
        self, story: Story
    ) -> None:
        """By a model of one idea, and a writer who counts."""
        ids = iter(range(10, 10 + NUM_NEW_TOKENS))

        def next_id(ids_so_far: list[int], _: Story) -> Tensor:
            return torch.eye(story.config.vocab_size)[[next(ids)]]

        text = continue_story(story, forward=next_id, write=lambda ids: str(ids[-2:]))
        assert text == str([8 + NUM_NEW_TOKENS, 9 + NUM_NEW_TOKENS])

    def test_a_part_that_is_not_one_is_refused(self, story: Story) -> None:
        with pytest.raises(TypeError, match="atend"):
            continue_story(story, atend=course.attend)


class TestContinueStory:
    def test_is_what_hugging_face_generates(self, hugging_face: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        ids = tokenizer(STORY, return_tensors="pt").input_ids
        output = hugging_face.generate(
            ids, do_sample=False, max_new_tokens=NUM_NEW_TOKENS
        )
        assert continue_story() == tokenizer.decode(output[0])

    def test_is_what_the_engine_generates(self) -> None:
        engine = LLMEngine(device="cpu", dtype="float32")
        params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS)
        (output,) = engine.generate([STORY], params, use_tqdm=False)
        assert continue_story() == STORY + output.outputs[0].text

    def test_ends_with_a_sentence_and_names_the_kite(self, story: Story) -> None:
        """What the pages say about it."""
        text = continue_story(story)
        assert text.startswith(STORY + " kite ")
        assert text.endswith(".")

    def test_tokens_are_the_text(self, story: Story) -> None:
        assert "".join(story.tokens) == STORY
        assert len(story.tokens) == len(story.ids) == 12


def defined_in(source: str) -> dict[str, str]:
    """The functions of a text, as code without types and docstrings."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
            found[node.name] = ast.unparse(node)
    return found


def test_page_00_shows_the_same_code() -> None:
    cells = nbformat.read(ROOT / "notebooks/00_tour.ipynb", as_version=4).cells
    shown: dict[str, str] = {}
    for cell in cells:
        if cell.cell_type == "code" and cell.id != "install":
            shown |= defined_in(cell.source)
    ours = defined_in(Path(course.__file__).read_text(encoding="utf-8"))
    names = {"norm", "rotate", "attend", "mlp", "choose", "weights_of", "forward"}
    assert {name: shown[name] for name in names} == {name: ours[name] for name in names}
    lines = sum(len(shown[name].split("\n")) for name in names)
    assert 45 <= lines <= 65, "the page says sixty"
