"""A small OpenAI-compatible server in a process of its own; every token carries the instant at which it was sent.

python -m tests… is not needed: `Server()` starts it, prints its port, and ends with its context.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from aiohttp import web

GAP = 0.01


def _event(data: object) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if request.app["key"] and request.headers.get("Authorization") != f"Bearer {request.app['key']}":
        return web.json_response({"error": {"message": "no such key"}}, status=401)
    if body["model"] != "tiny":
        return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
    chat = request.path.endswith("chat/completions")
    assert chat == ("messages" in body)
    count = body["max_tokens"]
    usage = {"prompt_tokens": len(json.dumps(body).split()), "completion_tokens": count}
    headers = {"X-Served-By": "pod-1", "X-Served-Zone": "a", "X-Turns": str(len(body.get("messages", [])))}
    answers = [m["content"] for m in body.get("messages", []) if m["role"] == "assistant"]
    if answers:  # what the client says that we said before
        headers["X-Gateway"] = answers[-1].strip()
    if not body.get("stream"):
        await asyncio.sleep(GAP * count)
        said = {"message": {"content": "word " * count}} if chat else {"text": "word " * count}
        choice = {**said, "finish_reason": "length"}
        return web.json_response({"choices": [choice], "usage": usage}, headers=headers)
    answer = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream"})
    answer.enable_chunked_encoding()
    await answer.prepare(request)
    for _ in range(count):
        await asyncio.sleep(GAP)
        if request.transport is None or request.transport.is_closing():  # the client gave up: nothing to report
            return answer
        text = {"delta": {"content": "word "}} if chat else {"text": "word "}
        await answer.write(_event({"choices": [{**text, "finish_reason": None}], "t": time.monotonic()}))
    await answer.write(_event({"choices": [{"delta": {}, "finish_reason": "length"}]}))
    if (body.get("stream_options") or {}).get("include_usage"):
        await answer.write(_event({"choices": [], "usage": usage}))
    await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


async def _main(key: str, cert: str) -> None:
    app = web.Application()
    app["key"] = key
    app.add_routes([web.post("/v1/chat/completions", _complete), web.post("/v1/completions", _complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    context = None
    if cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert)
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes it


class Server:
    """`with Server() as url:`"""

    def __init__(self, key: str = "", cert: Path | None = None) -> None:
        self._command = [sys.executable, __file__, key, str(cert or "")]
        self._scheme = "https" if cert else "http"
        self.process: subprocess.Popen[str]

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        return f"{self._scheme}://127.0.0.1:{int(self.process.stdout.readline())}"

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    import contextlib

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main(sys.argv[1], sys.argv[2]))
