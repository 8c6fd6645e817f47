"""A machine: PID 1 of a process namespace, which forks the kubelet and, for it, the containers.

It has a network namespace of its own. SIGPWR takes its power away: the link is cut first, then kernel, kubelet and
pods end at the same instant, and nobody is told: no FIN, no RST, as with a real machine. (SIGKILL of this process ends
all of it as well, but its sockets are closed while the link is up.)
"""

from __future__ import annotations

import os
import signal

import setproctitle

from sandbox.node import linux, network
from sandbox.node.agent import Machine, main as agent_main
from sandbox.node.zygote import Zygote, freeze, pair


def _power_off(*_: object) -> None:
    try:
        network.fall_silent()
    finally:
        os._exit(128 + signal.SIGPWR)


def main(argv: list[str]) -> int:
    """Boot the machine that `argv[0]` (JSON, see `agent.Machine`) describes; ends with its kubelet."""
    signal.signal(signal.SIGPWR, _power_off)
    freeze()
    network.join_fabric(Machine.load(argv[0]).index)
    ours, theirs = pair()
    if os.fork() == 0:
        code = 1
        try:
            ours.close()
            signal.signal(signal.SIGPWR, signal.SIG_DFL)
            linux.die_with_parent()
            setproctitle.setproctitle(f"gameday: kubelet {argv[1]}")
            code = agent_main(argv[0], theirs)
        finally:
            os._exit(code)
    theirs.close()
    Zygote(ours).run()
    return 1
