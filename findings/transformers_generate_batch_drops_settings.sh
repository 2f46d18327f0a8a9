#!/usr/bin/env bash
# transformers' generate_batch drops min_new_tokens, num_beams and keywords without a word.
#
# Versions:  transformers 5.23.0, torch 2.13.0. TORCH_INDEX=<address> takes torch from another index
# Expected:  generate_batch, the continuous batching of transformers, does what generate does with
#            the same GenerationConfig, or says which setting it lacks, as it does for
#            repetition_penalty ("isn't supported by CB. Dropping it."). A keyword that generate
#            takes is taken, or refused.
# Behaviour: min_new_tokens acts through a processor that is made only where the config holds
#            _eos_token_tensor, which generate sets before and generate_batch does not, so none is
#            made, and there is nothing to warn about. num_beams=2 is answered greedily. Of the
#            keywords only max_new_tokens is read; eos_token_id=... as a keyword stops nothing.
# Seen:      min_new_tokens=8: generate writes 9 tokens, generate_batch 5; num_beams=2: generate
#            writes another text than greedily, generate_batch the greedy one; eos_token_id: 5
#            tokens from the config, 12 as a keyword; nothing logged, nothing warned of
# Instead:   give generate_batch a GenerationConfig, never keywords, and check by hand what it must
#            do beyond eos_token_id, max_new_tokens, temperature, top_k and top_p.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0 psutil
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

heard = []
warnings.showwarning = lambda message, *_, **__: heard.append(str(message))


class Listener(logging.Handler):
    def emit(self, record):
        heard.append(record.getMessage())


for name in ("transformers", "ContinuousBatchingLogger"):
    logging.getLogger(name).addHandler(Listener(logging.WARNING))
torch.manual_seed(0)
torch.set_num_threads(1)
config = Qwen3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
)
model = Qwen3ForCausalLM(config).eval()
prompts = [torch.randint(1, 64, (length,)).tolist() for length in (3, 9, 17)]
settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 63}


def alone(**more):
    wanted = GenerationConfig(**settings | more)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        written = model.generate(ids, attention_mask=mask, generation_config=wanted)
        answers.append(written[0, len(prompt) :].tolist())
    return answers


def batched(more, **keywords):
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**settings | more),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
        **keywords,
    )
    return [output.generated_tokens for output in outputs.values()]


greedy = alone()
assert batched({}) == greedy and {len(answer) for answer in greedy} == {12}
batched({"repetition_penalty": 1.8})
assert any("Dropping it" in message for message in heard), heard
eos = greedy[0][4]
beams = alone(num_beams=2)
stopped = {
    "generate, min_new_tokens": alone(eos_token_id=eos, min_new_tokens=8),
    "generate, without": alone(eos_token_id=eos),
}
heard.clear()
stopped |= {
    "generate_batch, min_new_tokens": batched({"eos_token_id": eos, "min_new_tokens": 8}),
    "generate_batch, without": batched({"eos_token_id": eos}),
    "generate_batch, eos_token_id as a keyword": batched({}, eos_token_id=eos),
}
their_beams = batched({"num_beams": 2})
print("transformers", transformers.__version__)
for name, answers in stopped.items():
    print(f"{name}: {len(answers[0])} tokens")
print("num_beams=2: generate writes what it writes greedily:", beams == greedy)
print("num_beams=2: generate_batch writes what it writes greedily:", their_beams == greedy)
print("said:", heard)
assert [len(answers[0]) for answers in stopped.values()] == [9, 5, 5, 5, 12]
assert beams != greedy and their_beams == greedy and not heard
PYTHON
