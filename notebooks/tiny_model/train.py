"""Trains the bundled checkpoint with the course's own model.

python -m tiny_model.train --out FOLDER
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from folo_lib.qwen3 import Qwen3ForCausalLM
from tiny_model.corpus import documents
from tiny_model.tokenizer import END_OF_TEXT, IM_END, train_tokenizer

IGNORE = -100  # the target of a token that is read, not learned


def tiny_config(vocab_size: int = 2048) -> Qwen3Config:
    """A Qwen3 in miniature: every feature of the large ones, three million parameters."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def encode_document(
    tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]
) -> tuple[list[int], list[int]]:
    """Token ids of a document, and the same ids with `IGNORE` where nothing is learned."""
    ids: list[int] = []
    targets: list[int] = []
    for text, learned in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        targets += piece if learned else [IGNORE] * len(piece)
    return ids, targets


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of `length` tokens, each filled with whole documents; the rest is padding."""
    corpus = documents(seed)
    waiting = [encode_document(tokenizer, next(corpus)) for _ in range(64)]
    pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    while True:
        ids: list[int] = []
        targets: list[int] = []
        while fitting := [d for d in waiting if len(d[0]) <= length - len(ids)]:
            best = max(fitting, key=lambda d: len(d[0])) if ids else fitting[0]
            waiting.remove(best)
            waiting.append(encode_document(tokenizer, next(corpus)))
            ids, targets = ids + best[0], targets + best[1]
        if not ids:  # a document longer than a row
            waiting[0] = encode_document(tokenizer, next(corpus))
            continue
        rest = length - len(ids)
        yield ids + [pad] * rest, targets + [IGNORE] * rest


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of input ids and next-token targets, both `[rows, length]`."""
    source = packed_rows(tokenizer, seed, length + 1)
    while True:
        ids, targets = zip(*(next(source) for _ in range(rows)), strict=True)
        yield torch.tensor(ids)[:, :-1], torch.tensor(targets)[:, 1:]


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """`batches` for a `DataLoader`, whose worker writes the next ones ahead of time."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int
    ) -> None:
        self.arguments = (tokenizer, seed, rows, length)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(*self.arguments)

    def load(self, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches for 0 workers, that is in this process, and for 1."""
        return iter(DataLoader(self, batch_size=None, num_workers=workers))


def make_optimizers(
    model: Qwen3ForCausalLM, bfloat16: bool
) -> list[torch.optim.Optimizer]:
    """AdamW; with `bfloat16`, in which PyTorch's Muon computes, that for the layers' matrices."""
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if bfloat16 and parameter.dim() == 2 and "embed" not in name
    }
    others = [p for name, p in model.named_parameters() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices.values(), lr=0.02, weight_decay=0.01), adamw]


def learning_rate_factor(step: int, steps: int, warmup: int = 40) -> float:
    """Up in a line, flat, and down to zero over the last half."""
    return min(1.0, (step + 1) / warmup, 2 * (steps - step) / steps)


def train(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    rows: int = 26,
    length: int = 320,
    seed: int = 0,
    device: str = "cpu",
    bfloat16: bool = False,
    compile_model: bool = False,
    log_every: int = 50,
    report: Callable[[Qwen3ForCausalLM, int, float], None] | None = None,
    start: Path | None = None,
) -> Qwen3ForCausalLM:
    """Trains; the last tenth of the steps reads rows three times as long.

    Args:
        tokenizer: its length is the model's vocabulary.
        steps: optimizer steps, each over `rows * length` tokens.
        rows: rows in a batch.
        length: tokens in a row.
        seed: of the weights and the corpus.
        device: `"cpu"` or `"cuda"`.
        bfloat16: autocast, and Muon beside AdamW; slow where the hardware has no bfloat16.
        compile_model: fuse the step with `torch.compile`; wants a C++ compiler on a CPU.
        log_every: steps between two reports.
        report: called with the model, the step and the mean loss since the last report.
        start: a checkpoint to go on from, at half the learning rate; None starts from random.

    Returns:
        The model in float32.
    """
    torch.manual_seed(seed)
    config = tiny_config(len(tokenizer))
    model = Qwen3ForCausalLM(config, attention_backend="torch_naive").to(device)
    if start is not None:
        model.load_weights(load_file(start / "model.safetensors").items())
    optimizers = make_optimizers(model, bfloat16)
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]

    def loss_of(input_ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            logits = model.compute_logits(model(input_ids))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of) if compile_model else loss_of
    workers = int(device == "cuda")  # on a CPU a worker would compete with training
    short = Batches(tokenizer, seed + 1, rows, length).load(workers)
    long = Batches(tokenizer, seed + 2, max(rows // 3, 1), 3 * length).load(workers)
    losses: list[Tensor] = []
    for step in range(steps):
        factor = learning_rate_factor(step, steps)
        groups = [group for o in optimizers for group in o.param_groups]
        for group, base in zip(groups, base_rates, strict=True):
            group["lr"] = base * factor * (1.0 if start is None else 0.5)
        input_ids, targets = next(short if step < 0.9 * steps else long)
        loss = step_loss(input_ids.to(device), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) == log_every or step == steps - 1:
            if report is not None:
                report(model, step + 1, torch.stack(losses).mean().item())
            losses = []
    return model


def held_out_loss(
    hidden_states: Callable[[Tensor], Tensor],
    compute_logits: Callable[[Tensor], Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> float:
    """Mean loss in nats per learned token, over documents of a seed not trained on."""
    source = batches(tokenizer, 10**6, 16, 320)
    total = count = 0.0
    with torch.inference_mode():
        for _ in range(8):
            input_ids, targets = next(source)
            logits = compute_logits(hidden_states(input_ids)).float()
            total += F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
            count += (targets != IGNORE).sum().item()
    return total / count


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `folo_lib` both load."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: view.detach().to("cpu", torch.bfloat16).contiguous()
        for name, view in model.hf_weights().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ends = [tokenizer.convert_tokens_to_ids(t) for t in (IM_END, END_OF_TEXT)]
    model.config.eos_token_id, model.config.bos_token_id = ends
    model.config.pad_token_id = ends[1]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=ends[1],
        eos_token_id=ends,
        pad_token_id=ends[1],
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.95,
    ).save_pretrained(folder)


def average(first: Path, second: Path, out: Path) -> None:
    """The mean of the weights of two passes, written to `out` with the files of the second."""
    shutil.copytree(second, out, dirs_exist_ok=True)
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    mean = {
        name: ((one[name].float() + two[name].float()) / 2).bfloat16() for name in one
    }
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint"
    )
    parser.add_argument("--steps", type=int, default=2500)
    known = parser.add_mutually_exclusive_group()
    known.add_argument(
        "--start", type=Path, help="checkpoint to go on from, with its tokenizer"
    )
    known.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer; default: learn a new one"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the corpus"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="autocast and Muon, for a CPU with bfloat16 instructions; always on a GPU",
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--average", type=Path, nargs=2, help="train nothing: mean of two checkpoints"
    )
    args = parser.parse_args()
    if args.average is not None:
        return average(*args.average, args.out)

    known_tokenizer = args.start or args.tokenizer
    if known_tokenizer is None:
        corpus = documents(seed=0)
        texts = ("".join(text for text, _ in next(corpus)) for _ in range(30_000))
        tokenizer = train_tokenizer(texts, vocab_size=2048)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(known_tokenizer)
    bfloat16 = args.bfloat16 or args.device == "cuda"
    began = time.perf_counter()
    history: list[tuple[int, float]] = []

    def report(model: Qwen3ForCausalLM, step: int, loss: float) -> None:
        history.append((step, round(loss, 4)))
        seconds = time.perf_counter() - began
        print(
            f"step {step:5d}/{args.steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True
        )
        save(model, tokenizer, args.out)

    train(
        tokenizer,
        args.steps,
        device=args.device,
        bfloat16=bfloat16,
        compile_model=args.compile,
        report=report,
        start=args.start,
        seed=args.seed,
    )
    runs = []
    if args.start is not None:
        runs = json.loads((args.start / "training.json").read_text())["runs"]
    record = {
        "steps": args.steps,
        "device": args.device,
        "bfloat16": bfloat16,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "seed": args.seed,
        "loss": history,
    }
    lines = json.dumps({"runs": [*runs, record]}) + "\n"
    (args.out / "training.json").write_text(lines)


if __name__ == "__main__":
    main()
