#!/usr/bin/env bash
# A stream of the openai client that is left with `break` and deleted does not hang up.
#
# Versions:  openai 3.57.0, smolagents 1.26.0
# Expected:  once nothing refers to a stream any more, its connection is closed, and the server
#            stops writing tokens that nobody will read; CPython closes a generator at once.
# Behaviour: the stream and the generator inside it refer to each other, so only a run of the cyclic
#            garbage collector closes the connection, and a program that waits may never have one. A
#            generator of one's own around it does not help: `close()` on smolagents' generate_stream
#            ends the generator, and the request goes on.
# Seen:      half a second later the server is still sending, after `break` and `del` as well as after
#            smolagents' `close()`; gc.collect() ends it. With `with stream:` it ends at once.
# Instead:   `with client.chat.completions.create(..., stream=True) as stream:`, or stream.close().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q openai==3.57.0 smolagents==1.26.0
cat > "$folder/server.py" <<'PYTHON'
"""Streams a word every 20 ms for at most 5 s; GET says how many streams are open."""
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

open_streams = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(open_streams).encode())

    def do_POST(self):
        global open_streams
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        line = f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode()
        open_streams += 1
        try:
            for _ in range(250):
                self.wfile.write(line)
                time.sleep(0.02)
        except OSError:
            pass  # the client hung up
        open_streams -= 1

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import gc
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version

import openai
from smolagents import OpenAIModel

server = subprocess.Popen([sys.executable, "server.py"], stdout=subprocess.PIPE, text=True)
port = server.stdout.readline().strip()
url = f"http://127.0.0.1:{port}"
client = openai.OpenAI(base_url=url, api_key="none")
messages = [{"role": "user", "content": "Go on."}]


def start():
    return client.chat.completions.create(model="m", messages=messages, stream=True)


def count_open():
    time.sleep(0.5)
    return int(urllib.request.urlopen(url).read())


seen = {}
try:
    stream = start()
    for chunk in stream:
        break
    del stream, chunk
    seen["break and del"] = count_open()
    gc.collect()
    seen["gc.collect()"] = count_open()

    model = OpenAIModel("m", api_base=url, api_key="none")
    words = model.generate_stream(messages)
    next(words)
    words.close()
    del words
    seen["smolagents close()"] = count_open()
    gc.collect()
    seen["gc.collect() again"] = count_open()

    with start() as stream:
        for chunk in stream:
            break
    seen["with"] = count_open()
finally:
    server.terminate()
    server.wait()
print("openai", version("openai"), "smolagents", version("smolagents"), "streams open after", seen)
assert list(seen.values()) == [1, 0, 1, 0, 0], seen
PYTHON
