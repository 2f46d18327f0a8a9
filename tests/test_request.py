"""Prompts, the text as it comes, endings and outputs, against decoding everything again."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise, takewhile
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from folo_lib import (
    LLMEngine,
    bundled_model_path,
    load_model,
    load_tokenizer,
    request as module,
)
from folo_lib.inputs import InputProcessor
from folo_lib.request import (
    CompletionOutput,
    IncrementalDetokenizer,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    RequestSpec,
    RequestStatus,
    TokenBytes,
    byte_of_character,
    count_held_back,
    find_stop_string,
    merge_metrics,
)
from folo_lib.runner import SampledToken
from folo_lib.sampler import Sampler
from folo_lib.sampling_params import SamplingParams

V = 2048
EOS, EOS_2, IM_START, THINK = 2045, 2043, 2044, 2046


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(bundled_model_path())


@cache
def token_bytes() -> TokenBytes:
    return TokenBytes(tokenizer())


@cache
def id_of_byte() -> dict[int, int]:
    vocab = tokenizer().get_vocab()
    return {byte: vocab[char] for byte, char in bytes_to_unicode().items()}


def as_tokens(raw: bytes) -> list[int]:
    """One token per byte, so that any bytes can be had."""
    return [id_of_byte()[byte] for byte in raw]


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text).input_ids
    return ids


def decode(ids: Sequence[int], skip: bool = True) -> str:
    return str(tokenizer().decode(list(ids), skip_special_tokens=skip))


def detokenizer(**kwargs: Any) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(token_bytes(), SamplingParams(**kwargs))


def stream(ids: Sequence[int], **kwargs: Any) -> tuple[list[str], str | None, int]:
    """The texts as shown, the stop string, and how many tokens were taken."""
    text = detokenizer(max_tokens=None, **kwargs)
    shown, found, taken = [text.text], None, 0
    for token_id in ids:
        found = text.append(token_id)
        taken += 1
        shown.append(text.text)
        if found:
            break
    else:
        found = text.flush()
        shown.append(text.text)
    return shown, found, taken


def complete_part(ids: Sequence[int], skip: bool) -> str:
    """The text that no further token can change, found by trying what may follow."""
    raw = b"".join(
        token_bytes()[i] for i in ids if not (skip and i in (EOS, EOS_2, IM_START))
    )
    if raw[-2:-1] == b"\xed" and 0xA0 <= raw[-1] <= 0xBF:
        # Half a surrogate, encoded: Python's decoder sees it a byte later than it could.
        return decode(as_tokens(raw[:-2]))
    tails = [b"A", *(bytes([b]) * n for b in (0x80, 0xBF) for n in (1, 2, 3))]
    texts = [decode([*ids, *as_tokens(tail)], skip) for tail in tails]
    same = zip(*texts, strict=False)
    return texts[0][: sum(1 for _ in takewhile(lambda c: len(set(c)) == 1, same))]


def brute_force(
    ids: Sequence[int],
    stop: Sequence[str] = (),
    min_tokens: int = 0,
    include: bool = False,
    skip: bool = True,
) -> tuple[list[str], str | None, int]:
    """What `stream` must give: everything decoded and searched again at each token."""

    def search(text: str, old: str, num_tokens: int) -> tuple[str, str] | None:
        found = [
            (start + len(s), i)
            for i, s in enumerate(stop)
            for start in range(len(text))
            if text.startswith(s, start) and start + len(s) > len(old)
        ]
        if not found or num_tokens <= min_tokens:
            return None
        end, i = min(found)
        return text[: end - (0 if include else len(stop[i]))], stop[i]

    shown, old = [""], ""
    for n in range(1, len(ids) + 1):
        text = complete_part(ids[:n], skip)
        if found := search(text, old, n):
            return [*shown, found[0]], found[1], n
        beginnings = [s[:k] for s in stop for k in range(1, len(s))]
        held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        shown.append(text[: len(text) - held])
        old = text
    text = decode(ids, skip)
    if found := search(text, old, len(ids)):
        return [*shown, found[0]], found[1], len(ids)
    return [*shown, text], None, len(ids)


awkward_texts = st.lists(
    st.sampled_from(
        [
            "the cat",
            " ",
            "é",
            "e\u0301",
            "你好",
            "🙂",
            "👩\u200d🚀",
            "❤️",
            "क्षि",
            "\ufffd",
            "\n",
        ]
    ),
    max_size=6,
).map("".join)
any_bytes = st.binary(max_size=14)
likely_bytes = st.lists(
    st.sampled_from(
        list(b"aA\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xe0\xed\xef\xf0\xf4\xff")
    ),
    max_size=10,
).map(bytes)
any_ids = st.lists(st.integers(0, V + 3), max_size=12)
special_ids = st.lists(st.sampled_from([EOS, EOS_2, IM_START, THINK, 32]), max_size=6)
token_ids = st.one_of(
    awkward_texts.map(encode),
    any_bytes.map(as_tokens),
    likely_bytes.map(as_tokens),
    any_ids,
    st.tuples(any_ids, special_ids, likely_bytes.map(as_tokens)).map(
        lambda parts: [i for part in parts for i in part]
    ),
)


class TestTokenBytes:
    def test_spelling_is_that_of_gpt2(self) -> None:
        expected = {char: byte for byte, char in bytes_to_unicode().items()}
        assert byte_of_character() == expected
        assert len(expected) == 256

    def test_every_token_is_what_the_tokenizer_decodes(self) -> None:
        for i in range(V + 4):
            assert token_bytes()[i].decode(errors="replace") == decode([i], skip=False)

    def test_each_id_is_looked_up_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table, seen = TokenBytes(tokenizer()), []
        look_up = tokenizer().convert_ids_to_tokens
        monkeypatch.setattr(
            tokenizer(),
            "convert_ids_to_tokens",
            lambda i: seen.append(i) or look_up(i),  # type: ignore[func-returns-value]
        )
        assert set(table) == set(tokenizer().added_tokens_decoder)
        for _ in range(3):
            assert [table[i] for i in (5, EOS, V + 1)] == [b"&", b"<|im_end|>", b""]
        assert seen == [5, V + 1]

    def test_special_ids(self) -> None:
        assert token_bytes().special_ids == {EOS, EOS_2, IM_START}

    odd = (
        *(
            "<čas>",
            "é x",
            "ñ¡",
            "日本",
            "<|ŧool|>",
            "Ċend",
            "ĠĠĠx",
            "ÃÃ©",
            "\u0100\u0143",
            " x ",
        ),
        *("\n\n#", "<ŀŁ>", "¡", "🙂🙂", "\u00ad", "e\u0301"),
    )

    @pytest.mark.parametrize("special", [False, True])
    def test_added_tokens_are_shown_as_their_content(self, special: bool) -> None:
        """Where all their characters spell bytes, too: `decode` makes `<\\ras>` of `<čas>`."""
        added = copy.deepcopy(tokenizer())
        added.add_tokens(list(self.odd), special_tokens=special)
        new = list(range(V, len(added)))
        content = [added.added_tokens_decoder[i].content for i in new]
        assert len(new) >= len(self.odd) - 1  # "¡" is a byte already
        table = TokenBytes(added)
        assert [table[i].decode() for i in new] == content
        rng = random.Random(0)
        for _ in range(200):
            ids = rng.choices(
                [*new, *new, *range(V), *as_tokens(b"\xc3\xa9\xf0\x9f")], k=8
            )
            for skip in (True, False):
                params = SamplingParams(skip_special_tokens=skip)
                text, run, expected = IncrementalDetokenizer(table, params), [], ""
                for i in ids:
                    text.append(i)
                    hidden = skip and added.added_tokens_decoder.get(i)
                    if hidden and hidden.special:
                        continue
                    if i < V:
                        run.append(i)
                    else:
                        expected += added.decode(run) + content[i - V]
                        run = []
                text.flush()
                assert text.text == expected + added.decode(run)

    def test_added_tokens_outside_the_bytes_spelling_read_as_decode(self) -> None:
        added = copy.deepcopy(tokenizer())
        added.add_tokens(["é x", "日本", "<|x|>", " \n", "š"])
        table, rng = TokenBytes(added), random.Random(1)
        for _ in range(100):
            ids = rng.choices([*range(V, len(added)), *range(V)], k=8)
            text = IncrementalDetokenizer(
                table, SamplingParams(skip_special_tokens=False)
            )
            for i in ids:
                text.append(i)
            text.flush()
            assert text.text == added.decode(ids)

    def test_a_token_of_ordinary_text_keeps_its_bytes_when_it_is_added_too(
        self,
    ) -> None:
        """Else every space would be shown as its spelling."""
        added = copy.deepcopy(tokenizer())
        added.add_tokens(["Ġ", "Ġthe", "é"])
        table = TokenBytes(added)
        for text in ("in the end", "caf\u00e9 \u9999"):
            ids = tokenizer()(text).input_ids
            assert b"".join(table[i] for i in ids).decode() == text

    def strangers() -> Iterator[Any]:  # type: ignore[misc]
        vocab = {"a": 0, "Ġ": 1, "▁a": 2, "<0xC3>": 3, "[UNK]": 4}
        for name, decoder in {
            "none": None,
            "wordpiece": decoders.WordPiece(),
            "metaspace": decoders.Metaspace(),
            "byte-fallback": decoders.Sequence(
                [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
            ),
        }.items():
            backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
            if decoder is not None:
                backend.decoder = decoder
            yield pytest.param(
                PreTrainedTokenizerFast(tokenizer_object=backend), id=name
            )

    @pytest.mark.parametrize("stranger", list(strangers()))
    def test_a_tokenizer_of_another_kind_is_refused(
        self, stranger: PreTrainedTokenizerBase
    ) -> None:
        with pytest.raises(ValueError, match=r"is not a byte-level.*tokenizer=None"):
            InputProcessor(stranger, V, 64)

    def test_the_refusal_says_what_helps_whoever_has_a_folder(self) -> None:
        """With a folder, tokenizer=None alone would read the folder's tokenizer again."""
        stranger = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        )
        folder = bundled_model_path()
        with pytest.raises(ValueError, match=r"load_model\(folder\).*tokenizer=None"):
            LLMEngine(folder, stranger)
        engine = LLMEngine(load_model(folder), tokenizer=None)
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        [output] = engine.generate(
            [{"prompt_token_ids": [5, 6]}], params, use_tqdm=False
        )
        assert len(output.outputs[0].token_ids) == 3 and not output.outputs[0].text


class TestStreaming:
    @given(ids=token_ids, skip=st.booleans())
    @example(ids=as_tokens(b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80"), skip=True)
    @example(ids=as_tokens(b"ok\xf0\x9f"), skip=True)
    @example(ids=[*as_tokens(b"\xf0\x9f"), EOS, *as_tokens(b"\x99\x82")], skip=True)
    @example(ids=[*as_tokens(b"\xf0\x9f"), EOS, *as_tokens(b"\x99\x82")], skip=False)
    @settings(max_examples=400, deadline=None)
    def test_grows_only_and_ends_as_the_tokenizer_decodes(
        self, ids: list[int], skip: bool
    ) -> None:
        shown, found, _ = stream(ids, skip_special_tokens=skip)
        assert found is None
        assert shown[-1] == decode(ids, skip)
        assert all(new.startswith(old) for old, new in pairwise(shown))

    @given(ids=token_ids, skip=st.booleans())
    @settings(max_examples=150, deadline=None)
    def test_shows_at_once_what_is_certain_and_nothing_else(
        self, ids: list[int], skip: bool
    ) -> None:
        shown, _, _ = stream(ids, skip_special_tokens=skip)
        expected = [complete_part(ids[:n], skip) for n in range(len(ids) + 1)]
        assert shown == [*expected, decode(ids, skip)]

    @pytest.mark.parametrize(
        "text", ["naïve", "你好, 世界", "👩\u200d🚀 ❤️", "cafe\u0301"]
    )
    def test_replacement_only_where_the_text_is_cut(self, text: str) -> None:
        ids = encode(text)
        for n in range(len(ids) + 1):
            shown, _, _ = stream(ids[:n])
            assert all("�" not in part for part in shown[:-1])
            assert shown[-1] == decode(ids[:n])
        assert shown[-1] == text

    def test_a_character_comes_with_its_last_token(self) -> None:
        shown, _, _ = stream(encode("hi 🙂!"))
        assert shown == ["", "h", "hi", *["hi "] * 4, "hi 🙂", "hi 🙂!", "hi 🙂!"]

    def test_impossible_bytes_do_not_wait(self) -> None:
        shown, _, _ = stream(as_tokens(b"a\xff\xffb"))
        assert shown == ["", "a", "a�", "a��", "a��b", "a��b"]

    def test_requests_do_not_share_what_is_held(self) -> None:
        one, other = detokenizer(), detokenizer()
        for raw in as_tokens("é".encode()):
            one.append(raw)
            other.append(as_tokens(b"x")[0])
        assert (one.text, other.text) == ("é", "xx")

    def test_flushing_twice_adds_nothing(self) -> None:
        text = detokenizer(stop="##")
        for i in as_tokens(b"a#\xf0"):
            text.append(i)
        assert text.text == "a"
        text.flush()
        text.flush()
        assert text.text == "a#�"


class TestStopStrings:
    @given(
        ids=token_ids,
        data=st.data(),
        min_tokens=st.integers(0, 5),
        include=st.booleans(),
        skip=st.booleans(),
    )
    @settings(max_examples=200, deadline=None)
    def test_equals_brute_force_on_awkward_text(
        self,
        ids: list[int],
        data: st.DataObject,
        min_tokens: int,
        include: bool,
        skip: bool,
    ) -> None:
        """Stop strings are cut from the text itself, some with a wrong end."""
        text, stop = decode(ids, skip), []
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, max(0, len(text) - 1)))
            size = data.draw(st.integers(1, 5))
            stop.append(
                text[start : start + size] + data.draw(st.sampled_from(["", "x", "é"]))
            )
        stop = [s for s in stop if s] or ["x"]
        kwargs = {"stop": stop, "min_tokens": min_tokens}
        ours = stream(
            ids, include_stop_str_in_output=include, skip_special_tokens=skip, **kwargs
        )
        assert ours == brute_force(ids, stop, min_tokens, include, skip)
        assert all(new.startswith(old) for old, new in pairwise(ours[0]))
        if not include and not min_tokens:
            assert not any(s in shown for s in stop for shown in ours[0])

    @given(
        text=st.text("ab🙂", max_size=12),
        stop=st.lists(st.text("ab🙂", min_size=1, max_size=5), min_size=1, max_size=4),
        min_tokens=st.integers(0, 8),
        include=st.booleans(),
        whole=st.booleans(),
    )
    @settings(max_examples=400, deadline=None)
    def test_equals_brute_force_on_two_letters(
        self, text: str, stop: list[str], min_tokens: int, include: bool, whole: bool
    ) -> None:
        """Full of strings that overlap, repeat and contain one another."""
        ids = encode(text) if whole else as_tokens(text.encode())
        ours = stream(
            ids, stop=stop, min_tokens=min_tokens, include_stop_str_in_output=include
        )
        assert ours == brute_force(ids, stop, min_tokens, include)

    @given(
        text=st.text("ab", max_size=12),
        stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    )
    def test_held_back_is_the_longest_beginning_and_less_than_a_stop_string(
        self, text: str, stop: list[str]
    ) -> None:
        held = count_held_back(text, stop)
        possible = [
            k
            for k in range(1, len(text) + 1)
            if any(s[:-1].startswith(text[-k:]) for s in stop)
        ]
        assert held == max(possible, default=0)
        assert held < max(map(len, stop), default=1)

    def test_the_first_to_end_wins_then_the_order(self) -> None:
        assert find_stop_string("xabc", ["bc", "ab"]) == (1, "ab")
        assert find_stop_string("xabc", ["ab", "abc"]) == (1, "ab")
        assert find_stop_string("xabc", ["abc", "ab"]) == (1, "ab")
        assert find_stop_string("xabc", ["abc", "bc", "c"]) == (1, "abc")
        assert find_stop_string("xabc", ["c", "bc", "abc"]) == (3, "c")
        assert find_stop_string("xabc", ["d"]) is None
        assert find_stop_string("xabc", []) is None

    def test_only_what_ends_in_the_new_part_is_found(self) -> None:
        assert find_stop_string("aab", ["a"], num_searched=1) == (1, "a")
        assert find_stop_string("aab", ["a"], num_searched=2) is None
        assert find_stop_string("aab", ["aa", "ab"], num_searched=2) == (1, "ab")

    def test_split_over_tokens(self) -> None:
        ids = encode("Yes. User: hi")
        assert not any("User:" in decode([i]) for i in ids)
        shown, found, taken = stream(ids, stop="User:")
        assert (shown[-1], found) == ("Yes. ", "User:")
        assert decode(ids[:taken]) == "Yes. User:"
        assert shown == ["", "Y", "Yes", "Yes.", *["Yes. "] * 4]

    @pytest.mark.parametrize("stop", ["🙂", "好!", "!🙂", "é", "\u0301"])
    def test_next_to_and_inside_of_wide_characters(self, stop: str) -> None:
        text = "你好!🙂 é e\u0301."
        ids = as_tokens(text.encode())
        shown, found, taken = stream(ids, stop=stop)
        assert (shown[-1], found) == (text[: text.index(stop)], stop)
        end = text.index(stop) + len(stop)
        assert taken == len(text[:end].encode())
        assert not any("�" in part for part in shown)

    def test_two_at_once_in_one_token(self) -> None:
        [whole] = encode(" the")
        for stop, text in [
            (["he", "t"], " "),
            (["t", "he"], " "),
            (["e", "h"], " t"),
            (["the", "th"], " "),
        ]:
            shown, found, _ = stream([whole], stop=stop)
            assert shown[-1] == text
            assert found == {" t": "h"}.get(text, "th" if "th" in stop else "t")

    @pytest.mark.parametrize(
        ("token", "stop", "reason", "text"),
        [
            ("abc", ["abc", "b"], "b", "a"),
            ("xaby", ["aby", "b"], "b", "xa"),
            ("ab", ["b", "ab"], "b", "a"),
            ("ab", ["ab", "b"], "ab", ""),
        ],
    )
    def test_the_one_that_is_complete_first(
        self, token: str, stop: list[str], reason: str, text: str
    ) -> None:
        added = copy.deepcopy(tokenizer())
        added.add_tokens([f"#{token}"])  # no token of the vocabulary is all of it
        for ids in ([V], as_tokens(f"#{token}".encode())):
            params = SamplingParams(stop=stop)
            detokenizer = IncrementalDetokenizer(TokenBytes(added), params)
            found = next(f for i in ids if (f := detokenizer.append(i)))
            assert (found, detokenizer.text) == (reason, f"#{text}")

    @given(
        text=st.text("ab🙂é\ufffd", max_size=12),
        tail=st.sampled_from([b"", b"\xf0\x9f", b"\xff", b"\xe2\x82A"]),
        stop=st.lists(
            st.text("ab🙂\ufffd", min_size=1, max_size=4), min_size=1, max_size=4
        ),
        include=st.booleans(),
        ignored=st.integers(0, 20),
        data=st.data(),
    )
    @settings(max_examples=500, deadline=None)
    def test_text_and_reason_do_not_depend_on_the_cutting(
        self,
        text: str,
        tail: bytes,
        stop: list[str],
        include: bool,
        ignored: int,
        data: st.DataObject,
    ) -> None:
        """Any cutting of the bytes into tokens, as byte by byte; `min_tokens` at a cut."""
        raw = text.encode() + tail
        ignored = min(ignored, len(raw))
        cuts = data.draw(st.sets(st.integers(0, len(raw)))) | {0, ignored, len(raw)}
        pieces = [raw[a:b] for a, b in pairwise(sorted(cuts))]
        num_ignored = sum(cut < ignored for cut in cuts)
        results = []
        for parts, min_tokens in [
            (pieces, num_ignored),
            ([bytes([byte]) for byte in raw], ignored),
        ]:
            table = TokenBytes(tokenizer())
            table.update(enumerate(parts))
            params = SamplingParams(
                stop=stop,
                include_stop_str_in_output=include,
                min_tokens=min_tokens,
                max_tokens=None,
                skip_special_tokens=False,
            )
            detokenizer = IncrementalDetokenizer(table, params)
            found = None
            for i in range(len(parts)):
                if found := detokenizer.append(i):
                    break
            results.append((found or detokenizer.flush(), detokenizer.text))
        assert results[0] == results[1]

    def test_a_false_alarm_is_shown_when_it_is_over(self) -> None:
        shown, found, _ = stream(as_tokens(b"a##b#"), stop="###")
        assert shown == ["", "a", "a", "a", "a##b", "a##b", "a##b#"]
        assert found is None

    def test_what_comes_after_in_the_same_token_is_dropped(self) -> None:
        [whole] = encode(" the")
        assert stream([whole], stop="h")[0][-1] == " t"
        assert (
            stream([whole], stop="h", include_stop_str_in_output=True)[0][-1] == " th"
        )

    def test_half_a_character_after_the_stop_string_is_dropped(self) -> None:
        added = copy.deepcopy(tokenizer())
        added.add_tokens(["#Ã"])  # bytes: "#", and the first of two
        text = IncrementalDetokenizer(TokenBytes(added), SamplingParams(stop="#"))
        assert text.append(V) == "#"
        text.flush()
        assert text.text == ""

    def test_a_stop_string_may_begin_before_min_tokens_and_must_end_after(self) -> None:
        ids = as_tokens(b"##a##")
        assert stream(ids, stop="##")[1:] == ("##", 2)
        assert stream(ids, stop="##", min_tokens=1)[1:] == ("##", 2)
        assert stream(ids, stop="##", min_tokens=2)[1:] == ("##", 5)
        assert stream(ids, stop="##", min_tokens=2)[0][-1] == "##a"
        assert stream(ids, stop="##", min_tokens=5)[1:] == (None, 5)
        assert stream(as_tokens(b"###"), stop="##", min_tokens=2)[0][-1] == "#"

    def test_the_last_replacement_may_complete_one(self) -> None:
        assert stream(as_tokens(b"ab\xf0\x9f"), stop="b�")[0][-1] == "a"

    def test_special_tokens_are_text_only_if_they_are_shown(self) -> None:
        ids = [*encode("a"), EOS, *encode("b")]
        assert stream(ids, stop="<|im_end|>")[:2] == (["", "a", "a", "ab", "ab"], None)
        shown, found, _ = stream(ids, stop="<|im_end|>", skip_special_tokens=False)
        assert (shown[-1], found) == ("a", "<|im_end|>")
        assert stream(ids, stop="ab")[1] == "ab"


class TestCost:
    @pytest.mark.parametrize("stop", [None, ["User:", "a#b"], ["x" * 40 + "y"]])
    def test_work_per_token_does_not_grow(
        self, stop: list[str] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Characters searched and bytes decoded, of every token of a long text."""
        searched: list[int] = []
        for name in ("find_stop_string", "count_held_back"):
            function = getattr(module, name)

            def counting(text: str, *rest: Any, function: Any = function) -> Any:
                searched[-1] += len(text)
                return function(text, *rest)

            monkeypatch.setattr(module, name, counting)
        text = detokenizer(stop=stop)
        decoded = count_bytes(text)
        ids = encode("Use a 🙂 cup. Users wait. xxxx" + "x" * 60) * 60
        for i in ids:
            searched.append(0)
            text.append(i)
        longest = max(len(token_bytes()[i]) for i in ids)
        assert sum(decoded) == sum(len(token_bytes()[i]) for i in ids)
        assert max(decoded) == longest
        assert max(searched) <= 2 * (max(map(len, stop or ["x"])) - 1 + longest)
        half = len(ids) // 2
        assert max(searched[half:]) == max(searched[:half])
        assert text.text == decode(ids)[: len(text.text)]

    def test_text_is_joined_only_when_asked_for(self) -> None:
        text = detokenizer()
        for i in as_tokens(b"abcdef"):
            text.append(i)
        assert max(map(len, text._shown)) == 1
        assert text.text == "abcdef"
        assert text._shown == ["abcdef"]

    def test_a_request_copies_nothing_and_passes_the_same_list(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        check = module.Sampler.check_stop_conditions
        monkeypatch.setattr(
            module.Sampler,
            "check_stop_conditions",
            staticmethod(lambda ids, *rest: seen.append(ids) or check(ids, *rest)),
        )
        request = make(max_tokens=None)
        for i in range(5):
            request.append_token(SampledToken(i))
        assert all(ids is request.output_token_ids for ids in seen)
        assert len(seen) == 5


def count_bytes(text: IncrementalDetokenizer) -> list[int]:
    """A list that grows by the bytes of each call to the UTF-8 decoder."""
    counts: list[int] = []
    decoder = text._decoder

    class Counting:
        def decode(self, raw: bytes, final: bool = False) -> str:
            counts.append(len(raw))
            return decoder.decode(raw, final)

    text._decoder = Counting()  # type: ignore[assignment]
    return counts


def make(
    prompt: Any = "hi", room: int = 64, eos: Sequence[int] = (EOS, EOS_2), **kwargs: Any
) -> Request:
    processor = InputProcessor(tokenizer(), V, room, eos)
    [request] = processor.process_request(prompt, SamplingParams(**kwargs))
    return request


def run(ids: Sequence[int], **kwargs: Any) -> tuple[str, str | None, Any, int]:
    """Text, finish reason, stop reason and number of tokens of a request."""
    request = make(**kwargs)
    request.start()
    for i in ids:
        if request.status.is_finished:
            break
        request.append_token(SampledToken(i))
    status = request.status.finish_reason
    return request.text, status, request.stop_reason, len(request.output_token_ids)


CAT = encode("A cat sat.")
DOT = CAT[-1]


class TestEndings:
    def test_length(self) -> None:
        assert run(CAT, max_tokens=3) == ("A cat sat", "length", None, 3)
        assert run(CAT, max_tokens=5) == ("A cat sat.", None, None, 4)

    def test_length_that_the_model_leaves(self) -> None:
        prompt = [1] * 62
        assert run(CAT, prompt=prompt, max_tokens=None) == ("A cat", "length", None, 2)
        assert run(CAT, prompt=prompt) == ("A cat", "length", None, 2)

    def test_eos(self) -> None:
        assert run([*CAT, EOS, *CAT]) == ("A cat sat.", "stop", None, 5)

    def test_eos_on_the_last_allowed_token(self) -> None:
        assert run([*CAT, EOS], max_tokens=5) == ("A cat sat.", "stop", None, 5)

    def test_a_second_eos_id_names_itself(self) -> None:
        assert run([*CAT, EOS_2], max_tokens=5) == ("A cat sat.", "stop", EOS_2, 5)

    def test_eos_ids_come_from_the_generation_config(self) -> None:
        assert run([*CAT, EOS, DOT], eos=(DOT,)) == ("A cat sat", "stop", DOT, 4)
        assert run([EOS, DOT], eos=(DOT,), skip_special_tokens=False) == (
            ("<|im_end|>", "stop", DOT, 2)
        )

    def test_a_stop_id(self) -> None:
        assert run(CAT, stop_token_ids=[DOT]) == ("A cat sat", "stop", DOT, 4)
        assert run(CAT, stop_token_ids=[DOT], max_tokens=4)[1:3] == ("stop", DOT)

    def test_ignoring_eos(self) -> None:
        ids = [EOS, *CAT, EOS_2, DOT]
        assert run(ids, ignore_eos=True) == ("A cat sat..", None, None, 7)
        stops = {"ignore_eos": True, "stop_token_ids": [DOT]}
        assert run(ids, **stops) == ("A cat sat", "stop", DOT, 5)
        stops = {"ignore_eos": True, "stop_token_ids": [EOS_2]}
        assert run(ids, **stops) == ("A cat sat.", "stop", EOS_2, 6)

    def test_text_of_a_stop_id(self) -> None:
        shown = {"include_stop_str_in_output": True}
        assert run(CAT, stop_token_ids=[DOT], **shown)[0] == "A cat sat."
        assert run([*CAT, EOS], **shown)[0] == "A cat sat."
        both = {**shown, "skip_special_tokens": False}
        assert run([*CAT, EOS], **both)[0] == "A cat sat.<|im_end|>"
        assert run([*CAT, EOS], skip_special_tokens=False)[0] == "A cat sat."

    def test_half_a_character_before_the_end(self) -> None:
        half = as_tokens(b"ok\xf0\x9f")
        assert run([*half, EOS]) == ("ok�", "stop", None, 5)
        assert run(half, max_tokens=4) == ("ok�", "length", None, 4)

    def test_what_is_held_is_given_up_at_every_end(self) -> None:
        ids = as_tokens(b"ok##")
        assert run(ids, stop="###")[0] == "ok"
        assert run(ids, stop="###", max_tokens=4) == ("ok##", "length", None, 4)
        assert run([*ids, EOS], stop="###") == ("ok##", "stop", None, 5)

    def test_a_stop_string(self) -> None:
        assert run(CAT, stop="t s") == ("A ca", "stop", "t s", 3)
        assert run(CAT, stop=["zz", "t s"], include_stop_str_in_output=True) == (
            ("A cat s", "stop", "t s", 3)
        )

    def test_a_stop_string_on_the_last_allowed_token(self) -> None:
        assert run(CAT, stop="t s", max_tokens=3) == ("A ca", "stop", "t s", 3)
        assert run(as_tokens(b"a\xf0"), stop="a�", max_tokens=2) == (
            ("", "stop", "a�", 2)
        )

    def test_an_id_outranks_a_stop_string_of_the_same_token(self) -> None:
        kwargs = {"stop_token_ids": [DOT], "include_stop_str_in_output": True}
        assert run(CAT, stop=".", **kwargs) == ("A cat sat.", "stop", DOT, 4)
        assert run(CAT, stop="t.", **kwargs) == ("A cat sat.", "stop", DOT, 4)
        assert run(CAT, stop="t.", stop_token_ids=[DOT]) == (
            "A cat sat",
            "stop",
            DOT,
            4,
        )

    def test_min_tokens(self) -> None:
        """The sampler forbids EOS before; stop strings wait here."""
        ids = as_tokens(b"#a#b#")
        assert run(ids, stop="#")[1:] == ("stop", "#", 1)
        assert run(ids, stop="#", min_tokens=1) == ("#a", "stop", "#", 3)
        assert run(ids, stop="#", min_tokens=2) == ("#a", "stop", "#", 3)
        assert run(ids, stop="#", min_tokens=3) == ("#a#b", "stop", "#", 5)

    def test_min_tokens_meets_max_tokens(self) -> None:
        ids = as_tokens(b"#a#")
        limits = {"min_tokens": 3, "max_tokens": 3}
        assert run(ids, stop="#", **limits) == ("#a#", "length", None, 3)
        assert run([*ids[:2], DOT], stop_token_ids=[DOT], **limits) == (
            ("#a.", "length", None, 3)
        )
        limits["min_tokens"] = 2
        assert run(ids, stop="#", **limits) == ("#a", "stop", "#", 3)

    def test_without_text(self) -> None:
        assert run([*CAT, EOS], detokenize=False) == ("", "stop", None, 5)

    def test_without_a_tokenizer(self) -> None:
        processor = InputProcessor(None, V, 64, (EOS,))
        params = SamplingParams(max_tokens=3, logprobs=0)
        [request] = processor.process_request([1, 2], params)
        for i in (5, 6, 7):
            request.append_token(SampledToken(i, [(i, -1.0, 1)]))
        assert (request.text, request.status.finish_reason) == ("", "length")
        assert request.logprobs[0] == {5: Logprob(-1.0, 1, None)}
        [request] = processor.process_request([1, 2], params)
        request.append_token(SampledToken(EOS))
        assert (request.status.finish_reason, request.stop_reason) == ("stop", EOS)

    def test_the_model_length_is_no_reason_for_a_stop_id_in_the_text(self) -> None:
        assert run([*CAT, EOS], prompt=[1] * 59) == ("A cat sat.", "stop", None, 5)


class TestStates:
    def test_finish_reasons(self) -> None:
        reasons = {status.name: status.finish_reason for status in RequestStatus}
        assert reasons == {
            "WAITING": None,
            "RUNNING": None,
            "PREEMPTED": None,
            "FINISHED_STOPPED": "stop",
            "FINISHED_LENGTH": "length",
            "FINISHED_ABORTED": "abort",
            "FINISHED_ERROR": "error",
        }
        for status in RequestStatus:
            assert status.is_finished == (status.finish_reason is not None)

    def test_a_life(self) -> None:
        request = make(max_tokens=2)
        assert request.status is RequestStatus.WAITING
        request.start()
        assert request.status is RequestStatus.RUNNING
        request.append_token(SampledToken(5))
        request.status = RequestStatus.PREEMPTED
        request.start()
        assert request.status is RequestStatus.RUNNING
        request.append_token(SampledToken(6))
        assert request.status is RequestStatus.FINISHED_LENGTH

    def test_a_late_token_is_an_error_and_changes_nothing(self) -> None:
        request = make(max_tokens=1)
        request.append_token(SampledToken(5))
        with pytest.raises(RuntimeError, match="got a token when FINISHED_LENGTH"):
            request.append_token(SampledToken(6))
        assert request.output_token_ids == [5]
        assert request.metrics.num_output_tokens == 1

    def test_abort_shows_what_was_held(self) -> None:
        request = make(stop="###")
        for i in as_tokens(b"ok#\xf0"):
            request.append_token(SampledToken(i))
        assert request.text == "ok"
        request.finish(RequestStatus.FINISHED_ABORTED, now=3.0)
        assert request.text == "ok#�"
        assert request.status.finish_reason == "abort"
        assert request.metrics.finished_time == 3.0
        assert request.error is None

    def test_a_late_abort_changes_nothing(self) -> None:
        request = make(max_tokens=1)
        request.append_token(SampledToken(5), now=2.0)
        request.finish(RequestStatus.FINISHED_ABORTED, "late", now=9.0)
        assert request.status is RequestStatus.FINISHED_LENGTH
        assert request.metrics.finished_time == 2.0
        assert request.error is None

    def test_an_error_of_the_detokenizer_can_be_recorded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = make(stop="###")
        for i in as_tokens(b"ok#"):
            request.append_token(SampledToken(i))

        def broken(*args: object, **kwargs: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(IncrementalDetokenizer, "append", broken)
        monkeypatch.setattr(IncrementalDetokenizer, "flush", broken)
        with pytest.raises(RuntimeError, match="broken"):
            request.append_token(SampledToken(5))
        request.finish(RequestStatus.FINISHED_ERROR, "broken")
        output = RequestOutput.from_requests([request])
        assert output.finished
        assert output.error == "broken"
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].text == "ok"

    def test_an_error_elsewhere_shows_what_was_held(self) -> None:
        request = make(stop="###")
        for i in as_tokens(b"ok#"):
            request.append_token(SampledToken(i))
        request.finish(RequestStatus.FINISHED_ERROR, "the model is ill")
        assert (request.text, request.error) == ("ok#", "the model is ill")

    def test_token_ids_of_prompt_and_output(self) -> None:
        request = make(prompt=[7, 8, 9])
        assert (request.num_tokens, request.get_token_ids()) == (3, [7, 8, 9])
        for i in (10, 11):
            request.append_token(SampledToken(i))
        whole = [7, 8, 9, 10, 11]
        assert (request.num_tokens, request.get_token_ids()) == (5, whole)
        for start in range(7):
            assert request.get_token_ids(start) == whole[start:]
            for stop in range(7):
                assert request.get_token_ids(start, stop) == whole[start:stop]

    def test_preempted_and_back(self) -> None:
        request = make(prompt=[7, 8, 9])
        request.num_computed_tokens = 2
        request.start(now=2.0)
        assert request.metrics.num_cached_tokens == 2
        request.append_token(SampledToken(10), now=3.0)
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        assert not request.status.is_finished
        assert request.status.finish_reason is None
        request.num_computed_tokens = 3  # found in the cache, this time more of it
        request.start(now=9.0)
        assert request.status is RequestStatus.RUNNING
        assert request.metrics.first_scheduled_time == 2.0
        assert request.metrics.num_cached_tokens == 2
        assert request.get_token_ids(3) == [10]

    @pytest.mark.parametrize("place", ["ids", "logprobs", "stop", "text", "count"])
    def test_rewind_keeps_what_came_whole(
        self, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        """Ctrl-C in the middle of any token; then the same token once more."""
        owner, name = {
            "ids": (module, "label_logprobs"),
            "logprobs": (Sampler, "check_stop_conditions"),
            "stop": (IncrementalDetokenizer, "append"),
            "text": (RequestMetrics, "record_token"),
            "count": (IncrementalDetokenizer, "flush"),
        }[place]
        original = getattr(owner, name)
        ids = as_tokens("a ##🙂#é".encode())
        tokens = [SampledToken(i, [(i, -0.1 * n, 1)]) for n, i in enumerate(ids)]
        wanted: dict[str, Any] = {"stop": "###", "max_tokens": len(ids), "logprobs": 0}
        alone = make(**wanted)
        for token in tokens:
            alone.append_token(token, now=1.0)
        for fails_at in range(len(ids)):
            request = make(**wanted)
            request.start(now=0.0)
            request.block_ids, request.num_computed_tokens = [3], 2
            for n, token in enumerate(tokens):
                if n == fails_at:
                    monkeypatch.setattr(owner, name, interrupt)
                    with suppress(KeyboardInterrupt):
                        request.append_token(token, now=1.0)
                    monkeypatch.setattr(owner, name, original)
                    request.rewind()
                    assert (request.block_ids, request.num_computed_tokens) == ([], 0)
                if len(request.output_token_ids) == n:
                    request.append_token(token, now=1.0)
            ours, theirs = map(CompletionOutput.from_request, (request, alone))
            assert ours == theirs
            assert request.metrics.num_output_tokens == len(ids)

    def test_rewind_of_what_is_whole_changes_nothing(self) -> None:
        request = make(stop="###")
        for i in as_tokens(b"ok#"):
            request.append_token(SampledToken(i))
        detokenizer = request.detokenizer
        request.rewind()
        assert request.detokenizer is detokenizer
        assert request.text == "ok" and request.metrics.num_output_tokens == 3

    def test_prompt_logprobs_come_in_chunks_and_again(self) -> None:
        request = make(prompt=[5, 6, 7, 8], prompt_logprobs=0)
        scores = [[(6, -1.0, 2)], [(7, -2.0, 3)], [(8, -3.0, 4)]]

        def told() -> list[Any] | None:
            return RequestOutput.from_requests([request]).prompt_logprobs

        assert told() == [None]
        request.take_prompt_logprobs(1, scores[:2])
        request.take_prompt_logprobs(3, scores[2:])
        whole = told()
        assert whole is not None and len(whole) == 4
        assert [next(iter(one)) for one in whole[1:]] == [6, 7, 8]
        assert whole[2] == {7: Logprob(-2.0, 3, tokenizer().decode([7]))}
        request.take_prompt_logprobs(1, scores[:1])  # after a preemption: none is lost
        assert told() == whole
        assert RequestOutput.from_requests([make()]).prompt_logprobs is None

    def test_what_was_asked_for(self) -> None:
        assert issubclass(Request, RequestSpec)
        spec = RequestSpec(
            request_id="r",
            index=2,
            prompt_token_ids=[5],
            params=SamplingParams(),
            seed=0,
            max_tokens=1,
        )
        assert (spec.sample_id, spec.stop_token_ids) == ("r-2", ())

    def test_what_is_left_to_run(self) -> None:
        request = make(prompt=[5, 6, 7], max_tokens=3)
        left = []
        for num_computed, num_read in [
            (0, 0),  # the prompt
            (2, 0),  # the rest of it
            (3, 0),  # its first token is being drawn
            (3, 1),  # and is read
            (4, 0),  # it ran unread: the second is being drawn
            (4, 1),
            (4, 2),
            (5, 1),  # the third is the last, which nobody runs
            (5, 2),
        ]:
            request.num_computed_tokens = num_computed
            request.output_token_ids = [9] * num_read
            left.append(request.num_uncomputed_tokens)
        assert left == [3, 1, 1, 1, 1, 1, 1, 0, 0]
        request = make(prompt=[5, 6], max_tokens=1)
        assert request.num_uncomputed_tokens == 2
        request.num_computed_tokens = 2
        assert request.num_uncomputed_tokens == 0

    def test_stop_token_ids(self) -> None:
        assert make().stop_token_ids == (EOS, EOS_2)
        assert make(stop_token_ids=[DOT, EOS]).stop_token_ids == (EOS, EOS_2, DOT)
        assert make(stop_token_ids=[DOT], ignore_eos=True).stop_token_ids == (DOT,)
        assert make(ignore_eos=True).stop_token_ids == ()


class TestMetrics:
    def test_of_one_sample(self) -> None:
        metrics = RequestMetrics(10.0)
        assert (metrics.queue_time, metrics.ttft, metrics.tpot) == (None, None, None)
        assert (metrics.total_time, metrics.throughput) == (None, None)
        metrics.first_scheduled_time = 11.0
        for now in (13.0, 13.5, 14.0, 16.0):
            metrics.record_token(now)
        assert metrics.queue_time == 1.0
        assert metrics.prefill_time == 2.0
        assert metrics.ttft == 3.0
        assert metrics.tpot == (16.0 - 13.0) / 3
        assert metrics.total_time is None
        metrics.finished_time = 18.0
        assert metrics.total_time == 8.0
        assert metrics.throughput == 4 / 8

    def test_of_one_token(self) -> None:
        metrics = RequestMetrics(1.0, 1.0)
        metrics.record_token(2.0)
        assert (metrics.ttft, metrics.tpot) == (1.0, 0.0)

    def test_of_a_request(self) -> None:
        processor = InputProcessor(tokenizer(), V, 64, (EOS,))
        [request] = processor.process_request("hi", arrival_time=0.0)
        request.start(now=0.0)
        request.start(now=5.0)  # again, after it was preempted
        for now, i in enumerate([*CAT, EOS], start=1):
            request.append_token(SampledToken(i), now=float(now))
        assert request.metrics == RequestMetrics(
            arrival_time=0.0,
            first_scheduled_time=0.0,
            first_token_time=1.0,
            last_token_time=5.0,
            finished_time=5.0,
            num_output_tokens=5,
            decode_time=4.0,
            num_decode_tokens=4,
        )

    def test_the_clock_is_taken_where_no_time_is_given(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter(range(100))
        monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
        request = make(max_tokens=2)
        request.start()
        request.append_token(SampledToken(5))
        request.append_token(SampledToken(5))
        metrics = request.metrics
        assert [metrics.arrival_time, metrics.first_scheduled_time] == [0, 1]
        assert [metrics.first_token_time, metrics.last_token_time] == [2, 3]
        assert metrics.finished_time == 3
        other = make()
        other.finish(RequestStatus.FINISHED_ABORTED)
        assert other.metrics.total_time == 1

    def test_of_several_samples(self) -> None:
        one = RequestMetrics(0.0, 1.0, peak_memory=5)
        two = RequestMetrics(0.0, 4.0, peak_memory=9, num_cached_tokens=16)
        for now in (2.0, 3.0, 4.0):
            one.record_token(now)
        one.finished_time = 4.0
        both = merge_metrics([one, two])
        assert both.finished_time is None
        assert (both.first_token_time, both.last_token_time) == (2.0, 4.0)
        for now in (5.0, 9.0):
            two.record_token(now)
        two.finished_time = 9.0
        both = merge_metrics([one, two])
        assert (both.queue_time, both.ttft, both.total_time) == (1.0, 2.0, 9.0)
        assert (both.first_token_time, both.last_token_time) == (2.0, 9.0)
        assert both.tpot == (2.0 + 4.0) / (2 + 1)  # not the pause between the samples
        assert both.throughput == 5 / 9
        assert (both.peak_memory, both.num_cached_tokens) == (9, 16)
        alone = merge_metrics([one])
        assert alone == one and alone is not one  # which goes on
        assert merge_metrics([RequestMetrics(2.0), RequestMetrics(1.0)]) == (
            RequestMetrics(1.0)
        )


class TestOutputs:
    def test_everything_in_its_place(self) -> None:
        processor = InputProcessor(tokenizer(), V, 64, (EOS,))
        params = SamplingParams(n=2, seed=7)
        requests = processor.process_request("hi", params, request_id="r")
        for i in [*CAT, EOS]:
            requests[0].append_token(SampledToken(i))
        output = RequestOutput.from_requests(requests)
        assert (output.request_id, output.prompt) == ("r", "hi")
        assert output.prompt_token_ids == encode("hi")
        assert (output.finished, output.error) == (False, None)
        assert output.outputs == [
            CompletionOutput(0, "A cat sat.", [*CAT, EOS], None, None, "stop", None, 7),
            CompletionOutput(1, "", [], None, None, None, None, 7),
        ]
        requests[1].finish(RequestStatus.FINISHED_ERROR, "out of luck")
        output = RequestOutput.from_requests(requests)
        assert (output.finished, output.error) == (True, "out of luck")

    def test_snapshots_do_not_change(self) -> None:
        request = make(logprobs=1)
        request.append_token(SampledToken(CAT[0], [(CAT[0], -1.0, 1)]))
        before = RequestOutput.from_requests([request])
        kept = copy.deepcopy(before)
        request.append_token(SampledToken(CAT[1], [(CAT[1], -2.0, 1)]))
        request.finish(RequestStatus.FINISHED_ABORTED)
        assert before == kept
        before.prompt_token_ids.clear()
        before.outputs[0].token_ids.clear()
        assert request.prompt_token_ids == encode("hi")
        assert request.output_token_ids == CAT[:2]

    def test_logprobs(self) -> None:
        request = make(logprobs=2)
        half = as_tokens(b"\xf0")[0]
        top = [(half, -0.5, 3), (DOT, -0.1, 1), (half, -0.5, 2), (EOS, -0.4, 2)]
        request.append_token(SampledToken(half, top))
        request.append_token(SampledToken(DOT, [(DOT, -0.25, 1)]))
        output = CompletionOutput.from_request(request)
        assert output.logprobs == [
            {
                half: Logprob(-0.5, 3, "�"),
                DOT: Logprob(-0.1, 1, "."),
                EOS: Logprob(-0.4, 2, "<|im_end|>"),
            },
            {DOT: Logprob(-0.25, 1, ".")},
        ]
        assert next(iter(output.logprobs[0])) == half
        assert output.cumulative_logprob == -0.75

    def test_no_logprobs_unless_asked_for(self) -> None:
        output = CompletionOutput.from_request(make())
        assert output.logprobs is output.cumulative_logprob is None
        output = CompletionOutput.from_request(make(logprobs=0))
        assert (output.logprobs, output.cumulative_logprob) == ([], 0.0)


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_random_seeded_soak() -> None:
    """Whole requests with everything switched at random, against brute force."""
    rng = random.Random(0)
    for _ in range(300):
        raw = "".join(rng.choices(["a", "b", "#", "é", "🙂", "\ufffd"], k=10)).encode()
        ids = as_tokens(raw[: rng.randrange(1, len(raw) + 1)])
        stop = [
            "".join(rng.choices("ab#é🙂\ufffd", k=rng.choice([1, 2, 3]))) for _ in "12"
        ]
        min_tokens, include = rng.choice([0, 0, 3]), rng.random() < 0.5
        shown, found, taken = brute_force(ids, stop, min_tokens, include)
        text, reason, stop_reason, length = run(
            ids,
            stop=stop,
            min_tokens=min_tokens,
            include_stop_str_in_output=include,
            max_tokens=max(len(ids), min_tokens),
        )
        if length < min_tokens:
            continue
        assert (text, stop_reason, length) == (shown[-1], found, taken)
        assert reason == ("stop" if found else "length")
