"""Where a server listens by default. Imports nothing: the help of every command reads it."""

GRPC_PORT = 8001
DEFAULT_URL = f"localhost:{GRPC_PORT}"  # of gRPC, for clients
