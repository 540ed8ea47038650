"""The keys by which callers are known, of which the coordinator has hashes only.

A file has a line for each key, `NAME:SALT:HASH`, the hash being SHA-256 of salt and key in hexadecimal.
A slow hash as for passwords would only slow down every call: keys are made here, of 256 random bits, so
there is nothing to guess. The salt keeps equal keys in two files from looking alike.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.errors import InvalidArgument, Unauthenticated

log = logging.getLogger(__name__)

KEY_PREFIX = "colrow-"  # by which scanners for leaked secrets can know one
KEY_BYTES = 32
SALT_BYTES = 16
SCHEME = "bearer"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HEX = re.compile(r"[0-9a-f]+")

Version = tuple[int, int, int]
"""Inode, size and time of change of a file: another one is another content."""


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    salt: bytes
    digest: bytes

    @property
    def line(self) -> str:
        return f"{self.name}:{self.salt.hex()}:{self.digest.hex()}\n"


def new_key(name: str) -> tuple[str, Entry]:
    """A key, to be told once, and what is kept of it. ValueError where the name is no name."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument("name", name, "is not 1 to 64 letters, digits and ._@-")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    salt = secrets.token_bytes(SALT_BYTES)
    return key, Entry(name, salt, _digest(salt, key))


def add_key(name: str, file: Path) -> str:
    """Makes a key, appends its hash to the file, which is made where it is not, and returns the key.

    InvalidArgument where the file has that name already, or is no file of keys.
    """
    if file.exists() and any(entry.name == name for entry in read_entries(file, "file")):
        raise InvalidArgument("name", name, f"has a key in {file}; remove its line to replace it")
    key, entry = new_key(name)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidArgument("file", str(file), f"can't be written ({error.strerror})") from error
    with os.fdopen(descriptor, "w") as stream:
        stream.write(entry.line)
    return key


def read_entries(file: Path, field: str) -> tuple[Entry, ...]:
    """What a file holds. InvalidArgument of `field` where it can't be read or is no file of keys."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise InvalidArgument(field, str(file), f"can't be read ({error.strerror})") from error
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        salt, _, digest = rest.partition(":")
        hashes = _HEX.fullmatch(salt) and _HEX.fullmatch(digest)
        if not _NAME.fullmatch(name) or not hashes or len(salt) % 2 or len(digest) != 64:
            # The line is not shown: it may be a key that somebody put there.
            raise InvalidArgument(
                field, str(file), f"line {number} is no NAME:SALT:HASH; `colrow key` writes them"
            )
        entries.append(Entry(name, bytes.fromhex(salt), bytes.fromhex(digest)))
    return tuple(entries)


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode(errors="replace")).digest()


class ApiKeys:
    """The keys of some files, read again when a file has changed: a line that is gone opens nothing."""

    def __init__(self, files: Sequence[Path], field: str) -> None:
        """InvalidArgument of `field` where a file can't be used, or no file has a key."""
        self._field = field
        # The versions first: what changes a file while it is read is seen the next time.
        self._versions = {file: _version(file) for file in files}
        self._entries = {file: read_entries(file, field) for file in files}
        if not any(self._entries.values()):
            raise InvalidArgument(
                field, str(files[0]), "has no key; make one with `colrow key NAME --file FILE`"
            )

    def name_of(self, authorization: str) -> str:
        """Whose key `Bearer KEY` shows. Unauthenticated where it is none of these."""
        scheme, _, key = authorization.partition(" ")
        if not authorization or scheme.lower() != SCHEME:
            raise Unauthenticated(
                "an API key is needed, as `authorization: Bearer KEY`", reason="INVALID_API_KEY"
            )
        self._read_what_changed()
        found = ""
        for entries in self._entries.values():
            # All of them, or the time would tell how far one has come.
            for entry in entries:
                if hmac.compare_digest(entry.digest, _digest(entry.salt, key)):
                    found = entry.name
        if not found:
            raise Unauthenticated("the API key is not known here", reason="INVALID_API_KEY")
        return found

    def _read_what_changed(self) -> None:
        for file, before in self._versions.items():
            version = _version(file)
            if version == before:
                continue
            self._versions[file] = version
            try:
                self._entries[file] = read_entries(file, self._field)
            except InvalidArgument as error:
                log.error("the keys before it go on to count: %s", error)
            else:
                log.info("read %d keys of %s", len(self._entries[file]), file)


def _version(file: Path) -> Version | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
