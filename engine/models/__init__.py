"""The PyTorch models, as published: the source of every exported graph and the yardstick of every fast path.

Shape suffixes used in this package: B batch, C channel, D H W axes of the volume, d h w axes of the patch grid,
N tokens, E width, Q prompt tokens.
"""
