#!/usr/bin/env bash
# onnxruntime-genai's builder tells the head by its size, and can put it on the first layer.
#
# Versions:  onnxruntime-genai 0.18.0, onnx 1.23.2, onnx-ir 1.1.0, transformers 5.23.0, torch 2.13.0.
#            TORCH_INDEX=<address> takes torch from another index
# Expected:  the builder finds lm_head by its name, in a Qwen3 of any width, or says what it cannot do.
# Behaviour: every linear layer with vocab_size outputs is "LM head" to it. Where q_proj, gate_proj or
#            o_proj have as many, as in a model of bytes (256 tokens) with 256 channels, the head is
#            connected to a norm within the first layer, and stays there. What the later layers and
#            the last norm compute does not reach the logits. No error, no warning.
# Seen:      four models of 256 tokens that differ in one size. No layer with 256 outputs: logits
#            within 0.0001 of transformers, the head reads layers.2/final_norm_layernorm. q_proj, or
#            gate_proj and up_proj, or o_proj and down_proj with 256: logits off by more than 0.5, the
#            head reads layers.0/post_attention_layernorm. The one trace is a log that says "Reading
#            LM head" 3 or 5 times
# Instead:   give the vocabulary a size that no layer has, for example by padding it (260 for 256).
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

folder, *numbers = sys.argv[1:]
width, heads, middle = map(int, numbers)
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=256, hidden_size=width, intermediate_size=middle, num_hidden_layers=2,
    num_attention_heads=heads, num_key_value_heads=2, head_dim=32, initializer_range=0.1,
    max_position_embeddings=128, bos_token_id=0, pad_token_id=0, eos_token_id=255,
)
Qwen3ForCausalLM(config).save_pretrained(folder)
words = {f"w{index}": index for index in range(256)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="w0", bos_token="w0", eos_token="w255"
).save_pretrained(folder)
PYTHON
cat > "$folder/compare.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime_genai
import torch
from transformers import Qwen3ForCausalLM

folder, name, found, expected = sys.argv[1:]
reference = Qwen3ForCausalLM.from_pretrained(f"{folder}/model").eval()
model = onnxruntime_genai.Model(f"{folder}/onnx")
params = onnxruntime_genai.GeneratorParams(model)
params.set_search_options(max_length=16, do_sample=False)
generator = onnxruntime_genai.Generator(model, params)
prompt = [17, 140, 5, 229, 33, 8]
generator.append_tokens(np.array([prompt], dtype=np.int32))
with torch.no_grad():
    logits = reference(torch.tensor([prompt])).logits.numpy()
off = float(np.abs(generator.get_output("logits") - logits).max())
graph = onnx.load(f"{folder}/onnx/model.onnx").graph
head = next(node for node in graph.node if node.name == "/lm_head/MatMul")
reads = head.input[0].removeprefix("/model/").removesuffix("/output_0")
far = "more than 0.5" if off > 0.5 else "less than 0.0001" if off < 1e-4 else f"{off}"
print(f"{name}: logits off by {far}, the head reads {reads}, found {found} times")
early = "layers.0/post_attention_layernorm"
assert (reads, int(found), far) == {
    "none": ("layers.2/final_norm_layernorm", 1, "less than 0.0001"),
    "q_proj": (early, 3, "more than 0.5"),
    "gate_proj": (early, 5, "more than 0.5"),
    "o_proj": (early, 5, "more than 0.5"),
}[expected], (reads, found, off)
PYTHON
export HF_HUB_OFFLINE=1
echo "onnxruntime-genai $("$folder/venv/bin/python" -c 'import onnxruntime_genai as it; print(it.__version__)')"
while read -r name width heads middle; do
    rm -rf "$folder/model" "$folder/onnx"
    "$folder/venv/bin/python" "$folder/make.py" "$folder/model" "$width" "$heads" "$middle" 2> "$folder/log"
    "$folder/venv/bin/python" -m onnxruntime_genai.models.builder -i "$folder/model" -o "$folder/onnx" \
        -p fp32 -e cpu -c "$folder/cache" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 2; }
    if grep -iE "warn.*(head|vocab)" "$folder/log"; then exit 1; fi
    "$folder/venv/bin/python" "$folder/compare.py" "$folder" \
        "$width channels, $heads heads of 32, $middle in the middle" \
        "$(grep -c 'Reading LM head' "$folder/log")" "$name" 2> "$folder/said" || { cat "$folder/said"; exit 1; }
done <<'SIZES'
none 64 4 96
q_proj 64 8 96
gate_proj 64 4 256
o_proj 256 4 96
SIZES
