"""The bundled checkpoint and the program that made it: facts, figures, text, corpus."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from folo_lib import bundled_model_path, load_model
from folo_lib.checkpoint import load_tokenizer
from folo_lib.qwen3 import Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

from tiny_model import corpus, evaluate, train  # noqa: E402
from tiny_model.glossary import GLOSSARY  # noqa: E402
from tiny_model.small_talk import SMALL_TALK  # noqa: E402
from tiny_model.stories import Story, is_held_out, write_story  # noqa: E402
from tiny_model.story_checker import (  # noqa: E402
    PLOT_SIGNS,
    find_problems,
    split_sentences,
)
from tiny_model.tokenizer import train_tokenizer  # noqa: E402

FOLDER = bundled_model_path()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
USER = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.S)
ASSISTANT = "<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def writer() -> evaluate.Writer:
    return evaluate.Writer(FOLDER)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return load_model(FOLDER, device="cpu", use_tqdm=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(FOLDER)


TOKENIZER = AutoTokenizer.from_pretrained(
    FOLDER
)  # for hypothesis, which wants no fixture


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A story, an answer, an answer after a thought, a copy, and text unlike all of it."""

    def ask(question: str, **options: bool) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        assert isinstance(text, str)
        return text

    return [
        "Once upon a time",
        ask("What is the KV cache?"),
        ask("Explain prefill.", enable_thinking=True),
        ask("Repeat these words: river lamp stone green boat the"),
        "naïve 漢字 🦊\n\n\t<think>",
    ]


class TestCheckpoint:
    def test_is_at_most_ten_megabytes(self) -> None:
        size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
        assert 10**6 < size <= 10 * 10**6

    def test_config(self) -> None:
        config = AutoConfig.from_pretrained(FOLDER)
        assert isinstance(config, Qwen3Config)
        assert config.model_type == "qwen3"
        assert config.num_attention_heads > config.num_key_value_heads > 1
        assert config.head_dim != config.hidden_size / config.num_attention_heads
        assert config.tie_word_embeddings
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
        assert config.max_position_embeddings == 4096
        assert config.dtype == torch.bfloat16
        assert config.vocab_size == len(TOKENIZER)
        stored = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
        assert stored["architectures"] == ["Qwen3ForCausalLM"]

    def test_is_what_the_program_makes(self) -> None:
        """Sizes that `tiny_config` gives, but for the special tokens that `save` adds."""
        ours = train.tiny_config(len(TOKENIZER)).to_dict()
        stored = AutoConfig.from_pretrained(FOLDER).to_dict()
        passing = {"bos_token_id", "eos_token_id", "pad_token_id"}
        passing |= {"_name_or_path", "transformers_version", "dtype"}
        differing = {k for k in ours | stored if ours.get(k) != stored.get(k)}
        assert differing <= passing

    def test_weights_are_bfloat16_trained_and_finite(self) -> None:
        with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert "lm_head.weight" not in weights
        for name, weight in weights.items():
            assert weight.dtype == torch.bfloat16, name
            assert weight.isfinite().all(), name
            assert weight.float().std() > 0, f"{name} was not trained"

    def test_holds_no_pickle_and_no_code(self) -> None:
        allowed = {".json", ".jinja", ".safetensors", ".md"}
        assert {path.suffix for path in FOLDER.iterdir()} <= allowed

    def test_logits_equal_hugging_face(
        self, writer: evaluate.Writer, model: Qwen3ForCausalLM
    ) -> None:
        for prompt in prompts(writer.tokenizer):
            ids = writer.tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                ours = model.compute_logits(model(ids))
                theirs = writer.model(ids).logits
            bound = max(1e-5, 1e-5 * theirs.std().item())
            assert (ours - theirs).abs().max().item() <= bound

    def test_greedy_text_equals_hugging_face(
        self, writer: evaluate.Writer, model: Qwen3ForCausalLM
    ) -> None:
        ends = writer.ends
        for prompt in prompts(writer.tokenizer):
            ids = writer.tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                output = writer.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=60,
                    do_sample=False,
                )
                theirs = output[0, ids.shape[1] :].tolist()
                ours: list[int] = []
                while len(ours) < 60 and (not ours or ours[-1] not in ends):
                    so_far = torch.cat([ids, torch.tensor([ours]).long()], dim=1)
                    logits = model.compute_logits(model(so_far)[0, -1])
                    ours.append(int(logits.argmax()))
            assert ours == theirs, prompt

    @pytest.mark.more
    def test_padding_on_the_left_changes_no_answer(
        self, writer: evaluate.Writer
    ) -> None:
        """What `Writer` relies on, since it asks many questions of all lengths at once."""
        questions = prompts(writer.tokenizer)[:4]
        together = writer.continue_texts(questions, max_new_tokens=30)
        alone = [writer.continue_texts([q], max_new_tokens=30)[0] for q in questions]
        assert together == alone

    @pytest.mark.more
    def test_writes_words(self, writer: evaluate.Writer) -> None:
        [(text, _)] = writer.continue_texts(["Once upon a time"])
        words = re.findall(r"\b[a-z]{2,}\b", text)
        assert len(words) > 30
        known = set(corpus.word_list())
        assert sum(word in known for word in words) > 0.9 * len(words)


class TestSpecialTokens:
    def test_ids(self) -> None:
        ids = [TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL]
        assert ids == list(range(len(TOKENIZER) - 5, len(TOKENIZER)))
        for token, number in zip(SPECIAL, ids, strict=True):
            assert TOKENIZER.encode(token, add_special_tokens=False) == [number]

    def test_ends(self) -> None:
        end_of_text, _, im_end, _, _ = TOKENIZER.convert_tokens_to_ids(SPECIAL)
        generation = GenerationConfig.from_pretrained(FOLDER)
        assert generation.eos_token_id == [im_end, end_of_text]
        assert generation.pad_token_id == end_of_text
        assert TOKENIZER.eos_token_id == im_end
        assert TOKENIZER.pad_token_id == end_of_text
        config = AutoConfig.from_pretrained(FOLDER)
        assert config.eos_token_id == im_end
        assert config.pad_token_id == end_of_text

    def test_generation_defaults(self) -> None:
        generation = GenerationConfig.from_pretrained(FOLDER)
        assert generation.do_sample
        assert 0 < generation.temperature <= 1
        assert 0 < generation.top_p <= 1
        assert generation.top_k >= 0

    def test_thoughts_are_shown_and_turns_are_not(self) -> None:
        text = "".join(SPECIAL)
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think></think>"

    def test_nothing_is_added_to_a_text(self) -> None:
        plain = TOKENIZER.encode("Hello.", add_special_tokens=False)
        assert TOKENIZER.encode("Hello.") == plain
        assert TOKENIZER.encode("") == []


any_bytes = st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "replace"))
pieces = st.lists(
    st.sampled_from([*SPECIAL, " ", "\n", "\r\n", "\t", "a", "'ll", "é", "🦊", "."]),
    max_size=12,
).map("".join)


class TestTokenizer:
    @given(text=st.one_of(any_bytes, st.text(max_size=60), pieces))
    @settings(max_examples=300, deadline=None)
    @example("🦊👩‍👩‍👧‍👦🇯🇵👍🏽")
    @example("模型把每个词元的键和值存进缓存。")
    @example("e\u0301 o\u0308 Z\u0351\u036b\u0343 \u1112\u1161\u11ab נִקּוּד")
    @example("naïve café — “quotes” ﬁ Å Å")
    @example("\x00\x01\x7f\ufeff\u200b\u2028\ufffd\U0010ffff")
    @example(" leading,  double , trailing . \n\n\t\r\n ")
    @example("don't I'LL we're 1234567890 3.14")
    @example("<|im_end|> < |im_end|> <|im_end|x> </think")
    def test_any_text_survives(self, text: str) -> None:
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        assert TOKENIZER.decode(ids) == text
        assert all(0 <= i < len(TOKENIZER) for i in ids)

    def test_every_byte_has_a_token(self) -> None:
        alphabet = [chr(i) for i in range(0x250)] + ["\u0800", "\ud7ff", "\U00010000"]
        for character in alphabet:
            ids = TOKENIZER.encode(character, add_special_tokens=False)
            assert TOKENIZER.decode(ids) == character

    def test_every_token_is_reachable(self) -> None:
        vocabulary = TOKENIZER.get_vocab()
        assert sorted(vocabulary.values()) == list(range(len(TOKENIZER)))

    def test_digits_stand_alone(self) -> None:
        tokens = TOKENIZER.tokenize("12345")
        assert tokens == list("12345")

    def test_text_of_the_corpus_is_short(self) -> None:
        story = write_story(random.Random(0)).text
        ids = TOKENIZER.encode(story)
        assert len(ids) < 1.6 * len(story.split())

    def test_training_is_deterministic_and_exact(self) -> None:
        source = corpus.documents(seed=5)
        texts = ["".join(t for t, _ in next(source)) for _ in range(300)]
        first, second = (train_tokenizer(texts, vocab_size=600) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()
        assert len(first) == 600
        for text in texts[:50]:
            assert first.decode(first.encode(text)) == text


def render(messages: list[dict[str, str]], **options: Any) -> str:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


class TestChatTemplate:
    QUESTION = {"role": "user", "content": "What is decode?"}  # noqa: RUF012
    ASKED = "<|im_start|>user\nWhat is decode?<|im_end|>\n"

    @pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=str)
    def test_without_a_thought(self, options: dict[str, bool]) -> None:
        text = render([self.QUESTION], add_generation_prompt=True, **options)
        assert text == self.ASKED + ASSISTANT + NO_THOUGHT

    def test_with_a_thought(self) -> None:
        text = render([self.QUESTION], add_generation_prompt=True, enable_thinking=True)
        assert text == self.ASKED + ASSISTANT

    @pytest.mark.parametrize("thinking", [True, False])
    def test_without_generation_prompt(self, thinking: bool) -> None:
        text = render(
            [self.QUESTION], add_generation_prompt=False, enable_thinking=thinking
        )
        assert text == self.ASKED

    def test_system_message(self) -> None:
        system = {"role": "system", "content": "You are a friendly teacher."}
        text = render([system, self.QUESTION], add_generation_prompt=True)
        first = "<|im_start|>system\nYou are a friendly teacher.<|im_end|>\n"
        assert text == first + self.ASKED + ASSISTANT + NO_THOUGHT

    @pytest.mark.parametrize("thinking", [True, False])
    def test_thoughts_of_earlier_turns_are_left_out(self, thinking: bool) -> None:
        messages = [
            {"role": "user", "content": "Hi!"},
            {
                "role": "assistant",
                "content": "<think>\nSmall talk.\n</think>\n\nHello.",
            },
            {"role": "user", "content": "Repeat: a b"},
            {"role": "assistant", "content": "a b"},
            self.QUESTION,
        ]
        text = render(messages, add_generation_prompt=True, enable_thinking=thinking)
        assert text == (
            "<|im_start|>user\nHi!<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nRepeat: a b<|im_end|>\n"
            "<|im_start|>assistant\na b<|im_end|>\n"
            + self.ASKED
            + ASSISTANT
            + ("" if thinking else NO_THOUGHT)
        )

    def test_a_users_think_tag_is_kept(self) -> None:
        content = "What does </think> mean?"
        text = render([{"role": "user", "content": content}])
        assert content in text

    def test_content_is_taken_as_it_is(self) -> None:
        content = " {{ 7 * 7 }} {% raw %} <b>&amp; 🦊\n"
        text = render([{"role": "user", "content": content}])
        assert text == f"<|im_start|>user\n{content}<|im_end|>\n"

    @pytest.mark.parametrize("think", [True, False])
    def test_equals_what_the_corpus_teaches(self, think: bool) -> None:
        """A prompt of training is to the letter what the template makes."""
        rng = random.Random(3)
        turns = [corpus.glossary_turn(rng), corpus.copy_turn(rng)]
        turns.append(corpus.small_talk_turn(rng))
        for _ in range(20):
            (prompt, _), (learned, _), (end, _) = corpus.chat(rng, turns, think)
            messages: list[dict[str, str]] = []
            if prompt.startswith("<|im_start|>system"):
                system = prompt.partition("\n")[2].partition("<|im_end|>")[0]
                messages.append({"role": "system", "content": system})
            for question, _, answer in turns:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            options = {"add_generation_prompt": True, "enable_thinking": think}
            assert prompt == render(messages[:-1], **options)
            assert learned.endswith(turns[-1][2] + "<|im_end|>")
            assert end == "\n<|endoftext|>"


class TestCard:
    """The figures that `python -m tiny_model.evaluate --write-card` keeps."""

    def figures(self) -> dict[str, tuple[str, str]]:
        """Measured value and bound by the name of the figure."""
        card = FOLDER / "README.md"
        assert card.is_file(), f"{FOLDER} has no model card"
        text = card.read_text(encoding="utf-8")
        assert text.count(evaluate.BEGIN) == text.count(evaluate.END) == 1
        table = text.partition(evaluate.BEGIN)[2].partition(evaluate.END)[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.strip().splitlines()
        ]
        assert rows[0] == ["figure", "measured", "bound"]
        return {name: (value, bound) for name, value, bound in rows[2:]}

    def test_every_bound_is_reached(self) -> None:
        for name, (value, bound) in self.figures().items():
            if bound != "-":
                assert float(value.strip("%")) >= float(bound.strip("%")), name

    @pytest.mark.parametrize(
        ("words", "bound"),
        [
            ("held-out phrasings of", "95%"),
            ("held-out phrasings of .* after a thought", "-"),
            ("copied exactly, of 200", "95%"),
            ("end by themselves, of 300", "99%"),
            ("consistent, of 300", "90%"),
            ("60 to 250 tokens", "90%"),
            ("unlike all others", "100%"),
            ("held-out loss", "-"),
        ],
    )
    def test_the_figures_of_the_issue_are_there(self, words: str, bound: str) -> None:
        rows = self.figures().items()
        found = {b for name, (_, b) in rows if re.search(words, name)}
        assert bound in found

    def test_a_figure_below_its_bound_is_not_rounded_up_to_it(self) -> None:
        figure = evaluate.Figure("almost", 0.9496, 0.95)
        assert not figure.reached
        value = figure.row().split("|")[2].strip().strip("%")
        assert float(value) < 95

    def test_share_and_rows(self) -> None:
        assert evaluate.share([True, True, False, True]) == 0.75
        row = evaluate.Figure("name", 0.987, 0.95).row()
        assert row == "| name | 98.7% | 95% |"
        assert evaluate.Figure("loss", 0.5, percent=False).row() == (
            "| loss | 0.5000 | - |"
        )


class TestQuickEvaluation:
    """The figures again, in a small form, on the files as they are."""

    def test_held_out_questions(self, writer: evaluate.Writer) -> None:
        entries = random.Random(1).sample(GLOSSARY, 30)
        answers = writer.answer([entry.held_out for entry in entries])
        pairs = zip(answers, entries, strict=True)
        right = [answer == entry.answer for (answer, _), entry in pairs]
        assert sum(right) >= 27
        assert sum(ended for _, ended in answers) >= 29

    def test_copies(self, writer: evaluate.Writer) -> None:
        rng = random.Random(2)
        words = corpus.word_list()
        texts = [" ".join(rng.choices(words, k=rng.randint(8, 16))) for _ in range(20)]
        patterns = [rng.choice(corpus.COPY_PATTERNS) for _ in texts]
        answers = writer.answer(
            [
                pattern.format(text)
                for pattern, text in zip(patterns, texts, strict=True)
            ]
        )
        pairs = zip(answers, texts, strict=True)
        assert sum(answer == text for (answer, _), text in pairs) >= 18

    def test_small_talk(self, writer: evaluate.Writer) -> None:
        questions = [questions[0] for questions, _ in SMALL_TALK]
        answers = [answer for answer, _ in writer.answer(questions)]
        right = [a == b for a, (_, b) in zip(answers, SMALL_TALK, strict=True)]
        assert sum(right) >= 0.8 * len(right)


class TestGlossary:
    def test_sixty_terms_with_five_phrasings_each(self) -> None:
        assert len(GLOSSARY) >= 60
        for entry in GLOSSARY:
            asked = {corpus.normalize(text) for text in entry.phrasings}
            assert len(asked | {corpus.normalize(entry.held_out)}) >= 6, entry.term

    def test_every_question_leads_to_one_answer(self) -> None:
        owner: dict[str, str] = {}
        for entry in GLOSSARY:
            for text in (*entry.phrasings, entry.held_out):
                question = corpus.normalize(text)
                assert owner.setdefault(question, entry.term) == entry.term, text
        assert len({entry.answer for entry in GLOSSARY}) == len(GLOSSARY)
        assert len({entry.term for entry in GLOSSARY}) == len(GLOSSARY)

    def test_answers_have_the_length_that_is_promised(self) -> None:
        for entry in GLOSSARY:
            assert 15 <= len(entry.answer.split()) <= 40, entry.term
            assert entry.answer.isascii()
            assert entry.answer.isprintable()


class TestCorpus:
    @pytest.mark.more
    def test_held_out_questions_are_never_written(self) -> None:
        """Not even with a polite word before them: looked for inside each question."""
        held_out = [f" {corpus.normalize(entry.held_out)} " for entry in GLOSSARY]
        source = corpus.documents(
            seed=0
        )  # the seed of the tokenizer; training has 1 and 2
        questions = {
            f" {corpus.normalize(question)} "
            for document in itertools.islice(source, 20_000)
            for question in USER.findall("".join(text for text, _ in document))
        }
        assert len(questions) > 5_000
        everything = "\n".join(sorted(questions))
        assert [question for question in held_out if question in everything] == []

    def test_held_out_questions_are_no_pattern_and_no_phrasing(self) -> None:
        for entry in GLOSSARY:
            written = [pattern.format(entry.term) for pattern in corpus.PATTERNS]
            bare = entry.term.removeprefix("the ")
            written += [pattern.format(bare) for pattern in corpus.PATTERNS]
            asked = {corpus.normalize(text) for text in (*written, *entry.phrasings)}
            assert corpus.normalize(entry.held_out) not in asked, entry.term

    def test_is_the_same_every_time(self) -> None:
        first, second, other = (corpus.documents(seed) for seed in (7, 7, 8))
        ours = [next(first) for _ in range(30)]
        assert ours == [next(second) for _ in range(30)]
        assert ours != [next(other) for _ in range(30)]

    def test_only_answers_and_stories_are_learned(self) -> None:
        for document in itertools.islice(corpus.documents(seed=4), 500):
            learned = [text for text, is_learned in document if is_learned]
            assert len(learned) == 1
            assert learned[0].endswith(("<|im_end|>", "<|endoftext|>"))
            assert "<|im_start|>" not in learned[0]
            assert "".join(text for text, _ in document).endswith("<|endoftext|>")

    def test_copies_are_exact(self) -> None:
        rng = random.Random(6)
        for _ in range(200):
            question, _, answer = corpus.copy_turn(rng)
            assert question.endswith(answer)
            assert 1 <= len(answer.split()) <= 20

    def test_normalize(self) -> None:
        assert corpus.normalize("  What's a KV-cache?!\n") == "what s a kv cache"

    def test_is_printable_ascii(self) -> None:
        for document in itertools.islice(corpus.documents(seed=9), 500):
            text = "".join(text for text, _ in document).replace("\n", "")
            assert text.isascii()
            assert text.isprintable()


def rename_late(story: Story) -> str:
    """The hero has another name from half of the story on."""
    half = len(story.text) // 2
    name = "Ottokar" if story.hero != "Ottokar" else "Berta"
    return story.text[:half] + re.sub(rf"\b{story.hero}\b", name, story.text[half:])


def rename_friend(story: Story) -> str:
    """The friend is introduced by one name and called by another."""
    first = re.search(rf"\b{story.friend}\b", story.text)
    assert first
    rest = re.sub(rf"\b{story.friend}\b", "Quentin", story.text[first.end() :])
    return story.text[: first.end()] + rest


def other_thing(story: Story) -> str:
    """What was a kite in the opening is an anchor later."""
    rest = story.text[len(story.opening) :]
    return story.opening + re.sub(rf"\b{story.thing}\b", "anchor", rest)


def no_end(story: Story) -> str:
    return " ".join(split_sentences(story.text)[:-1])


def cut_off(story: Story) -> str:
    return story.text[: len(story.text) * 3 // 4].rstrip('.!?" ')


def said_twice(story: Story) -> str:
    sentences = split_sentences(story.text)
    return " ".join([*sentences[:4], sentences[3], *sentences[4:]])


def third_character(story: Story) -> str:
    sentences = split_sentences(story.text)
    new = "A goat named Zoltan came by."
    return " ".join([*sentences[:-1], new, sentences[-1]])


def goes_on(story: Story) -> str:
    return story.text + " Then the sun came up and all was well."


def no_middle(story: Story) -> str:
    """Hero and thing, and at once the end: no problem, no solution."""
    return f"{story.opening} {split_sentences(story.text)[-1]}"


def unsolved(story: Story) -> str:
    """What was lost is never found: the sentences that solve anything are gone."""
    first, second, *rest = split_sentences(story.text)
    solutions = [solution for _, solution in PLOT_SIGNS.values()]
    kept = [s for s in rest if not any(re.search(sign, s) for sign in solutions)]
    return " ".join([first, second, *kept])


MUTATIONS = [
    unsolved,
    rename_late,
    rename_friend,
    other_thing,
    no_end,
    cut_off,
    said_twice,
    third_character,
    goes_on,
    no_middle,
]


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    rng = random.Random("test")
    return [write_story(rng, held_out=i % 2 == 0) for i in range(300)]


class TestStories:
    @pytest.mark.more
    def test_the_checker_finds_nothing_in_them(self, stories: list[Story]) -> None:
        for story in stories:
            assert find_problems(story.text, story.opening) == [], story.text

    @pytest.mark.more
    @pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
    def test_the_checker_finds_mutations(
        self, stories: list[Story], mutate: Callable[[Story], str]
    ) -> None:
        passed = []
        for story in stories:
            text = mutate(story)
            assert text != story.text
            if not find_problems(text, story.opening):
                passed.append(text)
        assert len(passed) <= 0.02 * len(stories), passed[0]

    def test_say_what_they_are_about(self, stories: list[Story]) -> None:
        for story in stories:
            assert story.text.startswith(story.opening)
            assert story.hero in story.opening
            assert story.thing in story.opening
            assert story.friend in story.text
            assert story.hero in story.request
            assert story.hero != story.friend

    def test_are_unlike_each_other(self, stories: list[Story]) -> None:
        assert len({story.text for story in stories}) == len(stories)

    def test_have_the_length_that_the_model_is_asked_for(
        self, stories: list[Story]
    ) -> None:
        lengths = [len(TOKENIZER.encode(story.text)) for story in stories]
        assert min(lengths) >= 60
        assert max(lengths) <= 250

    def test_openings_for_evaluation_are_not_in_training(self) -> None:
        def key(story: Story) -> tuple[str, str, str]:
            named = re.search(r"([a-z]+) named ([A-Z][a-z]+)", story.opening)
            assert named
            assert named[2] == story.hero
            return story.hero, named[1], story.thing

        rng = random.Random(8)
        training = {key(write_story(rng)) for _ in range(1500)}
        held_out = {key(write_story(rng, held_out=True)) for _ in range(300)}
        assert not training & held_out
        assert all(is_held_out(*parts) for parts in held_out)
        assert not any(is_held_out(*parts) for parts in training)


class TestTraining:
    def test_documents_are_encoded_piece_by_piece(self) -> None:
        ids, targets = train.encode_document(
            TOKENIZER, [("Hi there", False), (" fox<|im_end|>", True), ("\n", False)]
        )
        assert TOKENIZER.decode(ids) == "Hi there fox<|im_end|>\n"
        learned = [t for t in targets if t != train.IGNORE]
        assert TOKENIZER.decode(learned) == " fox<|im_end|>"
        assert all(t in (i, train.IGNORE) for i, t in zip(ids, targets, strict=True))

    @pytest.mark.parametrize("length", [321, 961])
    def test_rows_are_full_of_whole_documents(self, length: int) -> None:
        end, start, stop = TOKENIZER.convert_tokens_to_ids(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        )
        learned = 0
        rows = train.packed_rows(TOKENIZER, seed=3, length=length)
        for ids, targets in itertools.islice(rows, 40):
            assert len(ids) == len(targets) == length
            assert ids[-1] == end
            for i, target in zip(ids, targets, strict=True):
                assert target in (i, train.IGNORE)
            assert ids.count(start) == ids.count(stop)
            padding = len(list(itertools.takewhile(end.__eq__, reversed(ids))))
            assert padding < 0.2 * length
            learned += sum(target != train.IGNORE for target in targets)
        assert learned > 0.3 * 40 * length

    def test_targets_are_the_next_tokens(self) -> None:
        input_ids, targets = next(train.batches(TOKENIZER, 3, rows=6, length=320))
        rows = list(itertools.islice(train.packed_rows(TOKENIZER, 3, 321), 6))
        assert input_ids.shape == targets.shape == (6, 320)
        assert input_ids.dtype == targets.dtype == torch.int64
        assert input_ids.tolist() == [ids[:-1] for ids, _ in rows]
        assert targets.tolist() == [row[1:] for _, row in rows]
        learned = targets != train.IGNORE
        shifted = input_ids[:, 1:]
        assert torch.equal(shifted[learned[:, :-1]], targets[:, :-1][learned[:, :-1]])

    def test_questions_are_read_and_answers_are_learned(self) -> None:
        input_ids, targets = next(train.batches(TOKENIZER, 5, rows=20, length=320))
        text = "".join(
            TOKENIZER.decode([t for t in row if t != train.IGNORE])
            for row in targets.tolist()
        )
        assert "<|im_start|>" not in text
        assert "<|im_end|>" in text
        assert "<|endoftext|>" in text
        assert "user\n" not in text
        ids = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert (input_ids == ids[0]).any()
        assert not (targets == ids[0]).any()

    def test_learning_rate(self) -> None:
        factors = [train.learning_rate_factor(step, 400) for step in range(400)]
        assert factors[0] == 1 / 40
        assert max(factors) == 1 == factors[39] == factors[200]
        assert 0 < factors[-1] < 0.01
        assert factors[200:] == sorted(factors[200:], reverse=True)

    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_every_parameter_has_one_optimizer(self, bfloat16: bool) -> None:
        config = train.tiny_config()
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        held = [
            (p, type(optimizer))
            for optimizer in train.make_optimizers(model, bfloat16)
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        assert len(held) == len({p for p, _ in held}) == len(list(model.parameters()))
        muons = [p for p, kind in held if kind is torch.optim.Muon]
        assert len(muons) == (4 * config.num_hidden_layers if bfloat16 else 0)
        assert all(p.dim() == 2 and len(p) != config.vocab_size for p in muons)

    @pytest.mark.more
    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_learns(self, bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """One narrow layer, in bfloat16 with Muon and in float32 without, to long rows."""
        config = train.tiny_config(len(TOKENIZER))
        config.hidden_size, config.intermediate_size = 64, 96
        config.num_hidden_layers = 1
        config.layer_types = ["full_attention"]
        monkeypatch.setattr(train, "tiny_config", lambda vocab_size: config)
        dtypes: list[torch.dtype] = []
        losses: list[float] = []
        compute_logits = Qwen3ForCausalLM.compute_logits

        def spy(model: Qwen3ForCausalLM, hidden_states: Tensor) -> Tensor:
            logits = compute_logits(model, hidden_states)
            dtypes.append(logits.dtype)
            return logits

        monkeypatch.setattr(Qwen3ForCausalLM, "compute_logits", spy)
        train.train(
            TOKENIZER,
            10,
            rows=2,
            length=160,
            bfloat16=bfloat16,
            log_every=3,
            report=lambda model, step, loss: losses.append(loss),
        )
        assert set(dtypes) == {torch.bfloat16 if bfloat16 else torch.float32}
        assert len(losses) == 4
        assert losses[0] > losses[1] > losses[2]

    @pytest.mark.more
    def test_a_saved_model_loads(self, tmp_path: Path) -> None:
        """Trained for three steps from the bundled one, saved, loaded: bfloat16 exact."""
        losses: list[float] = []
        trained = train.train(
            TOKENIZER,
            3,
            rows=2,
            length=160,
            log_every=1,
            report=lambda model, step, loss: losses.append(loss),
            start=FOLDER,
        )
        assert len(losses) == 3
        assert max(losses) < 3
        train.save(trained, TOKENIZER, tmp_path / "out")
        again = load_model(tmp_path / "out", device="cpu", use_tqdm=False)
        stored: dict[str, Tensor] = again.hf_weights()
        for name, weight in trained.hf_weights().items():
            assert torch.equal(stored[name], weight.bfloat16().float()), name
        assert load_tokenizer(tmp_path / "out").get_vocab() == TOKENIZER.get_vocab()
        ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
        assert ends == TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        config = AutoConfig.from_pretrained(tmp_path / "out")
        assert [config.eos_token_id, config.pad_token_id] == ends
