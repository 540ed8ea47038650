"""The `colrow` command, and a small Python client over the gRPC stubs.

from client import Colrow

with Colrow("localhost:50051") as colrow:
    for piece in colrow.generate("Once upon a time", max_tokens=32, temperature=0):
        print(piece.text, end="", flush=True)
"""

from client.grpc_client import Colrow, Piece

__all__ = ["Colrow", "Piece"]
