"""The `colrow` command, and a small Python client over the gRPC stubs.

from client import Colrow

with Colrow("localhost:50051") as colrow:
    for piece in colrow.generate("Once upon a time", max_tokens=32, temperature=0):
        print(piece.text, end="", flush=True)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.grpc_client import AsyncColrow, Colrow, Piece, Score, TokenLogprobs

__all__ = ["AsyncColrow", "Colrow", "Piece", "Score", "TokenLogprobs"]


def __getattr__(name: str) -> Any:
    # When first used (PEP 562): gRPC takes longer to import than the rest of the command, and most of
    # it, every `--help` too, does without.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from client import grpc_client

    return getattr(grpc_client, name)
