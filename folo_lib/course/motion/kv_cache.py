"""Page 06: a cache that fills step by step, and what is computed without it."""

from __future__ import annotations

from collections.abc import Sequence

from folo_lib.course.figures import CACHE, DECODE, KEYS, PREFILL, VALUES, Look
from folo_lib.course.motion.base import Canvas, Guess, Motion, button, player

__all__ = ["fill_cache"]

WIDTH, TOP, HIGH = 340, 76, 20  # pixels: of the canvas, of the first row, of a box
ROWS = {"runs": TOP, "key": TOP + 52, "value": TOP + 98}  # their upper edges
BAR = 190  # pixels: the longest


def fill_cache(words: Sequence[str], num_prompt: int, bytes_per_token: int) -> Motion:
    """A prompt and what a model adds to it: which tokens run in a step, and what is kept.

    Args:
        words: all tokens. The last one is drawn from the last step, and does not run.
        num_prompt: how many of them are the prompt.
        bytes_per_token: of keys and values in all layers.

    Raises:
        ValueError: if no token follows the prompt.
    """
    last = len(words) - num_prompt - 1  # of the steps, of which 0 is the prefill
    if last < 0:
        raise ValueError(
            f"{len(words)} words must be more than {num_prompt} of a prompt."
        )
    wide = (WIDTH - 20) / len(words)
    canvas, bars = Canvas(WIDTH, 204), Canvas(290, 150)
    for name, text in (
        ("runs", "run through the model in this step"),
        ("key", "keys"),
        ("value", "values"),
    ):
        canvas.text((2, ROWS[name] - 10), text, anchor="start", font=13)
    for i, word in enumerate(words):
        x = 2 + i * wide
        seen = 1.0 if i <= num_prompt else 0.0
        bold = i >= num_prompt
        canvas.text(
            (x + wide / 2, TOP - 28),
            word.strip(),
            f"word{i}",
            anchor="start",
            turn=-50,
            font=12,
            alpha=seen,
            bold=bold,
        )
        if i == len(words) - 1:
            continue
        looks: dict[str, dict[str, Look]] = {
            "runs": {"prefill": PREFILL, "decode": DECODE},
            "key": {"kept": CACHE, "new": KEYS},
            "value": {"kept": CACHE, "new": VALUES},
        }
        for name, both in looks.items():
            size = wide - 2, HIGH
            at = x, ROWS[name]
            canvas.box(at, size, width=0.6, dash=":", alpha=0.5)
            for look_name, look in both.items():
                is_on = i < num_prompt and look_name in ("prefill", "new")
                key = f"{name}-{look_name}{i}"
                canvas.box(at, size, "", look, key, alpha=float(is_on))
    most = sum(range(num_prompt, num_prompt + last + 1))
    bars.text((2, 14), "tokens run so far", anchor="start", bold=True)
    for y, key, text, ground in (
        (44, "with", "with a cache", KEYS),
        (98, "without", "without", None),
    ):
        bars.text((2, y), text, anchor="start")
        length = BAR * num_prompt / most
        bars.box((2, y + 12), (length, HIGH), "", ground, key)
        bars.text((length + 10, y + 22), num_prompt, f"{key}-count", anchor="start")
    with_cache = num_prompt + last
    choices = [with_cache, 2 * with_cache, most]
    return Motion(
        "a cache that fills",
        [canvas, bars],
        f"Step 0 runs {num_prompt} tokens, the prompt, and draws “{words[num_prompt].strip()}”.",
        [*player(last), button("mode", "Throw the cache away")],
        FILL_SCRIPT,
        {
            "words": [word.strip() for word in words],
            "prompt": num_prompt,
            "bytes": bytes_per_token,
            "most": most,
            "bar": BAR,
        },
        Guess(
            f"After a prompt of {num_prompt} tokens come {last} decode steps. With a cache the "
            f"model runs {with_cache} tokens in all. How many without?",
            [str(choice) for choice in choices],
            2,
            f"{most}, which is {most / with_cache:.1f} times as many: without a cache every step "
            "runs all tokens again, to have their keys and values. Go step by step, then throw "
            "the cache away and do it again.",
        ),
    )


FILL_SCRIPT = """
let kept = true, go = () => {};
const kib = (bytes) => `${(bytes / 1024).toFixed(0)} KiB`;
const draw = (step) => {
  const length = data.prompt + step;
  data.words.forEach((_, i) => {
    show(`word${i}`, i <= length);
    if (i === data.words.length - 1) return;
    const runs = i < length && (!kept || step === 0 || i === length - 1);
    const alone = kept && step > 0;
    show(`runs-prefill${i}`, runs && !alone);
    show(`runs-decode${i}`, runs && alone);
    for (const row of ["key", "value"]) {
      show(`${row}-new${i}`, runs);
      show(`${row}-kept${i}`, kept && i < length && !runs);
    }
  });
  const counts = {with: length, without: 0};
  for (let i = 0; i <= step; i++) counts.without += data.prompt + i;
  for (const [key, count] of Object.entries(counts)) {
    const long = data.bar * count / data.most;
    widen(key, long);
    shift(`${key}-count`, long + 10);
    write(`${key}-count`, count);
  }
  const drawn = data.words[length], ran = kept && step > 0 ? 1 : length;
  says(`Step ${step} runs ${ran} token${ran > 1 ? "s" : ""}` +
    (step === 0 ? ", the prompt," : kept ? ` (“${data.words[length - 1]}”)` : ", all of them again,") +
    ` and draws “${drawn}”. ` +
    (kept ? `The cache then holds ${length} tokens in ${kib(length * data.bytes)}.` :
      "Then their keys and values are thrown away."));
};
reveal(() => {
  on("mode", () => {
    kept = !kept;
    knob("mode").setAttribute("aria-pressed", !kept);
    draw(value("step"));
  });
  go = player(draw);
});
"""
