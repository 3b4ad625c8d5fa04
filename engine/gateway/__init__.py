"""The HTTP gateway: OpenAI's routes and our own over the common API, with keys, limits, audit lines and metrics.

Its packages are those of the extra `m3d-engine[gateway]`. `app.py` has the routes; docs/gateway.md is for users.
"""
