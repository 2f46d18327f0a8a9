"""Page 09: a text that leaves token by token, and what a stop string holds back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_lib.course.figures import DECODE, Look
from folo_lib.course.motion.base import Canvas, Guess, Motion, player, text_field
from folo_lib.request import IncrementalDetokenizer, TokenBytes
from folo_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["step_tokens"]

TEXT = " A friendly mouse named Felix met a mouse named Fox. Fox"
STOP = "mouse named Fox"
LIMIT, NUM_CHIPS, NUM_LINES = 72, 40, 2
WIDTH, TOP, ROW = (
    336,
    28,
    28,
)  # pixels: of a row of chips, their first edge, and their distance
LETTER, LINE = 7.83, 42  # pixels of a letter of 13, and letters in a line
HELD, SENT = 190, 240  # where the two begin
AHEAD = Look("#ECECEC", "", "", "")


def label_bytes(token: bytes) -> str:
    """A token in a chip: spaces visible, the bytes of a split character in hex."""
    try:
        return token.decode().replace(" ", "·")
    except UnicodeDecodeError:
        return "<" + token.hex(" ").upper() + ">"


def lay_out(labels: list[str]) -> list[tuple[float, int, float]]:
    """Left edge, upper edge and width of each chip, in rows, as the script does it."""
    x, y, places = 2.0, TOP, []
    for label in labels:
        wide = round(LETTER * len(label) + 9, 2)
        if x + wide > WIDTH and x > 2:
            x, y = 2.0, y + ROW
        places.append((x, y, wide))
        x = round(x + wide + 3, 2)
    return places


def step_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: str = TEXT,
    stop: str = STOP,
    step: int = 3,
) -> Motion:
    """A text and a stop string to type, and token by token what is held back and what is sent.

    Args:
        tokenizer: byte-level, with a small vocabulary, which goes into the figure.
        text: what the model writes in the first state.
        stop: the stop string.
        step: how many tokens it has written in the first state.

    Raises:
        ValueError: if the vocabulary has more than 5,000 tokens.
    """
    added = set(tokenizer.added_tokens_decoder)
    vocabulary = {
        i: token for token, i in tokenizer.get_vocab().items() if i not in added
    }
    if len(vocabulary) > 5000:
        raise ValueError(
            f"a vocabulary of {len(vocabulary):,} tokens is too large to show."
        )
    words = [vocabulary.get(i, "") for i in range(max(vocabulary) + 1)]
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer(text).input_ids
    reader = IncrementalDetokenizer(token_bytes, SamplingParams(stop=[stop]))
    for token_id in ids[:step]:
        reader.append(token_id)
    whole = b"".join(token_bytes[i] for i in ids[:step]).decode()
    held = whole[len(reader.text) :]

    canvas = Canvas(340, 296)
    canvas.text((2, 12), "tokens of the model", anchor="start", font=13)
    labels = [label_bytes(token_bytes[i]) for i in ids]
    places = lay_out(labels)
    for i in range(NUM_CHIPS):
        is_there = i < len(ids)
        x, y, wide = places[i] if is_there else (0, 0, 10)
        is_next = is_there and i == step - 1
        for key, look, is_on in (
            (f"ahead{i}", AHEAD, is_there and i >= step),
            (f"now{i}", DECODE, is_next),
            (f"past{i}", None, is_there and i < step - 1),
        ):
            canvas.box(
                (x, y),
                (wide, 22),
                labels[i] if is_there else "",
                look,
                key,
                font=13,
                mono=True,
                alpha=float(is_on),
                write=True,
            )
    canvas.text((2, HELD - 12), "held back", anchor="start", font=13)
    canvas.box((2, HELD), (WIDTH, 22), dash="--")
    shown = held.replace(" ", "·")
    canvas.text((8, HELD + 11), shown, "held", anchor="start", font=13, mono=True)
    canvas.text((2, SENT - 8), "sent to the reader", anchor="start", font=13)
    canvas.box((2, SENT + 4), (WIDTH, 18 * NUM_LINES + 8))
    for i in range(NUM_LINES):
        line = reader.text[LINE * i : LINE * (i + 1)].replace(" ", "·")
        at = 8, SENT + 17 + 18 * i
        canvas.text(at, line, f"sent{i}", anchor="start", font=13, mono=True)
    last = labels[step - 1]
    return Motion(
        "a text with a stop string",
        canvas,
        f"After {step} tokens, the last of them “{last}”, “{shown}” is held back.",
        [
            text_field("text", "text", text, limit=LIMIT),
            text_field("stop", "stop string", stop, size=16, limit=30),
            *(
                knob.replace('value="0"', f'value="{step}"')
                for knob in player(len(ids) + 1)
            ),
        ],
        STOP_SCRIPT,
        {
            "vocabulary": words,
            "top": TOP,
            "row": ROW,
            "width": WIDTH,
            "letter": LETTER,
            "line": LINE,
            "lines": NUM_LINES,
            "chips": NUM_CHIPS,
        },
        Guess(
            f"The stop string is “{stop}”, and the last token was “{last}”. What happens to "
            "it?",
            ["it is sent", "it is held back", "half of it is sent"],
            1,
            f"It is held back: “{held}” may be the beginning of the stop string, and what was sent "
            "cannot be taken back. Step on: once it is clear that it was not, it is sent. Then "
            "type a text and a stop string of your own; try an emoji, too.",
        ),
    )


STOP_SCRIPT = """
// Byte-level BPE: of all neighbours the pair whose token is the oldest is merged first.
const printable = [];
for (let b = 0; b < 256; b++) if ((b > 32 && b < 127) || (b > 160 && b < 173) || b > 173) printable.push(b);
const spelled = new Map(printable.map((b) => [b, String.fromCodePoint(b)]));
for (let b = 0, n = 0; b < 256; b++) if (!spelled.has(b)) spelled.set(b, String.fromCodePoint(256 + n++));
const byteOf = new Map([...spelled].map(([b, letter]) => [letter, b]));
const rank = new Map(data.vocabulary.map((word, i) => [word, i]));
const words = new RegExp("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])" +
  "|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*" +
  "|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+", "gu");
const encode = (text) => (text.match(words) || []).flatMap((word) => {
  const parts = [...new TextEncoder().encode(word)].map((b) => spelled.get(b));
  for (;;) {
    let best = Infinity, at = -1;
    for (let i = 0; i + 1 < parts.length; i++) {
      const found = rank.get(parts[i] + parts[i + 1]);
      if (found < best) [best, at] = [found, i];
    }
    if (at < 0) return parts;
    parts.splice(at, 2, parts[at] + parts[at + 1]);
  }
}).map((token) => Uint8Array.from([...token].map((letter) => byteOf.get(letter))));
const label = (bytes) => {
  try {
    return new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(bytes).replaceAll(" ", "·");
  } catch {
    return "<" + [...bytes].map((b) => b.toString(16).toUpperCase().padStart(2, "0")).join(" ") + ">";
  }
};
const countHeld = (text, stop) => {
  for (let count = Math.min(text.length, stop.length - 1); count > 0; count--)
    if (stop.startsWith(text.slice(text.length - count))) return count;
  return 0;
};
// What is sent and held after so many tokens; one more ends the text.
const run = (tokens, stop, count) => {
  const decoder = new TextDecoder("utf-8", {ignoreBOM: true});
  let sent = "", held = "";
  for (let i = 0; i < count; i++) {
    const over = i >= tokens.length;
    const text = held + (over ? decoder.decode() : decoder.decode(tokens[i], {stream: true}));
    const found = stop ? text.indexOf(stop) : -1;
    if (found >= 0) return {sent: sent + text.slice(0, found), held: "", stopped: i + 1};
    const tail = over || !stop ? 0 : countHeld(text, stop);
    sent += text.slice(0, text.length - tail);
    held = text.slice(text.length - tail);
  }
  return {sent, held, stopped: 0};
};
let tokens = [];
const draw = (step) => {
  const stop = knob("stop").value, {sent, held, stopped} = run(tokens, stop, step);
  const done = stopped || step, labels = tokens.map(label);
  let x = 2, y = data.top;
  for (let i = 0; i < data.chips; i++) {
    const kinds = {ahead: i >= done, now: i === done - 1, past: i < done - 1};
    const wide = i < labels.length ? data.letter * labels[i].length + 9 : 10;
    if (x + wide > data.width && x > 2) [x, y] = [2, y + data.row];
    for (const [kind, is] of Object.entries(kinds)) {
      const key = `${kind}${i}`;
      place(key, x, y);
      widen(key, wide);
      shift(key, wide / 2);
      write(key, i < labels.length ? labels[i] : "");
      show(key, is && i < labels.length);
    }
    x += wide + 3;
  }
  write("held", held.replaceAll(" ", "·"));
  for (let i = 0; i < data.lines; i++)
    write(`sent${i}`, sent.slice(data.line * i, data.line * (i + 1)).replaceAll(" ", "·"));
  says(stopped ? `Token ${stopped} completes the stop string. The text ends before it, and the other ` +
      `${tokens.length - Math.min(stopped, tokens.length)} tokens are not asked for.` :
    step > tokens.length ? "The model has ended its text, and what was held back is sent." :
    step === 0 ? "Nothing has been written yet." :
    `After ${step} token${step > 1 ? "s" : ""}, the last of them “${labels[step - 1]}”, ` +
    (held ? `“${held.replaceAll(" ", "·")}” is held back.` : "nothing is held back."));
};
reveal(() => {
  tokens = encode(knob("text").value);
  const go = player(draw, 700);
  const read = () => {
    tokens = encode(knob("text").value).slice(0, data.chips);
    knob("step").max = tokens.length + 1;
    go(Math.min(value("step"), tokens.length + 1));
  };
  on("text", read);
  on("stop", read);
});
"""
