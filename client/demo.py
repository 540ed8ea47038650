"""`colrow demo`: the whole of Colrow on one screen."""

import time

from rich.console import Console
from rich.markup import escape

from client.answer import Answer, stream_answer
from client.grpc_client import Colrow
from client.serving import Settings, running
from client.views import (
    communication_table,
    console,
    held_table,
    rank_rows,
    rank_table,
    ranks_text,
    transport_name,
)
from colrow.v1 import control_service_pb2

SETTLE_TIMEOUT_S = 2.0
POLL_S = 0.02


def run_demo(tp: int, question: str, max_tokens: int) -> None:
    """Serves the demo model over `tp` workers on the CPU, asks it, and stops.

    Shows the answer, what each rank held and what was communicated.
    """
    out = console()
    with running(Settings(tp=tp, device="cpu"), console(stderr=True)) as started:
        cluster = started.cluster
        out.print(
            f"[bold]{escape(cluster.model)}[/bold], cut over {ranks_text(tp)} on the CPU, "
            f"transport: {transport_name(cluster)}"
        )
        out.print(rank_table("What each rank owns", rank_rows(cluster.plan)))
        out.print(held_table(cluster))
        with Colrow(started.local.target) as colrow:
            out.print(f"[bold]> {escape(question)}[/bold]")
            chat = [{"role": "user", "content": question}]
            answer = stream_answer(colrow, chat, max_tokens=max_tokens, temperature=0.0)
            out.print(f"[dim]{answer.summary}[/dim]\n")
            _show_communication(out, _settled(colrow), answer)
    out.print("All processes have stopped. `colrow serve` keeps a cluster running.", markup=False)


def _settled(colrow: Colrow) -> control_service_pb2.Cluster:
    """The cluster when every rank has done every step that was sent.

    Steps are sent ahead, so one is still computed when the answer has ended.
    """
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        cluster = colrow.cluster()
        done = all(worker.last_step_id == cluster.scheduler.steps for worker in cluster.workers)
        if done or time.monotonic() > deadline:
            return cluster
        time.sleep(POLL_S)


def _show_communication(out: Console, cluster: control_service_pb2.Cluster, answer: Answer) -> None:
    if len(cluster.workers) == 1:
        out.print("One rank has nothing to communicate; try --tp 2.")
        return
    # The first step computes the prompt and each further one a token. The last step may be one too
    # many: it was sent before it was known that the answer had ended.
    num_tokens = answer.prompt_tokens + cluster.scheduler.steps - 1
    out.print(communication_table(cluster, num_tokens))
