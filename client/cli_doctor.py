"""The command that examines a machine: `doctor`."""

import json
from typing import Annotated

import typer

from client.cli_processes import DEFAULTS
from client.options import Json


def doctor(
    grpc_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port that `colrow serve` would listen on.")
    ] = DEFAULTS.grpc_port,
    http_port: Annotated[
        int, typer.Option(min=1, max=65535, help="And that of the OpenAI-compatible API.")
    ] = DEFAULTS.http_port,
    host: Annotated[str, typer.Option(help="The address it would listen on.")] = DEFAULTS.host,
    as_json: Json = False,
) -> None:
    """Examine this machine: what there is to serve on, whether it works, what to do where not.

    Transports are tried between processes, and each GPU writes into every other one's memory.

    Exit code 1 if something would keep `colrow serve` from working. Warnings do not count.

    Example: colrow doctor --json
    """
    from client.doctor import examine
    from client.doctor_view import findings_data, findings_summary, findings_table
    from client.serving import termination_interrupts
    from client.views import console, progress_view
    from colrow.finding import Verdict

    findings = []
    with termination_interrupts(), progress_view(console(stderr=True)) as progress:
        progress("Examining this machine", 0, 0)
        for finding in examine(host, grpc_port, http_port):
            findings.append(finding)
    if as_json:
        print(json.dumps(findings_data(findings), indent=2))
    else:
        out = console()
        out.print(findings_table(findings))
        out.print(findings_summary(findings))
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise typer.Exit(1)
