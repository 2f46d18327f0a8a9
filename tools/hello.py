"""Let the bundled model tell a story, token by token: the first thing `make run` shows."""

import torch
from transformers import GenerationConfig

from folo_lib import bundled_model_path, load_model, load_tokenizer

PROMPT = "Once upon a time"
MAX_NEW_TOKENS = 200


def main() -> None:
    path = bundled_model_path()
    model, tokenizer = load_model(path, use_tqdm=False), load_tokenizer(path)
    device = next(model.parameters()).device
    stop_ids = GenerationConfig.from_pretrained(path).eos_token_id

    print("\nThe course's own Qwen3 says:\n")
    print(PROMPT, end="", flush=True)
    ids = tokenizer.encode(PROMPT)
    for _ in range(MAX_NEW_TOKENS):
        with torch.inference_mode():
            hidden_states = model(torch.tensor([ids], device=device))  # [1, S, E]
            logits = model.compute_logits(hidden_states[0, -1])  # [V]
        ids.append(int(logits.argmax()))
        if ids[-1] in stop_ids:
            break
        print(tokenizer.decode(ids[-1]), end="", flush=True)
    print("\n")


if __name__ == "__main__":
    main()
