#!/usr/bin/env bash
# Ray Data reads one row of JSON Lines as several where its text holds U+2028, U+2029 or U+0085.
#
# Versions:  ray 2.60.0, pyarrow 26.0.1
# Expected:  read_text gives as many rows as the file has lines, that is, ends of line: JSON allows
#            these characters inside a string, and JSON Lines ends a row at "\n" alone.
# Behaviour: it splits with `str.splitlines`, for which they end a line too.
# Seen:      '{"prompt": "one\u2028two"}\n', the character itself in the file
#         -> ['{"prompt": "one', 'two"}'], and neither is JSON
# Instead:   a reader of one's own that splits bytes at b"\n" (examples/batch_ray.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ray==2.60.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 venv/bin/python - <<'PYTHON'
from pathlib import Path

import ray

line = '{"prompt": "one\u2028two"}'
Path("in.jsonl").write_text(line + "\n", "utf-8")
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
rows = [row["text"] for row in ray.data.read_text("in.jsonl").take_all()]
print(ray.__version__, [line], "->", rows)
assert rows == line.split("\u2028") and len(rows) == 2, rows
PYTHON
