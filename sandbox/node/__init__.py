"""The sandbox's machines: the process that is a machine, its kubelet, its pods and their network."""
