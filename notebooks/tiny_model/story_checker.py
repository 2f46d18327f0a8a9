"""Does a text tell one consistent story? Rules on the bare text, no list of the author's words.

The checker knows how such a story introduces things ("a fox named Mira", "had a red kite"),
which words announce a problem and which its solution, and some words that belong to any
scenery. Everything else has to be introduced by the text before it is used.
"""

import re
from collections import Counter
from dataclasses import dataclass


def _words(text: str) -> set[str]:
    return set(text.split())


# Problem and solution of a plot; the first has to come before the second, and neither alone.
PLOT_SIGNS = {
    "lost": (
        r"(was|were) (gone|missing|not there)|could not find|(had|has) lost|never lost",
        r"\bfound\b",
    ),
    "broken": (r"\bbroken?\b|\bcracked\b", r"\bmended\b|\bfixed\b|\brepaired\b"),
    "wanted by both": (
        r"\bboth (of them )?wanted\b|wanted it too\b|wanted (\w+ ){1,3}too\b",
        r"\bshared?\b|\btook turns\b|\btake turns\b",
    ),
    "out of reach": (
        r"\bstuck\b|could not reach|too high\b",
        r"\bgot (\w+ ){1,3}down\b|\bcame down, (right|and)|a little, and (\w+ ){1,3}came down",
    ),
    "heavy": (
        r"too heavy|could not lift|(did|would) not move",
        r"they (lifted|pushed|moved|carried)\b|time (\w+ ){1,3}moved|and \w+ (carried|moved)",
    ),
    "forgotten": (
        r"\bforgot\b|\bleft (\w+ ){1,3}behind",
        r"\b(gave|given|brought|handed) (\w+ ){1,3}back\b",
    ),
    "storm": (
        r"\bstorm\b|\brain\b|\bthunder\b",
        r"\b(storm|rain) (passed|was over|stopped)|sun came out",
    ),
    "no present": (
        r"\bpresent\b|\bbirthday (of|had)",
        r"\b(gave|handed) (?!(\w+ ){1,3}back)(\w+ ){1,3}(to|away)\b",
    ),
    "dirty": (r"\bmud\b|\bdirty\b|\bmuddy\b", r"\bclean\b"),
    "race": (
        r"\brace\b",
        r"\bcrossed the line|\bfinished the race|the end of the race",
    ),
}
CLOSING = re.compile(
    r"(From (that day on|then on)|(Ever since|After) that day|That (night|evening)"
    r"|(And that|That) is how)\b"
)
# What happens to the thing of the story happens to nothing else in it.
ABOUT_THE_THING = re.compile(
    r"\b(?:found|lost|mended|fixed|forgot|shared?|washed|turns with|look for|looked for|missed)"
    r" (?:the|a|an|his|her|their) ((?:\w+ )?\w+)"
)

PRONOUNS = {
    "he": "he",
    "him": "he",
    "his": "he",
    "she": "she",
    "her": "she",
    "hers": "she",
}
FUNCTION_WORDS = _words(
    "a about after again all along also always and are around as at back because before "
    "behind but by down every everywhere for from had has he her him his how if in into is "
    "it left near next not of off on onto or out over she so still than that the their them "
    "then there they through to together too under until up was were when where which who "
    "with would"
)
STARTERS = FUNCTION_WORDS | _words(
    "an another any arm away bang bees before below beside between big bit black blue boom "
    "both can come could day did do does dust each early ever far fast first follow four "
    "good half hand happy hello here high i it its just knock large last late later leaves "
    "let long look many may maybe more my nearby never no nobody now often oh old once one "
    "only ouch our outside piece please quick quickly ready sad side since slowly small "
    "some soon step suddenly sun take tap thank thanks these this those three today "
    "tomorrow two upon wait we well what while white whoosh why wind yes you your"
)
# Words before a noun that are not the thing's own adjective.
MODIFIERS = _words(
    "best big birthday black bright clear clever close cold cool dark deep dry fine first "
    "friendly front good great green happy hard heavy high hollow kind last little long "
    "loud lovely low mended new next nice old other own poor quiet right sad safe second "
    "small soft sunny tall true very warm whole wide wild wooden young"
)
# Nouns that need no introduction; none of them is something to own.
SCENERY = _words(
    "afternoon air arm arms back bank bed birds birthday bottom breath bushes cheek clouds "
    "corner dark day dinner door dust end evening eyes face fence field floor flowers "
    "friend fun grass ground hand hands head heads heart home house idea knock leaves light "
    "line market matter middle moon morning most mud name nap neighbors night nose other "
    "others path paw paws pieces place present prize problem rain rest road rocks roof root "
    "same sea shade side sky snow song stars storm story sun things thunder time top toys "
    "tree trees turn two wall water way whole wind window winner winners woods world yard"
)

CREATURES = _words(
    "badger bear beaver bird boy cat chicken cow crow deer dog donkey duck elephant fish "
    "fox frog girl goat goose hamster hare hedgehog hen horse lion man mole monkey mouse "
    "otter owl pig pony puppy rabbit raccoon rat sheep snail snake squirrel tiger toad "
    "turtle wolf woman"
)


@dataclass(frozen=True)
class _Named:
    kind: str
    name: str
    start: int


def find_problems(text: str, opening: str) -> list[str]:
    """What is inconsistent in a story; an empty list means nothing was found.

    Args:
        text: the whole story, beginning with `opening`.
        opening: the first two sentences, which name the hero and the thing.
    """
    if not text.startswith(opening):
        return ["the text does not begin with the opening"]
    named = _introductions(text)
    heroes = _introductions(opening)
    thing, adjective = _thing(opening)
    if not heroes or not thing:
        return ["the opening does not introduce a hero and a thing"]
    hero = heroes[0]
    friends = [other for other in named if other.name != hero.name]
    sentences = split_sentences(text)
    story = text[len(opening) :]

    problems = _ending(text, sentences)
    if not friends:
        problems.append("no friend is introduced")
    if len(friends) > 1:
        problems.append(
            f"more than two characters: {[other.name for other in friends]}"
        )
    problems += _twice_introduced(named)
    problems += _names(text, named)
    problems += _kinds(text, named)
    problems += _mentions(story, sentences, hero, friends, thing)
    problems += _pronouns(text, hero, friends)
    problems += _thing_stays(text, story, thing, adjective)
    problems += _unknown_nouns(text, opening)
    problems += _plot(story)
    counts = Counter(sentence.lower() for sentence in sentences)
    problems += [f"said twice: {sentence}" for sentence, n in counts.items() if n > 1]
    return problems


def split_sentences(text: str) -> list[str]:
    """Sentences; a quote and the words that say who spoke stay together."""
    parts = re.split(
        r"(?<=[.!?])\s+(?=[\"A-Z])|(?<=[.!?]\")\s+(?=[\"A-Z])", text.strip()
    )
    return [part for part in parts if part]


def _introductions(text: str) -> list[_Named]:
    pattern = re.compile(r"\b[Aa]n? (?:[a-z]+ )?([a-z]+) named ([A-Z][a-z]+)")
    return [_Named(m[1], m[2], m.start()) for m in pattern.finditer(text)]


def _thing(opening: str) -> tuple[str, str | None]:
    """The noun the second sentence introduces with "a" or "an", and its adjective."""
    second = split_sentences(opening)[-1]
    for match in re.finditer(r"(\w+) an? ([a-z]+)(?: ([a-z]+))?", second):
        before, first, following = match.groups()
        if before in {"in", "near", "by", "on", "at", "as"}:
            continue
        if (
            following is None
            or following in FUNCTION_WORDS
            or following in {"best", "most"}
        ):
            return first, None
        return following, first
    return "", None


def _without_quotes(text: str) -> str:
    return re.sub(r'"[^"]*"', '""', text)


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def _ending(text: str, sentences: list[str]) -> list[str]:
    problems = []
    if not re.search(r"[.!?]\"?$", text.rstrip()):
        problems.append("the text is cut off")
    if text.count('"') % 2:
        problems.append("a quote is not closed")
    if not CLOSING.match(sentences[-1]):
        problems.append("no closing sentence")
    if any(CLOSING.match(sentence) for sentence in sentences[:-1]):
        problems.append("goes on after the closing sentence")
    return problems


def _twice_introduced(named: list[_Named]) -> list[str]:
    counts = Counter(character.name for character in named)
    return [
        f"{name} is introduced twice" for name, count in counts.items() if count > 1
    ]


def _names(text: str, named: list[_Named]) -> list[str]:
    """Capitalised words have to be introduced names, or open a sentence."""
    first_seen = {character.name: character.start for character in reversed(named)}
    problems = []
    for match in re.finditer(r"\b[A-Z][a-z]*\b", text):
        word = match[0]
        if word in first_seen:
            if match.start() < first_seen[word]:
                problems.append(f"{word} is used before being introduced")
            continue
        opens = re.search(r"(^|[.!?]\"?\s+\"?|^\"|[\s(]\")$", text[: match.start()])
        if word != "I" and not (opens and word.lower() in STARTERS):
            problems.append(f"{word} was never introduced")
    for name in first_seen:
        if re.search(rf"\b{name},? and {name}\b", text):
            problems.append(f"{name} and {name}")
    return problems


def _kinds(text: str, named: list[_Named]) -> list[str]:
    kinds = {character.name: character.kind for character in named}
    problems = []
    for name, kind in re.findall(r"\b([A-Z][a-z]+),? the ([a-z]+)", text):
        if kind in CREATURES and kinds.get(name, kind) != kind:
            problems.append(f"{name} the {kind} was a {kinds[name]}")
    for kind, name in re.findall(
        r"\b[Tt]he ([a-z]+),? (?:named )?([A-Z][a-z]+)\b", text
    ):
        if kind in CREATURES and kinds.get(name, kind) != kind:
            problems.append(f"the {kind} {name} was a {kinds[name]}")
    return problems


def _mentions(
    story: str, sentences: list[str], hero: _Named, friends: list[_Named], thing: str
) -> list[str]:
    problems = []
    for word in (hero.name, thing):
        if len(re.findall(rf"\b{word}\b", story)) < 2:
            problems.append(f"{word} is hardly mentioned after the opening")
    last_two = " ".join(sentences[-2:])
    for friend in friends:
        if len(re.findall(rf"\b{friend.name}\b", story)) < 2:
            problems.append(f"{friend.name} is not mentioned again")
    if not any(_has(last_two, other.name) for other in (hero, *friends)):
        problems.append("the end is about neither hero nor friend")
    if not _has(last_two, thing) and not _has(last_two, hero.name):
        problems.append("the end is about neither hero nor thing")
    return problems


def _pronouns(text: str, hero: _Named, friends: list[_Named]) -> list[str]:
    """Where only one character is in play, "he" and "she" do not mix."""
    problems = []
    friend_at = friends[0].start if friends else len(text)
    alone = _genders(text[:friend_at])
    if len(alone) > 1:
        problems.append(f"{hero.name} is both he and she")
    elif alone:
        for sentence in split_sentences(text[friend_at:]):
            plain = _without_quotes(sentence)
            other = any(_has(sentence, friend.name) for friend in friends)
            if _has(plain, hero.name) and not other and _genders(plain) - alone:
                problems.append(f"{hero.name} changes pronoun: {sentence}")
    return problems


def _genders(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", _without_quotes(text).lower())
    return {PRONOUNS[word] for word in words if word in PRONOUNS}


def _thing_stays(text: str, story: str, thing: str, adjective: str | None) -> list[str]:
    problems = []
    determiner = r"\b(?:[Tt]he|[Aa]n?|[Hh]is|[Hh]er|[Tt]heir|[Mm]y|[Yy]our|[Tt]his)"
    allowed = {
        adjective,
        "mended",
        "poor",
        "dear",
        "dirty",
        "muddy",
        "lovely",
        "nice",
        "fine",
    }
    for word in re.findall(rf"{determiner} ([a-z]+) {thing}\b", text):
        if word not in allowed and word not in FUNCTION_WORDS:
            problems.append(f"the {thing} was {adjective or 'plain'}, now it is {word}")
    for phrase in ABOUT_THE_THING.findall(story):
        first, _, second = phrase.partition(" ")
        noun = second if first == adjective or first in MODIFIERS | allowed else first
        if noun != thing:
            problems.append(f"this story is about the {thing}, not the {noun}")
    return problems


def _unknown_nouns(text: str, opening: str) -> list[str]:
    """ "the drum" is only for a drum that was there before, or for scenery."""
    problems = []
    _, adjective = _thing(opening)
    determiner = r"\b(?:the|my|your|our|their|this)"
    for match in re.finditer(
        rf"{determiner} (?=([a-z]+)(?: ([a-z]+))?)", text, re.IGNORECASE
    ):
        first, second = match.groups()
        before = text[: match.start()].lower()
        noun = first
        if (
            second
            and second not in FUNCTION_WORDS
            and (first in MODIFIERS or first == adjective)
        ):
            noun = second
        known = noun in SCENERY or noun in FUNCTION_WORDS or noun in MODIFIERS
        if not known and not re.search(rf"\b{noun}s?\b", before):
            problems.append(f"nobody told of the {noun} before")
    return problems


def _plot(story: str) -> list[str]:
    problems = []
    resolved = []
    for plot, (trouble, solution) in PLOT_SIGNS.items():
        first = re.search(trouble, story)
        if first is None:
            if re.search(solution, story):
                problems.append(f"solved what never was a problem: {plot}")
        elif re.search(solution, _later(story, first.end())) is None:
            problems.append(f"not solved: {plot}")
        else:
            resolved.append(plot)
    if not resolved:
        problems.append("nothing happens: no problem and solution")
    return problems


def _later(story: str, position: int) -> str:
    """What comes after the sentence at this position."""
    end = re.compile(r"[.!?]").search(story, position)
    return story[end.end() :] if end else ""
