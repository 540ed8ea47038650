"""`colrow layer`: one module's partial outputs and what they combine to, with what that teaches."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.markup import escape

from client.grpc_client import array
from client.views import enum_name, new_table
from colrow.v1 import control_service_pb2, shard_plan_pb2

SHOWN_NUMBERS = 5
SHOWN_PIECES = 3

_COMBINE = shard_plan_pb2.Combine.DESCRIPTOR


def show_layer(target: Console, response: control_service_pb2.RunLayerResponse) -> None:
    """Every module that was run, in order, and of a whole layer its result."""
    for run in response.runs:
        _show_run(target, run)
    if len(response.runs) > 1:
        whole = array(response.output)
        target.print(
            f"The layer's output, with its residual connections: {list(whole.shape)}, "
            f"token 0: {_numbers(whole[0])}"
        )


def _show_run(target: Console, run: control_service_pb2.ModuleRun) -> None:
    combine = enum_name(_COMBINE, run.combine)
    x, output = array(run.input), array(run.output)
    table = new_table(f"{escape(run.module)}", "", "shape")
    if combine == "concat":
        table.add_column("columns")
    table.add_column("token 0")
    columns: list[str] = [""] if combine == "concat" else []
    table.add_row("input", str(list(x.shape)), *columns, _first_token(x))
    for partial in run.partials:
        if combine == "concat":
            columns = [" ".join(f"[{c.start},{c.stop})" for c in partial.columns)]
        part = array(partial.output)
        table.add_row(f"rank {partial.rank}", str(list(part.shape)), *columns, _first_token(part))
    table.add_section()
    if combine == "concat":
        columns = [f"[0,{output.shape[1]})"]
        shown = " | ".join(_pieces(run, output))
    else:
        shown = _first_token(output)
    table.add_row(f"[bold]{combine}[/bold]", str(list(output.shape)), *columns, shown)
    target.print(table)
    target.print(_lesson(run, combine, integers=x.dtype.kind == "i"))
    target.print()


def _pieces(run: control_service_pb2.ModuleRun, output: np.ndarray) -> Iterator[str]:
    """Of the whole output the first numbers of each rank's columns."""
    for partial in run.partials[:SHOWN_PIECES]:
        start = partial.columns[0].start
        yield _numbers(output[0, start : partial.columns[0].stop], 2)
    if len(run.partials) > SHOWN_PIECES:
        yield "…"


def _first_token(values: np.ndarray) -> str:
    return _numbers(values[0]) if values.ndim > 1 else _ids(values)


def _numbers(values: np.ndarray, limit: int = SHOWN_NUMBERS) -> str:
    more = " …" if len(values) > limit else ""
    return " ".join(f"{value:8.4f}" for value in values[:limit]) + more


def _ids(values: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:SHOWN_NUMBERS])
    return f"ids {shown}" + (" …" if len(values) > SHOWN_NUMBERS else "")


def _lesson(run: control_service_pb2.ModuleRun, combine: str, *, integers: bool) -> str:
    """What happened here, in a sentence or two."""
    if len(run.partials) == 1:
        return "One rank: it has the whole module, and nothing is to combine."
    if combine == "replicate":
        return (
            "[bold]Replicated[/bold]: every rank has the whole weight and came to the same output; "
            "nothing is exchanged."
        )
    if combine == "concat":
        lesson = (
            "[bold]Column parallel[/bold]: the output dimension is cut. Each rank took the whole "
            "input, computed columns of the output of its own, and these are concatenated."
        )
        covered = sum(c.stop - c.start for partial in run.partials for c in partial.columns)
        if covered > array(run.output).shape[1]:
            lesson += " Ranks that share a KV head computed the same columns."
        if run.module.count("."):
            # When serving only the head's outputs are gathered.
            lesson += (
                " Serving skips that: what follows works on each rank's own columns, up to the "
                "row-parallel module."
            )
        return lesson
    if integers:
        return (
            "[bold]Vocab parallel[/bold]: each rank looked up the token ids of its own part of the "
            "vocabulary and gave zeros for all others, so the sum is the whole embedding."
        )
    leaf = run.module.rpartition(".")[2]
    if "proj" in leaf:
        return (
            "[bold]Row parallel[/bold]: the input dimension is cut. Each rank took its columns of "
            "the input and has a term of every output, so the terms are summed; serving does it "
            "with an all-reduce."
        )
    return (
        "[bold]Column, then row parallel[/bold]: each rank went through its own heads or neurons "
        "and has a term of every output, so the terms are summed: one all-reduce when serving, "
        "and nothing is exchanged before it."
    )
