"""What makes serving on a CPU faster.

The rest of the engine reaches it by `engine.runtime.acceleration` alone, and works without this folder. What each part
gains is measured in benchmarks/README.md; models that it does not help go without.
"""
