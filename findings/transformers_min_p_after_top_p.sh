#!/usr/bin/env bash
# transformers applies min_p after top_p, to the probabilities that top_p has left.
#
# Versions:  transformers 5.23.0, torch 2.13.0. TORCH_INDEX=<address> takes torch from another index
# Expected:  the same filters with the same numbers keep the same tokens in transformers and in vLLM,
#            whose sampler applies min_p to the distribution of the model, before top_k and top_p.
# Behaviour: top_p 0.82 keeps 3 of [0.5, 0.3, 0.15, 0.05]; min_p 0.2 then asks for 0.2 times the
#            largest, and removes none of them. The other way round min_p removes the fourth, and
#            top_p, of what remains, the third: 0.526 + 0.316 = 0.842 are enough.
# Seen:      [0.526, 0.316, 0.158, 0]: 3 tokens. The other order: [0.625, 0.375, 0, 0]: 2 tokens
# Instead:   do not combine the two, or count on one library's order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import MinPLogitsWarper, Qwen3Config, Qwen3ForCausalLM, TopPLogitsWarper

config = Qwen3Config(
    vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=8,
)
model = Qwen3ForCausalLM(config)
logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
model.lm_head.forward = lambda hidden: logits.expand(*hidden.shape[:-1], 4)
prompt = torch.tensor([[0]])
out = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, top_p=0.82,
    min_p=0.2, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
    eos_token_id=None, pad_token_id=0,
)
seen = out.scores[0][0].softmax(-1)
other = TopPLogitsWarper(0.82)(prompt, MinPLogitsWarper(0.2)(prompt, logits))[0].softmax(-1)
print(transformers.__version__, "generate:", seen.tolist(), "min_p first:", other.tolist())
assert (seen > 0).tolist() == [True, True, True, False], seen
assert (other > 0).tolist() == [True, True, False, False], other
PYTHON
