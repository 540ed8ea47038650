"""A private CA for a cluster, and the certificates of its services and users.

    DIR/ca/                 ca.crt and ca.key: who has the key can make certificates, so keep it away
    DIR/coordinator/        ca.crt, tls.crt, tls.key, as `colrow.tls` reads them
    DIR/workers/HOST/
    DIR/users/NAME/

A service's certificate is good for both directions: workers and coordinator are called, and a probe in
their container calls with it. What a worker lets in is the name `coordinator` alone.
"""

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from colrow.errors import InvalidArgument
from colrow.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE

CA_KEY_FILE = "ca.key"
COORDINATOR = "coordinator"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
CA_DAYS = 3650
CLOCKS_DIFFER_BY = timedelta(hours=1)

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose certificates to make. Each of `workers` is the host names of one, comma separated."""

    coordinator: str | None = None
    workers: Sequence[str] = ()
    users: Sequence[str] = ()
    days: int = 365


@dataclass(frozen=True, slots=True)
class _Plan:
    """One certificate: its folder, its name, and the hosts that it is for, none for a user's."""

    folder: Path
    name: str
    hosts: tuple[str, ...]


def make_certificates(root: Path, wanted: Wanted) -> list[Path]:
    """Writes what is wanted, under a new CA or the one that is there, and returns the folders.

    Nothing is written over, and nothing is written where anything is wrong: InvalidArgument.
    """
    plans = _plans(root, wanted)
    for plan in plans:
        if plan.folder.exists():
            raise InvalidArgument("dir", str(plan.folder), "is there; remove it to make it anew")
    ca = root / "ca"
    if ca.exists():
        ca_key, ca_certificate = _read_ca(ca)
    else:
        ca_key, ca_certificate = _make_ca(ca)
    for plan in plans:
        key, certificate = _issue(plan, ca_key, ca_certificate, wanted.days)
        _write(
            plan.folder,
            {
                CA_FILE: _pem(ca_certificate),
                CERTIFICATE_FILE: _pem(certificate),
                KEY_FILE: _key_pem(key),
            },
        )
    return [plan.folder for plan in plans]


def _plans(root: Path, wanted: Wanted) -> list[_Plan]:
    plans = []
    if wanted.coordinator is not None:
        hosts = _hosts("coordinator", wanted.coordinator)
        plans.append(_Plan(root / "coordinator", COORDINATOR, hosts))
    for worker in wanted.workers:
        hosts = _hosts("worker", worker)
        if COORDINATOR in hosts:
            raise InvalidArgument("worker", worker, "other workers would take it for coordinator")
        plans.append(_Plan(root / "workers" / hosts[0], "worker", hosts))
    for user in wanted.users:
        if not _USER.fullmatch(user) or user == COORDINATOR:
            raise InvalidArgument("user", user, "is no name for a user")
        plans.append(_Plan(root / "users" / user, user, ()))
    if len({plan.folder for plan in plans}) < len(plans):
        raise InvalidArgument("dir", str(root), "one certificate is asked for twice")
    return plans


def _hosts(field: str, text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip() for host in text.split(","))
    for host in hosts:
        if _address(host) is None and not _HOST.fullmatch(host):
            raise InvalidArgument(field, host, "is neither a host name nor an address")
    return hosts


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _make_ca(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Colrow cluster CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder, {CA_FILE: _pem(certificate), CA_KEY_FILE: _key_pem(key)})
    return key, certificate


def _read_ca(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
        key = load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), None)
    except OSError as error:
        raise InvalidArgument(
            "dir", str(folder), f"{error.filename} can't be read ({error.strerror})"
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidArgument("dir", str(folder), "holds no CA of this command") from error
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != certificate.public_key()
    ):
        raise InvalidArgument("dir", str(folder), f"{CA_KEY_FILE} is not that of {CA_FILE}")
    return key, certificate


def _issue(
    plan: _Plan,
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    days: int,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, plan.name)])
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    if plan.hosts:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names: list[x509.GeneralName] = []
        for host in dict.fromkeys((*plan.hosts, *THIS_MACHINE)):
            address = _address(host)
            names.append(x509.IPAddress(address) if address else x509.DNSName(host))
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    return key, builder.sign(ca_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER_BY)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """New files in a new folder; keys for nobody else to read."""
    try:
        folder.mkdir(parents=True)
        for name, content in files.items():
            mode = 0o600 if name.endswith(".key") else 0o644
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
    except OSError as error:
        raise InvalidArgument("dir", str(folder), f"can't be written ({error.strerror})") from error
