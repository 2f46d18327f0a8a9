"""Page 10: a queue, one request that runs, the blocks of the cache, and readers who leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from folo_lib.course.figures import CACHE, DECODE, PREFILL, Look
from folo_lib.course.motion.base import Canvas, Guess, Motion, button

__all__ = ["Told", "count_blocks", "run_queue"]

NAME = (52, 26)  # pixels of the sign with a request's name
WAITING, RUNNING, BLOCKS, DONE = 26, 92, 172, 236  # upper edges
SIGN = Look("#ECECEC", "", "", "")
NUM_WRITTEN = 3
"""Tokens of the request that runs in the still picture."""


class Told(NamedTuple):
    """A request and what the model answers.

    Attributes:
        name: short.
        prompt: the text that it asks with.
        num_prompt_tokens: how many tokens that is.
        words: the text of each token of the answer, all of which it may write.
    """

    name: str
    prompt: str
    num_prompt_tokens: int
    words: Sequence[str]


def count_blocks(request: Told, block_size: int) -> int:
    """What a request gets when it starts: blocks for all that it may ever write."""
    return -(-(request.num_prompt_tokens + len(request.words)) // block_size)


def run_queue(
    requests: Sequence[Told], num_blocks: int = 8, block_size: int = 4
) -> Motion:
    """Requests that run one after another, step by step; any of them can be withdrawn.

    Without the script it shows a later step: the reader of the first has left, and its blocks
    are lost.

    Args:
        requests: in the order in which they came, at most four.
        num_blocks: of the cache.
        block_size: slots in a block.

    Raises:
        ValueError: unless there are three or four, who need blocks for the question to make sense:
            two of them fit, and no third.
    """
    needs = [count_blocks(request, block_size) for request in requests]
    if not 3 <= len(requests) <= 4 or not needs[0] + needs[1] <= num_blocks < sum(
        needs[:3]
    ):
        raise ValueError(
            f"three or four requests, of which two fit into {num_blocks} blocks and a third "
            f"does not; these {len(requests)} need {needs}."
        )
    canvas = Canvas(340, DONE + 30 * len(requests) + 4)
    for y, text in (
        (WAITING, "waiting, first come, first served"),
        (RUNNING, "running: prompt, then token by token"),
        (BLOCKS, f"cache of {num_blocks} blocks with {block_size} slots each"),
        (DONE, "ended"),
    ):
        canvas.text((2, y - 12), text, anchor="start", font=13)
    wide = 336 / num_blocks
    for i in range(num_blocks):
        at, size = (2 + wide * i, BLOCKS), (wide - 4, 28)
        canvas.box(at, size, dash=":", width=0.8)
        is_lost, is_held = i < needs[0], needs[0] <= i < needs[0] + needs[1]
        owner, seen = requests[1].name if is_held else "", float(is_held)
        key, gone = f"block{i}", float(is_lost)
        canvas.box(at, size, owner, CACHE, key, write=True, font=13, alpha=seen)
        middle = at[0] + wide / 2 - 2, BLOCKS + 14
        canvas.text(middle, "lost", f"lost{i}", font=12, alpha=gone)
    most = max(len(request.words) for request in requests)
    step = 232 / most
    one = requests[1]
    canvas.box((62, RUNNING), (40, 26), one.num_prompt_tokens, PREFILL, "prompt")
    for i in range(most):
        place = 106 + step * i, RUNNING
        seen = float(i < NUM_WRITTEN - 1)
        canvas.box(place, (step - 3, 26), "", DECODE, f"token{i}", alpha=seen)
    told = one.prompt + "".join(one.words[:NUM_WRITTEN])
    canvas.text((2, RUNNING + 40), told, "words", anchor="start", font=13)
    left = "the reader left after 1 token"
    for i, request in enumerate(requests):
        canvas.box(
            [(2, DONE), (2, RUNNING), (2, WAITING), (60, WAITING)][i],
            NAME,
            request.name,
            SIGN,
            f"sign{i}",
            label=f"withdraw {request.name}",
            glides=True,
        )
        place = 62, DONE + 30 * i + 13
        canvas.text(place, "" if i else left, f"ended{i}", anchor="start", font=12)
    first, second, third = (request.name for request in requests[:3])
    return Motion(
        "a queue and its blocks",
        canvas,
        f"A step runs 1 token of {second}, which gets “{one.words[NUM_WRITTEN - 1].strip()}”. "
        f"Blocks free: {num_blocks - sum(needs[:2])} of {num_blocks}, lost: {needs[0]}. "
        f"{third} needs {needs[2]}.",
        [
            button("next", "Next step"),
            button("leave", "The reader leaves"),
            button("forget", "Blocks are forgotten"),
            button("reset", "From the start"),
        ],
        QUEUE_SCRIPT,
        {
            "requests": [
                [r.name, r.prompt, r.num_prompt_tokens, list(r.words), need]
                for r, need in zip(requests, needs, strict=True)
            ],
            "blocks": num_blocks,
            "edges": [WAITING, RUNNING, BLOCKS, DONE],
        },
        Guess(
            f"{first} runs and has {needs[0]} of {num_blocks} blocks. Its reader leaves, and the "
            f"engine forgets to give the blocks back. The same happens to {second}. What becomes "
            f"of {third}?",
            [
                "it runs as usual",
                "it waits for ever",
                "it is given the blocks of the others",
            ],
            1,
            f"It waits for ever: {third} needs {needs[2]} blocks, and only "
            f"{num_blocks - sum(needs[:2])} of them can be had, because nobody is left who could "
            "give the others back. Try it with “Blocks "
            "are forgotten”, then without. A press on a name withdraws a request that waits.",
        ),
    )


QUEUE_SCRIPT = """
const [waitingY, runningY, , doneY] = data.edges;
let waiting, running, written, owners, ended, forgets = false;
const name = (i) => data.requests[i][0], need = (i) => data.requests[i][4];
const free = () => owners.filter((owner) => owner === null).length;
const draw = (said) => {
  waiting.forEach((i, at) => place(`sign${i}`, 2 + 58 * at, waitingY));
  if (running !== null) place(`sign${running}`, 2, runningY);
  ended.forEach(([i, text], at) => {
    place(`sign${i}`, 2, doneY + 30 * at);
    write(`ended${at}`, text);
  });
  for (let at = ended.length; at < data.requests.length; at++) write(`ended${at}`, "");
  owners.forEach((owner, b) => {
    show(`block${b}`, owner !== null && owner >= 0);
    show(`lost${b}`, owner === -1);
    write(`block${b}`, owner !== null && owner >= 0 ? name(owner) : "");
  });
  show("prompt", running !== null && written > 0);
  write("prompt", running === null ? "" : data.requests[running][2]);
  for (let i = 0; piece(`token${i}`); i++) show(`token${i}`, running !== null && i < written - 1);
  write("words", running === null || !written ? "" :
    data.requests[running][1] + data.requests[running][3].slice(0, written).join(""));
  data.requests.forEach((_, i) => {
    const over = ended.some(([j]) => i === j);
    piece(`sign${i}`).setAttribute("tabindex", over ? -1 : 0);
  });
  knob("leave").disabled = running === null;
  knob("next").disabled = running === null && !waiting.length;
  says(`${said} Blocks free: ${free()} of ${data.blocks}` +
    (owners.includes(-1) ? `, lost: ${owners.filter((owner) => owner === -1).length}.` : "."));
};
const end = (i, text, lost) => {
  owners = owners.map((owner) => owner === i ? (lost ? -1 : null) : owner);
  ended.push([i, text]);
};
const step = () => {
  if (running === null) {
    if (free() < need(waiting[0]))
      return draw(`${name(waiting[0])} needs ${need(waiting[0])} blocks and cannot start.`);
    running = waiting.shift();
    written = 0;
    let left = need(running);
    owners = owners.map((owner) => owner === null && left-- > 0 ? running : owner);
  }
  const i = running, [, prompt, length, words] = data.requests[i];
  const ran = written ? 1 : length;
  written++;
  let said = `A step runs ${ran} token${ran > 1 ? "s" : ""} of ${name(i)}, which gets “${words[written - 1].trim()}”.`;
  if (written === words.length) {
    end(i, prompt + words.join(""), false);
    running = null;
    said += " It is finished and gives its blocks back.";
  }
  draw(said);
};
const withdraw = (i) => {
  if (running === i) {
    end(i, `the reader left after ${written} token${written > 1 ? "s" : ""}`, forgets);
    running = null;
    draw(`${name(i)} is withdrawn` + (forgets ? ", and its blocks are forgotten." : " and gives its blocks back."));
  } else if (waiting.includes(i)) {
    waiting = waiting.filter((j) => j !== i);
    end(i, "withdrawn before it ran", false);
    draw(`${name(i)} is withdrawn; it had no blocks yet.`);
  }
};
const reset = () => {
  waiting = data.requests.map((_, i) => i);
  [running, written, ended] = [null, 0, []];
  owners = Array(data.blocks).fill(null);
  draw(`${waiting.length} requests wait.`);
};
reset();
step();
reveal(() => {
  on("next", step);
  on("leave", () => withdraw(running));
  on("forget", () => {
    forgets = !forgets;
    knob("forget").setAttribute("aria-pressed", forgets);
    draw(forgets ? "From now on a reader who leaves takes his blocks with him." : "Blocks are given back again.");
  });
  on("reset", reset);
  data.requests.forEach((_, i) => press(piece(`sign${i}`), () => withdraw(i)));
});
"""
