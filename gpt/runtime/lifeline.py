"""Connections by which all processes of a job end together when one of them fails or dies.

Process 0 is the hub: every other process (a spoke) connects to it at the coordinator's address and keeps this
connection, its lifeline, open until the job is done. The operating system closes the connection of a process that
dies, and TCP keep-alive detects a host that lost its power or its network. Whoever notices this first tells the hub,
the hub tells all others, and all exit at once.

Messages are JSON objects, one per line:

    hub → spoke    {"nonce"}                                            a random number, for the proof below
    spoke → hub    {"process", "count", "name", "facts", "nonce", "proof"}
    hub → spoke    {"proof", "refusal"}                                 the spoke has joined if `refusal` is ""
    hub → spoke    {"key", "value"}                                     a value that process 0 shares
    spoke → hub    {"error", "code"}                                    an error that has to end all processes
    hub → spoke    {"end"}                                              exit at once, with this code
    both           {"done": true}                                       the sender is about to exit normally

A proof is an HMAC-SHA256 of the sender's role and both random numbers, with the job's secret as the key
(GPT_CLUSTER_SECRET), so each side knows that the other has the secret, and nobody sends it. Without a secret, the key
is empty, and a proof only tells processes of this program from other programs.
"""

import contextlib
import errno
import hmac
import ipaddress
import json
import os
import resource
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from gpt.runtime import versions
from gpt.runtime.errors import UserError

SECRET = "GPT_CLUSTER_SECRET"  # name of the environment variable
NOTICE_AFTER = 10  # seconds of waiting after which a line says for which process
HANDSHAKE = 10  # seconds in which a connection has to prove that it is from a process of this job
PRINTING = 10  # seconds in which a terminal or a pipe has to accept the last message of a process
MAX_HELLO, MAX_MESSAGE = 1 << 16, 1 << 26  # bytes of a message during and after the handshake
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class Lifeline:
    """What a hub and a spoke have in common. The constructor returns when the process has joined the job.

    Args:
      address: HOST:PORT at which process 0 listens.
      count: number of processes.
      index: number of this process.
      timeout: seconds to wait for the other processes.
      facts: what has to be equal in all processes; see `versions.facts`.

    Raises:
      UserError: another process did not join in time or has other facts, or this process was refused.
    """

    def __init__(self, address: str, count: int, index: int, timeout: float, facts: dict[str, str]):
        self.address, self.count, self.index, self.timeout, self.facts = address, count, index, timeout, facts
        self.name = f"process {index} on {socket.gethostname()}"
        self._changed = threading.Condition()
        self._peers: dict[int, _Connection] = {}  # by process number, including processes that ended
        self._done: set[int] = set()  # numbers of the processes that are about to exit normally
        self._start, self._has_noticed = time.monotonic(), False
        self._join()

    def _join(self) -> None:
        """Waits until the process has joined the job."""
        raise NotImplementedError

    def _waited_too_long(self, notice: str) -> bool:
        """Returns whether the timeout has passed. Prints the notice, once, after NOTICE_AFTER seconds."""
        waited = time.monotonic() - self._start
        if waited > NOTICE_AFTER and not self._has_noticed:
            self._has_noticed = True
            print(notice, file=sys.stderr, flush=True)
        return waited > self.timeout

    def _in_background(self, function: Callable[..., None], *args: Any) -> None:
        """Runs a function in a thread. An exception ends all processes, because a death would no longer be noticed."""

        def guarded() -> None:
            try:
                function(*args)
            except _Malformed as error:
                self._end(f"error: {self.name} cannot read a message of another process: {error}.", 1)
            except BaseException:
                self._end(traceback.format_exc(), 1)

        threading.Thread(target=guarded, name="lifeline", daemon=True).start()

    def finish(self) -> None:
        """Tells the other processes that this process is about to exit normally."""
        self._done.add(self.index)
        self._send_all({"done": True})

    def _send_all(self, message: dict[str, Any]) -> None:
        with self._changed:
            for peer in self._peers.values():
                peer.send(message)

    def _follow(self, index: int) -> None:
        """Handles the messages of a process until its connection closes."""
        with contextlib.suppress(OSError):
            while True:
                self._receive(index, self._peers[index].receive())
        with self._changed:
            if not self._done & {self.index, index}:
                self._end(
                    f"error: {self._peers[index].name} ended without a message (killed, out of memory, or its host "
                    "failed), so all processes end. Run the same command again to resume from the last checkpoint.",
                    1,
                )

    def _receive(self, index: int, message: dict[str, Any]) -> None:
        """Handles a message of a process."""
        raise NotImplementedError

    def _end(self, text: str, code: int) -> NoReturn:
        """Ends this process. A hub ends all others too."""
        exit_now(text, code)


class Hub(Lifeline):
    """Process 0, with a connection to each other process."""

    def _join(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is an open file; often limited to 1,024
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._refused = ""  # the last connection that was refused, as a sentence for the user
        for server in self._listen():
            self._in_background(self._accept, server)
        with self._changed:
            while len(self._peers) < self.count - 1:
                missing = ", ".join(str(i) for i in range(1, self.count) if i not in self._peers)
                waiting_for = f"at {self.address} for process {missing} of {self.count}"
                if self._waited_too_long(f"waiting {waiting_for} …{self._refused}"):
                    self._refuse(f"{self.name} waited {self.timeout:.0f} s {waiting_for} to connect.{self._refused}")
                self._changed.wait(1)
            differing = [i for i, spoke in self._peers.items() if versions.differences(self.facts, spoke.facts)]
            if differing:
                first = self._peers[min(differing)]
                more = f" {len(differing) - 1} other processes differ too." if len(differing) > 1 else ""
                self._refuse(
                    f"{first.name} differs from {self.name} in {versions.differences(self.facts, first.facts)}.{more} "
                    "Their results would not agree: give all processes the same code, libraries and settings."
                )

    def _refuse(self, text: str) -> None:
        """Ends the other processes, and raises UserError in this one."""
        self._send_all({"end": 1})
        raise UserError(text)

    def _listen(self) -> list[socket.socket]:
        """Listens at the IP addresses of the coordinator's name, and at no others."""
        host, port = host_and_port(self.address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            places = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
            names = [str(address[0]) for _, address in places]
            is_local = all(ipaddress.ip_address(name.split("%")[0]).is_loopback for name in names)
            if is_local and not host.endswith("localhost") and host not in names:
                # Debian gives a host's own name the address 127.0.1.1, but other hosts use an address of an interface.
                places, is_local = [(socket.AF_INET, ("", port))], False
            servers: list[socket.socket] = []
            for i, (family, address) in enumerate(places, 1):
                try:
                    servers.append(socket.create_server(address, family=family, backlog=1024))
                except OSError as error:  # "localhost" has two addresses, even on a host without IPv6
                    is_absent = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                    if not is_absent or (i == len(places) and not servers):
                        raise
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"{self.name} cannot listen at {self.address}: {_reason(error)}. "
                "--coordinator has to name the host of process 0 and a free port there."
            ) from None
        if not is_local and not _secret():
            print(
                f"warning: {SECRET} is not set, so any program that can connect to {self.address} can join this job; "
                "see launch/README.md.",
                file=sys.stderr,
            )
        return servers

    def service(self) -> tuple[str, str]:
        """Returns two addresses for JAX's coordination service: one to connect to, and one to listen at."""
        with self._changed:
            hosts = {spoke.address for spoke in self._peers.values()}
        host = hosts.pop() if len(hosts) == 1 else ""  # all addresses if the other processes use different ones
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            port = server.getsockname()[1]
        host = f"[{host}]" if ":" in host else host
        return f"{host or self.address.rpartition(':')[0]}:{port}", f"{host or '[::]'}:{port}"

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        """Returns the JSON value that `compute` returns on process 0; see `cluster.share`."""
        value = json.loads(json.dumps(compute()))
        self._send_all({"key": key, "value": value})
        return value

    def failed(self, text: str, code: int, own_fault: bool) -> NoReturn:
        """Ends all processes after an error in this one; see `cluster.failed`."""
        if not own_fault:
            time.sleep(5)
        self._end(text, code)

    def _end(self, text: str, code: int) -> NoReturn:
        with self._changed:
            self._send_all({"end": code})
            super()._end(text, code)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, (host, *_) = server.accept()
                self._in_background(self._serve, connection, host)
            except (OSError, RuntimeError):  # too many open files or threads for now
                time.sleep(0.5)

    def _serve(self, connection: socket.socket, host: str) -> None:
        """Lets a process join, and follows it."""
        try:
            index = self._welcome(_Connection(connection), host)
        except (OSError, ValueError):  # another program, which must not affect the job
            connection.close()
        else:
            self._follow(index)

    def _welcome(self, connection: "_Connection", host: str) -> int:
        """Lets a process join, and returns its number.

        Raises:
          OSError, ValueError: the connection is not from a process of this job, or the process was refused.
        """
        own_nonce = secrets.token_hex(16)
        connection.send({"nonce": own_nonce})
        hello = connection.receive(time.monotonic() + HANDSHAKE)
        index, count, name, facts, nonce, proof = _fields(
            hello, process=int, count=int, name=str, facts=dict, nonce=str, proof=str
        )
        if not _is_proof(proof, "process", own_nonce, nonce):
            connection.send({"proof": ""})
            self._refused = f" A program on {host} tried to join with another {SECRET}."
            raise ValueError
        refusal = ""
        with self._changed:
            if count != self.count:
                refusal = f"{name} was started as one of {count} processes, {self.name} as one of {self.count}."
            elif index in self._peers or not 0 < index < self.count:
                refusal = f"{name} has the same number as {self._peers.get(index, self).name}."
            connection.send({"proof": _proof("process 0", nonce, own_nonce), "refusal": refusal})
            if refusal:
                self._refused = f" {refusal}"
                raise ValueError
            connection.name, connection.facts = name, facts
            self._peers[index] = connection
            self._changed.notify_all()
        return index

    def _receive(self, index: int, message: dict[str, Any]) -> None:
        with self._changed:
            if "done" in message:
                self._done.add(index)
            else:
                self._end(*_fields(message, error=str, code=int))


class Spoke(Lifeline):
    """Any process except process 0, with a connection to process 0. Its methods have the same purpose as the hub's."""

    def _join(self) -> None:
        self._values: dict[str, Any] = {}  # values that process 0 shared and that nobody has taken yet
        while not self._peers:
            try:
                self._peers[0] = self._connect()
            except (OSError, UnicodeError) as error:
                reason = _reason(error)
                if self._waited_too_long(f"{self.name} waits for process 0 at {self.address} ({reason}) …"):
                    raise UserError(
                        f"{self.name} waited {self.timeout:.0f} s for process 0 at {self.address}: {reason}. "
                        "Check --coordinator and what process 0 prints."
                    ) from None
                time.sleep(0.5)
        self._in_background(self._follow, 0)

    def _connect(self) -> "_Connection":
        """Connects to process 0, and checks that it is process 0 of this job.

        Raises:
          OSError: process 0 does not listen yet, or another program listens at its address.
          UserError: process 0 refuses this process.
        """
        patience = min(HANDSHAKE, max(self._start + self.timeout - time.monotonic(), 1))
        deadline = time.monotonic() + patience
        with contextlib.ExitStack() as on_failure:
            connection = on_failure.enter_context(socket.create_connection(host_and_port(self.address), patience))
            try:
                hub = _Connection(connection)
                (nonce,) = _fields(hub.receive(deadline), nonce=str)
                own_nonce = secrets.token_hex(16)
                proof = _proof("process", nonce, own_nonce)
                own = {"process": self.index, "count": self.count, "name": self.name, "facts": self.facts}
                hub.send(own | {"nonce": own_nonce, "proof": proof})
                answer = hub.receive(deadline)
                is_known = _is_proof(*_fields(answer, proof=str), "process 0", own_nonce, nonce)
            except (OSError, ValueError):
                raise ConnectionError(0, "the program there does not answer as process 0 does") from None
            if not is_known:
                raise ConnectionError(0, f"the program there has another {SECRET}")
            if refusal := answer.get("refusal"):
                raise UserError(refusal)
            hub.name = f"{self.name}: process 0 at {self.address}"
            on_failure.pop_all()
        return hub

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values.pop(key)

    def failed(self, text: str, code: int, own_fault: bool) -> NoReturn:
        # If all processes have the same error, process 0 reports it, and `_receive` ends this process during the sleep.
        time.sleep(1 if own_fault else 5)
        text = f"{self.name}: {text}"
        # Printed first, because `_receive` ends this process after process 0 answers.
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        self._send_all({"error": text, "code": code})
        exit_now("", code)

    def _receive(self, index: int, message: dict[str, Any]) -> None:
        if "key" in message:
            with self._changed:
                self._values[message["key"]] = message["value"]
                self._changed.notify_all()
        elif "done" in message:
            self._done.add(index)
        else:
            exit_now("", *_fields(message, end=int))


class _Malformed(ValueError):
    """A message that no process of this program sends."""


class _Connection:
    """A socket that sends and receives JSON objects, one per line.

    Attributes:
      address: this host's IP address on the connection.
      name, facts: what the process at the other end sent about itself.
    """

    name = ""
    facts: dict[str, str]

    def __init__(self, connection: socket.socket):
        self._socket, self._rest, self.address = connection, b"", connection.getsockname()[0]
        # A host that loses its power closes no connection: after 25 s without an answer, the connection is closed here.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def receive(self, deadline: float | None = None) -> dict[str, Any]:
        """Waits for the next message and returns it.

        Args:
          deadline: time on the monotonic clock. During the handshake only, in which messages have to be short.

        Raises:
          OSError: the other side closed the connection, or the deadline has passed.
          _Malformed: the message is too long, or not a JSON object.
        """
        limit, patience = MAX_MESSAGE if deadline is None else MAX_HELLO, None
        while b"\n" not in self._rest:
            if len(self._rest) > limit:
                raise _Malformed("it is too long")
            if deadline is not None and (patience := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(patience)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError
            self._rest += data
        self._socket.settimeout(None)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _Malformed(error) from None
        if not isinstance(message, dict):
            raise _Malformed("it is not a JSON object")
        return message

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the thread that receives gets an error too, and handles it
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the host and the port of HOST:PORT, where HOST may be an IPv6 address in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def exit_now(text: str, code: int) -> NoReturn:
    """Prints a message and ends this process without waiting for other processes or for JAX.

    Args:
      text: message for standard error; "" for none.
      code: exit code. If it is not that of an error, as in a message from a faulty process, the exit code is 1.
    """
    code = code if 0 < code < 256 else 1
    try:
        threading.Timer(PRINTING, os._exit, (code,)).start()
        if text:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _fields(message: dict[str, Any], **types: type) -> list[Any]:
    """Returns fields of a message in order. Raises _Malformed if one is missing or does not have its type."""
    for name, kind in types.items():
        if type(message.get(name)) is not kind:
            raise _Malformed(f"{name}={message.get(name)!r:.50}")
    return [message[name] for name in types]


def _secret() -> bytes:
    return os.fsencode(os.environ.get(SECRET, "").strip())


def _proof(role: str, *nonces: str) -> str:
    """Returns the HMAC of the sender's role and both random numbers, for which a process needs the secret."""
    return hmac.new(_secret(), "\n".join([role, *nonces]).encode(), "sha256").hexdigest()


def _is_proof(proof: str, *args: str) -> bool:
    return hmac.compare_digest(proof.encode(), _proof(*args).encode())


def _reason(error: OSError | UnicodeError) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]  # create_server adds the address
