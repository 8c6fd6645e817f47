"""Chaos Mesh as the sandbox has it: the controller that runs experiments and the daemon on every node.

Real: the resources, their life cycle, the killed processes, the dropped packets (nftables in the pod's
network namespace). Emulated: the admission webhook (see `controller`) and the runtime's container kill (an
annotation that the node agent obeys). Not supported, and refused with a reason: IOChaos, DNSChaos, HTTPChaos,
TimeChaos, KernelChaos, and the actions that `actions` names. Schedule and Workflow are not served at all.
"""
