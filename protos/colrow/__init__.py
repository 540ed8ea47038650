"""The contract between Colrow's services: generated stubs in `colrow.v1`, and what goes with them.

`colrow.errors` names the errors of the contract without protobuf; `colrow.rpc` puts them and the
standard services (health, reflection, channelz) on a gRPC server.
"""

from importlib.metadata import PackageNotFoundError, version

MAX_PEERS = 8
"""Ranks of TRANSPORT_PEER, at most."""

try:
    __version__ = version("colrow")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"
