"""The paged KV cache: blocks on demand, reference counts, shared prefixes."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from itertools import chain

from folo_lib.request import Request


def hash_block_tokens(parent_hash: bytes, token_ids: Iterable[int]) -> bytes:
    """The name of a full block: a hash of its tokens and of all tokens before it.

    Args:
        parent_hash: of the block before it; empty for the first of a sequence.
        token_ids: of the block, `block_size` many.

    Returns:
        32 bytes, the same in every process and on every machine of one byte order.
    """
    return sha256(parent_hash + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """Which block of a cache is needed by how many requests, and what it can be found by.

    A block that nobody needs is free, and is one of two kinds. If it has a hash, its
    contents may serve again, and it is kept as long as there are others; of these the
    one that was freed first is evicted first. If it has none, it is empty.

    Args:
        num_blocks: in the cache.

    Attributes:
        ref_counts: by block id, how many requests have the block in their table.
        empty: free blocks without a hash; the last one is the next to be taken.
        evictable: free blocks with a hash, in the order in which they were freed.
        cached_blocks, block_hashes: the block of a hash, and the hash of a block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self.empty = list(range(num_blocks))[::-1]
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.cached_blocks: dict[bytes, int] = {}
        self.block_hashes: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody needs, empty or not."""
        return len(self.empty) + len(self.evictable)

    def get_new_blocks(self, num_blocks: int) -> list[int]:
        """Free blocks for one request; hashes that they had are forgotten.

        Raises:
            RuntimeError: if there are too few, and none is taken.
        """
        if num_blocks > self.num_free_blocks:
            raise RuntimeError(
                f"{num_blocks} blocks are wanted and {self.num_free_blocks} are free."
            )
        new = []
        for _ in range(num_blocks):
            if self.empty:
                block_id = self.empty.pop()
            else:
                block_id, _ = self.evictable.popitem(last=False)
                del self.cached_blocks[self.block_hashes.pop(block_id)]
            self.ref_counts[block_id] = 1
            new.append(block_id)
        return new

    def touch(self, block_ids: Iterable[int]) -> None:
        """One request more needs these blocks, which have a hash."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self.evictable[block_id]
            self.ref_counts[block_id] += 1

    def free_blocks(self, block_ids: Sequence[int]) -> None:
        """One request less needs these, in the order of its table; the last go first.

        Raises:
            ValueError: if one of them is free already.
        """
        for block_id in reversed(block_ids):
            if self.ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free: nobody can free it again.")
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] > 0:
                continue
            if block_id in self.block_hashes:
                self.evictable[block_id] = None
            else:
                self.empty.append(block_id)

    def cache_block(self, block_id: int, block_hash: bytes) -> None:
        """From now on the hash finds this block, unless it finds another already."""
        if block_hash not in self.cached_blocks:
            self.cached_blocks[block_hash] = block_id
            self.block_hashes[block_id] = block_hash


class PagedKVCacheManager:
    """Blocks on demand, shared where requests begin with the same tokens.

    See `KVCacheManager` of page 11, whose methods these are.

    Args:
        num_blocks: in the cache.
        block_size: tokens in a block.
        enable_prefix_caching: whether blocks are shared and kept.

    Attributes:
        pool: who needs which block.
        pending: the block of a hash, for those that the step being made up will fill.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.reset()

    def reset(self) -> None:
        """Forgets who has what, and all that is cached."""
        self.pool = BlockPool(self.num_blocks)
        self.pending: dict[bytes, int] = {}

    def hash_blocks(self, request: Request, num_blocks: int) -> list[bytes]:
        """The hashes of a request's blocks, at least of its first `num_blocks`."""
        hashes, size = request.block_hashes, self.block_size
        for i in range(len(hashes), num_blocks):
            token_ids = request.get_token_ids(i * size, (i + 1) * size)
            hashes.append(hash_block_tokens(hashes[-1] if hashes else b"", token_ids))
        return hashes

    def get_computed_blocks(self, request: Request) -> list[int] | None:
        """Blocks with the beginning of a request, but never with its last token.

        That token must run: its logits are what the next one is drawn from.

        Returns:
            Block ids; None if the next block is written by another request in the step
            that is being made up, so that it pays to wait for the step after it.
        """
        found: list[int] = []
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return found  # log-probabilities of a prompt need all of its tokens to run
        num_blocks = (request.num_tokens - 1) // self.block_size
        for block_hash in self.hash_blocks(request, num_blocks)[:num_blocks]:
            block_id = self.pool.cached_blocks.get(block_hash)
            if block_id is None:
                return None if block_hash in self.pending else found
            found.append(block_id)
        return found

    def allocate_slots(
        self, request: Request, num_tokens: int, computed: Sequence[int] = ()
    ) -> list[int] | None:
        """Room for the next `num_tokens` tokens of a request.

        Args:
            request: gets the blocks at the end of its `block_ids`.
            num_tokens: how many will run.
            computed: of `get_computed_blocks`, for a request that has no block yet.

        Returns:
            The blocks that it got; None, and nothing has changed, if there are too few.
        """
        block_ids, pool, size = request.block_ids, self.pool, self.block_size
        num_cached = request.num_computed_tokens + len(computed) * size
        length = num_cached + num_tokens
        num_new = -(-length // size) - len(block_ids) - len(computed)
        new: list[int] = []
        if computed or num_new > 0:
            num_revived = sum(pool.ref_counts[block_id] == 0 for block_id in computed)
            if num_new > pool.num_free_blocks - num_revived:
                return None
            pool.touch(computed)  # first, or they might be evicted for the new ones
            new = [*computed, *pool.get_new_blocks(num_new)]
            block_ids += new
        first, stop = num_cached // size, length // size  # blocks that this step fills
        if first < stop and self.enable_prefix_caching:
            hashes = self.hash_blocks(request, stop)[first:stop]
            self.pending.update(zip(hashes, block_ids[first:stop], strict=True))
        return new

    def publish(self) -> None:
        """The step is made up: the blocks that it fills can be found from now on."""
        for block_hash, block_id in self.pending.items():
            self.pool.cache_block(block_id, block_hash)
        self.pending.clear()

    def free(self, request: Request) -> None:
        """Takes back all blocks of a request; again does nothing."""
        self.pool.free_blocks(request.block_ids)
        request.block_ids = []
        if self.pending:  # what it was to write in this step will not be written
            counts, pending = self.pool.ref_counts, self.pending.items()
            self.pending = {name: i for name, i in pending if counts[i] > 0}

    def check_integrity(self, requests: Collection[Request]) -> None:
        """Checks the books, between two steps; see `find_faults`.

        Args:
            requests: all that have blocks.

        Raises:
            RuntimeError: if a block is lost, counted wrongly, or found by a wrong hash.
        """
        if faults := find_faults(self.pool, requests, self.block_size):
            raise RuntimeError("; ".join(faults))

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests have."""
        return self.num_blocks - self.pool.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody has, and whose contents may serve again."""
        return len(self.pool.evictable)


def find_faults(
    pool: BlockPool, requests: Collection[Request], block_size: int
) -> list[str]:
    """What is wrong in the books of a pool, in words; empty if all is well.

    Every block is free once or counted once for each table that names it. A hash and
    its block lead to one another, and a block that can be found has been computed.
    """
    faults = []
    owners = Counter(chain.from_iterable(request.block_ids for request in requests))
    free = Counter([*pool.empty, *pool.evictable])
    for block_id, count in enumerate(pool.ref_counts):
        state = f"block {block_id} is counted {count} times"
        if count != owners[block_id]:
            faults.append(f"{state}, and in {owners[block_id]} tables")
        if free[block_id] != (count == 0):
            faults.append(f"{state}, and free {free[block_id]} times")
    if (
        pool.block_hashes.keys() & pool.empty
        or pool.evictable.keys() - pool.block_hashes
    ):
        faults.append("an empty block has a hash, or an evictable one has none")
    if pool.cached_blocks != {name: i for i, name in pool.block_hashes.items()}:
        faults.append("hashes and blocks do not lead to one another")
    for request in requests:
        num_computed = request.num_computed_tokens
        if num_computed > len(request.block_ids) * block_size:
            faults.append(f"{request.sample_id} has no room for {num_computed} tokens")
        for i, block_id in enumerate(request.block_ids):
            name = pool.block_hashes.get(block_id)
            if name is not None and (i + 1) * block_size > num_computed:
                faults.append(f"block {block_id} can be found, and is not yet computed")
            elif name is not None and name != request.block_hashes[i]:
                faults.append(f"block {block_id} is found by the hash of other tokens")
    return faults
