"""Several processes as one program: they find each other, wait for the first one, and end together.

JAX finds out how a job was launched (Slurm, Open MPI, TPU pods, Kubernetes) and joins the devices. What it lacks
is a word for the person at the log: who waits for whom, and who failed first. For this each process holds a
connection to process 0, its lifeline: a process that dies closes it, and at once all others know.
"""

import contextlib
import importlib.util
import json
import os
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from gpt.errors import UsageError, UserError

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, a free port. Not needed where the launcher is known: launch/README.md.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_TIMEOUT = flags.DEFINE_float(
    "cluster_timeout", 300, "Seconds to wait for the other processes to start.", lower_bound=1
)

NOTICE_AFTER = 10  # seconds of waiting until a line says for what


def start() -> None:
    """Joins the other processes of this job, if there are any, before JAX is used.

    Raises:
      UsageError: the flags contradict each other.
      UserError: a process did not come within --cluster_timeout.
    """
    global _lifeline
    _leave_an_absent_tpu_alone()
    given = {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UsageError(f"--{' and --'.join(set(given) - set(missing))} needs --{' and --'.join(missing)}.")
    address, count, index, devices = given["coordinator"], given["num_processes"], given["process_id"], None
    if missing:
        # The public jax.distributed.initialize finds out the same, but ends the process when a peer is missing.
        from jax._src.clusters import ClusterEnv

        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(_TIMEOUT.value))
        except RuntimeError as error:
            raise UserError(f"Cannot tell the processes of this job: {error} Or set --coordinator and so on.") from None
        address, count, index, devices = found
    elif index >= count:
        raise UsageError(f"--process_id={index} has to be less than --num_processes={count}.")
    elif not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise UsageError(f"--coordinator={address} has to be of the form HOST:PORT.")
    if not address or count == 1:
        return
    import jax

    _lifeline = (_Hub if index == 0 else _Spoke)(address, count, index, _TIMEOUT.value)
    # The port that was agreed on is the lifeline's, so JAX's service gets another one.
    service = share("service", lambda: f"{address.rpartition(':')[0]}:{_free_port()}")
    jax.config.update("jax_enable_preemption_service", False)  # the loop has its own way to agree on where to stop
    jax.distributed.initialize(
        service,
        count,
        index,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(_TIMEOUT.value),
        shutdown_timeout_seconds=60,
    )


def _leave_an_absent_tpu_alone() -> None:
    """Where libtpu is installed for `gpt.plan` alone, JAX looks for a TPU in vain, loudly, and its profiler crashes."""
    if "JAX_PLATFORMS" in os.environ or not importlib.util.find_spec("libtpu"):
        return
    import jax
    from jax._src import hardware_utils  # as JAX does itself, to tell whether a TPU should be there

    if hardware_utils.num_available_tpu_chips_and_device_id()[0] == 0:
        has_gpu = hardware_utils.has_visible_nvidia_gpu() and importlib.util.find_spec("jax_cuda13_plugin")
        jax.config.update("jax_platforms", "cuda,cpu" if has_gpu else "cpu")


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return _lifeline is None or _lifeline.index == 0


def is_several() -> bool:
    """Whether this process is one of several."""
    return _lifeline is not None


def share(key: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gives on process 0, the only one to call it; the others wait.

    Args:
      key: names it; used once.
      compute: returns what JSON can hold, which is the form that it arrives in.
    """
    return _lifeline.share(key, compute) if _lifeline else compute()


def first_before_others(key: str, function: Callable[[], Any]) -> Any:
    """`function()` on every process, on process 0 before the others: they find done what it left in a cache."""
    if is_first():
        result = function()
        share(key, lambda: None)
        return result
    share(key, lambda: None)
    return function()


def failed(text: str, code: int, own_fault: bool) -> int:
    """Ends all processes because of an error in this one; returns `code` where there is only one.

    Args:
      text: for the user; process 0 shows it too.
      own_fault: False if a process that has gone may be what caused the error; its word comes first then.
    """
    if _lifeline is None:
        if text:
            print(text, file=sys.stderr)
        return code
    return _lifeline.failed(text, code, own_fault)


def finish() -> None:
    """Says that this process is done, so that it may close its lifeline."""
    if _lifeline:
        _lifeline.finish()


class _Lifeline:
    """What both ends of the connections have in common: lines of JSON, and a thread that reads them."""

    def __init__(self, address: str, count: int, index: int, timeout: float):
        self.address, self.count, self.index, self.timeout = address, count, index, timeout
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

    def _read(self) -> None:
        raise NotImplementedError

    def _start_reading(self) -> None:
        threading.Thread(target=self._read, name="lifeline", daemon=True).start()


class _Hub(_Lifeline):
    """Process 0, with a connection from each of the others."""

    def __init__(self, address: str, count: int, index: int, timeout: float):
        super().__init__(address, count, index, timeout)
        # A connection is an open file, and the usual limit to these is 1,024.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        port = int(address.rpartition(":")[2])
        try:
            self._server = socket.create_server(("", port), backlog=count)
        except OSError as error:
            raise UserError(f"{self.name} cannot listen at port {port} of {address}: {error.strerror}.") from None
        self._spokes: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._done: set[int] = set()
        self._shared: list[dict] = []
        self._start_reading()
        with self._changed:
            while len(self._names) < count - 1:
                missing = ", ".join(str(i) for i in range(1, count) if i not in self._names)
                if self._waited_too_long(f"waiting at {address} for process {missing} of {count} …"):
                    text = (
                        f"{self.name} waited {timeout:.0f} s at {address} for process {missing} of {count} to connect."
                    )
                    self._send_all({"end": 1, "text": text})
                    raise UserError(text)
                self._changed.wait(1)

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        message = {"key": key, "value": compute()}
        with self._changed:
            self._shared.append(message)
            self._send_all(message)
        return json.loads(json.dumps(message["value"]))

    def failed(self, text: str, code: int, own_fault: bool) -> int:
        if not own_fault:
            time.sleep(5)
        with self._changed:
            self._end(text, code)
        return code

    def finish(self) -> None:
        with self._changed:
            self._done.add(0)
            self._send_all({"done": True})

    def _send_all(self, message: dict) -> None:
        for spoke in list(self._spokes.values()):
            _send(spoke, message)

    def _end(self, text: str, code: int) -> None:
        """Ends all processes, with the reason on this one's log."""
        self._send_all({"end": code, "text": text})
        _exit(text, code)

    def _read(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._server, selectors.EVENT_READ)
        lines: dict[socket.socket, _Lines] = {}
        while True:
            for ready, _ in selector.select():
                connection = ready.fileobj
                if connection is self._server:
                    connection, _ = self._server.accept()
                    _keep_alive(connection)
                    lines[connection] = _Lines(connection)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                messages = lines[connection].read()
                for message in messages or ():
                    self._take(connection, message)
                if messages is None:
                    selector.unregister(connection)
                    connection.close()
                    self._gone(connection)

    def _take(self, connection: socket.socket, message: dict) -> None:
        with self._changed:
            sender = next((i for i, spoke in self._spokes.items() if spoke is connection), None)
            if sender is None:
                self._welcome(connection, message)
            elif "done" in message:
                self._done.add(sender)
            elif "error" in message:
                self._end(message["error"], message["code"])

    def _welcome(self, connection: socket.socket, message: dict) -> None:
        index = message.get("process")
        if not isinstance(index, int) or "name" not in message:  # some stranger
            return
        refusal = ""
        if message["count"] != self.count:
            refusal = f"{message['name']} was told of {message['count']} processes, {self.name} of {self.count}."
        elif index in self._spokes or not 0 < index < self.count:
            refusal = f"{message['name']} has the number of {self._names.get(index, self.name)}."
        if refusal:
            _send(connection, {"end": 1, "text": refusal})
            return
        self._spokes[index], self._names[index] = connection, message["name"]
        for shared in self._shared:
            _send(connection, shared)
        self._changed.notify_all()

    def _gone(self, connection: socket.socket) -> None:
        with self._changed:
            for index, spoke in list(self._spokes.items()):
                if spoke is connection:
                    del self._spokes[index]
                    if index not in self._done and 0 not in self._done:
                        self._end(f"error: {_gone(self._names[index])}", 1)


class _Spoke(_Lifeline):
    """Any other process, with its connection to process 0."""

    def __init__(self, address: str, count: int, index: int, timeout: float):
        super().__init__(address, count, index, timeout)
        host, _, port = address.rpartition(":")
        while True:
            try:
                self._hub = socket.create_connection((host.strip("[]"), int(port)), timeout=5)
                break
            except OSError as error:
                reason = error.strerror or str(error)
                if self._waited_too_long(f"{self.name} waits for process 0 at {address} ({reason}) …"):
                    raise UserError(
                        f"{self.name} waited {timeout:.0f} s for process 0 at {address}: {reason}."
                    ) from None
                time.sleep(0.5)
        self._hub.settimeout(None)
        _keep_alive(self._hub)
        self._values: dict[str, Any] = {}
        self._done = False
        _send(self._hub, {"process": index, "name": self.name, "count": count})
        self._start_reading()

    def share(self, key: str, compute: Callable[[], Any]) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values.pop(key)

    def failed(self, text: str, code: int, own_fault: bool) -> int:
        # Where all processes make the same mistake, process 0 is the one to say it; `_read` ends this one then.
        time.sleep(1 if own_fault else 5)
        text = f"{self.name}: {text}"
        print(text, file=sys.stderr, flush=True)  # first, for `_read` ends this process as soon as process 0 knows
        _send(self._hub, {"error": text, "code": code})
        _exit("", code)
        return code

    def finish(self) -> None:
        _send(self._hub, {"done": True})
        self._done = True

    def _read(self) -> None:
        lines = _Lines(self._hub)
        while (messages := lines.read()) is not None:
            for message in messages:
                if "key" in message:
                    with self._changed:
                        self._values[message["key"]] = message["value"]
                        self._changed.notify_all()
                elif "end" in message:
                    _exit("", message["end"])
                elif "done" in message:
                    self._done = True
        if not self._done:
            _exit(f"error: {self.name}: {_gone(f'process 0 at {self.address}')}", 1)


_lifeline: _Hub | _Spoke | None = None


class _Lines:
    """Messages, of a line each, as they come."""

    def __init__(self, connection: socket.socket):
        self._connection, self._rest = connection, b""

    def read(self) -> list[dict] | None:
        """Waits for some; None if the other end is gone or does not speak this language."""
        try:
            data = self._connection.recv(65536)
            *complete, self._rest = (self._rest + data).split(b"\n")
            messages = [json.loads(line) for line in complete]
        except (OSError, ValueError):
            return None
        return messages if data and all(isinstance(message, dict) for message in messages) else None


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # the thread that reads learns of it too
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """A host that loses its power closes nothing: after 40 s without an answer it counts as gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _gone(name: str) -> str:
    return (
        f"{name} is gone without a word (killed, out of memory, or its host is down), so all end. "
        "The same command goes on from the last checkpoint."
    )


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _exit(text: str, code: int) -> None:
    """Ends this process at once: the others may be gone, and JAX would wait for them."""
    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
