"""Calls to the chaos daemons of the nodes, over HTTP."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson

from sandbox.chaos.actions import CannotAct
from sandbox.client import Obj

PORT = 31767  # chaos-daemon's
SECONDS = 5.0  # for a daemon to answer


class HttpDaemons:
    """`actions.Daemons` for the sandbox's own nodes."""

    async def call(self, method: str, host: str, path: str, body: Obj | None = None) -> Obj:
        url = f"http://{host}:{PORT}{path}"
        data = None if body is None else orjson.dumps(body)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS)) as session,
                session.request(method, url, data=data) as answer,
            ):
                text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as lost:
            raise CannotAct(f"the chaos daemon at {host}:{PORT} does not answer") from lost
        if answer.status >= 400:
            raise CannotAct(text)
        found: dict[str, Any] = orjson.loads(text)
        return found
