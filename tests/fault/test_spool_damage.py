"""The spool's file is damaged while the service is not running.

Fault: cut off at 10 random places (long: 50), bits flipped in as many, blocks of zeros; a file that is something else, an empty one,
one without permission. Half of the messages are in the file, half in its write-ahead log.
Proof: the files differ from what the service had left, and at which pages is reckoned here, from the outside.
Held: the service starts each time, says what is wrong, and sets the file aside when it cannot be used as it is. Every
message whose bytes are in a page that is as it was arrives, once and byte for byte; none arrives that was not sent; new
messages go on. Figure: messages, damaged files, those in undamaged pages and lost (0), those in damaged pages and not recovered.
"""

import random
import shutil
import sqlite3

import pytest

import clients
from oracle import AS_TESTER, FRESH, Kept, scaled
from processes import wait_until
from stream import payload_of, seeded

COUNT = 3000
PAGE, WAL_HEADER, FRAME_HEADER, LEAF = 4096, 32, 24, 13  # sqlite.org/fileformat2.html
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


class Files:
    """The spool's files, and how the service had left them."""

    def __init__(self, directory):
        self.directory = directory
        self.original = {path.name: path.read_bytes() for path in directory.iterdir() if path.name in ("spool.db", "spool.db-wal")}

    def put_back(self):
        shutil.rmtree(self.directory)
        self.directory.mkdir()
        for name, data in self.original.items():
            (self.directory / name).write_bytes(data)

    def undamaged(self):
        """The numbers of those messages that lie in a page, or a frame of the log, that is as it was: a leaf, for what other
        pages have of a message is left over. The log's last transaction does not count when its end is gone: that is what
        one looks like that was never committed."""
        whole = []
        for name, original in self.original.items():
            path = self.directory / name
            now = path.read_bytes() if path.is_file() else b""
            first, header = (WAL_HEADER, FRAME_HEADER) if name.endswith("-wal") else (0, 0)
            units = [original[at:at + header + PAGE] for at in range(first, len(original), header + PAGE)
                     if now[at:at + header + PAGE] == original[at:at + header + PAGE]]
            while header and units and units[-1][4:8] == bytes(4):  # no end of a transaction
                units.pop()
            whole += [unit for unit in units if unit[header] == LEAF]
        pages = b"\0".join(whole)
        return {number for number in range(COUNT) if payload_of(number) in pages}

    def place(self, moments):
        """A random place: the path of one of the files, and an offset."""
        name = moments.choices(list(self.original), [len(data) for data in self.original.values()])[0]
        return self.directory / name, moments.randrange(len(self.original[name]))

    # ---- what happens to them

    def cut_off(self, moments):
        path, offset = self.place(moments)
        path.write_bytes(self.original[path.name][:offset])

    def flip_bits(self, moments):
        path, _ = self.place(moments)  # in one file: of what is in both, one copy is left
        data = bytearray(path.read_bytes())
        for _ in range(moments.choice([1, 3, 30])):
            data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(data)

    def zeros(self, moments):
        path, offset = self.place(moments)
        data = bytearray(path.read_bytes())
        data[offset:offset + 5000] = bytes(len(data[offset:offset + 5000]))
        path.write_bytes(data)

    def foreign(self, moments):
        (self.directory / "spool.db").write_bytes(moments.randbytes(50_000))

    def text(self, _moments):
        (self.directory / "spool.db").write_text("not a spool\n" * 1000)
        (self.directory / "spool.db-wal").unlink(missing_ok=True)

    def another_database(self, _moments):
        for path in self.directory.iterdir():
            path.unlink()
        with sqlite3.connect(self.directory / "spool.db") as database:
            database.execute("CREATE TABLE message (id, text)")
        database.close()

    def empty(self, _moments):
        (self.directory / "spool.db").write_bytes(b"")

    def empty_and_no_log(self, _moments):
        (self.directory / "spool.db").write_bytes(b"")
        (self.directory / "spool.db-wal").unlink()


@pytest.fixture
def spooled(scene, tmp_path):
    """A scene with COUNT messages in the spool, the service killed, MongoDB there; and the spool's files."""
    directory = tmp_path / "spool"
    directory.mkdir()
    it = scene(**{"spool.path": directory / "spool.db"})
    it.server.kill9()
    it.publish(COUNT // 2)
    it.wait_spooled(COUNT // 2)
    it.running.stop(timeout=20)  # copies the log into the file
    it.start()
    it.publish(COUNT // 2)
    it.wait_spooled(COUNT)
    it.running.kill9()
    it.server.restart()
    files = Files(directory)
    assert len(files.original) == 2 and files.undamaged() == it.published == set(range(COUNT))
    return it, files


def start_and_look(it, files):
    """Start on the damaged files; what arrived of what was undamaged, all that arrived, and what the service said."""
    expected, mark = files.undamaged(), it.running.mark()
    it.start()
    it.wait_drained()
    kept, said = Kept(it), it.running.log[mark:]
    assert not expected - kept.copies.keys(), f"{len(expected - kept.copies.keys())} of {len(expected)} undamaged are lost\n{said}"
    assert kept.twice == 0 and kept.copies.keys() <= it.published
    before = it.database.messages.count_documents({"topic": FRESH})
    clients.publish(it.broker.port, ['"fresh"'], FRESH, **AS_TESTER)
    wait_until(lambda: it.database.messages.count_documents({"topic": FRESH}) > before, 20, it.state)
    return expected, kept, said


@pytest.mark.timeout(scaled(240, 1200))
def test_a_damaged_spool(spooled):
    it, files = spooled
    moments, times = seeded(), scaled(10, 50)
    damages = [Files.cut_off] * times + [Files.flip_bits] * times + [Files.zeros] * (times // 2) + [
        Files.foreign, Files.text, Files.another_database, Files.empty, Files.empty_and_no_log]
    undamaged = set_aside = recovered = gone = 0
    for number, damage in enumerate(damages):
        files.put_back()
        damage(files, random.Random(moments.random()))
        assert any((files.directory / name).read_bytes() != data for name, data in files.original.items()
                   if (files.directory / name).exists()) or len(list(files.directory.iterdir())) < 2
        expected, kept, said = start_and_look(it, files)
        aside = any(".corrupt-" in path.name for path in files.directory.iterdir())
        missing = COUNT - len(kept.copies)
        what = f"{number}: {damage.__name__}, {missing} missing\n{said}"
        assert not aside or '"level":"error"' in said, what
        # A log that ends early, and nothing at all, look like what a crash or a first start leaves.
        unseen = (Files.cut_off, Files.zeros, Files.empty_and_no_log)
        assert not missing or "damaged" in said or "checksum" in said or damage in unseen, what
        undamaged, set_aside, gone = undamaged + len(expected), set_aside + aside, gone + missing
        recovered += len(kept.copies) - len(expected)
        it.running.kill9()
        if number < len(damages) - 1:
            it.database.client.drop_database("mqtt2mongo")
    files.put_back()
    it.start()
    it.conclude("spool_damage", faults=len(damages), set_aside=set_aside, in_undamaged_pages=undamaged,
                in_damaged_pages_and_recovered=recovered, in_damaged_pages_and_gone=gone)


@pytest.mark.timeout(scaled(120, 120))
def test_a_spool_without_permission(spooled):
    it, files = spooled
    it.running.without_capabilities = [CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH]  # else nothing keeps root out
    path = files.directory / "spool.db"
    path.chmod(0)
    it.server.sigstop()
    mark = it.running.mark()
    it.start()
    it.running.wait_log("spool.*([Pp]ermission|cannot|unable)", after=mark)
    it.publish(500)
    assert it.running.sums()["consumer"]["spooled"] == 0, "into a file that it may not write?"
    it.running.kill9()
    mark = it.running.mark()
    it.running.start()
    it.running.wait_log("spool.*([Pp]ermission|cannot|unable)", after=mark)
    path.chmod(0o600)
    it.wait_spooled(COUNT + 500)  # by itself
    it.server.sigcont()
    _, kept = it.conclude("spool_damage, permission", faults=1)
    assert kept.twice == 0
