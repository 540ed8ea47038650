"""Where a coordinator is, and how one gets in. gRPC is imported when it is called first."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.grpc_client import Colrow

DEFAULT_TARGET = "localhost:50051"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`target` is host:port, `tls` a folder of `colrow certs` or a file of CAs; see `Colrow`."""

    target: str = DEFAULT_TARGET
    tls: Path | None = None
    api_key: str | None = field(default=None, repr=False)

    def connect(self) -> "Colrow":
        from client.grpc_client import Colrow

        return Colrow(self.target, tls=self.tls, api_key=self.api_key)
