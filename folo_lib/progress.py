"""The bar that says how far `generate` is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from folo_lib.request import RequestOutput

__all__ = ["show_progress"]


def show_progress(
    outputs: Iterable[RequestOutput], total: int, use_tqdm: bool
) -> Iterator[RequestOutput]:
    """Passes outputs on, and counts them in a bar with tokens per second in and out."""
    from tqdm.auto import tqdm

    start, num_read, num_written = time.perf_counter(), 0, 0
    with tqdm(desc="Processed prompts", total=total, disable=not use_tqdm) as bar:
        for output in outputs:
            num_read += len(output.prompt_token_ids)
            num_written += output.metrics.num_output_tokens
            seconds = time.perf_counter() - start
            rates = num_read / seconds, num_written / seconds
            text = "in {:.0f} tokens/s, out {:.0f} tokens/s".format(*rates)
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            yield output
