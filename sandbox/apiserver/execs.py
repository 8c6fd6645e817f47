"""pods/exec: a client's WebSocket is joined to one of the kubelet of the pod's node, message by message.

The channel protocols (v4, v5: k8s.io/apimachinery/pkg/util/remotecommand) are the client's and the kubelet's
business. SPDY, which kubectl before 1.30 speaks, is refused in so many words; so are attach and portforward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
from aiohttp import WSMsgType, web

from sandbox.apiserver import errors, logs
from sandbox.apiserver.core import Core
from sandbox.client import ApiError

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STREAMS = {"stdin": "input", "stdout": "output", "stderr": "error", "tty": "tty"}  # ours → the kubelet's name
_KNOWN = {*_STREAMS, "command", "container", "pretty"}
_CONNECT_SECONDS = 3.0


def url(core: Core, request: web.BaseRequest, namespace: str, name: str) -> tuple[str, list[tuple[str, str]]]:
    """Where the kubelet offers what is asked for, and its query. Raises ApiError."""
    found = core.store.get("pods", namespace, name)
    if found is None:
        raise errors.not_found("", "pods", name)
    if unknown := set(request.query) - _KNOWN:
        raise errors.bad_request(f"unsupported exec parameters: {', '.join(sorted(unknown))}")
    container = logs.container(found.obj, request.query.get("container", ""))
    node = found.obj["spec"].get("nodeName")
    if not node:
        raise errors.bad_request(f"pod {name} does not have a host assigned")
    streams = [theirs for ours, theirs in _STREAMS.items() if request.query.get(ours) in ("1", "true")]
    if not {"input", "output", "error"} & set(streams):
        raise errors.bad_request("you must specify at least 1 of stdin, stdout, stderr")
    commands = request.query.getall("command", [])
    if not commands:
        raise errors.bad_request("you must specify at least one command for the container")
    query = [("command", word) for word in commands] + [(stream, "1") for stream in streams]
    return f"{logs.kubelet(core, node)}/exec/{namespace}/{name}/{container}", query


def _offered(request: web.BaseRequest) -> list[str]:
    """The protocols of the client that a kubelet understands. Raises ApiError when there is none, or no WebSocket."""
    upgrade = request.headers.get("Upgrade", "").lower()
    if upgrade.startswith("spdy/"):
        raise ApiError(
            501,
            "NotImplemented",
            "exec over SPDY is not supported by the sandbox: use a client that speaks WebSocket (kubectl ≥ 1.30)",
        )
    if upgrade != "websocket":
        raise errors.bad_request("Upgrade request required")
    asked = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part.strip()]
    offered = [protocol for protocol in PROTOCOLS if protocol in asked]
    if not offered:
        raise errors.bad_request(
            f"unable to upgrade: unable to negotiate protocol: client supports [{' '.join(asked)}], "
            f"server accepts [{' '.join(PROTOCOLS)}]"
        )
    return offered


async def proxy(core: Core, request: web.BaseRequest, namespace: str, name: str) -> web.StreamResponse:
    """Run a command in a container, until it ends or the client goes. Raises ApiError."""
    target, query = url(core, request, namespace, name)
    offered = _offered(request)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        kubelet = await _dial(session, target, query, offered)
        async with kubelet:
            client = web.WebSocketResponse(protocols=(kubelet.protocol or offered[-1],), max_msg_size=0)
            await client.prepare(request)
            await _join(client, kubelet)
            return client


async def _dial(
    session: aiohttp.ClientSession, target: str, query: Sequence[tuple[str, str]], offered: Sequence[str]
) -> aiohttp.ClientWebSocketResponse:
    try:
        return await session.ws_connect(target, params=query, protocols=offered, max_msg_size=0, ssl=False)
    except aiohttp.WSServerHandshakeError as refused:
        # The handshake's answer has lost its text; the same question without an upgrade is refused for the same reason.
        async with session.get(target, params=query, ssl=False) as answer:
            text = (await answer.text()).strip() if answer.status >= 400 else str(refused)
        reason = {400: "BadRequest", 404: "NotFound", 501: "NotImplemented"}.get(refused.status, "InternalError")
        raise ApiError(refused.status if refused.status >= 400 else 500, reason, text) from refused
    except (aiohttp.ClientError, TimeoutError) as lost:
        raise ApiError(500, "InternalError", f"error dialing backend: {lost or 'no answer in time'}") from lost


async def _join(client: web.WebSocketResponse, kubelet: aiohttp.ClientWebSocketResponse) -> None:
    """Both ways until one side ends; then the other is ended too."""
    ways = [asyncio.create_task(_copy(client, kubelet)), asyncio.create_task(_copy(kubelet, client))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
    await kubelet.close()
    await client.close(code=kubelet.close_code or 1000)


Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


async def _copy(source: Socket, sink: Socket) -> None:
    async for message in source:
        if message.type is WSMsgType.BINARY:
            await sink.send_bytes(message.data)
        elif message.type is WSMsgType.TEXT:
            await sink.send_str(message.data)
        else:
            return
