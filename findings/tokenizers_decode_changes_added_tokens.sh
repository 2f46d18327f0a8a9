#!/usr/bin/env bash
# A byte-level tokenizer decodes an added token to another text than the one it was added with.
#
# Versions:  tokenizers 0.23.3
# Expected:  decode(encode(text)) == text: an added token stands for its own content.
# Behaviour: the ByteLevel decoder takes the characters of every token for spelled bytes, those of
#            added tokens too, where all of them are among its 256. "č" (U+010D) spells the byte of a
#            carriage return, "Ġ" that of a space. With one character beyond the 256, "ž" (U+017E),
#            the token is left as it is.
# Seen:      "a <čas> b"  -> "a <\ras> b"
#            "a <Ġ> b"    -> "a < > b"
#            "a <žena> b" -> "a <žena> b"
# Instead:   take the content of an added token as its text (`TokenBytes` on page 09).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<čas>", "<Ġ>", "<žena>")])
texts = ["a <čas> b", "a <Ġ> b", "a <žena> b"]
seen = [tokenizer.decode(tokenizer.encode(text).ids) for text in texts]
print(tokenizers.__version__, texts, "->", seen)
assert seen == ["a <\ras> b", "a < > b", "a <žena> b"], seen
PYTHON
