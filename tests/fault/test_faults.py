"""The faults themselves: what the fault tests stand on."""

import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

from faults import Link, faketime, memory_limit
from oracle import MONGO_SECRET
from processes import Process, wait_until


def _python(process, code, **environment):
    process.environment = environment
    process.spawn([sys.executable, "-c", code])
    assert process.wait_exit() == 0, process.log
    return process.stdout.read_text().strip()


def test_limits_of_a_process(tmp_path):
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    with Process("limited", tmp_path) as process:
        process.limits = {resource.RLIMIT_NOFILE: 32}
        assert _python(process, code) == "32"


def test_a_capability_taken_away(tmp_path):
    path = tmp_path / "closed"
    path.write_text("")
    path.chmod(0)
    with Process("limited", tmp_path) as process:
        process.without_capabilities = [1, 2]
        process.spawn(["cat", path])
        assert process.wait_exit() != 0 and "Permission denied" in process.log


def test_a_memory_limit(tmp_path):
    """Where a cgroup may be made, the kernel ends who takes more; elsewhere there is none."""
    with memory_limit(64) as group, Process("limited", tmp_path) as process:
        process.cgroup = group
        process.spawn([sys.executable, "-c", "print(len(b'x' * (200 << 20)))"])
        assert process.wait_exit() == (-9 if group else 0)


def test_a_faked_clock(tmp_path):
    """The wall clock is another, the monotonic one is not."""
    code = "import time; print(int(time.time()), int(time.monotonic()))"
    with Process("late", tmp_path) as process:
        wall, monotonic = _python(process, code, **faketime("-1h")).split()
    assert abs(time.time() - 3600 - int(wall)) < 10 and abs(time.monotonic() - int(monotonic)) < 10
    with Process("1970", tmp_path) as process:
        assert int(_python(process, code, **faketime("@1970-01-01 00:00:10")).split()[0]) < 60


def test_a_failing_fsync(tmp_path, fsync_fault):
    """Only of the files it is meant for, only while it is on, and counted."""
    code = ("import os, sys\nfor name in ('spool.db', 'other'):\n"
            "    file = os.open(name, os.O_RDWR | os.O_CREAT)\n    for call in (os.fsync, os.fdatasync):\n"
            "        try:\n            call(file); print('ok')\n        except OSError as error:\n            print(error.errno)")
    with Process("sync", tmp_path) as process:
        assert _python(process, code, **fsync_fault.environment).split() == ["ok"] * 4
        fsync_fault.on()
        assert fsync_fault.failures() == 0
        assert _python(process, code, **fsync_fault.environment).split()[4:] == ["5", "5", "ok", "ok"]
    assert fsync_fault.failures() == 2


def test_a_slow_link_and_a_cut():
    with socket.create_server(("127.0.0.1", 0)) as server, Link(server.getsockname()[1], latency=0.1) as link:
        with socket.create_connection(("127.0.0.1", link.port)) as client:
            peer, _ = server.accept()
            begun = time.monotonic()
            client.sendall(b"question")
            assert peer.recv(100) == b"question" and time.monotonic() - begun >= 0.1
            link.cut_in_answer(10)
            peer.sendall(b"short")
            assert client.recv(100) == b"short"
            peer.sendall(b"0123456789")
            assert client.recv(100) == b"01234"
            try:
                assert client.recv(100) == b""
            except ConnectionResetError:
                pass
            assert link.cuts == 1 and not link.cutting
            peer.close()


def test_a_file_system_of_its_own(tmpfs):
    path = tmpfs(1)
    done = subprocess.run(["dd", "if=/dev/zero", f"of={path}/file", "bs=1M", "count=2"], capture_output=True, text=True,
                          check=False)
    assert "No space left" in done.stderr and Path(path).is_mount()


def test_a_replica_set_has_another_primary(replica_set):
    server = replica_set(auth=True, password=MONGO_SECRET)
    collection = server.client().test.things
    first = server.step_down()
    second = server.wait_primary(other_than=first)
    collection.insert_one({"n": 1})
    assert server.kill_primary() is second and not second.alive
    assert server.wait_primary() is not second
    second.launch()
    wait_until(lambda: collection.count_documents({}) == 1, 30)
