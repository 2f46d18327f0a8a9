"""The front page in two languages: the number, the story, two buttons, the parts of the course.

The story is told by the bundled model while the site is built, and shown by a style sheet alone.
"""

from __future__ import annotations

import html
from functools import cache
from typing import NamedTuple

import draw_readme
import run_pages
from course_pages import REPOSITORY, find_pages, read_page

from folo_lib.course.throughput_figures import (
    best_tpot,
    compare_systems,
    latest,
    read_recording,
)

TOUR = (
    "https://colab.research.google.com/github/folovllm/FoloVLLM/blob/main/notebooks/"
    "00_tour.ipynb"
)


class Words(NamedTuple):
    """What the front page says, in one language."""

    start: str
    colab: str
    source: str
    throughput: str
    latency: str
    proof: str
    proofs: str
    measured: str
    story: str
    legend: tuple[str, str, str]
    again: str
    minutes: str
    parts: tuple[tuple[str, str], ...]


# First and last page of each part; the titles and the sentences are in the languages.
PARTS = (("00", "05"), ("06", "10"), ("11", "16"), ("17", "zz"))

ENGLISH = Words(
    start="Start with the tour",
    colab="Open in Colab",
    source="Source on GitHub",
    throughput="the tokens of vLLM {version}: {ours:,.0f} per second with {requests} mixed "
    "requests",
    latency="a token for one request alone; vLLM takes {theirs:.2f} ms",
    proof="to begin with: no GPU, no network, no model hub",
    proofs="Nothing",
    measured="Qwen3-0.6B’s shape with random weights, {device}, {date}; vLLM on the other card of "
    "the same machine. {link}",
    story="The bundled model, three million parameters, on a CPU. Each token stands on the colour "
    "of the model’s doubt.",
    legend=("from 50 %", "10 to 50 %", "below 10 %"),
    again="Tell it again",
    minutes="about {} hours",
    parts=(
        (
            "A model that speaks",
            "Attention, rotary positions, norms and a whole Qwen3, until real weights say "
            "their first words.",
        ),
        (
            "An engine",
            "Never compute a key twice, draw tokens that can be drawn again, stream text, "
            "stop where asked.",
        ),
        (
            "Many, and fast",
            "Continuous batching, a paged cache, Triton kernels and CUDA graphs, close to the "
            "speed of memory.",
        ),
        (
            "Served and measured",
            "Thirty clients at once, a benchmark that does not fool itself, and how the model "
            "was made.",
        ),
    ),
)
CHINESE = Words(
    start="从导览页开始",
    colab="在 Colab 中打开",
    source="GitHub 上的源码",
    throughput="于 vLLM {version} 的词元数：{requests} 个长短不一的请求，每秒 {ours:,.0f} 个词元",
    latency="一个词元（单独一个请求）；vLLM 为 {theirs:.2f} 毫秒",
    proof="就能开始：不需要 GPU、网络或模型仓库",
    proofs="什么都不用",
    measured="Qwen3-0.6B 的形状、随机权重，{device}，{date}；vLLM 运行在同一台机器的另一块卡上。{link}",
    story="附带的模型，三百万参数，在 CPU 上运行。词元越出乎意料，底色越深。",
    legend=("50 % 以上", "10 % 到 50 %", "低于 10 %"),
    again="再讲一遍",
    minutes="约 {} 小时",
    parts=(
        (
            "会说话的模型",
            "注意力、旋转位置编码、归一化和完整的 Qwen3，直到真实的权重说出第一句话。",
        ),
        ("引擎", "每个键只算一次，抽样可以复现，文本逐词元流出，该停就停。"),
        ("又多又快", "连续批处理、分页缓存、Triton 内核与 CUDA 图，接近显存的速度。"),
        (
            "服务与测量",
            "同时服务三十个客户端，不自欺的基准测试，以及模型是怎样训练的。",
        ),
    ),
)


@cache
def write_story() -> str:
    """The tokens of the story as HTML, each with its doubt and its turn."""
    spans = []
    for turn, piece in enumerate(draw_readme.tell_story()):
        share = round(100 * (1 - piece.probability))
        spans.append(
            f'<span class="u{piece.num_underlines}" style="--doubt:{share}%;--turn:{turn}" '
            f'title="{piece.probability:.0%}">{html.escape(piece.text)}</span>'
        )
    return f"<b>{html.escape(draw_readme.PROMPT)}</b>" + "".join(spans)


def write_numbers(words: Words, unit: str, times: str) -> str:
    """The headline, from the recording; nothing where there is none."""
    record = read_recording(draw_readme.RECORD)
    systems = {name: row for name, _, row in compare_systems(record)}
    rows = latest(record, "tpot").get("rows", [])
    boxes = [(words.proofs, words.proof)]
    note = ""
    if rows and "vLLM" in systems:
        ours, theirs = systems["folo_lib"], systems["vLLM"]
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        said = words.throughput.format(
            version=record["sections"]["vllm"][-1]["versions"]["vllm"],
            ours=ours["tokens_per_second"],
            requests=ours["requests"],
        )
        alone = words.latency.format(
            theirs=best_tpot(record["sections"]["vllm"], rows[0])["tpot_ms"]
        )
        boxes = [
            (times.format(f"{ratio:.2f}"), said),
            (f"{rows[0]['tpot_ms']:.2f} {unit}", alone),
            *boxes,
        ]
        link = '<a href="benchmark.html">{}</a>'.format(
            "How it was measured." if words is ENGLISH else "怎样测量。"
        )
        note = words.measured.format(
            device=record["setup"]["device"],
            date=latest(record, "throughput")["date"][:10],
            link=link,
        )
    cells = "\n".join(
        f"<li><strong>{html.escape(number)}</strong> {html.escape(text)}</li>"
        for number, text in boxes
    )
    return f'<ul class="numbers">\n{cells}\n</ul>\n<p class="small">{note}</p>'


def write_cards(words: Words) -> str:
    """A card for each part of the course, with its pages."""
    cards = []
    for (title, text), (first, last) in zip(words.parts, PARTS, strict=True):
        links, minutes = [], 0
        for page in find_pages():
            if first <= page.stem and page.stem[: len(last)] <= last:
                head = run_pages.read_head(read_page(page))
                minutes += head.minutes
                links.append(
                    f'<a href="pages/{page.stem}.html">{html.escape(head.title)}</a>'
                )
        hours = words.minutes.format(round(minutes / 60))
        cards.append(
            f"<section><h3>{title}</h3>\n<p>{text}</p>\n<p>{'<br>'.join(links)}</p>\n"
            f'<p class="small">{hours}</p></section>'
        )
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def write(words: Words, unit: str, times: str) -> str:
    samples = "".join(
        f'<span class="u{underlines}" style="--doubt:{doubt}%">{text}</span> '
        for underlines, doubt, text in zip(
            (0, 1, 2), (25, 70, 95), words.legend, strict=True
        )
    )
    return f"""```{{raw}} html
<p class="buttons">
<a class="first" href="pages/00_tour.html">{words.start}</a>
<a href="{TOUR}">{words.colab}</a>
<a href="{REPOSITORY}">{words.source}</a>
</p>
{write_numbers(words, unit, times)}
<figure class="story">
<p lang="en">{write_story()}</p>
<figcaption><span class="samples">{samples}</span> {words.story}
<button type="button" hidden>{words.again}</button></figcaption>
</figure>
{write_cards(words)}
```"""


def write_front() -> str:
    return write(ENGLISH, "ms", "{} times")


def write_chinese_front() -> str:
    return write(CHINESE, "毫秒", "{} 倍")
