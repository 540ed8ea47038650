"""What `benchmarks/serving.py` measured, as tables: beside what is wanted, and what was predicted.

A result is the JSON of one cluster. Its `figures`, and as far as there are any its `predicted`, are by
kind and key: `figures["tpot_s"]["8"]` is the time per token at batch 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.predict_scaling import table

PREFIX = "serving_"
NOTHING = "-"
SINGLE, AUTO, NCCL = "single", "auto", "nccl"

Result = Mapping[str, Any]
Column = tuple[str, str]  # kind and key


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of figure and how it is shown: `title` has a place for the key."""

    title: str
    scale: float
    digits: int
    less_is_better: bool = True

    def show(self, value: float) -> str:
        return f"{self.scale * value:,.{self.digits}f}"

    def gain(self, value: float, base: float) -> float:
        """How many times as good as `base`."""
        return base / value if self.less_is_better else value / base


@dataclass(frozen=True, slots=True)
class Target:
    must: float
    aim: float


KINDS = {
    "tpot_s": Kind("TPOT, batch {}, ms", 1e3, 2),
    "ttft_s": Kind("TTFT, prompt {}, ms", 1e3, 1),
    "tokens_per_s": Kind("tokens/s, {} requests at once", 1, 0, less_is_better=False),
}

# For two NVIDIA H200 with NVLink, by shapes, tp size and transport. NCCL alone has one of its own.
TARGETS: dict[tuple[str, int, str], dict[Column, Target]] = {
    ("8b", 2, AUTO): {
        ("tpot_s", "1"): Target(2.8e-3, 2.1e-3),
        ("tpot_s", "8"): Target(3.1e-3, 2.4e-3),
        ("tpot_s", "32"): Target(3.4e-3, 2.7e-3),
        ("tpot_s", "128"): Target(4.8e-3, 4.0e-3),
        ("ttft_s", "128"): Target(7e-3, 4e-3),
        ("ttft_s", "1024"): Target(24e-3, 17e-3),
        ("ttft_s", "8192"): Target(130e-3, 110e-3),
        ("tokens_per_s", "512"): Target(16500, 21000),
    },
    ("8b", 2, NCCL): {("tpot_s", "1"): Target(4.1e-3, 3.6e-3)},
    ("70b", 2, AUTO): {
        ("tpot_s", "1"): Target(19e-3, 17e-3),
        ("ttft_s", "1024"): Target(126e-3, 110e-3),
    },
}

BASE_TP = {"70b": 2}
"""What speed-ups are against, where it is not one rank."""


def file_name(shapes: str, tp_size: int, transport: str, device: str) -> str:
    return f"{PREFIX}{shapes}_tp{tp_size}_{transport}_{slug(device)}.json"


def slug(device: str) -> str:
    """A device's name within a file's."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def load(folder: Path) -> list[Result]:
    """The results in a folder, in the order of their tables."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{PREFIX}*.json"))]
    return sorted(found, key=lambda r: (r["shapes"], r["device"], r["tp_size"], r["transport"]))


def figures_of(bench: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The medians of what `colrow bench --json` writes; None of what could not be measured."""
    figures: dict[str, dict[str, float | None]] = {}
    for measured in bench["measurements"]:
        rates, requests = measured["over_repeats"], measured["over_requests"]
        key = str(measured["value"])
        if measured["kind"] == "decode":
            # Between two steps while the whole batch decodes, and nothing else does.
            steps_per_s = _median(rates["steps_per_s"])
            figures.setdefault("tpot_s", {})[key] = 1 / steps_per_s if steps_per_s else None
            figures.setdefault("idle_share", {})[key] = _median(rates["control_share"])
        elif measured["kind"] == "prefill":
            figures.setdefault("ttft_s", {})[key] = _median(requests["ttft_s"])
        else:
            key = str(bench["settings"]["requests"])
            figures.setdefault("tokens_per_s", {})[key] = _median(rates["tokens_per_s"])
    return figures


def _median(distribution: Mapping[str, float] | None) -> float | None:
    return None if distribution is None else distribution["p50"]


def without_requests(bench: Mapping[str, Any]) -> dict[str, Any]:
    """`colrow bench --json` without every single token's arrival."""
    measurements = [
        measured
        | {
            "repeats": [
                {name: value for name, value in repeat.items() if name != "requests"}
                for repeat in measured["repeats"]
            ]
        }
        for measured in bench["measurements"]
    ]
    return {**bench, "measurements": measurements}


def figure_in(figures: Mapping[str, Any], column: Column) -> float | None:
    value: float | None = figures.get(column[0], {}).get(column[1])
    return value


def page(results: Sequence[Result]) -> list[str]:
    """Markdown: tables for each model's shapes on each device, then what failed."""
    lines: list[str] = []
    for shapes, device in dict.fromkeys((r["shapes"], r["device"]) for r in results):
        group = [r for r in results if (r["shapes"], r["device"]) == (shapes, device)]
        base_tp = BASE_TP.get(shapes, 1)
        against = f"; in parentheses times as good as tp={base_tp}" if len(group) > 1 else ""
        lines += [f"### {shapes} shapes, {device}", "", f"Medians{against}.", ""]
        lines += [*speed_table(group), "", *overhead_table(group), ""]
    for result in results:
        where = f"{result['shapes']}, tp={result['tp_size']}, {result['transport']}"
        if result["error"] is not None:
            lines.append(f"- {where}: failed: {result['error'].splitlines()[0]}")
        for problem in result["request_errors"]:
            lines.append(f"- {where}: requests failed: {problem}")
    return lines


def columns_of(results: Sequence[Result]) -> list[Column]:
    """All that any of them has measured, or was predicted; by kind, keys ascending."""
    known = [figures for r in results for figures in (r["figures"], r["predicted"])]
    return [
        (kind, key)
        for kind in KINDS
        for key in sorted({key for figures in known for key in figures.get(kind, ())}, key=int)
    ]


def speed_table(results: Sequence[Result]) -> list[str]:
    """A row for each cluster, and below it what was predicted, how far off, and what is wanted."""
    columns = columns_of(results)
    base = _base(results)
    rows = []
    for result in results:
        targets = TARGETS.get((result["shapes"], result["tp_size"], result["transport"]), {})
        cells = [_cell(result, column, base, targets.get(column)) for column in columns]
        rows.append([str(result["tp_size"]), transport_of(result), *cells])
        if result["predicted"]:
            rows.append(["", "predicted", *(_predicted_cell(result, column) for column in columns)])
        if targets:
            rows.append(["", "must / aim", *(_wanted(c, targets.get(c)) for c in columns)])
    return table(["tp", "transport", *map(_title, columns)], rows)


def overhead_table(results: Sequence[Result]) -> list[str]:
    """The start, how long the device waits between decode steps (wanted: below 5 %), communication."""
    batches = [key for kind, key in columns_of(results) if kind == "tpot_s"]
    rows = []
    for result in results:
        figures, predicted = result["figures"], result["predicted"]
        tpot_s = figure_in(figures, ("tpot_s", "1"))
        spent_s = figures.get("communication_s")
        rows.append(
            [
                str(result["tp_size"]),
                transport_of(result),
                _number(figures.get("serving_after_s"), 1),
                _number(figures.get("first_token_after_s"), 1),
                *(_percent(figure_in(figures, ("idle_share", batch))) for batch in batches),
                _number(None if spent_s is None else 1e6 * spent_s, 0),
                _percent(spent_s / tpot_s if spent_s is not None and tpot_s else None),
                _number(1e6 * predicted["communication_s"] if predicted else None, 0),
                _percent(predicted["communication_share"] if predicted else None),
            ]
        )
    heads = [
        *("tp", "transport", "serves after, s", "first token after, s"),
        *(f"idle of a step, batch {batch}" for batch in batches),
        *("communication of one token, µs", "of its TPOT", "predicted, µs", "predicted of TPOT"),
    ]
    return table(heads, rows)


def transport_of(result: Result) -> str:
    """What was asked for and, where that leaves it open, what it came to."""
    chosen = result["chosen_transport"]
    asked: str = result["transport"]
    return f"{asked} ({chosen})" if asked == AUTO and chosen else asked


def speed_rows(results: Sequence[Result], shapes: str) -> list[dict[str, Any]]:
    """Those of some shapes whose decoding was measured, as `predict_scaling.plot` takes them."""
    return [
        {"tp_size": result["tp_size"], "tpot_s": result["figures"]["tpot_s"]}
        for result in results
        if result["shapes"] == shapes
        and result["transport"] in (SINGLE, AUTO)
        and result["figures"].get("tpot_s")
        and None not in result["figures"]["tpot_s"].values()
    ]


def _base(results: Sequence[Result]) -> Result | None:
    for result in results:
        is_base = result["tp_size"] == BASE_TP.get(result["shapes"], 1)
        if is_base and result["transport"] in (SINGLE, AUTO):
            return result
    return None


def _cell(result: Result, column: Column, base: Result | None, target: Target | None) -> str:
    value = figure_in(result["figures"], column)
    if value is None:
        return NOTHING
    kind = KINDS[column[0]]
    shown = kind.show(value)
    if base is not None and base is not result and (known := figure_in(base["figures"], column)):
        shown += f" ({kind.gain(value, known):.2f}x)"
    if target is not None and kind.gain(value, target.must) < 1:
        shown += " **missed**"
    return shown


def _predicted_cell(result: Result, column: Column) -> str:
    """With how far off it is from what was measured, where that is known."""
    measured, predicted = (
        figure_in(result["figures"], column),
        figure_in(result["predicted"], column),
    )
    off = f" ({predicted / measured - 1:+.1%})" if measured and predicted else ""
    return _shown(column, predicted) + off


def _title(column: Column) -> str:
    kind, key = column
    return KINDS[kind].title.format(f"{int(key):,}")


def _shown(column: Column, value: float | None) -> str:
    return NOTHING if value is None else KINDS[column[0]].show(value)


def _wanted(column: Column, target: Target | None) -> str:
    if target is None:
        return NOTHING
    return f"{_shown(column, target.must)} / {_shown(column, target.aim)}"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"
