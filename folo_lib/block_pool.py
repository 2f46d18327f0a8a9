"""The paged cache: blocks on demand, shared where the tokens are the same."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from .request import Request


# cell
def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The block_hash of a block: of its tokens, and of all that came before them.

    Args:
        parent: the block_hash of the block before it; empty for the first.
        token_ids: of the block.
    """
    return sha256(parent + array("q", token_ids).tobytes()).digest()


# cell
class BlockPool:
    """Blocks, how many requests have each, and which of them can be found by block_hash.

    A block that nobody has is free. If it has a block_hash, its contents stay until it is
    needed for something else, the one that was freed first before the others.

    Args:
        num_blocks: in the cache.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_references = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))
        self.block_of: dict[bytes, int] = {}
        self.hash_of: dict[int, bytes] = {}

    def take(self, count: int) -> list[int]:
        """Free blocks, for one request; the hashes they had are forgotten."""
        taken = []
        for _ in range(count):
            block_id, _ = self.free_blocks.popitem(last=False)
            if (block_hash := self.hash_of.pop(block_id, None)) is not None:
                del self.block_of[block_hash]
            self.num_references[block_id] = 1
            taken.append(block_id)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more request has these."""
        for block_id in block_ids:
            if self.num_references[block_id] == 0:
                del self.free_blocks[block_id]
            self.num_references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One request less has these; the end of a sequence is the first to go."""
        for block_id in reversed(block_ids):
            self.num_references[block_id] -= 1
            if self.num_references[block_id] == 0:
                self.free_blocks[block_id] = None
                if block_id not in self.hash_of:  # nothing to keep: used next
                    self.free_blocks.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Makes a block findable, unless another with the same contents is."""
        if block_hash not in self.block_of:
            self.block_of[block_hash], self.hash_of[block_id] = block_id, block_hash


# cell
class PagedKVCacheManager:
    """Blocks on demand, and shared: see `KVCacheManager` of page 11."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.reset()

    def reset(self) -> None:
        """Forgets who has what, and all that is cached."""
        self.pool = BlockPool(self.num_blocks)
        self.pending: dict[bytes, int] = {}  # written in the step that is being made up

    def hash_blocks(self, request: Request, num_tokens: int) -> list[bytes]:
        """The hashes of the full blocks among the first `num_tokens` tokens."""
        hashes, size = request.block_hashes, self.block_size
        count = num_tokens // size
        if len(hashes) < count:
            for i in range(len(hashes), count):
                parent = hashes[-1] if hashes else b""
                token_ids = request.get_token_ids(i * size, (i + 1) * size)
                hashes.append(hash_block(parent, token_ids))
        return hashes[:count]

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        """Blocks with the beginning of a request; see `KVCacheManager`.

        Never with all of it: its last token must run, for the logits of the next.
        """
        found: list[int] = []
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return found
        for block_hash in self.hash_blocks(request, request.num_tokens - 1):
            if block_hash not in self.pool.block_of:
                return None if block_hash in self.pending else found
            found.append(self.pool.block_of[block_hash])
        return found

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        """Room for the next tokens; see `KVCacheManager`."""
        num_held = len(request.block_ids) + len(computed)
        num_cached = request.num_computed_tokens + len(computed) * self.block_size
        length = num_cached + num_tokens
        missing = -(-length // self.block_size) - num_held
        reused = sum(self.pool.num_references[i] == 0 for i in computed)
        if missing > len(self.pool.free_blocks) - reused:
            return None
        self.pool.share(computed)
        new = [*computed, *self.pool.take(missing)]
        request.block_ids += new
        if self.enable_prefix_caching:
            first = num_cached // self.block_size  # the first that this step may fill
            hashes = self.hash_blocks(request, length)[first:]
            filled = request.block_ids[first : first + len(hashes)]
            self.pending.update(zip(hashes, filled, strict=True))
        return new

    def publish(self) -> None:
        """What the step writes can be found from the next one on."""
        for block_hash, block_id in self.pending.items():
            self.pool.register(block_id, block_hash)
        self.pending.clear()

    def free(self, request: Request) -> None:
        """Takes back all blocks of a request; again does nothing."""
        self.pool.release(request.block_ids)
        request.block_ids = []

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self.pool.free_blocks)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody has, and whose contents may serve again."""
        return sum(block_id in self.pool.free_blocks for block_id in self.pool.hash_of)
