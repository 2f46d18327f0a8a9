"""Checks of the exercises of page 16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from folo_lib.course.exercises import exercise, require
from folo_lib.course.ranks import ThreadGroup, run_ranks

__all__ = ["check_choose_num_ranks", "check_cut_fused", "check_gather_top"]


@exercise
def check_choose_num_ranks(choose: Callable[..., int | None]) -> None:
    """Beside the formula of section 10, which knows no sums on one rank."""
    quick, slow = {2: 2.5e-6, 4: 4e-6, 8: 7e-6}, {2: 13e-6, 4: 20e-6, 8: 30e-6}
    small, large = (1.2e9, 28, 4e12), (15.1e9, 36, 4e12)
    for model, sums, target in [
        (large, quick, 2e-3),
        (large, slow, 2e-3),
        (large, slow, 2.5e-3),
        (large, slow, 2.9e-3),
        (large, quick, 4e-3),
        (large, {8: 7e-6, 2: 2.5e-6}, 2e-3),
        (small, quick, 0.4e-3),
        (small, quick, 0.29e-3),
        (small, slow, 0.29e-3),
        ((8.0, 0, 1.0), {2: 1.0}, 5.0),
    ]:
        num_bytes, num_layers, bandwidth = model
        times = {1: num_bytes / bandwidth} | {
            ranks: num_bytes / ranks / bandwidth + (2 * num_layers + 1) * seconds
            for ranks, seconds in sums.items()
        }
        best = min((n for n, time in times.items() if time <= target), default=None)
        got = choose(num_bytes, num_layers, bandwidth, dict(sums), target)
        said = ", ".join(f"{n}: {1e3 * t:.3g} ms" for n, t in sorted(times.items()))
        require(
            got == best,
            f"{num_bytes:g} bytes, {num_layers} layers, {bandwidth:g} bytes a second, "
            f"at most {1e3 * target:g} ms: {best} is wanted, not {got!r}. A step takes "
            f"{said}.",
        )


@exercise
def check_cut_fused(cut_fused: Callable[..., Tensor]) -> None:
    """Of `cut_fused`: each row of the matrix says which head it belongs to."""
    for num_heads, num_kv_heads, head_dim, size in [
        (4, 2, 3, 1),
        (4, 2, 3, 2),
        (8, 8, 2, 4),
        (4, 2, 3, 4),
        (16, 2, 2, 8),
        (6, 3, 1, 3),
    ]:
        counts = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
        rows = [
            f"{kind}{head}"
            for kind, count in counts.items()
            for head in range(count)
            for _ in range(head_dim)
        ]
        weight = torch.arange(float(2 * len(rows))).view(-1, 2)
        model = f"{num_heads} query heads and {num_kv_heads} key/value heads"
        for rank in range(size):
            own = range(rank * num_heads // size, (rank + 1) * num_heads // size)
            group = num_heads // num_kv_heads
            seen = sorted({head // group for head in own})
            wanted = [f"q{head}" for head in own]
            wanted += [f"{kind}{head}" for kind in "kv" for head in seen]
            got = cut_fused(weight, num_heads, num_kv_heads, head_dim, rank, size)
            case = f"rank {rank} of {size}, with {model}"
            require(
                isinstance(got, Tensor)
                and got.ndim == 2
                and got.shape == (len(wanted) * head_dim, 2),
                f"{case}: the shape is {list(getattr(got, 'shape', []))}, and "
                f"{[len(wanted) * head_dim, 2]} is wanted, for the heads "
                f"{', '.join(wanted)}.",
            )
            found = [rows[int(number) // 2] for number in got[:, 0]]
            order = [i for name in wanted for i, row in enumerate(rows) if row == name]
            require(
                torch.equal(got, weight[order]),
                f"{case}: the rows belong to {', '.join(dict.fromkeys(found))}, and "
                f"{', '.join(wanted)} are wanted, each with its {head_dim} rows.",
            )


@exercise
def check_gather_top(gather_top: Callable[[Tensor, int, ThreadGroup], Tensor]) -> None:
    """Of `gather_top`: batches, ties within and between ranks, and what was sent."""
    noise = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 11, generator=noise)
    rows[1, [2, 9]] = 8.0  # a tie between ranks
    rows[2, [6, 7]] = 8.0  # a tie on one rank
    rows[3] = -100.0
    wanted = rows.argmax(-1)
    for size in (1, 2, 3):
        width = -(-11 // size)

        def work(group: ThreadGroup, width: int = width) -> tuple[Tensor, int]:
            start = group.rank * width
            own = rows[:, start : start + width].contiguous()
            top = gather_top(own, start, group)
            return top, sum(torch.Size(shape).numel() for _, shape in group.log)

        for rank, (top, num_sent) in enumerate(run_ranks(size, work)):
            require(
                top.dtype == torch.int64 and top.shape == (5,),
                f"the result is {top.dtype} of shape {list(top.shape)}, and int64 of shape "
                "[5] is wanted, one id for each row.",
            )
            require(
                torch.equal(top, wanted),
                f"rank {rank} of {size} finds {top.tolist()}, and {wanted.tolist()} are the "
                "best; rows 1 to 3 have ties, and the smaller id wins.",
            )
            require(
                num_sent <= 10,
                f"a rank has sent {num_sent} numbers for 5 rows, and two for each row are "
                "enough.",
            )
