"""Clients in a process of their own, for the section `serving`: streams over HTTP, timed.

    python -m folo_lib.benchmark_clients HOST PORT < requests.json

reads a list of bodies for `/v1/completions`, sends them at the same time, and prints seconds and
tokens as JSON. It needs nothing but the standard library, so that the clients cost little.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

__all__ = ["main"]


async def read_stream(host: str, port: int, body: dict[str, Any]) -> tuple[float, int]:
    """Sends one request; seconds until the first event, and the tokens of the last one."""
    reader, writer = await asyncio.open_connection(host, port)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    begin = time.perf_counter()
    writer.write(head.encode() + content)
    first, num_tokens = 0.0, 0
    async for line in reader:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begin
            if b'"usage": {' in line:
                num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    return first, num_tokens


async def run(host: str, port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """All of them at a time."""
    begin = time.perf_counter()
    done = await asyncio.gather(*(read_stream(host, port, body) for body in bodies))
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "ttft": [first for first, _ in done],
        "tokens": sum(num_tokens for _, num_tokens in done),
    }


def main() -> None:
    """`python -m folo_lib.benchmark_clients`."""
    host, port = sys.argv[1:]
    print(json.dumps(asyncio.run(run(host, int(port), json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
