"""The server's certificate: read, checked by a handshake of our own, and read again when its files change.

A renewed certificate serves new connections at once; connections that exist keep the old one until their age retires
them. A renewal that cannot be used (half written, key of another certificate, expired) changes nothing and is logged.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from service import logs
from service.errors import ConfigurationError

_log = logs.get("tls")

# Files that did not serve are looked at again after so many seconds, though they are the same: their certificate may
# have become valid, or the process may have a file descriptor again.
_AGAIN_S = 30.0

# Size, time and place of each file: Kubernetes swaps a link, other tools write in place.
_Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ServerTls:
    """PEM files. `certificate`: chain, own certificate first. `client_ca`: who may sign clients; None asks for none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Those that are in use."""
        return (self.certificate, self.key) + ((self.client_ca,) if self.client_ca else ())


class Certificates:
    """Hands gRPC the certificate of the moment.

    Args:
        files: where it is.
        loaded: is told the end of validity of each certificate that comes into use, in seconds since 1970.
        clock: monotonic seconds.

    Raises:
        ConfigurationError: a file cannot be read, or what is in them does not serve.
    """

    def __init__(
        self, files: ServerTls, loaded: Callable[[float], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._files = files
        self._loaded = loaded
        self._clock = clock
        self._again = math.inf
        self._seen = _signature(files)
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; asks for the certificate at every handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self.renewed,  # type: ignore[arg-type]  # the stub forgets None, which means: as before
            require_client_authentication=self._files.client_ca is not None,
        )

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificate if its files have changed and it serves; None: go on with the one in use. Never raises."""
        try:
            signature = _signature(self._files)
            if signature == self._seen and self._clock() < self._again:
                return None
            # Before reading: what changes meanwhile is looked at again.
            self._seen, self._again = signature, self._clock() + _AGAIN_S
            self._configuration = self._read()
            self._again = math.inf
        except ConfigurationError as error:
            _log.error("certificate not renewed", error=str(error))
            return None
        _log.info("certificate renewed", path=str(self._files.certificate))
        return self._configuration

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        expiry = check(files)
        try:
            chain, key = files.certificate.read_bytes(), files.key.read_bytes()
            ca = files.client_ca.read_bytes() if files.client_ca else None
        except OSError as error:
            raise _unreadable(error) from None
        if _signature(files) != self._seen:
            raise ConfigurationError(f"{files.certificate} changed while it was read")  # the next handshake reads again
        self._loaded(expiry)
        return grpc.ssl_server_certificate_configuration([(key, chain)], ca)


def check(files: ServerTls) -> float:
    """Shakes hands with the certificate, in memory.

    Returns:
        The end of its validity, in seconds since 1970.

    Raises:
        ConfigurationError: not PEM, the key belongs to another certificate, not valid yet or any more.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # Its own certificate is trusted as it is, whoever signed it: the question is whether it works.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    path = files.certificate
    try:
        server.load_cert_chain(path, files.key)
        client.load_verify_locations(path)
        if files.client_ca:
            path = files.client_ca
            server.load_verify_locations(path)
            path = files.certificate
        return _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        raise ConfigurationError(f"the certificate {path} does not serve: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"{path} does not serve ({error.reason or error}); expected PEM files: a certificate chain, "
            f"and the key of its first certificate in {files.key}"
        ) from None
    except OSError as error:
        raise _unreadable(error) from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> float:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    # Client hello, server hello to finished, client finished, tickets: two rounds of each end are enough.
    for end in ends * 2:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    certificate = ends[0].getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(certificate["notAfter"])))


def _signature(files: ServerTls) -> _Signature:
    try:
        return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in files.all))
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{error.filename} cannot be read ({error.strerror}); TLS needs it")
