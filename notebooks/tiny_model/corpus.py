"""The corpus of the bundled checkpoint: stories, questions and answers, copying, small talk.

Everything is drawn by a seeded program. A document is a list of pieces of text, each marked
as learned or only read: the model learns stories and answers, not the questions.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

from tiny_model.glossary import GLOSSARY
from tiny_model.small_talk import SMALL_TALK, UNKNOWN, UNKNOWN_ANSWER
from tiny_model.stories import write_story
from tiny_model.tokenizer import END_OF_TEXT, END_THINK, IM_END, IM_START, THINK

Document = list[tuple[str, bool]]  # (text, is it learned?)
Turn = tuple[str, str, str]  # question, thought, answer

PATTERNS = (
    "What is {}?",
    "What does {} mean?",
    "What do you know about {}?",
    "Explain {}.",
    "Explain {} to me.",
    "Explain {} in simple words.",
    "Tell me about {}.",
    "Tell me what {} is.",
    "Describe {}.",
    "Can you explain {}?",
    "Could you tell me about {}?",
    "I do not understand {}.",
    "I want to learn about {}.",
    "How would you explain {} to a friend?",
    "Give me a short answer: what is {}?",
    "Why is {} important?",
    "Why do we need {}?",
    "What is the idea of {}?",
    "What is the point of {}?",
    "How does {} work?",
    "{}?",
    "{}",
)
COPY_PATTERNS = (
    "Repeat these words: {}",
    "Repeat after me: {}",
    "Repeat: {}",
    "Copy these words: {}",
    "Copy this: {}",
    "Say this again: {}",
    "Please say: {}",
    "Write these words again: {}",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about inference engines.",
    "You are a friendly teacher.",
    "Answer in one or two sentences.",
)


def normalize(question: str) -> str:
    """A question without case and punctuation, to compare wordings."""
    return " ".join(re.sub(r"[^a-z0-9 ]", " ", question.lower()).split())


HELD_OUT = frozenset(normalize(entry.held_out) for entry in GLOSSARY)


@cache
def word_list() -> tuple[str, ...]:
    """Every lower-case word of the stories and the glossary, in alphabetical order."""
    rng = random.Random(0)
    texts = [write_story(rng).text for _ in range(2000)] + [e.answer for e in GLOSSARY]
    return tuple(
        sorted({w for text in texts for w in re.findall(r"\b[a-z]{2,}\b", text)})
    )


def random_words(rng: random.Random, count: int) -> list[str]:
    """Words in an order that means nothing; now and then invented ones."""
    words = [rng.choice(word_list()) for _ in range(count)]
    if rng.random() < 0.25:
        invented = rng.random()
        for i in range(count):
            if rng.random() < invented:
                letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))
                words[i] = "".join(letters)
    return words


def ask(rng: random.Random, question: str) -> str:
    """The question as somebody might type it: other case, no full stop, a polite word."""
    if rng.random() < 0.15:
        question = rng.choice(("Please ", "Hi. ", "Hello, ", "So, ", "Now ")) + (
            question[0].lower() + question[1:] if question[1:2].islower() else question
        )
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.15:
        question = question.lower()
    return question


@cache
def filler_words() -> tuple[str, ...]:
    """Words that the questions of many entries use, so that they point to none."""
    counts = Counter(
        word
        for entry in GLOSSARY
        for word in {w for text in entry.phrasings for w in normalize(text).split()}
    )
    terms = {w for e in GLOSSARY for w in normalize(e.term).split() if len(w) > 3}
    return tuple(sorted(w for w, n in counts.items() if n >= 5 and w not in terms))


def in_passing(rng: random.Random, term: str) -> str:
    """The term among words that say nothing, so that the term alone leads to the answer."""
    words = rng.choices(filler_words(), k=rng.randint(2, 10))
    words.insert(rng.randint(0, len(words)), term)
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice(".??")


def glossary_turn(rng: random.Random) -> Turn:
    entry = rng.choice(GLOSSARY)
    while True:
        kind = rng.random()
        if kind < 0.25:
            question = rng.choice(PATTERNS).format(entry.term)
            question = question[0].upper() + question[1:]
        elif kind < 0.6:
            term = entry.term if rng.random() < 0.5 else entry.term.removeprefix("the ")
            question = in_passing(rng, term)
        else:
            question = rng.choice(entry.phrasings)
        question = ask(rng, question)
        if normalize(question) not in HELD_OUT:
            return question, f"The question is about {entry.term}.", entry.answer


def copy_turn(rng: random.Random) -> Turn:
    words = " ".join(random_words(rng, rng.randint(1, 20)))
    question = rng.choice(COPY_PATTERNS).format(words)
    return question, "I should repeat the words.", words


def story_turn(rng: random.Random) -> Turn:
    story = write_story(rng)
    return ask(rng, story.request), f"A story about {story.hero}.", story.text


def small_talk_turn(rng: random.Random) -> Turn:
    if rng.random() < 0.25:
        return ask(rng, rng.choice(UNKNOWN)), "I was not taught this.", UNKNOWN_ANSWER
    questions, answer = rng.choice(SMALL_TALK)
    return ask(rng, rng.choice(questions)), "This is small talk.", answer


def chat(rng: random.Random, turns: list[Turn], think: bool) -> Document:
    """A conversation in the words of the chat template; its last answer is learned."""
    prompt = ""
    if rng.random() < 0.15:
        prompt += f"{IM_START}system\n{rng.choice(SYSTEM_PROMPTS)}{IM_END}\n"
    for question, _, answer in turns[:-1]:
        prompt += f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
    question, thought, answer = turns[-1]
    prompt += f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
    if think:
        learned = f"{THINK}\n{thought}\n{END_THINK}\n\n{answer}{IM_END}"
    else:
        prompt += f"{THINK}\n\n{END_THINK}\n\n"
        learned = f"{answer}{IM_END}"
    return [(prompt, False), (learned, True), (f"\n{END_OF_TEXT}", False)]


def document(rng: random.Random) -> Document:
    """One document of the corpus. Half of the learned tokens are stories."""
    kind = rng.random()
    if kind < 0.26:
        return [(write_story(rng).text + END_OF_TEXT, True)]
    think = rng.random() < 0.15
    if kind < 0.36:
        return chat(rng, [story_turn(rng)], think)
    turn = (
        small_talk_turn if kind > 0.96 else copy_turn if kind > 0.82 else glossary_turn
    )
    others = (glossary_turn, copy_turn, small_talk_turn)
    history = [rng.choice(others)(rng) for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))]
    return chat(rng, [*history, turn(rng)], think)


def documents(seed: int) -> Iterator[Document]:
    """The corpus, without end."""
    rng = random.Random(seed)
    while True:
        yield document(rng)
