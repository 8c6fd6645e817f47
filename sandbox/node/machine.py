"""A machine: PID 1 of a process namespace, which forks the kubelet and, for it, the containers.

SIGKILL of this process is a crash of the whole machine: kernel, kubelet and pods at the same instant.
"""

from __future__ import annotations

import os

import setproctitle

from sandbox.node import linux
from sandbox.node.agent import main as agent_main
from sandbox.node.zygote import Zygote, freeze, pair


def main(argv: list[str]) -> int:
    """Boot the machine that `argv[0]` (JSON, see `agent.Machine`) describes; ends with its kubelet."""
    freeze()
    ours, theirs = pair()
    if os.fork() == 0:
        code = 1
        try:
            ours.close()
            linux.die_with_parent()
            setproctitle.setproctitle(f"gameday: kubelet {argv[1]}")
            code = agent_main(argv[0], theirs)
        finally:
            os._exit(code)
    theirs.close()
    Zygote(ours).run()
    return 1
