"""API keys: what is kept of them, who is let in, and what a changed file changes."""

import hashlib
import logging
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.cli import app
from colrow.errors import InvalidArgument, Unauthenticated
from coordinator import api_keys
from coordinator.access import Access, what_is_open
from coordinator.api_keys import ApiKeys, Entry, add_key, new_key, read_entries
from coordinator.config import CoordinatorConfig, parse

pytestmark = pytest.mark.timeout(60)


def config(*flags: str) -> CoordinatorConfig:
    return parse(("--model", ".", "--workers", "localhost:1", *flags))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "api-keys"


def test_the_file_has_a_salted_hash_of_each_key_and_no_key(file: Path) -> None:
    keys = {name: add_key(name, file) for name in ("alice", "bob")}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    salts = set()
    for line, (name, key) in zip(lines, keys.items(), strict=True):
        assert key not in file.read_text()
        assert len(key) >= 43  # 256 bits
        named, salt, digest = line.split(":")
        assert named == name
        assert hashlib.sha256(bytes.fromhex(salt) + key.encode()).hexdigest() == digest
        salts.add(salt)
    assert len(salts) == len(set(keys.values())) == 2


def test_a_key_is_known_by_its_owners_name_whatever_the_case_of_the_scheme(file: Path) -> None:
    alice, bob = add_key("alice", file), add_key("bob", file)
    keys = ApiKeys([file], "api_keys")
    assert keys.name_of(f"Bearer {alice}") == "alice"
    assert keys.name_of(f"bearer {bob}") == "bob"


def test_a_key_that_is_added_while_the_file_is_first_read_opens_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_key("alice", file)
    key, entry = new_key("bob")
    late = [entry.line]

    def read(file: Path, field: str) -> tuple[Entry, ...]:
        entries = read_entries(file, field)
        if late:
            file.write_text(file.read_text() + late.pop())
        return entries

    monkeypatch.setattr(api_keys, "read_entries", read)
    assert ApiKeys([file], "api_keys").name_of(f"Bearer {key}") == "bob"


@pytest.mark.parametrize(
    "shown",
    [
        *("", "Bearer", "Bearer ", "{key}", "Basic {key}", "Bearer {key}x", "Bearer  {key}"),
        *("Bearer {cut}", "Bearer {hash}", "Bearer {line}", "Bearer \N{SNOWMAN}", "Bearer \0"),
    ],
)
def test_what_is_not_the_whole_key_opens_nothing(file: Path, shown: str) -> None:
    key = add_key("alice", file)
    line = file.read_text().strip()
    keys = ApiKeys([file], "api_keys")
    shown = shown.format(key=key, cut=key[:-1], hash=line.rpartition(":")[2], line=line)
    with pytest.raises(Unauthenticated) as raised:
        keys.name_of(shown)
    assert raised.value.reason == "INVALID_API_KEY"
    assert key not in str(raised.value)


def test_every_entry_is_compared_in_constant_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = [add_key(name, file) for name in "abc"]
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert ApiKeys([file], "api_keys").name_of(f"Bearer {first}") == "a"
    assert len(compared) == 3


def test_a_line_that_is_added_opens_and_one_that_is_gone_closes_without_a_restart(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alice = add_key("alice", file)
    keys = ApiKeys([file], "api_keys")
    bob = add_key("bob", file)
    assert keys.name_of(f"Bearer {bob}") == "bob"

    file.write_text(file.read_text().splitlines(keepends=True)[1])
    with pytest.raises(Unauthenticated):
        keys.name_of(f"Bearer {alice}")
    assert keys.name_of(f"Bearer {bob}") == "bob"

    file.write_text("half a li")
    assert keys.name_of(f"Bearer {bob}") == "bob"
    assert "the keys before it go on to count" in caplog.text

    file.write_text("")
    with pytest.raises(Unauthenticated):
        keys.name_of(f"Bearer {bob}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't be read (No such file or directory)"),
        ("", "has no key; make one with `colrow key NAME --file FILE`"),
        ("# nothing\n\n", "has no key"),
        ("alice:00:" + "0" * 64 + "\ncolrow-secret\n", "line 2 is no NAME:SALT:HASH"),
        ("alice:0:" + "0" * 64, "line 1 is no NAME:SALT:HASH"),
        ("alice:00:" + "0" * 63, "line 1 is no NAME:SALT:HASH"),
    ],
)
def test_a_file_that_is_none_is_refused_without_showing_what_is_in_it(
    file: Path, content: str | None, problem: str
) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidArgument, match=re.escape(problem)) as raised:
        Access.open(config("--api-keys", str(file)))
    assert str(raised.value).startswith(f"api_keys = {str(file)!r}: ")
    assert "secret" not in str(raised.value)


def test_a_name_has_one_key(file: Path) -> None:
    add_key("alice", file)
    with pytest.raises(InvalidArgument, match="has a key in"):
        add_key("alice", file)
    with pytest.raises(InvalidArgument, match="name = 'a:b'"):
        add_key("a:b", file)
    assert [entry.name for entry in read_entries(file, "file")] == ["alice"]


def test_the_command_prints_the_key_and_nothing_else(file: Path) -> None:
    made = CliRunner().invoke(app, ["key", "alice", "--file", str(file)])
    assert made.exit_code == 0
    assert ApiKeys([file], "api_keys").name_of(f"Bearer {made.output.strip()}") == "alice"


# --- who may call what ------------------------------------------------------------------------

GENERATE = "/colrow.v1.InferenceService/Generate"
DRAIN = "/colrow.v1.ControlService/Drain"
CHANNELZ = "/grpc.channelz.v1.Channelz/GetServers"
UNKNOWN = "/colrow.v1.Unknown/Method"
OPEN = ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/X")


def may(access: Access, method: str, key: str = "") -> bool:
    try:
        access.to_grpc(method, f"Bearer {key}" if key else "")
    except Unauthenticated:
        return False
    return True


def test_one_file_opens_all_and_without_a_key_only_probes_and_the_schema_are_open(
    file: Path,
) -> None:
    key = add_key("alice", file)
    access = Access.open(config("--api-keys", str(file)))
    assert access is not None
    for method in (GENERATE, DRAIN, CHANNELZ, UNKNOWN):
        assert may(access, method, key) and not may(access, method)
    assert all(may(access, method) for method in OPEN)


def test_operators_may_have_keys_of_their_own(tmp_path: Path) -> None:
    users, operators = tmp_path / "users", tmp_path / "operators"
    alice, olga = add_key("alice", users), add_key("olga", operators)
    flags = ("--api-keys", str(users), "--control-api-keys", str(operators))
    access = Access.open(config(*flags))
    assert access is not None
    assert may(access, GENERATE, alice) and not may(access, GENERATE, olga)
    for method in (DRAIN, CHANNELZ, UNKNOWN):
        assert may(access, method, olga) and not may(access, method, alice)
    access.to_http("GET /v1/models", f"Bearer {alice}")
    with pytest.raises(Unauthenticated):
        access.to_http("GET /v1/models", f"Bearer {olga}")

    only_operators = Access.open(config("--control-api-keys", str(operators)))
    assert only_operators is not None
    assert may(only_operators, GENERATE) and not may(only_operators, DRAIN)
    assert Access.open(config()) is None


def test_logs_name_the_key_and_never_show_it(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = add_key("alice", file)
    access = Access.open(config("--api-keys", str(file)))
    assert access is not None
    assert may(access, GENERATE, key) and not may(access, GENERATE, f"{key}x")
    called, refused = caplog.records
    assert vars(called)["api_key"] == "alice" and vars(called)["called"] == GENERATE
    assert refused.message == "call refused" and vars(refused)["called"] == GENERATE
    assert all(key not in str(vars(record)) for record in caplog.records)


# --- what is left open ------------------------------------------------------------------------


def test_on_loopback_nothing_is_open() -> None:
    assert what_is_open(config()) == []


def test_each_door_to_other_machines_is_told_with_the_flag_that_closes_it(tmp_path: Path) -> None:
    wide = config("--host", "0.0.0.0")
    flags = ["--tls", "--api-keys", "--control-api-keys"]
    lines = what_is_open(wide)
    assert len(lines) == 3
    assert all(flag in line for flag, line in zip(flags, lines, strict=True))
    keys = (tmp_path,)
    assert len(what_is_open(replace(wide, tls=tmp_path))) == 2
    assert len(what_is_open(replace(wide, api_keys=keys, control_api_keys=keys))) == 1
    assert what_is_open(replace(wide, tls=tmp_path, client_cert_auth=True)) == []

    far = replace(config(), workers=("localhost:1", "10.0.0.2:1"))
    (line,) = what_is_open(far)
    assert "10.0.0.2:1" in line and "localhost" not in line and "--worker-tls" in line
    assert what_is_open(replace(far, worker_tls=tmp_path)) == []
