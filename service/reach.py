"""Why a server cannot be reached. gRPC only tells that it cannot, so this opens a connection of its own and looks."""

from __future__ import annotations

import re
import socket
import ssl

from service.exits import ServerUnreachableError

_TIMEOUT_S = 2.0
_ADDRESS = re.compile(r"(?:(?:dns|ipv4|ipv6):/*)?(?P<host>[^/,]+?):(?P<port>\d+)")
_OTHER_SERVER = "start one with `convoy serve`, or name another with --server"


def unreachable(target: str, tls: ssl.SSLContext | None = None) -> ServerUnreachableError:
    """The error of a server that does not answer, with the reason and what to do. Blocks for a few seconds at most.

    Args:
        target: `host:port`, or any gRPC target.
        tls: what the client would have spoken; None for plain text.
    """
    address = _ADDRESS.fullmatch(target)
    if address is None:
        port = "" if ":" in target else f" (give its port, as in {target}:8500)"
        return ServerUnreachableError(f"no server answers at {target}{port}; {_OTHER_SERVER}")
    host = address["host"].strip("[]")
    try:
        with socket.create_connection((host, int(address["port"])), _TIMEOUT_S) as connection:
            reason = _untold(connection) if tls is None else _refused(connection, host, tls)
    except (OSError, OverflowError) as error:  # nobody listens, no such host, no such port
        detail = getattr(error, "strerror", None) or str(error)
        return ServerUnreachableError(f"no server answers at {target} ({detail}); {_OTHER_SERVER}")
    return ServerUnreachableError(f"{target} {reason}")


def _untold(connection: socket.socket) -> str:
    """Of a server that takes connections but does not answer in plain text."""
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # whoever it is: nothing is sent to it
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    try:
        with anyone.wrap_socket(connection):
            pass
    except OSError:
        return (
            "accepts connections, but is no gRPC server that answers: it is stuck, or that is another port (8500 by "
            "default; 8501 is for HTTP)"
        )
    return "speaks TLS; give --tls-ca (and --tls-certificate with --tls-key if it asks for a client's certificate)"


def _refused(connection: socket.socket, host: str, tls: ssl.SSLContext) -> str:
    """Of a server that takes connections, but not with these files."""
    tls.set_alpn_protocols(["h2"])
    shaken = answered = False
    try:
        with tls.wrap_socket(connection, server_hostname=host) as secured:
            shaken = True
            # Whether it takes the client's certificate comes after the handshake; a gRPC server begins to speak.
            answered = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return f"shows a certificate that is not accepted: {error.verify_message}; is --tls-ca who signed it?"
    except TimeoutError:
        answered = True
    except OSError as error:
        if not shaken:
            reason = getattr(error, "reason", None) or error
            return f"speaks no TLS that this client can use ({reason}); leave out --tls-ca, or name another port"
    if answered:
        return "accepts connections, but does not answer in time; it is stuck, or is another kind of server"
    return "does not take this client; give the certificate that it asks for, with --tls-certificate and --tls-key"
