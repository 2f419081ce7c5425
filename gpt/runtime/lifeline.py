"""TODO."""

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
from collections import deque
from collections.abc import Callable
from typing import Any

from gpt.runtime import versions
from gpt.runtime.errors import UserError

SECRET = "GPT_CLUSTER_SECRET"  # the environment variable
NOTICE_AFTER = 10  # seconds of waiting until a line says for what
HANDSHAKE = 10  # seconds within which a program that connects has to prove that it is a process of this job
PRINTING = 10  # seconds that a terminal or a pipe gets to take the last words of a process that has to end
MAX_UNKNOWN = 64  # connections that may be at it; the oldest makes room for another
MAX_HELLO, MAX_MESSAGE = 1 << 16, 1 << 26  # bytes
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class Lifeline:
    """What both ends of the connections have in common.

    Args:
      facts: what has to be the same in all processes; see `versions.facts`.
    """

    def __init__(self, address: str, count: int, index: int, timeout: float, facts: dict[str, str]):
        self.address, self.count, self.index, self.timeout, self.facts = address, count, index, timeout, facts
        self.name = f"process {index} on {socket.gethostname()}"
        self._changed = threading.Condition()
        self._began, self._noticed = time.monotonic(), False

    def _waited_too_long(self, notice: str) -> bool:
        """Whether the time is over; prints the notice, once, when it gets long."""
        waited = time.monotonic() - self._began
        if waited > NOTICE_AFTER and not self._noticed:
            self._noticed = True
            print(notice, file=sys.stderr, flush=True)
        return waited > self.timeout

    def _in_background(self, function: Callable[..., None], *args: Any) -> None:
        """Runs a function in a thread. If it fails, all end: without this thread, no death would be noticed."""

        def guarded() -> None:
            try:
                function(*args)
            except _Malformed as error:
                self._end(f"error: {self.name} cannot read a message of another process: {error}.", 1)
            except BaseException:
                self._end(traceback.format_exc(), 1)

        threading.Thread(target=guarded, name="lifeline", daemon=True).start()

    def _end(self, text: str, code: int) -> None:
        """Ends this process, and those that it can reach."""
        _exit(text, code)


class Hub(Lifeline):
    """Process 0, with a connection from each of the others."""

    def __init__(self, address: str, count: int, index: int, timeout: float, facts: dict[str, str]):
        super().__init__(address, count, index, timeout, facts)
        # A connection is an open file, and the usual limit to these is 1,024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._unknown: deque[socket.socket] = deque()
        self._spokes: dict[int, _Connection] = {}
        self._names: dict[int, str] = {}
        self._facts: dict[int, dict[str, str]] = {}
        self._done: set[int] = set()
        self._refused = ""
        for server in self._listen():
            self._in_background(self._accept, server)
        with self._changed:
            while len(self._names) < count - 1:
                missing = ", ".join(str(i) for i in range(1, count) if i not in self._names)
                if self._waited_too_long(f"waiting at {address} for process {missing} of {count} …{self._refused}"):
                    self._refuse(
                        f"{self.name} waited {timeout:.0f} s at {address} for process {missing} of {count} to connect."
                        f"{self._refused}"
                    )
                self._changed.wait(1)
            different = [index for index in self._facts if versions.differences(facts, self._facts[index])]
            if different:
                what = versions.differences(facts, self._facts[min(different)])
                more = f" {len(different) - 1} other processes differ too." if len(different) > 1 else ""
                self._refuse(
                    f"{self._names[min(different)]} differs from {self.name} in {what}.{more} Their results would not "
                    "agree: give all processes the same code, libraries and settings."
                )

    def _refuse(self, text: str) -> None:
        """Ends the other processes, and raises what this one ends with."""
        self._send_all({"end": 1})
        raise UserError(text)

    def _listen(self) -> list[socket.socket]:
        """Listens at the addresses that the coordinator's name stands for, and at no others."""
        host, port = host_and_port(self.address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            places = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
            is_local = all(ipaddress.ip_address(address[0].split("%")[0]).is_loopback for _, address in places)
            if is_local and not host.endswith("localhost") and host not in [address[0] for _, address in places]:
                # Debian calls its own host 127.0.1.1, but others know the name by the address of an interface.
                places, is_local = [(socket.AF_INET, ("", port))], False
            servers, absent = [], None
            for family, address in places:
                try:
                    servers.append(socket.create_server(address, family=family, backlog=1024))
                except OSError as error:  # "localhost" is two addresses, also where there is no IPv6
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    absent = error
            if absent and not servers:
                raise absent
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
        """Returns where JAX's service is to be reached, and where it is to listen."""
        with self._changed:
            found = {spoke.address for spoke in self._spokes.values()}
        host = found.pop() if len(found) == 1 else ""  # at all addresses if the others use different ones
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            port = server.getsockname()[1]
        host = f"[{host}]" if ":" in host else host
        return f"{host or self.address.rpartition(':')[0]}:{port}", f"{host or '[::]'}:{port}"

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        value = json.loads(json.dumps(compute()))
        with self._changed:
            self._send_all({"key": key, "value": value})
        return value

    def failed(self, text: str, code: int, own_fault: bool) -> int:
        if not own_fault:
            time.sleep(5)
        self._end(text, code)
        return code

    def finish(self) -> None:
        with self._changed:
            self._done.add(0)
            self._send_all({"done": True})

    def _send_all(self, message: dict) -> None:
        for spoke in list(self._spokes.values()):
            spoke.send(message)

    def _end(self, text: str, code: int) -> None:
        with self._changed:
            self._send_all({"end": code})
            super()._end(text, code)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, (host, *_) = server.accept()
                self._in_background(self._serve, connection, host)
            except (OSError, RuntimeError):  # too many open files or threads, which may pass
                time.sleep(0.5)

    def _serve(self, connection: socket.socket, host: str) -> None:
        """Follows one connection to its end."""
        self._unknown.append(connection)
        if len(self._unknown) > MAX_UNKNOWN:
            with contextlib.suppress(OSError, IndexError):
                self._unknown.popleft().shutdown(socket.SHUT_RDWR)
        try:
            spoke = _Connection(connection)
            index = self._welcome(spoke, host)
        except (OSError, ValueError):  # some other program; nothing that it sends may matter
            connection.close()
            return
        finally:
            with contextlib.suppress(ValueError):
                self._unknown.remove(connection)
        with contextlib.suppress(OSError):
            while True:
                self._take(index, spoke.receive())
        with self._changed:
            del self._spokes[index]
            if index not in self._done and 0 not in self._done:
                self._end(f"error: {_gone(self._names[index])}", 1)

    def _welcome(self, connection: "_Connection", host: str) -> int:
        """Lets a process in, and returns its number.

        Raises:
          OSError, ValueError: the connection is not from a process of this job, or this process cannot take part.
        """
        ours = secrets.token_hex(16)
        connection.send({"nonce": ours})
        hello = connection.receive(time.monotonic() + HANDSHAKE)
        index, count, name, facts, theirs, proof = _fields(
            hello, process=int, count=int, name=str, facts=dict, nonce=str, proof=str
        )
        if not _is_proof(proof, "process", ours, theirs):
            connection.send({"proof": ""})
            self._refused = f" A program on {host} tried to join with another {SECRET}."
            raise ValueError
        refusal = ""
        with self._changed:
            if count != self.count:
                refusal = f"{name} was started as one of {count} processes, {self.name} as one of {self.count}."
            elif index in self._names or not 0 < index < self.count:
                refusal = f"{name} has the same number as {self._names.get(index, self.name)}."
            connection.send({"proof": _proof("process 0", theirs, ours), "refusal": refusal})
            if refusal:
                self._refused = f" {refusal}"
                raise ValueError
            self._spokes[index], self._names[index], self._facts[index] = connection, name, facts
            self._changed.notify_all()
        return index

    def _take(self, index: int, message: dict) -> None:
        with self._changed:
            if "done" in message:
                self._done.add(index)
            else:
                self._end(*_fields(message, error=str, code=int))


class Spoke(Lifeline):
    """Any other process, with its connection to process 0."""

    def __init__(self, address: str, count: int, index: int, timeout: float, facts: dict[str, str]):
        super().__init__(address, count, index, timeout, facts)
        while True:
            try:
                self._hub = self._connect()
                break
            except (OSError, UnicodeError) as error:
                reason = _reason(error)
                if self._waited_too_long(f"{self.name} waits for process 0 at {address} ({reason}) …"):
                    raise UserError(
                        f"{self.name} waited {timeout:.0f} s for process 0 at {address}: {reason}. "
                        "Check --coordinator and what process 0 prints."
                    ) from None
                time.sleep(0.5)
        self._values: dict[str, Any] = {}
        self._done = False
        self._in_background(self._read)

    def _connect(self) -> "_Connection":
        """Connects to process 0 and makes sure that it is process 0.

        Raises:
          OSError: it is not there yet, or another program is there.
          UserError: it does not want this process.
        """
        patience = min(HANDSHAKE, max(self._began + self.timeout - time.monotonic(), 1))
        deadline = time.monotonic() + patience
        with contextlib.ExitStack() as opened:
            connection = opened.enter_context(socket.create_connection(host_and_port(self.address), patience))
            try:
                hub = _Connection(connection)
                (theirs,) = _fields(hub.receive(deadline), nonce=str)
                ours = secrets.token_hex(16)
                proof = _proof("process", theirs, ours)
                own = {"process": self.index, "count": self.count, "name": self.name, "facts": self.facts}
                hub.send(own | {"nonce": ours, "proof": proof})
                answer = hub.receive(deadline)
                is_known = _is_proof(*_fields(answer, proof=str), "process 0", ours, theirs)
            except (OSError, ValueError):
                raise ConnectionError(0, "the program there does not answer as process 0 does") from None
            if not is_known:
                raise ConnectionError(0, f"the program there has another {SECRET}")
            if refusal := answer.get("refusal"):
                raise UserError(refusal)
            opened.pop_all()
        return hub

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values.pop(key)

    def failed(self, text: str, code: int, own_fault: bool) -> int:
        # Where all processes make the same mistake, process 0 is the one to say it; `_read` ends this one then.
        time.sleep(1 if own_fault else 5)
        text = f"{self.name}: {text}"
        with contextlib.suppress(OSError):  # first, for `_read` ends this process as soon as process 0 knows
            print(text, file=sys.stderr, flush=True)
        self._hub.send({"error": text, "code": code})
        _exit("", code)
        return code

    def finish(self) -> None:
        self._hub.send({"done": True})
        self._done = True

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message = self._hub.receive()
                if "key" in message:
                    with self._changed:
                        self._values[message["key"]] = message["value"]
                        self._changed.notify_all()
                elif "done" in message:
                    self._done = True
                else:
                    _exit("", *_fields(message, end=int))
        if not self._done:
            _exit(f"error: {self.name}: {_gone(f'process 0 at {self.address}')}", 1)


class _Malformed(ValueError):
    """A message that no process of gpt sends."""


class _Connection:
    """Messages over a socket: JSON objects, a line each."""

    def __init__(self, connection: socket.socket):
        self._socket, self._rest, self.address = connection, b"", connection.getsockname()[0]
        # A host that loses its power closes nothing: after 25 s without an answer it counts as gone.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def receive(self, deadline: float | None = None) -> dict:
        """Waits for the next message.

        Args:
          deadline: on the monotonic clock; with one, the sender is unknown, and only a short message is accepted.

        Raises:
          OSError: the other end has gone, or the time is over.
          _Malformed: what came is not a message.
        """
        limit, wait = MAX_MESSAGE if deadline is None else MAX_HELLO, None
        while b"\n" not in self._rest:
            if len(self._rest) > limit:
                raise _Malformed("it is too long")
            if deadline is not None and (wait := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._socket.settimeout(wait)
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

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # the thread that receives learns of it too
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _fields(message: dict, **types: type) -> list:
    """Returns fields of a message. Raises _Malformed where one is missing or not of its type."""
    for name, kind in types.items():
        if type(message.get(name)) is not kind:
            raise _Malformed(f"{name}={message.get(name)!r:.50}")
    return [message[name] for name in types]


def _secret() -> bytes:
    return os.fsencode(os.environ.get(SECRET, "").strip())


def _proof(role: str, *nonces: str) -> str:
    """Returns what only a process that knows the secret can compute: of the sender's role and both random numbers."""
    return hmac.new(_secret(), "\n".join([role, *nonces]).encode(), "sha256").hexdigest()


def _is_proof(proof: str, *args: str) -> bool:
    return hmac.compare_digest(proof.encode(), _proof(*args).encode())


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _reason(error: OSError | UnicodeError) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition(" (while ")[0]  # create_server adds the address


def _gone(name: str) -> str:
    return (
        f"{name} is gone without a word (killed, out of memory, or its host is down), so all end. "
        "The same command goes on from the last checkpoint."
    )


def _exit(text: str, code: int) -> None:
    """Ends this process at once: the others may be gone, and JAX would wait for them.

    Args:
      code: also one from another process, which may be anything; it ends with 1 unless it is that of an error.
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
