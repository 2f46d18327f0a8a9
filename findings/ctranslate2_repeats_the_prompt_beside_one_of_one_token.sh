#!/usr/bin/env bash
# ctranslate2 puts prompts into answers where it was told not to, if one prompt has a single token.
#
# Versions:  ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0. TORCH_INDEX=<address> takes torch
#            from another index
# Expected:  generate_batch(..., include_prompt_in_result=False, max_length=8) returns the first 8 tokens
#            of each answer and none of the prompt, whoever is in the batch. max_length does not count
#            the prompt.
# Behaviour: as soon as one prompt of the batch has one token, the answers to all longer ones begin with
#            their own prompt, all of it but its first token, and max_length counts these tokens too.
#            A prompt that is longer than max_length gets a part of itself and no answer.
# Seen:      a prompt of 5 tokens, alone or beside one of 2 or of 9: the 8 tokens that transformers writes.
#            Beside one of 1 token: 4 tokens of the prompt, then 4 of the answer. A prompt of 9 or of
#            12: 8 tokens of itself. Nothing is said. The same with beam_size=2
# Instead:   keep prompts of one token out of a batch, or take the prompt along
#            (include_prompt_in_result=True), raise max_length by its length and cut it off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$folder/venv/bin/pip" install -q ctranslate2==4.8.5 transformers==5.23.0 torch==2.13.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" 2> "$folder/said" <<'PYTHON' || { cat "$folder/said"; exit 1; }
import sys

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

folder, count = sys.argv[1], 8
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.4,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
reference = Qwen3ForCausalLM(config).eval()
with torch.no_grad():
    for name, weight in reference.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 3)
reference.save_pretrained(f"{folder}/model")
words = {f"w{index}": index for index in range(64)}
PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
    bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3",
).save_pretrained(f"{folder}/model")
TransformersConverter(f"{folder}/model").convert(f"{folder}/converted")
generator = ctranslate2.Generator(f"{folder}/converted", compute_type="float32", intra_threads=1)


def theirs(prompt, beams):
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "num_beams": beams}
    written = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return written[0, len(prompt) :].tolist()


def answers(prompts, beams):
    results = generator.generate_batch(
        [[f"w{token}" for token in prompt] for prompt in prompts],
        include_prompt_in_result=False, max_length=count, end_token=[], beam_size=beams,
    )
    return [result.sequences_ids[0] for result in results]


def prompt(length):
    numbers = torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(length))
    return numbers.tolist()


print("ctranslate2", ctranslate2.__version__)
for beams in (1, 2):
    for lengths in ((5,), (1,), (5, 2), (9, 5), (12, 9, 2), (5, 1), (1, 9), (12, 5, 1, 1)):
        prompts = [prompt(length) for length in lengths]
        for text, answer in zip(prompts, answers(prompts, beams), strict=True):
            repeated = text[1:] if 1 in lengths else []
            wanted = (repeated + theirs(text, beams))[:count]
            seen = f"{min(len(repeated), count)} of the prompt, {max(count - len(repeated), 0)} of the answer"
            print(f"beam_size={beams}, a prompt of {len(text)} in a batch of {lengths}: {seen}")
            assert answer == wanted, (text, answer, wanted)
PYTHON
if grep -iE "prompt|max_length" "$folder/said"; then exit 1; fi
