"""The commands that make what a cluster knows its services and users by: `certs` and `key`."""

from pathlib import Path
from typing import Annotated

import typer


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where certificates go.")],
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST,...", help="Names and addresses by which users call the coordinator."
        ),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST,...",
            help="Names and addresses by which the coordinator calls a worker. Once for each worker.",
        ),
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A user to make a certificate for. Once for each."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are valid.")] = 365,
) -> None:
    """Make a private CA for a cluster, and certificates of its services and users.

    Where DIR has a CA already, it signs: so workers and users can be added later.

    Without options: a coordinator, a worker and a user on this machine. All that are made for services
    hold for localhost, too.

    Example: colrow certs certs --coordinator llm.example --worker gpu-a --worker gpu-b --user alice
    """
    from client.certificates import Wanted, make_certificates

    wanted = Wanted(coordinator, worker or (), user or (), days)
    if (coordinator, worker, user) == (None, None, None):
        wanted = Wanted("localhost", ("localhost",), ("user",), days)
    made = make_certificates(folder, wanted)
    ca_key = folder / "ca" / "ca.key"
    print(f"The CA's key is {ca_key}: who has it can make certificates; keep it elsewhere.")
    for place in made:
        match place.relative_to(folder).parts:
            case ("coordinator",):
                print(f"{place}: colrow coordinator --tls {place} --worker-tls {place}")
                print("    and --client-cert-auth, if users are to present certificates")
            case ("workers", _):
                print(f"{place}: colrow worker --tls {place}")
            case _:
                print(f"{place}: colrow generate --tls {place}")


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; it stands in logs.")],
    file: Annotated[Path, typer.Option(help="The file of keys that its hash is added to.")],
) -> None:
    """Make an API key: print it, and add its hash to a file for `colrow coordinator --api-keys`.

    It is shown this once. To take it back remove the line of NAME; a running coordinator notices.

    Example: colrow key alice --file api-keys
    """
    from coordinator.api_keys import add_key

    print(add_key(name, file))
