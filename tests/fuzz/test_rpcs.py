"""Every RPC of every service, with fields of any value and bytes of any kind, against a live cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import strategies as st

from colrow.rpc import MAX_MESSAGE_BYTES
from colrow.v1 import control_service_pb2, inference_service_pb2, shard_worker_service_pb2
from coordinator import convert
from coordinator.families import model_spec
from coordinator.shard_plan import make_plan
from tests.clusters import start
from tests.fuzz.victim import (
    NUM_TOKENS,
    PROMPT,
    Cluster,
    Call,
    Tally,
    calls,
    examine,
    make,
    open_calls,
)
from tests.fuzz.wire import Rpc, rpcs

pytestmark = pytest.mark.timeout(600)

_worker = shard_worker_service_pb2

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
MODULES = (
    *("model.embed_tokens", "model.norm", "lm_head", "model", "model.layers", "model.layers.1"),
    *("model.layers.0.self_attn", "model.layers.0.mlp.down_proj", "mlp.up_proj", "self_attn", ""),
    *("model.layers.0.self_attn.q_proj.weight", "mlp.last", "__class__", "model.layers.99.mlp"),
)


def configs(folder: Path) -> st.SearchStrategy[str]:
    """config.json files that are nearly right."""
    config = json.loads((folder / "config.json").read_text())
    number = st.sampled_from((0, 1, 2, 3, 8, 4096, 2**31 - 1, 2**63, -1, 0.5, 1e308))
    changes = st.dictionaries(st.sampled_from(sorted(config)), number | JSON, max_size=3)
    return changes.map(lambda changed: json.dumps(config | changed))


def hints(folder: Path, **further: Any) -> dict[str, st.SearchStrategy[Any]]:
    """Values that lead deeper than random ones."""
    small, unit = st.integers(0, 8), st.floats(0, 1, width=32)
    return {
        "model": st.sampled_from(("", "tiny")),
        "ids": st.integers(0, 330),
        "token_ids": st.integers(0, 330),
        "role": st.sampled_from(("user", "assistant", "system")),
        "module": st.sampled_from(MODULES),
        "layer": small,
        "num_tokens": small,
        "max_tokens": small,
        "n": st.sampled_from((1, 2, 128)),
        "tp_size": st.sampled_from((1, 2, 3, 1024)),
        "config_json": configs(folder),
        "model_path": st.just(str(folder)),
        "temperature": unit,
        "top_p": unit,
        "shape": st.sampled_from((1, 2, 72, 104)),
        "data": st.sampled_from((bytes(4 * 72), bytes(8), b"\xff" * 288)),
        "service": st.sampled_from(("colrow.v1.InferenceService", "")),
        **further,
    }


@pytest.fixture
def channel(cluster: Cluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cluster.coordinator.address) as opened:
        yield opened


# Drain is for good; it has a test of its own.
LASTING = {"Drain"}


def test_every_rpc_of_the_coordinator(
    cluster: Cluster, channel: grpc.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [rpc for rpc in rpcs(channel) if rpc.name not in LASTING]
    assert {rpc.service.rpartition(".")[2] for rpc in found} >= {
        *("InferenceService", "ControlService", "Health", "ServerReflection", "Channelz"),
    }
    deeper = hints(cluster.folder)
    tally = Tally()
    failures: list[Exception] = []
    with cluster.without_leaks():
        for rpc in found:

            def check(call: Call, rpc: Rpc = rpc) -> None:
                make(channel, rpc, call, tally)
                cluster.check()

            num_cases = 60 if rpc.service.startswith("colrow.") else 12
            try:
                examine(calls(rpc, deeper), num_cases, check)
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup("RPCs", failures)
    with capsys.disabled():
        print(f"\n{tally.codes.total()} calls of {len(found)} RPCs of the coordinator: {tally}")
