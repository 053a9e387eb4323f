"""Fixtures of the fault tests, beside those of all tests (../conftest.py).

    scene(...)     starts a broker, a mongod and the service: a Scene (oracle.py)
    tmpfs(size)    a file system of its own of so many MiB, full sooner than a disk; root's only
    fsync_fault    a Fsync (faults.py): fsync fails while it is on
    no_memory      a NoMemory (faults.py)
"""

import contextlib
import os
import subprocess

import pytest

from faults import Fsync, NoMemory
from oracle import MONGO_SECRET, SERVICE, TESTER, Scene


@pytest.fixture
def scene(service, mosquitto, fresh_mongod):
    """default_queue: a broker without any setting, whose queues end after 1,000 messages; else the recommended one.
    broker: further arguments of Mosquitto; server: another one than a Mongod; the rest as for Scene."""
    def make(*, default_queue=False, broker=None, server=None, **options):
        options_of_broker = {"users": dict([SERVICE, TESTER]), "extra": ["sys_interval 1"]} | (broker or {})
        if default_queue:
            options_of_broker |= {"base": "\n"}
        server = server or fresh_mongod(auth=True, password=MONGO_SECRET)
        return stack.enter_context(Scene(service, mosquitto(**options_of_broker), server, **options))

    with contextlib.ExitStack() as stack:
        yield make


@pytest.fixture
def tmpfs(tmp_path):
    mounted = []

    def mount(mebibytes):
        path = tmp_path / f"tmpfs-{len(mounted) + 1}"
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "tmpfs", path], capture_output=True, text=True,
                              check=False) if os.geteuid() == 0 else None
        if done is None or done.returncode != 0:
            pytest.skip("mounting needs root" if done is None else f"cannot mount: {done.stderr}")
        mounted.append(path)
        return path

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def fsync_fault(tmp_path):
    return Fsync(tmp_path)


@pytest.fixture
def no_memory(tmp_path):
    return NoMemory(tmp_path)
