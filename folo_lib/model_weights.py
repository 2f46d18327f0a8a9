"""Weights of a model around loading: random ones, an odd tied head, their order in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from folo_lib.checkpoint_checks import is_equal, warn_of_untied_head

__all__ = ["init_weights", "store_by_columns", "tie_head"]


def init_weights(model: nn.Module, std: float) -> None:
    """Matrices normal, biases zero; norms keep their ones."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


def tie_head(
    matrix: Tensor,
    weights: Iterable[tuple[str, Tensor]],
    set_head: Callable[[Tensor], None],
) -> Iterator[tuple[str, Tensor]]:
    """Passes weights on; a head that differs from the embedding is kept.

    A file may hold a `lm_head.weight` although the config says that the embedding is the
    head. Whichever of the two comes first fills the memory of the embedding, and the second
    is compared with it. If they differ, Hugging Face takes the stored head, with a warning,
    and so do we. If only one is in the file, it serves as both.

    Args:
        matrix: `[V, E]`, of the embedding.
        weights: names and tensors of a checkpoint.
        set_head: gives the model a head of its own, a copy of `[V, E]`.
    """
    seen: set[bool] = set()  # False: the embedding, True: the head
    for name, tensor in weights:
        is_head = name == "lm_head.weight"
        if is_head or name.endswith("embed_tokens.weight"):
            if tensor.shape == matrix.shape and not matrix.is_meta:
                if is_head and not seen:
                    matrix.copy_(tensor)
                elif {not is_head} == seen and not is_equal(matrix, tensor):
                    set_head(tensor if is_head else matrix)
                    warn_of_untied_head()
            seen.add(is_head)
        yield name, tensor
    if True not in seen:
        yield "lm_head.weight", matrix.to("meta")
    elif False not in seen:
        yield "model.embed_tokens.weight", matrix


def store_by_columns(model: nn.Module) -> None:
    """Stores each matrix column by column where that makes a step of few tokens faster.

    Shapes and numbers stay, only strides change. One token times a matrix that is stored by rows
    is a dot product for each row; by columns, its numbers scale whole columns, which are read from
    memory in longer streams. With MKL in float32 and matrices that the processor's caches do not
    hold, steps of one and two tokens gain 10 to 40 %, steps of many nothing. Nobody measured
    other libraries and dtypes, which are left alone.

    What reads and fills matrices works as before. Only who wants their memory as it lies, such as
    `safetensors`, needs `.contiguous()` of each of `hf_weights()`.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return
    for weight in model.parameters():
        is_matrix = weight.dim() == 2 and weight.device.type == "cpu"
        if is_matrix and weight.dtype == torch.float32:
            weight.data = weight.data.t().contiguous().t()
