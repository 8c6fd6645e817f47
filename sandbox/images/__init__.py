"""What runs inside the sandbox's containers; `sandbox/images.toml` maps image names to these modules.

Every image is a `main(argv) -> int`, called in a forked process whose environment and network are the pod's.
"""
