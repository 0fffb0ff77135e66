"""What the tests of this folder start their servers with, without one."""

import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.process import Server, held_port


def test_a_held_port_is_for_who_asks_for_its_number():
    with held_port() as port, socket.socket() as other, socket.socket() as meant, socket.socket() as client:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        meant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meant.bind(("127.0.0.1", port))
        meant.listen()
        client.connect(("127.0.0.1", port))
        meant.accept()[0].close()


def test_another_server_on_the_port_is_seen(monkeypatch):
    states = iter([None, 1])  # runs, then has ended
    process: subprocess.Popen = SimpleNamespace(poll=lambda: next(states))
    monkeypatch.setattr(Server, "get", lambda *_: (200, ""))
    with pytest.raises(AssertionError, match="another one answers on its port"):
        Server(process, "http://127.0.0.1:1", Path(), Path()).wait_until_healthy()
