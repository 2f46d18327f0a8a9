#!/usr/bin/env bash
# langchain-openai knows a prompt that is too long with one version of openai and not with another.
#
# Versions:  langchain-openai 1.7.4 (it asks for openai>=2.45.0), openai 3.30.0 and 3.57.0
# Expected:  an answer of 400 with the code "context_length_exceeded" raises
#            OpenAIContextOverflowError, a ContextOverflowError of langchain-core, with both.
# Behaviour: it looks for the code in `str(error)`. Until 3.30.0 at least that text held the whole
#            body; by 3.44.0 it holds the message only, and the code is in `error.code` alone.
# Seen:      3.30.0: OpenAIContextOverflowError; 3.57.0: OpenAIInvalidRequestError, which is no
#            ContextOverflowError. The answer of the server and `error.code` are the same
# Instead:   except openai.BadRequestError as error, and look at error.code; as a server, say
#            "prompt is too long" in the message, which langchain-openai looks for as well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ask.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

said = {"message": "This chat has 90 tokens, and 64 fit.", "code": "context_length_exceeded"}
body = json.dumps({"error": said | {"type": "invalid_request_error", "param": None}}).encode()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
chat = ChatOpenAI(model="m", base_url=f"http://127.0.0.1:{server.server_port}", api_key="none")
try:
    chat.invoke("Hello")
except openai.BadRequestError as caught:
    error = caught
known = isinstance(error, ContextOverflowError)
packages = [f"{name} {version(name)}" for name in ("langchain-openai", "openai")]
print(*packages, type(error).__name__, error.code, "overflow" if known else "no overflow")
assert error.code == "context_length_exceeded"
assert known == (version("openai") == "3.30.0")
PYTHON
for openai in 3.30.0 3.57.0; do
    python3 -m venv "$folder/$openai"
    "$folder/$openai/bin/pip" install -q langchain-openai==1.7.4 openai=="$openai"
    "$folder/$openai/bin/python" "$folder/ask.py"
done
