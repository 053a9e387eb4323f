"""Processes that never outlive their test, and waiting for conditions instead of for time."""

import ctypes
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Sanitizer builds are slower: every wait of the tests is multiplied by this.
TIME_FACTOR = float(os.environ.get("MQTT2MONGO_TIME_FACTOR", "1"))

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24


def _die_with_parent():
    """The kernel ends the process should pytest itself be killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    """A port on 127.0.0.1 that nothing has, as far as one can know."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, timeout=10, what=None, interval=0.02):
    """Return the condition's first true value. Past `timeout` seconds (times TIME_FACTOR) an AssertionError names `what`
    (text, or a function that returns text: said late, it tells the last state)."""
    deadline = time.monotonic() + timeout * TIME_FACTOR
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            said = what() if callable(what) else what or getattr(condition, "__name__", "condition")
            raise AssertionError(f"not within {timeout * TIME_FACTOR:g} s: {said}")
        time.sleep(interval)


def accepts(port):
    """Does anything accept a TCP connection on 127.0.0.1:port?"""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


class Process:
    """One program in a session of its own, its output in files. Started again it appends to them.

    `directory` must exist; `stdout` and `stderr` are paths in it. Use as a context manager, or call end() in a
    fixture's teardown: it kills whatever state the process is in.

    limits   {resource.RLIMIT_NOFILE: 32, …}: what the kernel grants it, from the next start on
    without_capabilities  numbers (capability.h) of what root may not do in it
    cgroup   a directory under /sys/fs/cgroup that it is put into before it runs
    """

    def __init__(self, name, directory, environment=None):
        self.name = name
        self.limits, self.without_capabilities, self.cgroup = {}, [], None
        self.directory = Path(directory)
        self.environment = environment
        self.stdout = self.directory / f"{name}.out"
        self.stderr = self.directory / f"{name}.err"
        self.popen = None

    def spawn(self, argv):
        """Start `argv`; the process before it must have ended."""
        assert not self.alive, f"{self.name} is already running"
        with self.stdout.open("ab") as out, self.stderr.open("ab") as err:
            self.popen = subprocess.Popen(
                [str(argument) for argument in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                cwd=self.directory, env=self.environment, start_new_session=True, preexec_fn=self._before_it_runs)

    def _before_it_runs(self):
        """Between fork and exec."""
        _die_with_parent()
        for limit, value in self.limits.items():
            resource.setrlimit(limit, (value, value))
        for capability in self.without_capabilities:
            _libc.prctl(_PR_CAPBSET_DROP, capability)  # fails for who has none of them anyway
        if self.cgroup:
            (Path(self.cgroup) / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def pid(self):
        return self.popen.pid

    @property
    def alive(self):
        return self.popen is not None and self.popen.poll() is None

    @property
    def log(self):
        """All it wrote to standard error, in all its lives."""
        return self.stderr.read_text(errors="replace") if self.stderr.exists() else ""

    def signal(self, number):
        self.popen.send_signal(number)

    def sigstop(self):
        """Freeze it: its sockets stay open and say nothing. Returns once it is really stopped."""
        self.signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", what=f"{self.name} stopped")

    def sigcont(self):
        self.signal(signal.SIGCONT)

    def kill9(self):
        """SIGKILL, and wait until the kernel has taken it down. Returns at once when it has ended already."""
        if self.alive:
            self.signal(signal.SIGKILL)
            self.popen.wait()

    def wait_exit(self, timeout=10):
        """Wait for it to end by itself; its exit status (negative: the signal that ended it)."""
        wait_until(lambda: not self.alive, timeout, lambda: f"{self.name} ended\n{self.tail()}")
        return self.popen.returncode

    def terminate(self, timeout=10):
        """SIGTERM and wait; its exit status."""
        if self.alive:
            self.signal(signal.SIGTERM)
        return self.wait_exit(timeout)

    def end(self):
        """Teardown: nothing is left running, whatever happened."""
        if self.popen is not None:
            try:
                os.killpg(self.popen.pid, signal.SIGKILL)  # the group: also what it may have started
            except ProcessLookupError:
                pass
            self.popen.wait()

    def tail(self, lines=30):
        return "\n".join(self.log.splitlines()[-lines:])

    def wait_log(self, pattern, timeout=10, after=0):
        """Wait until standard error matches the regular expression from offset `after` (see mark()) on; the match."""
        expression = re.compile(pattern)
        return wait_until(lambda: expression.search(self.log, after), timeout,
                          lambda: f"{self.name} logged {pattern!r}; its last lines:\n{self.tail()}", interval=0.05)

    def mark(self):
        """The log's length now, for wait_log(after=...)."""
        return len(self.log)

    def memory(self):
        """Peak and present resident memory in bytes: (VmHWM, VmRSS) of a running process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return tuple(int(re.search(rf"^{name}:\s+(\d+) kB", status, re.M)[1]) * 1024 for name in ("VmHWM", "VmRSS"))

    def catches(self, number):
        """Has it a handler for this signal by now?"""
        caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{self.pid}/status").read_text(), re.M)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
