"""nftables inside another network namespace, without moving the calling process there.

A short-lived thread enters the namespace and ends there: nothing has to come back, and no await can come between.
libnftables (about 1 ms) where it is installed, else the `nft` command (about 6 ms). Source: facts/sandbox-recipes.md.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import threading
from functools import cache

from sandbox.node import linux


class NftFailed(Exception):
    """The kernel or nft refused; the text is nft's own."""


async def apply(fd: int, script: str) -> None:
    """Run nft commands in the network namespace that `fd` is open on, as one transaction. Raises `NftFailed`."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    own = os.dup(fd)  # the caller may close its own while the thread is under way

    def settle(error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(None)

    def work() -> None:
        error: Exception | None = None
        try:
            linux.setns(own, linux.CLONE_NEWNET)
            run(script)
        except (OSError, NftFailed) as failure:
            error = failure if isinstance(failure, NftFailed) else NftFailed(str(failure))
        finally:
            os.close(own)
        loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=work, name="nft", daemon=True).start()
    await done


@cache
def _library() -> ctypes.CDLL | None:
    try:
        lib = ctypes.CDLL("libnftables.so.1")
    except OSError:
        return None
    lib.nft_ctx_new.restype = ctypes.c_void_p
    lib.nft_ctx_new.argtypes = [ctypes.c_uint32]
    lib.nft_ctx_free.argtypes = [ctypes.c_void_p]
    lib.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    return lib


_one_at_a_time = threading.Lock()  # libnftables does not promise that its parser may run twice at once


def run(script: str) -> None:
    """Run nft commands in the namespace of the calling thread. Raises `NftFailed`."""
    lib = _library()
    if lib is None:
        done = subprocess.run(["nft", "-f", "-"], input=script, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NftFailed(done.stderr.strip())
        return
    with _one_at_a_time:
        context = lib.nft_ctx_new(0)  # opens its netlink socket here, in the namespace of this thread
        try:
            lib.nft_ctx_buffer_error(context)
            if lib.nft_run_cmd_from_buffer(context, script.encode()):
                text = lib.nft_ctx_get_error_buffer(context) or b"nft failed"
                raise NftFailed(text.decode(errors="replace").strip())
        finally:
            lib.nft_ctx_free(context)
