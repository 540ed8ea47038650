"""Certificates: one folder for each service and each user, checked when it is read.

Its files are named as in a Kubernetes TLS secret: `tls.crt` is the certificate, with those between it
and its CA; `tls.key` its private key; `ca.crt` the CAs that the other side is checked by. `colrow certs`
writes such folders. What is read stays for the life of the process.
"""

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from colrow.errors import InvalidArgument

CA_FILE = "ca.crt"
CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    bare = host.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost"


def explain(message: str, *, encrypted: bool) -> str:
    """What keeps a client and a server apart, by gRPC's account of it; "" where it is not TLS."""
    if "WRONG_VERSION_NUMBER" in message:
        return "it does not speak TLS"
    if "CERTIFICATE_VERIFY_FAILED" in message:
        return "its certificate is of no CA in our ca.crt, is no server's, or has expired"
    if "Hostname Verification" in message or "Peer name" in message:
        return "its certificate is not for this name"
    if "Socket closed" in message:
        may = "ask for a certificate of its CA" if encrypted else "speak TLS"
        return f"it closes the connection; it may {may}"
    return ""


@dataclass(frozen=True, slots=True)
class Tls:
    """One side of a connection, in PEM form: whom it trusts, and who it is."""

    path: Path
    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def server_context(self, *, client_certificates: bool) -> ssl.SSLContext:
        """For servers that are not gRPC's; with `client_certificates` clients must present one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.path / CERTIFICATE_FILE, self.path / KEY_FILE)
        if client_certificates:
            assert self.ca is not None
            context.load_verify_locations(cadata=self.ca.decode())
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def read_server(folder: Path, name: str, *, client_certificates: bool) -> Tls:
    """What a server shows, and with `client_certificates` also what it checks its clients by.

    InvalidArgument of the field `name` where a file is missing, can't be read, is not what it should
    be or has expired.
    """
    return _read(folder, name, needs_ca=client_certificates, needs_certificate=True)


def read_peer(folder: Path, name: str) -> Tls:
    """For a service that calls others, and shows itself to them. Errors as of `read_server`."""
    return _read(folder, name, needs_ca=True, needs_certificate=True)


def read_user(path: Path, name: str = "tls") -> Tls:
    """For users: a folder, whose own certificate may be missing, or a file of CAs alone."""
    if path.is_file():
        reader = _Reader(path.parent, name, path)
        return Tls(path, ca=reader.certificates(path.name))
    return _read(path, name, needs_ca=True, needs_certificate=False)


def _read(folder: Path, name: str, *, needs_ca: bool, needs_certificate: bool) -> Tls:
    if not folder.is_dir():
        raise InvalidArgument(
            name, str(folder), f"is no folder with {CERTIFICATE_FILE}, {KEY_FILE} and {CA_FILE}"
        )
    reader = _Reader(folder, name, folder)
    ca = reader.certificates(CA_FILE) if needs_ca else None
    certificate = key = None
    if needs_certificate or reader.has(CERTIFICATE_FILE) or reader.has(KEY_FILE):
        certificate = reader.certificates(CERTIFICATE_FILE)
        key = reader.key_of(certificate)
    return Tls(folder, ca, certificate, key)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads files of `folder`; errors name the field and what the user gave it."""

    folder: Path
    name: str
    given: Path

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    def certificates(self, file: str) -> bytes:
        """The PEM of a file of certificates of which the first is valid now."""
        content = self._content(file)
        try:
            certificates = x509.load_pem_x509_certificates(content)
        except ValueError as error:
            raise self._error(f"{file} holds no certificate in PEM form") from error
        self._check_time(file, certificates)
        return content

    def _check_time(self, file: str, certificates: Sequence[x509.Certificate]) -> None:
        # Of a bundle of CAs some may have expired; those of a chain are checked by the other side.
        now = datetime.now(UTC)
        problem = ""
        for certificate in certificates:
            first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
            if first <= now <= last:
                return
            if not problem:
                problem = f"expired on {last:%F}" if last < now else f"is valid from {first:%F} on"
            if file == CERTIFICATE_FILE:
                break
        raise self._error(f"{file} {problem}")

    def key_of(self, certificate: bytes) -> bytes:
        """The PEM of the private key, which has to belong to the certificate."""
        content = self._content(KEY_FILE)
        try:
            public = load_pem_private_key(content, None).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise self._error(
                f"{KEY_FILE} holds no private key in PEM form without a password"
            ) from error
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        named = x509.load_pem_x509_certificates(certificate)[0].public_key()
        if public.public_bytes(*form) != named.public_bytes(*form):
            raise self._error(f"{KEY_FILE} does not belong to {CERTIFICATE_FILE}")
        return content

    def _content(self, file: str) -> bytes:
        try:
            return (self.folder / file).read_bytes()
        except FileNotFoundError as error:
            raise self._error(f"{file} is missing") from error
        except OSError as error:
            raise self._error(f"{file} can't be read ({error.strerror})") from error

    def _error(self, problem: str) -> InvalidArgument:
        return InvalidArgument(self.name, str(self.given), problem)
