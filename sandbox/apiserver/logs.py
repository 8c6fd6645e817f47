"""pods/log: passed through from the kubelet of the pod's node."""

from __future__ import annotations

import aiohttp
from aiohttp import web

from sandbox.apiserver import errors
from sandbox.apiserver.core import Core
from sandbox.client import ApiError, Obj

_KNOWN = {
    "container",
    "follow",
    "previous",
    "timestamps",
    "tailLines",
    "limitBytes",
    "sinceSeconds",
    "sinceTime",
    "pretty",
    "insecureSkipTLSVerifyBackend",
    "stream",
}


def container(pod: Obj, asked: str) -> str:
    """The container meant: the one asked for, or the only one. Raises ApiError."""
    spec, name = pod["spec"], pod["metadata"]["name"]
    names = [c["name"] for c in spec["containers"]]
    inits = [c["name"] for c in spec.get("initContainers") or []]
    if not asked:
        if len(names) == 1 and not inits:
            return str(names[0])
        text = f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]"
        if inits:
            text += f" or one of the init containers: [{' '.join(inits)}]"
        raise errors.bad_request(text)
    if asked not in names and asked not in inits:
        raise errors.bad_request(f"container {asked} is not valid for pod {name}")
    return asked


def kubelet(core: Core, node_name: str) -> str:
    """Where a node's kubelet answers, by what the Node says. Raises ApiError."""
    node = core.store.get("nodes", "", node_name)
    if node is None:
        raise errors.not_found("", "pods", node_name)  # so the real server: it looks for the node's "pod" of logs
    status = node.obj.get("status") or {}
    addresses = {entry["type"]: entry["address"] for entry in status.get("addresses") or []}
    port = ((status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}).get("Port")
    if not port or "InternalIP" not in addresses:
        raise ApiError(
            500, "InternalError", f'Internal error occurred: no preferred addresses found for node "{node_name}"'
        )
    return f"{core.kubelet_scheme}://{addresses['InternalIP']}:{port}"


async def proxy(core: Core, request: web.BaseRequest, namespace: str, name: str) -> web.StreamResponse:
    """Stream a container's log. Raises ApiError."""
    found = core.store.get("pods", namespace, name)
    if found is None:
        raise errors.not_found("", "pods", name)
    if unknown := set(request.query) - _KNOWN:
        raise errors.bad_request(f"unsupported log parameters: {', '.join(sorted(unknown))}")
    chosen = container(found.obj, request.query.get("container", ""))
    node = found.obj["spec"].get("nodeName")
    if not node:
        return web.Response(status=204)
    query = {key: value for key, value in request.query.items() if key != "container"}
    url = f"{kubelet(core, node)}/containerLogs/{namespace}/{name}/{chosen}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=3)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        try:
            answer = await session.get(url, params=query, ssl=False)
        except (aiohttp.ClientError, TimeoutError) as lost:
            raise ApiError(500, "InternalError", f"Get {url!r}: {lost or 'no answer in time'}") from lost
        async with answer:
            if answer.status >= 400:
                text = (await answer.text()).strip()
                reason = "BadRequest" if answer.status == 400 else "InternalError"
                raise ApiError(answer.status, reason, text)
            return await _pass(request, answer)


async def _pass(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except aiohttp.ClientConnectionResetError:  # the reader has gone
        raise
    except aiohttp.ClientError:  # the kubelet is gone: the client shall not take this for the log's end
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response
