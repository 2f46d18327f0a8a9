#!/usr/bin/env bash
# torch.compile of torch 2.10 compiles anew for each length of a list that compiled code never reads,
# if the list is in a frozen dataclass.
#
# Versions:  torch 2.10.0 and, to compare, 2.13.0 (CPU builds do). TORCH_INDEX=<address> takes torch
#            from another index
# Expected:  an object is handed through compiled code to a function under torch.compiler.disable,
#            which alone looks into it. Its list is no input of the compiled code, so that other
#            lengths of the list change nothing. And it is all the same whether the dataclass is frozen.
# Behaviour: with torch 2.10.0, a frozen dataclass is taken apart where it is handed on, and the length
#            of each list in it becomes a guard: six lengths are compiled six times, until the limit
#            of eight makes the function run uncompiled (2.11 writes one line to the log then). A plain
#            dataclass has no such guard, and in 2.13.0 a frozen one has none either.
# Seen:      parts compiled for six lengths, before and after the call:
#            2.10.0: frozen 7, plain 2. 2.13.0: frozen 2, plain 2.
# Instead:   hand only tensors through compiled code, or make lists of one length; and test with
#            torch._dynamo.config.error_on_recompile in the oldest version that is supported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/count.py" <<'PYTHON'
import sys
from dataclasses import make_dataclass

import torch


@torch.compiler.disable
def use(x, step):
    return x * len(step.numbers)


def layer(x, step):
    return use(x + 1, step) + 1


def count(frozen):
    step_class = make_dataclass("Step", ["numbers"], frozen=frozen)
    compiled = []

    def note(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(layer, backend=note, dynamic=True)
    for length in range(3, 9):
        result = run(torch.zeros(4), step_class(list(range(length))))
        assert result.tolist() == [length + 1.0] * 4
    return len(compiled)


found = {name: count(name == "frozen") for name in ("frozen", "plain")}
print("torch", torch.__version__, found)
assert str(found) == sys.argv[1], f"expected {sys.argv[1]}"
PYTHON
for version in 2.10.0 2.13.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$version" numpy
done
"$folder/2.10.0/bin/python" "$folder/count.py" "{'frozen': 7, 'plain': 2}"
"$folder/2.13.0/bin/python" "$folder/count.py" "{'frozen': 2, 'plain': 2}"
