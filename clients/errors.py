"""What can go wrong between a client and a server.

ClientError
├── ServerDidNotStart   `hub serve` ended or said nothing in time
├── ServerUnreachable   nothing answers at the URL
└── RequestRefused      the server answered with an error; its message is passed on
"""

from __future__ import annotations


class ClientError(Exception):
    """The root; its text is what the user reads."""


class ServerDidNotStart(ClientError):
    pass


class ServerUnreachable(ClientError):
    pass


class RequestRefused(ClientError):
    pass
