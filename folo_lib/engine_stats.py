"""How full an engine is, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """How full an engine is at this moment, and what it has done so far.

    Attributes:
        num_running, num_waiting: requests.
        num_blocks, num_used_blocks: of the cache, and those that requests have.
        num_cached_blocks: blocks that nobody has, and whose contents may serve again.
        num_preemptions: how often a request lost its blocks to another.
        num_prefix_tokens, num_prefix_hits: tokens of requests that started, and those
            of them that were found in the cache.

    Example:
        >>> from folo_lib import LLM
        >>> stats = LLM(use_tqdm=False).stats()
        >>> stats.num_running, stats.num_waiting, stats.prefix_hit_rate
        (0, 0, 0.0)
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int = 0
    num_preemptions: int = 0
    num_prefix_tokens: int = 0
    num_prefix_hits: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """Hits by tokens, from 0 to 1; 0 before the first request."""
        return self.num_prefix_hits / max(1, self.num_prefix_tokens)
