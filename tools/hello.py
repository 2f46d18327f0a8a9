"""Let the bundled model tell a story, token by token: the first thing `make run` shows."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, GenerationConfig

from folo_lib import bundled_model_path, load_model

PROMPT = "Once upon a time"
MAX_NEW_TOKENS = 200


def main() -> None:
    path = bundled_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    eos = GenerationConfig.from_pretrained(path).eos_token_id
    stops = set(eos if isinstance(eos, list) else [eos])
    model = load_model(path)
    device = next(model.parameters()).device

    print("\nThe course's own Qwen3 says:\n")
    print(PROMPT, end="", flush=True)
    ids = tokenizer.encode(PROMPT)
    shown = PROMPT
    for _ in range(MAX_NEW_TOKENS):
        with torch.inference_mode():
            hidden = model(torch.tensor([ids], device=device))
            token = int(model.compute_logits(hidden[:, -1]).argmax())
        if token in stops:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(
            "\N{REPLACEMENT CHARACTER}"
        ):  # half a character waits for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print("\n")


if __name__ == "__main__":
    main()
