#!/usr/bin/env bash
# onnxruntime-genai takes a prompt's last pad token for padding, and padding on the left for text.
#
# Versions:  onnxruntime-genai 0.18.0, onnx 1.23.2, onnx-ir 1.1.0, transformers 5.23.0, torch 2.13.0.
#            TORCH_INDEX=<address> takes torch from another index
# Expected:  append_tokens reads the ids it is given. A prompt alone needs no padding, so one that
#            ends with the model's pad token (Qwen3's is <|endoftext|>, which also parts one document
#            from the next) is read to its end. Of a batch, rows that are padded on the left, as
#            transformers asks of decoders, are read without their padding, or refused.
# Behaviour: append_tokens takes no attention mask. What counts as padding are pad tokens at the end of a
#            row, even of the only row: the first answer is the one to the prompt without them.
#            Pad tokens in front are read as text; a row padded on the left gets another answer.
# Seen:      alone, the pad token first or in the middle: 8 of 8 tokens as from transformers; last: 1
#            of 8, and the first is the answer to the prompt without it. Two rows, padded on the
#            right: all 16 as from transformers, on the left: 8 for the long row, 1 for the short one.
#            Nothing is said
# Instead:   pad on the right, as Tokenizer.encode_batch does. For a prompt that ends with the pad token,
#            append everything before it and then it alone: a second append_tokens is read whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
"$folder/venv/bin/pip" install -q onnxruntime-genai==0.18.0 onnx==1.23.2 onnx-ir==1.1.0 \
    transformers==5.23.0 torch==2.13.0
cat > "$folder/make.py" <<'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.4,
    max_position_embeddings=256, bos_token_id=0, pad_token_id=0, eos_token_id=79,
)
model = Qwen3ForCausalLM(config)
with torch.no_grad():
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 3)
model.save_pretrained(sys.argv[1])
words = {f"w{index}": index for index in range(80)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="w0", bos_token="w0", eos_token="w79"
).save_pretrained(sys.argv[1])
PYTHON
export HF_HUB_OFFLINE=1
"$folder/venv/bin/python" "$folder/make.py" "$folder/model"
"$folder/venv/bin/python" -m onnxruntime_genai.models.builder -i "$folder/model" \
    -o "$folder/onnx" -p fp32 -e cpu -c "$folder/cache" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 2; }
"$folder/venv/bin/python" - "$folder" <<'PYTHON' 2> "$folder/said" || { cat "$folder/said"; exit 1; }
import sys

import numpy as np
import onnxruntime_genai
import torch
from transformers import Qwen3ForCausalLM

folder = sys.argv[1]
count, pad = 8, 0
reference = Qwen3ForCausalLM.from_pretrained(f"{folder}/model").eval()
model = onnxruntime_genai.Model(f"{folder}/onnx")


def theirs(prompt):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    return reference.generate(ids, attention_mask=mask, **options)[0, len(prompt) :].tolist()


def answers(rows, *more):
    length = sum(map(len, [rows[0], *more]))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(
        max_length=length + count, do_sample=False, batch_size=len(rows)
    )
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array(rows, dtype=np.int32))
    for part in more:
        generator.append_tokens(np.array([part], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[length:].tolist() for row in range(len(rows))]


def same(ours, prompt):
    return sum(one == two for one, two in zip(ours, theirs(prompt), strict=True))


text = [17, 40, 5, 29, 33, 8]
long = [21, 9, 50, 44, 13, 30, 7, 26, 3, 58]
padding = [pad] * (len(long) - len(text))
first, middle, last = [pad, *text], [*text[:3], pad, *text[3:]], [*text, pad]
print("onnxruntime-genai", onnxruntime_genai.__version__)
seen = {name: same(answers([prompt])[0], prompt) for name, prompt in
        {"none": text, "first": first, "middle": middle, "last": last}.items()}
for name, number in seen.items():
    print(f"one prompt, pad token {name}: {number} of {count} as from transformers")
start = answers([last])[0][0]
print("last: the first token is the answer to the prompt without it:", start == theirs(text)[0])
in_two = same(answers([text], [pad])[0], last)
print(f"last, appended on its own: {in_two} of {count}")
right = answers([text + padding, long])
left = answers([padding + text, long])
rows = {"right": (same(right[0], text), same(right[1], long)),
        "left": (same(left[0], text), same(left[1], long))}
for side, (short_row, long_row) in rows.items():
    print(f"two rows, padded on the {side}: {short_row} and {long_row} of {count}")
assert seen == {"none": 8, "first": 8, "middle": 8, "last": 1} and in_two == 8
assert start == theirs(text)[0] != theirs(last)[0]
assert rows == {"right": (8, 8), "left": (1, 8)}
PYTHON
cat "$folder/said"
