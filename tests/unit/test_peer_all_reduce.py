"""The kernel of the peer-to-peer all-reduce, on simulated GPUs: 2 to 8 ranks, any order of events.

`peer_simulator.cpp` runs the kernel's own source on a CPU. What it can't tell is whether the source is
right for a GPU's instructions, which tests/gpu does, and how fast it is.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shard_worker.communicator import peer_sums

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "shard_worker" / "communicator" / "peer_all_reduce.cu"
SIMULATOR = Path(__file__).with_name("peer_simulator.cpp")
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MANY_TURNS = 2_000_000

if shutil.which("g++") is None:
    pytest.skip("the simulator needs g++", allow_module_level=True)

Compile = Callable[..., ctypes.CDLL]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are quick to simulate, and that a tensor without rows takes several blocks of."""
    monkeypatch.setattr(peer_sums, "SLOT_BYTES", 32 * 1024)
    monkeypatch.setattr(peer_sums, "_PLAIN_WIDTH", 8)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The simulator with the kernel, changed as `change` says, for elements of a type."""
    folder = tmp_path_factory.mktemp("simulator")
    libraries: dict[tuple[torch.dtype, tuple[str, str]], ctypes.CDLL] = {}

    def compile(dtype: torch.dtype, change: tuple[str, str] = ("", "")) -> ctypes.CDLL:
        if (library := libraries.get((dtype, change))) is not None:
            return library
        source = KERNEL.read_text()
        assert change[0] in source
        kernel = folder / f"kernel{len(libraries)}.cu"
        kernel.write_text(source.replace(*change) if change[0] else source)
        out = kernel.with_suffix(".so")
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-DELEMENT={ELEMENTS[dtype]}"]
        if not change[0]:
            command += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
        subprocess.run(
            [*command, f'-DKERNEL="{kernel}"', "-o", str(out), str(SIMULATOR)],
            check=True,
            timeout=120,
        )
        library = ctypes.CDLL(str(out))
        library.simulate.restype = ctypes.c_long
        libraries[dtype, change] = library
        return library

    return compile


@dataclass(frozen=True, slots=True)
class Call:
    """One all-reduce of [rows, hidden]; `normalises`: with residual and RMSNorm."""

    rows: int
    hidden: int
    normalises: bool = True
    two_shot: bool = False


@dataclass(slots=True)
class Ran:
    """What came of a call: by rank."""

    call: Call
    terms: list[Tensor]
    residual: Tensor
    weight: Tensor
    residuals: list[Tensor]
    outs: list[Tensor]


class _Launch(ctypes.Structure):
    """`Launch` of the simulator: the kernel's arguments, then how it is launched."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out")),
        ("count", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("eps", ctypes.c_float),
        ("two_shot", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("mine", *(f"buffer{rank}" for rank in range(8)))),
        ("capacity", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("state", ctypes.c_void_p),
        ("mailbox", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_uint64),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("items", ctypes.c_uint32),
    )


class Simulation:
    """`num_ranks` ranks that make `calls`, one after the other, launched as the communicator does."""

    def __init__(
        self,
        library: ctypes.CDLL,
        num_ranks: int,
        calls: list[Call],
        *,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        timeout_s: float = 1e6,
    ) -> None:
        self.library, self.num_ranks = library, num_ranks
        self.ran: list[Ran] = []
        generator = torch.Generator().manual_seed(seed)
        words = peer_sums.TURNS * num_ranks * peer_sums.SLOT_BYTES // 4
        memories = [
            torch.full((words,), peer_sums.EMPTY, dtype=torch.int32) for _ in range(num_ranks)
        ]
        self.states = [torch.zeros(peer_sums.STATE_WORDS, dtype=torch.int32) for _ in memories]
        self.mailboxes = [torch.zeros(peer_sums.MAILBOX_WORDS, dtype=torch.int32) for _ in memories]
        self.kept = memories
        library.reset(num_ranks, ctypes.c_uint64(seed))
        for call in calls:
            shape = (call.rows, call.hidden)
            terms = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_ranks)]
            for term in terms:  # also what marks an empty place, and what it would cancel to
                term[torch.rand(shape, generator=generator) < 0.1] = -0.0
                if dtype == torch.float32:
                    marked = torch.rand(shape, generator=generator) < 0.1
                    term.view(torch.int32)[marked] = peer_sums.EMPTY
            residual = torch.randn(shape, generator=generator).to(dtype)
            weight = torch.randn(call.hidden, generator=generator).to(dtype)
            ran = Ran(call, terms, residual, weight, [], [])
            for rank, term in enumerate(terms):
                ran.residuals.append(residual.clone())
                ran.outs.append(torch.full(shape, 7.0, dtype=dtype))
                launch = peer_sums.plan_launch(
                    term,
                    ran.outs[-1],
                    ran.residuals[-1] if call.normalises else None,
                    weight if call.normalises else None,
                    1e-5,
                    two_shot=call.two_shot,
                    buffers=[memory.data_ptr() for memory in memories],
                    rank=rank,
                    state=self.states[rank],
                    mailbox=self.mailboxes[rank],
                    timeout_s=timeout_s,
                )
                values = (*launch.arguments, launch.blocks, launch.threads, launch.items)
                numbers = (
                    value.item() if isinstance(value, np.generic) else value for value in values
                )
                library.add_launch(ctypes.byref(_Launch(*numbers)))
            self.ran.append(ran)

    def run(
        self,
        *,
        most_resident: int = 2,
        most_turns: int = MANY_TURNS,
        dead: int = -1,
        death_turn: int = 0,
        abort_turn: int = -1,
    ) -> int:
        turns: int = self.library.simulate(
            most_resident,
            ctypes.c_long(most_turns),
            dead,
            ctypes.c_long(death_turn),
            ctypes.c_long(abort_turn),
        )
        return turns

    def has_failed(self, rank: int) -> bool:
        return bool(self.states[rank][peer_sums.FAILED])

    def missing(self, rank: int) -> list[int]:
        """Who did not come, as this rank's device says."""
        return self.mailboxes[rank][peer_sums.MISSING :].nonzero().flatten().tolist()

    def check(self) -> None:
        """Every rank has the sum in rank order, rounded once, to the bit."""
        for ran in self.ran:
            # As float32 the mark is a number next to zero, and is sent as that.
            first, *others = (term.float() * (term.abs() > 1e-40) for term in ran.terms)
            total = sum(others, start=first)
            if not ran.call.normalises:
                expected = total.to(ran.residual.dtype)
                assert all(torch.equal(out, expected) for out in ran.outs), ran.call
                continue
            stream = (total + ran.residual.float()).to(ran.residual.dtype)
            assert all(torch.equal(residual, stream) for residual in ran.residuals), ran.call
            x = stream.double()
            x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * ran.weight.double()
            first = ran.outs[0]
            precision = torch.finfo(first.dtype).eps
            torch.testing.assert_close(first.double(), x, rtol=2 * precision, atol=1e-6)
            assert all(torch.equal(out, first) for out in ran.outs), ran.call


# A large call, then small ones: what the large one left has to be emptied by a smaller grid.
MIXED = [
    Call(4, 64),
    Call(1, 64),
    Call(3, 64, two_shot=True),
    Call(1, 64, normalises=False),
    Call(5, 128, normalises=False, two_shot=True),
    Call(2, 64),
    Call(1, 256),
    Call(4, 64, two_shot=True),
    Call(1, 64),
    Call(1, 64),
    Call(4, 64),
]


@pytest.mark.parametrize("num_ranks", range(2, 9))
@pytest.mark.parametrize("seed", range(3))
def test_every_rank_holds_the_sum_whatever_the_order_of_events(
    compiled: Compile, num_ranks: int, seed: int
) -> None:
    simulation = Simulation(compiled(torch.bfloat16), num_ranks, MIXED, seed=seed)
    assert simulation.run() > 0
    simulation.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_ranks", [2, 5])
def test_other_types(compiled: Compile, dtype: torch.dtype, num_ranks: int) -> None:
    calls = [replace(call, hidden=call.hidden // 2) for call in MIXED]
    simulation = Simulation(compiled(dtype), num_ranks, calls, dtype=dtype)
    assert simulation.run() > 0
    simulation.check()


@pytest.mark.parametrize("two_shot", [False, True])
def test_rows_wider_than_a_block(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch, two_shot: bool
) -> None:
    monkeypatch.setattr(peer_sums, "_MAX_THREADS", 32)
    calls = [Call(2, 8 * 75, two_shot=two_shot), Call(1, 8 * 96, two_shot=two_shot)] * 3
    simulation = Simulation(compiled(torch.bfloat16), 3, calls)
    assert simulation.run() > 0
    simulation.check()


@pytest.mark.parametrize("two_shot", [False, True])
def test_one_shot_and_two_shots_give_the_same_bits(compiled: Compile, two_shot: bool) -> None:
    calls = [Call(5, 64, two_shot=two_shot), Call(2, 64, normalises=False, two_shot=two_shot)]
    simulation = Simulation(compiled(torch.bfloat16), 4, calls, seed=11)
    assert simulation.run() > 0
    other = Simulation(
        compiled(torch.bfloat16),
        4,
        [replace(call, two_shot=not call.two_shot) for call in calls],
        seed=11,
    )
    assert other.run() > 0
    for one, two in zip(simulation.ran, other.ran, strict=True):
        assert torch.equal(one.outs[0], two.outs[0])
        assert torch.equal(one.residuals[0], two.residuals[0])


def test_many_rows_need_not_be_resident_together(compiled: Compile) -> None:
    calls = [Call(24, 64, two_shot=two_shot) for two_shot in (False, True, False)]
    simulation = Simulation(compiled(torch.bfloat16), 4, calls)
    assert simulation.run(most_resident=1) > 0
    simulation.check()


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("death_turn", [0, 40, 400])
def test_a_rank_that_dies_is_named_and_nobody_hangs(
    compiled: Compile, two_shot: bool, death_turn: int
) -> None:
    calls = [Call(3, 64, two_shot=two_shot)] * 40
    simulation = Simulation(compiled(torch.bfloat16), 3, calls, timeout_s=0.003)
    assert simulation.run(dead=1, death_turn=death_turn) > 0, "the others wait for ever"
    survivors = (0, 2)
    assert all(simulation.has_failed(rank) for rank in survivors)
    # Who waited for a survivor that waited in vain names that one; somebody names the dead one.
    assert any(simulation.missing(rank) == [1] for rank in survivors)


def test_an_abort_ends_the_wait_before_the_deadline_and_blames_nobody(compiled: Compile) -> None:
    simulation = Simulation(compiled(torch.bfloat16), 2, [Call(2, 64)] * 3)
    assert simulation.run(dead=1, death_turn=0, abort_turn=2000) > 2000
    assert simulation.has_failed(0)
    assert simulation.missing(0) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("(call % 3)", "(call % 2)"), id="two turns where three are needed"),
        pytest.param(("at < last_count;", "at < count;"), id="a smaller call empties too little"),
        pytest.param(("own[item] = sendable(x[at])", "own[item] = x[at]"), id="the mark is sent"),
        pytest.param(("emptiness());", "make_uint4(0, 0, 0, 0));"), id="nothing is emptied"),
        pytest.param(
            ("(last_owner == rank || p == last_owner)", "last_owner == rank"),
            id="the owners' sums stay",
        ),
        pytest.param(("is_empty(v.x) ||", ""), id="a torn word is taken for whole"),
    ],
)
def test_the_simulator_finds_what_is_wrong(compiled: Compile, change: tuple[str, str]) -> None:
    def goes_wrong(seed: int) -> bool:
        simulation = Simulation(compiled(torch.bfloat16, change), 3, MIXED * 2, seed=seed)
        if simulation.run(most_turns=100_000) < 0:
            return True
        try:
            simulation.check()
        except AssertionError:
            return True
        return False

    assert any(goes_wrong(seed) for seed in range(5))
