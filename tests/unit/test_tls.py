"""Folders of certificates: what `colrow certs` makes, and what is refused when one is read."""

import re
import ssl
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    PolicyBuilder,
    Store,
    VerificationError,
)
from typer.testing import CliRunner

from client.certificates import Wanted, make_certificates
from client.cli import app
from colrow import tls
from colrow.errors import InvalidArgument
from coordinator.__main__ import main as coordinator_main
from tests.certificates import make_cluster, self_signed

pytestmark = pytest.mark.timeout(60)

DAY = timedelta(days=1)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    return make_cluster(tmp_path / "certs")


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())


def uses(folder: Path) -> set[x509.ObjectIdentifier]:
    return set(certificate(folder).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


# --- making them ------------------------------------------------------------------------------


def test_a_services_certificate_is_good_for_the_hosts_given_and_for_this_machine(
    tmp_path: Path,
) -> None:
    (folder, *_) = make_certificates(tmp_path, Wanted("llm.example,10.0.0.1,*.pods.example"))
    names = certificate(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == [
        "llm.example",
        "*.pods.example",
        "localhost",
    ]
    addresses = map(str, names.value.get_values_for_type(x509.IPAddress))
    assert list(addresses) == ["10.0.0.1", "127.0.0.1", "::1"]


def test_what_it_signs_holds_by_the_rules_of_the_web(tmp_path: Path) -> None:
    root = make_cluster(tmp_path / "one")
    other = make_cluster(tmp_path / "other")

    def check(folder: Path, ca: Path) -> None:
        store = Store([x509.load_pem_x509_certificate((ca / "ca" / "ca.crt").read_bytes())])
        verifier = PolicyBuilder().store(store).build_server_verifier(x509.DNSName("localhost"))
        verifier.verify(certificate(folder), [])

    check(root / "coordinator", root)
    check(root / "workers" / "localhost", root)
    with pytest.raises(VerificationError):
        check(root / "coordinator", other)
    with pytest.raises(VerificationError):
        check(root / "users" / "user", root)


def test_services_may_serve_and_call_and_users_call_only(cluster: Path) -> None:
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert uses(cluster / "coordinator") == uses(cluster / "workers/localhost") == both
    assert uses(cluster / "users/user") == {ExtendedKeyUsageOID.CLIENT_AUTH}


def test_keys_are_readable_by_their_owner_only(cluster: Path) -> None:
    keys = list(cluster.rglob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_nothing_is_written_over_and_nothing_is_written_then(cluster: Path) -> None:
    before = {path: path.read_bytes() for path in cluster.rglob("*") if path.is_file()}
    with pytest.raises(InvalidArgument, match=r"users/user'?: is there"):
        make_certificates(cluster, Wanted(workers=["gpu-b"], users=["user"]))
    assert {path: path.read_bytes() for path in cluster.rglob("*") if path.is_file()} == before
    assert not (cluster / "workers/gpu-b").exists()


def test_what_is_added_later_is_of_the_same_ca(cluster: Path) -> None:
    make_certificates(cluster, Wanted(workers=["gpu-b,10.0.0.2"], users=["bob"], days=7))
    first = tls.read_server(cluster / "workers/localhost", "tls", client_certificates=True)
    added = tls.read_server(cluster / "workers/gpu-b", "tls", client_certificates=True)
    assert first.ca == added.ca
    issued = certificate(cluster / "users/bob")
    assert timedelta(7) <= issued.not_valid_after_utc - issued.not_valid_before_utc < timedelta(8)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (Wanted("a host"), "coordinator = 'a host': is neither a host name nor an address"),
        (Wanted("../up"), "coordinator = '../up': is neither"),
        (Wanted(workers=["a,"]), "worker = '': is neither"),
        (Wanted(workers=["gpu,coordinator"]), "other workers would take it for coordinator"),
        (Wanted(workers=["gpu", "gpu"]), "one certificate is asked for twice"),
        (Wanted(users=["coordinator"]), "user = 'coordinator': is no name for a user"),
        (Wanted(users=[".."]), "is no name for a user"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, wanted: Wanted, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(problem)):
        make_certificates(tmp_path / "certs", wanted)
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("damage", ["no key", "another's key", "no PEM"])
def test_a_ca_that_is_none_signs_nothing(cluster: Path, tmp_path: Path, damage: str) -> None:
    key = cluster / "ca/ca.key"
    if damage == "no key":
        key.unlink()
    elif damage == "no PEM":
        key.write_text("secret")
    else:
        key.write_bytes((cluster / "coordinator/tls.key").read_bytes())
    with pytest.raises(InvalidArgument, match=r"dir = ") as raised:
        make_certificates(cluster, Wanted(users=["bob"]))
    assert "\n" not in str(raised.value)
    assert not (cluster / "users/bob").exists()


def test_the_command_says_what_to_pass_where(tmp_path: Path) -> None:
    root = tmp_path / "certs"
    made = CliRunner().invoke(app, ["certs", str(root)])
    assert made.exit_code == 0, made.output
    assert f"colrow coordinator --tls {root}/coordinator --worker-tls {root}/coordinator" in (
        made.output
    )
    assert f"colrow worker --tls {root}/workers/localhost" in made.output
    assert f"colrow generate --tls {root}/users/user" in made.output


# --- reading them -----------------------------------------------------------------------------


def test_every_folder_that_is_made_can_be_read(cluster: Path) -> None:
    for folder in (cluster / "coordinator", cluster / "workers/localhost"):
        own = tls.read_server(folder, "tls", client_certificates=True)
        assert own.ca and own.certificate and own.key
        context = own.server_context(client_certificates=True)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert tls.read_peer(folder, "worker_tls") == own
    assert tls.read_user(cluster / "users/user").key


def test_a_user_may_have_no_certificate_or_a_file_of_cas_alone(cluster: Path) -> None:
    for path in (cluster / "ca", cluster / "ca/ca.crt"):
        user = tls.read_user(path)
        assert user.ca == (cluster / "ca/ca.crt").read_bytes()
        assert user.certificate is user.key is None


def test_a_server_of_users_without_certificates_needs_no_ca(cluster: Path) -> None:
    (cluster / "coordinator/ca.crt").unlink()
    assert tls.read_server(cluster / "coordinator", "tls", client_certificates=False).ca is None
    with pytest.raises(InvalidArgument, match=r"ca\.crt is missing"):
        tls.read_server(cluster / "coordinator", "tls", client_certificates=True)


def locked_key(folder: Path) -> None:
    key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    (folder / "tls.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )


def foreign_key(folder: Path) -> None:
    (folder / "tls.key").write_bytes((folder.parent / "users/user/tls.key").read_bytes())


def folder_as_file(folder: Path) -> None:
    (folder / "tls.crt").unlink()
    (folder / "tls.crt").mkdir()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "tls.key").unlink(), "tls.key is missing"),
        (lambda folder: (folder / "tls.crt").unlink(), "tls.crt is missing"),
        (lambda folder: (folder / "ca.crt").unlink(), "ca.crt is missing"),
        (lambda folder: (folder / "tls.crt").write_text("?"), "tls.crt holds no certificate"),
        (lambda folder: (folder / "ca.crt").write_text(""), "ca.crt holds no certificate"),
        (lambda folder: (folder / "tls.key").write_text("?"), "tls.key holds no private key"),
        (locked_key, "tls.key holds no private key in PEM form without a password"),
        (foreign_key, "tls.key does not belong to tls.crt"),
        (folder_as_file, "tls.crt can't be read (Is a directory)"),
    ],
)
def test_a_folder_that_can_not_be_used_is_refused_in_one_line(
    cluster: Path, damage: Callable[[Path], object], problem: str
) -> None:
    folder = cluster / "coordinator"
    damage(folder)
    with pytest.raises(InvalidArgument) as raised:
        tls.read_peer(folder, "worker_tls")
    assert str(raised.value).startswith(f"worker_tls = {str(folder)!r}: {problem}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("first", "last", "problem"),
    [
        (-2 * DAY, -DAY, r"tls\.crt expired on \d{4}-\d\d-\d\d$"),
        (DAY, 2 * DAY, r"tls\.crt is valid from \d{4}-\d\d-\d\d on$"),
    ],
)
def test_a_certificate_is_refused_before_and_after_its_time(
    tmp_path: Path, first: timedelta, last: timedelta, problem: str
) -> None:
    folder = self_signed(tmp_path / "old", first=first, last=last)
    with pytest.raises(InvalidArgument, match=problem):
        tls.read_server(folder, "tls", client_certificates=False)


def test_of_several_cas_one_has_to_be_valid(tmp_path: Path, cluster: Path) -> None:
    old = self_signed(tmp_path / "old", first=-2 * DAY, last=-DAY)
    with pytest.raises(InvalidArgument, match=r"ca\.crt expired"):
        tls.read_user(old / "ca.crt")
    bundle = tmp_path / "bundle.crt"
    bundle.write_bytes((old / "ca.crt").read_bytes() + (cluster / "ca/ca.crt").read_bytes())
    assert tls.read_user(bundle).ca == bundle.read_bytes()


@pytest.mark.parametrize("flag", ["tls", "worker-tls"])
def test_the_coordinator_ends_with_a_line_that_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    arguments = ("--model", str(tmp_path), "--workers", "localhost:1", f"--{flag}", "/nowhere")
    assert coordinator_main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    name = flag.replace("-", "_")
    assert line.startswith(f"colrow coordinator: {name} = '/nowhere': is no folder with tls.crt")


def test_asking_for_certificates_without_tls_is_a_wrong_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        coordinator_main(("--model", ".", "--workers", "localhost:1", "--client-cert-auth"))
    assert "--client-cert-auth: needs --tls" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("localhost", True), ("[::1]", True)),
        *(("0.0.0.0", False), ("[::]", False), ("10.0.0.1", False), ("gpu-a", False)),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, inside: bool) -> None:
    assert tls.is_loopback(host) is inside
