#!/usr/bin/env bash
# Ray Data guesses what the strings and numbers of a JSON file mean, and does not give them back.
#
# Versions:  ray 2.60.0, pyarrow 26.0.1, pandas 3.1.1
# Expected:  read_json and write_json give back the values of the file: a JSON string is a string.
# Behaviour: strings that look like dates become timestamps, and are written as numbers; integers of
#            2**63 and more become floats; and floats are written with ten digits. Nothing warns.
# Seen:      {"id": "2024-01-31", "seed": 9223372036854775809, "score": 0.1234567890123456}
#         -> {"id": 1706659200000, "seed": 9.223372037e+18, "score": 0.123456789}
# Instead:   read lines as bytes, and parse them with `json` (examples/batch_ray.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ray==2.60.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
RAY_USAGE_STATS_ENABLED=0 venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import ray

rows = [{"id": "2024-01-31", "seed": 2**63 + 1, "score": 0.1234567890123456}]
Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
ray.data.read_json("in.jsonl").write_json("out")
[file] = Path("out").iterdir()
[row] = map(json.loads, file.read_text().splitlines())
print(ray.__version__, rows[0], "->", row)
assert row == {"id": 1706659200000, "seed": 9.223372037e18, "score": 0.123456789}, row
PYTHON
