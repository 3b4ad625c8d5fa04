"""The steps of deploy/gpu_check.py. `steps` lists them; each runs in a process of its own, by `child`."""
