"""Faults that are made, each with the proof that it happened.

    Fsync        fsync and fdatasync of the spool fail with EIO while it is on
    NoMemory     one function of a library finds no memory while it is on
    Link         a TCP link that is slow, loses packets, or breaks in the middle of an answer
    faketime()   environment in which the wall clock is another, and the monotonic clock is not
    Clock        the same, and it can be set while the process runs
    memory_limit()  a cgroup with a memory limit
"""

import contextlib
import os
import queue
import random
import socket
import struct
import threading
import time
from pathlib import Path

from processes import wait_until
from service import BUILD


class Fsync:
    """`environment` is for the service; on() and off(); failures(): how many calls have failed."""

    def __init__(self, directory, match="spool"):
        self._control, self._log = Path(directory) / "fsync-fails", Path(directory) / "fsync-failures"
        library = Path(BUILD) / "tests" / "fault" / "fault_fsync.so"
        assert library.exists(), f"no {library}: it is built with the program"
        self.environment = {"LD_PRELOAD": str(library), "FAULT_FSYNC_CONTROL": str(self._control), "FAULT_FSYNC_MATCH": match,
                            "FAULT_FSYNC_LOG": str(self._log)}

    def on(self):
        self._control.touch()

    def off(self):
        self._control.unlink()

    def failures(self):
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


class NoMemory:
    """As Fsync; on() names the function, one of nomem.c."""

    def __init__(self, directory):
        self._control, self._log = Path(directory) / "no-memory", Path(directory) / "no-memory-failures"
        library = Path(BUILD) / "tests" / "fault" / "fault_nomem.so"
        assert library.exists(), f"no {library}: it is built with the program"
        self.environment = {"LD_PRELOAD": str(library), "FAULT_NOMEM_CONTROL": str(self._control),
                            "FAULT_NOMEM_LOG": str(self._log)}

    def on(self, function):
        self._control.write_text(function)

    def off(self):
        self._control.unlink()

    def failures(self):
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


def faketime(shift):
    """`shift` as faketime has it: "-1h", "@1970-01-01 00:00:00". Only the wall clock moves."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    assert libraries, "no libfaketime: scripts/setup.sh installs it"
    return {"LD_PRELOAD": str(libraries[0]), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "TZ": "UTC"}


class Clock:
    """The wall clock of a process: `environment` is for it. set() as faketime() has it; it takes up to a second to be seen."""

    def __init__(self, directory):
        self._file = Path(directory) / "clock"
        self.set("+0")
        self.environment = {**faketime(""), "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_CACHE_DURATION": "1"}
        del self.environment["FAKETIME"]  # it would beat the file

    def set(self, shift):
        new = self._file.with_suffix(".new")
        new.write_text(f"{shift}\n")
        new.replace(self._file)


@contextlib.contextmanager
def memory_limit(mebibytes):
    """A cgroup of that limit, for Process.cgroup; None where none may be made: look at Process.memory() instead."""
    for root, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root) / f"mqtt2mongo-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            with (group / limit).open("r+") as file:  # not made here: else this is no cgroup
                file.write(str(mebibytes << 20))
        except OSError:
            group.rmdir()
            continue
        yield group
        wait_until(lambda: not (group / "cgroup.procs").read_text(), what="the cgroup is empty")
        group.rmdir()
        return
    yield None


class Link:
    """A port in front of a real server's. A packet that is lost comes a retransmission later, and so does all behind it: that
    is all that TCP shows of it.

    latency   seconds each way
    loss      how many of all packets are lost, 0 to 1
    pieces, late, cuts   how many pieces passed, how many of them late by a loss, how many connections were cut
    """

    RETRANSMISSION = 0.25
    PACKET = 1448

    def __init__(self, target, *, latency=0.0, loss=0.0):
        self.target, self.latency, self.loss = target, latency, loss
        self.pieces = self.late = self.cuts = 0
        self._cut_at, self._random = 0, random.Random(1)
        self._ends = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_in_answer(self, least):
        """Of the server's next answer of so many bytes or more, half comes through; then the connection is reset."""
        self._cut_at = least

    @property
    def cutting(self):
        return self._cut_at > 0

    def _accept(self):
        with contextlib.suppress(OSError):  # end() closes the listener
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self.target))
                    self._ends += [client, server]
                    for end in (client, server):  # which may be gone again by now
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except OSError:
                    client.close()
                    continue
                for source, sink in ((client, server), (server, client)):
                    passing = queue.SimpleQueue()
                    threading.Thread(target=self._read, args=[source, passing], daemon=True).start()
                    threading.Thread(target=self._write, args=[source, sink, passing, sink is client], daemon=True).start()

    def _read(self, source, passing):
        data = True
        while data:
            try:
                data = source.recv(self.PACKET * 8)
            except OSError:
                data = b""
            late = any(self._random.random() < self.loss for _ in range(0, len(data), self.PACKET))
            self.pieces += 1
            self.late += late
            passing.put((time.monotonic() + self.latency + (self.RETRANSMISSION if late else 0), data))

    def _write(self, source, sink, passing, answers):
        with contextlib.suppress(OSError):
            while True:
                due, data = passing.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                if answers and 0 < self._cut_at <= len(data):
                    self._cut_at = 0
                    self.cuts += 1
                    sink.sendall(data[:len(data) // 2])
                    time.sleep(0.02)  # a reset at once would take them back
                    for end in (source, sink):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def end(self):
        for each in [self._listener, *self._ends]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
