"""Peers that do what no real server does, all on 127.0.0.0/8, and a proxy that writes down who said what, and when.

    Peer(behave)   accepts TCP connections and treats each as `behave` says (stay_silent, hang_up, reset, …)
    BlackHole()    a port on which connecting neither succeeds nor fails
    Resolver()     a name server that does not answer, or says 127.0.0.1 to everything
    Altering()     a proxy to mongod that changes its replies
    Recorder()     proxies to real servers; early_acknowledgements() tells which messages were acknowledged too early
"""

import collections
import contextlib
import copy
import heapq
import itertools
import json
import random
import selectors
import socket
import struct
import threading
import time
from typing import NamedTuple

import bson

from processes import wait_until


class _Thread:
    """A thread that lives as long as its with-block. run() must look at self.ending, or end by what stop() does."""

    def __init__(self):
        self.ending = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        self.ending.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


# ---- peers that misbehave


def _listen(port, backlog=64):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(backlog)
    return listener


class Peer(_Thread):
    """Accepts connections on `port` until stopped; each is handed to behave(connection, ending) in a thread of its own.

    accepted   when each connection came (monotonic seconds)
    received   what each sent, as far as `behave` has read it by receive()
    """

    def __init__(self, behave, port=0):
        super().__init__()
        self.behave = behave
        self.accepted, self.connections = [], []
        self._listener = _listen(port)
        self.port = self._listener.getsockname()[1]

    def run(self):
        with contextlib.suppress(OSError):  # stop() closes the listener
            while True:
                connection, _ = self._listener.accept()
                self.accepted.append(time.monotonic())
                self.connections.append(connection)
                threading.Thread(target=self._treat, args=[connection], daemon=True).start()

    def _treat(self, connection):
        with contextlib.suppress(OSError), connection:  # the service may hang up at any moment
            self.behave(connection, self.ending)

    def stop(self):
        """Close everything: afterwards the port is free."""
        for end in [self._listener, *self.connections]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        super().stop()


def stay_silent(connection, ending):
    """Read, never answer; until the other side hangs up."""
    while connection.recv(4096):
        pass
    ending.wait(0)


def hang_up(connection, _ending):
    """Close at once, without a word."""
    connection.shutdown(socket.SHUT_RDWR)


def reset(connection, _ending):
    """Read the first bytes, then send a reset."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer(*pieces, every=0.0, close=False):
    """Read the first bytes, send the pieces, `every` seconds one; then hang up, or read on in silence."""
    def behave(connection, ending):
        if not connection.recv(4096):
            return
        for piece in pieces:
            connection.sendall(piece)
            if every and ending.wait(every):
                return
        if not close:
            stay_silent(connection, ending)

    return behave


def one_byte_each(data):
    return [data[index:index + 1] for index in range(len(data))]


class Altering(Peer):
    """In front of mongod at 127.0.0.1:target: alter(command, reply) gets what was asked and what mongod answered, as dictionaries, and
    returns what the service is to get instead, or the reply itself. What it changes is what other servers that speak MongoDB's
    protocol would answer.

    altered   how many replies were changed
    """

    def __init__(self, target, alter):
        super().__init__(self._serve)
        self.target, self.alter, self.altered = target, alter, 0

    @property
    def uri(self):
        return f"mongodb://127.0.0.1:{self.port}/?directConnection=true"

    def _serve(self, connection, _ending):
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            asked = {}
            threading.Thread(target=self._ask, args=[connection, server, asked], daemon=True).start()
            while message := _mongodb_message(server):
                connection.sendall(self._altered(message, asked))

    @staticmethod
    def _ask(connection, server, asked):
        with contextlib.suppress(OSError):
            while message := _mongodb_message(connection):
                length, request, _, code = struct.unpack_from("<iiii", message)
                if code == 2013:
                    body, documents = _sections(message)
                    asked[request] = body | {"documents": documents}
                server.sendall(message)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _altered(self, message, asked):
        _, request, reply_to, code = struct.unpack_from("<iiii", message)
        command = asked.pop(reply_to, None) if code == 2013 else None
        if command is None:
            return message
        reply, _ = _sections(message)
        other = self.alter(command, copy.deepcopy(reply))
        if other == reply:
            return message
        self.altered += 1
        body = struct.pack("<I", 0) + b"\0" + bson.encode(other)
        return struct.pack("<iiii", 16 + len(body), request, reply_to, code) + body


def _mongodb_message(connection):
    """The next whole message of MongoDB's protocol, or b"" at the end."""
    message = bytearray()
    while len(message) < 4 or len(message) < struct.unpack_from("<i", message)[0]:
        wanted = 4 - len(message) if len(message) < 4 else struct.unpack_from("<i", message)[0] - len(message)
        data = connection.recv(wanted)
        if not data:
            return b""
        message += data
    return bytes(message)


class BlackHole:
    """A listener whose queue is full: the kernel drops what comes, and a connect waits."""

    def __init__(self):
        self._listener = _listen(0, 0)
        self.port = self._listener.getsockname()[1]
        self._fillers = []

    def start(self):
        for _ in range(16):
            filler = socket.socket()
            filler.settimeout(0.3)
            self._fillers.append(filler)
            try:
                filler.connect(("127.0.0.1", self.port))
            except TimeoutError:
                return self
        raise AssertionError("the listener's queue does not fill")

    def stop(self):
        for end in [self._listener, *self._fillers]:
            end.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


class Resolver(_Thread):
    """A name server on port 53 (so: root's) of an address of its own; silent until `answers` is set to True."""

    def __init__(self):
        super().__init__()
        self.address = ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])
        self.answers = False
        self.queries = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((self.address, 53))
        self._socket.settimeout(0.1)

    def run(self):
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                query, sender = self._socket.recvfrom(4096)
                self.queries += 1
                if self.answers:
                    self._socket.sendto(self._reply(query), sender)
        self._socket.close()

    @staticmethod
    def _reply(query):
        end = query.index(b"\0", 12) + 5  # name, type, class (RFC 1035 §4.1.2)
        address = query[end - 4:end - 2] == b"\0\x01"
        header = query[:2] + b"\x81\x80" + struct.pack(">HHHH", 1, address, 0, 0)
        record = b"\xc0\x0c\0\x01\0\x01" + struct.pack(">IH4s", 1, 4, bytes([127, 0, 0, 1])) if address else b""
        return header + query[12:end] + record


# ---- the recorder


class Event(NamedTuple):
    """Bytes that passed. From the service: when they arrived here; from the server: when they were passed on to the service.
    So an answer that the service can have seen always stands before what the service sent after it."""

    time: float       # monotonic
    link: str         # the proxy's name
    connection: int   # counted from 1 for each proxy
    side: str         # who sent it: "service" or "server"
    data: bytes       # empty: it closed, or reset, its side


class _Flow:
    """One direction of one connection."""

    def __init__(self, source, sink, side, number):
        self.source, self.sink, self.side, self.number = source, sink, side, number
        self.waiting = []          # (due, order, bytes): not yet passed on
        self.unsent = bytearray()  # passed on, but the socket is full
        self.ended = self.closed = self.gathered = False


class Proxy:
    """One listening port in front of a real server. Made by Recorder.add()."""

    def __init__(self, recorder, name, target, port, delay, gather):
        self.recorder, self.name, self.target, self.delay, self.gather = recorder, name, target, delay, gather
        self.listener = _listen(port)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.frozen = False
        self.flows = []
        self.numbers = itertools.count(1)

    def freeze(self):
        """Nothing passes any more; connections stay open, and new ones are taken."""
        self.recorder.call(lambda: setattr(self, "frozen", True))

    def thaw(self):
        self.recorder.call(lambda: setattr(self, "frozen", False))

    def cut(self):
        """Reset all connections there are."""
        def cut():
            for flow in self.flows:
                for end in (flow.source, flow.sink):
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.recorder.forget(end)
            self.flows.clear()

        self.recorder.call(cut)


class Recorder(_Thread):
    """One thread that passes bytes for all its proxies, so that `events` is in the one order in which things happened."""

    def __init__(self):
        super().__init__()
        self.events, self.proxies = [], []
        self._selector = selectors.DefaultSelector()
        self._orders = itertools.count()
        self._calls = collections.deque()

    def add(self, name, target, *, port=0, delay=0.0, gather=None):
        """A proxy to 127.0.0.1:target; before start() only.

        delay   seconds by which what the server sends is held back
        gather  the first bytes of the server on each connection are held back until there are so many, or for a second, and
                then passed on in one piece
        """
        proxy = Proxy(self, name, target, port, delay, gather)
        self.proxies.append(proxy)
        self._selector.register(proxy.listener, selectors.EVENT_READ, proxy)
        return proxy

    def call(self, function):
        """Run a function in the recorder's thread."""
        done = threading.Event()
        self._calls.append((function, done))
        assert done.wait(10), "the recorder does not run"

    def stop(self):
        super().stop()
        for proxy in self.proxies:
            proxy.listener.close()
            for flow in proxy.flows:
                flow.source.close()
        self._selector.close()

    def run(self):
        while not self.ending.is_set():
            busy = any(flow.waiting for proxy in self.proxies for flow in proxy.flows)
            for key, mask in self._selector.select(0.001 if busy else 0.02):
                if isinstance(key.data, Proxy):
                    self._accept(key.data)
                elif mask & selectors.EVENT_READ:
                    self._read(*key.data)
            while self._calls:
                function, done = self._calls.popleft()
                function()
                done.set()
            for proxy in self.proxies:
                for flow in list(proxy.flows):
                    self._pass_on(proxy, flow)

    def forget(self, end):
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(end)
        end.close()

    def _accept(self, proxy):
        service, _ = proxy.listener.accept()
        server = socket.socket()
        try:
            server.connect(("127.0.0.1", proxy.target))
        except OSError:
            service.close()
            return
        number = next(proxy.numbers)
        for end, other, side in ((service, server, "service"), (server, service, "server")):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            flow = _Flow(end, other, side, number)
            proxy.flows.append(flow)
            self._selector.register(end, selectors.EVENT_READ, (proxy, flow))

    def _read(self, proxy, flow):
        if proxy.frozen or flow.ended:
            if flow.ended:
                self._selector.unregister(flow.source)
            else:
                time.sleep(0.001)  # what waits in the socket keeps the selector awake
            return
        try:
            data = flow.source.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        flow.ended = not data
        due = time.monotonic()
        if flow.side == "service":
            self.events.append(Event(due, proxy.name, flow.number, flow.side, data))
        else:
            due += proxy.delay
        heapq.heappush(flow.waiting, (due, next(self._orders), data))

    @staticmethod
    def _held_back(proxy, flow):
        """Is it too early for a server's first bytes? When it no longer is, they are made one piece."""
        if not proxy.gather or flow.gathered or flow.side == "service" or not flow.waiting:
            return False
        first = flow.waiting[0]
        data = b"".join(data for _, _, data in sorted(flow.waiting))
        if len(data) < proxy.gather and time.monotonic() - first[0] < 1 and not flow.ended:
            return True
        flow.gathered = True
        flow.waiting = [entry for entry in flow.waiting if not entry[2]]  # the end, if it has come
        if data:
            heapq.heappush(flow.waiting, (*first[:2], data))
        return False

    def _pass_on(self, proxy, flow):
        if proxy.frozen or self._held_back(proxy, flow):
            return
        while flow.waiting and flow.waiting[0][0] <= time.monotonic():
            _, _, data = heapq.heappop(flow.waiting)
            if flow.side == "server":
                self.events.append(Event(time.monotonic(), proxy.name, flow.number, flow.side, data))
            flow.unsent += data
            flow.closed = flow.closed or not data
        try:
            if flow.unsent:
                del flow.unsent[:flow.sink.send(flow.unsent)]
            if flow.closed and not flow.unsent:
                flow.sink.shutdown(socket.SHUT_WR)
                self._end(proxy, flow)
        except BlockingIOError:
            pass
        except OSError:
            flow.ended = flow.closed = True
            self._end(proxy, flow)

    def _end(self, proxy, flow):
        """One direction is through; when both are, so is the connection."""
        proxy.flows.remove(flow)
        if not any(other.number == flow.number for other in proxy.flows):
            self.forget(flow.source)
            self.forget(flow.sink)

    # ---- what was said

    def connections(self, link):
        return sorted({event.connection for event in list(self.events) if event.link == link and event.data})

    def ended(self, link, connection, side="service"):
        """The number of the event in which that side closed, or None."""
        for index, event in enumerate(list(self.events)):
            if (event.link, event.connection, event.side, event.data) == (link, connection, side, b""):
                return index
        return None

    def stream(self, link, connection, side):
        return _Stream((index, event.data) for index, event in enumerate(list(self.events))
                       if (event.link, event.connection, event.side) == (link, connection, side))


class _Stream:
    """The bytes of one direction of one connection, and the events they came in."""

    def __init__(self, pieces):
        self._starts, self._indices, self.data = [], [], b""
        parts, length = [], 0
        for index, data in pieces:
            self._starts.append(length)
            self._indices.append(index)
            parts.append(data)
            length += len(data)
        self.data = b"".join(parts)
        self._at = 0

    def event_of(self, offset):
        """The number of the event that the byte came in. Offsets must not go back by much: it searches from the last one."""
        while self._at + 1 < len(self._starts) and self._starts[self._at + 1] <= offset:
            self._at += 1
        while self._starts[self._at] > offset:
            self._at -= 1
        return self._indices[self._at]


class Packet(NamedTuple):
    """An MQTT control packet."""

    first: int  # the number of the event with its first byte
    last: int   # and of the one with its last
    type: int
    flags: int
    body: bytes


CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 1, 2, 3, 4, 8, 14


def mqtt_packets(stream):
    """The complete packets of a stream."""
    offset, data = 0, stream.data
    while offset + 2 <= len(data):
        length, shift, at = 0, 0, offset + 1
        while at < len(data):
            byte = data[at]
            length |= (byte & 0x7f) << shift
            shift, at = shift + 7, at + 1
            if not byte & 0x80:
                break
        if at + length > len(data):
            return
        yield Packet(stream.event_of(offset), stream.event_of(at + length - 1), data[offset] >> 4, data[offset] & 15,
                     data[at:at + length])
        offset = at + length


class Publish(NamedTuple):
    topic: str
    id: int
    dup: bool
    payload: bytes


def parse_publish(packet, protocol=5):
    """A PUBLISH of QoS 1."""
    length, = struct.unpack_from(">H", packet.body)
    identifier, = struct.unpack_from(">H", packet.body, 2 + length)
    at = 4 + length
    if protocol == 5:
        properties, shift = 0, 0
        while True:
            byte = packet.body[at]
            properties |= (byte & 0x7f) << shift
            shift, at = shift + 7, at + 1
            if not byte & 0x80:
                break
        at += properties
    return Publish(packet.body[2:2 + length].decode(), identifier, bool(packet.flags & 8), packet.body[at:])


def puback_id(packet):
    return struct.unpack_from(">H", packet.body)[0]


def payload_key(payload):
    """The same for a payload's bytes and for what MongoDB holds of it: its JSON, or its bytes when it is none."""
    if isinstance(payload, bytes):
        try:
            payload = json.loads(payload)
        except ValueError:
            return payload
    return json.dumps(payload, sort_keys=True)


class _Command(NamedTuple):
    last: int  # the number of the event with its last byte
    request: int
    reply_to: int
    body: dict
    documents: list  # of an insert


def _commands(stream):
    """The OP_MSG messages of a stream to or from mongod."""
    offset, data = 0, stream.data
    while offset + 16 <= len(data):
        length, request, reply_to, code = struct.unpack_from("<iiii", data, offset)
        if offset + length > len(data):
            return
        if code == 2013:
            yield _Command(stream.event_of(offset + length - 1), request, reply_to, *_sections(data[offset:offset + length]))
        offset += length


def _sections(message):
    flags, = struct.unpack_from("<I", message, 16)
    end = len(message) - (4 if flags & 1 else 0)
    at, body, documents = 20, {}, []
    while at < end:
        kind, length = message[at], struct.unpack_from("<i", message, at + 1)[0]
        section = message[at + 1:at + 1 + length]
        if kind == 0:
            body = bson.decode(section)
            documents += body.get("documents", [])
        else:
            documents += bson.decode_all(section[section.index(b"\0", 4) + 1:])
        at += 1 + length
    return body, documents


def _stored_at(recorder, link):
    """For each payload the number of the event in which the first reply that says it is stored reached the service."""
    stored = {}
    for connection in recorder.connections(link):
        inserts = {command.request: command for command in _commands(recorder.stream(link, connection, "service"))
                   if "insert" in command.body}
        for reply in _commands(recorder.stream(link, connection, "server")):
            insert = inserts.get(reply.reply_to)
            if insert is None or reply.body["ok"] != 1 or "writeConcernError" in reply.body:
                continue
            assert insert.body["writeConcern"]["w"] == "majority" and insert.body["writeConcern"]["j"] is True, insert.body
            failed = {error["index"] for error in reply.body.get("writeErrors", []) if error["code"] != 11000}
            for index, document in enumerate(insert.documents):
                if index not in failed:
                    key = payload_key(document["payload"])
                    stored[key] = min(stored.get(key, reply.last), reply.last)
    return stored


class Acknowledgements(NamedTuple):
    proper: list  # payloads in the order of their PUBACKs
    early: list   # of those acknowledged before mongod's answer had reached the service


def acknowledgements(recorder, broker="mqtt", database="mongodb"):
    """All PUBACKs of the service, judged: each must stand behind mongod's answer to an insert that holds the message."""
    stored = _stored_at(recorder, database)
    proper, early = [], []
    for connection in recorder.connections(broker):
        came = mqtt_packets(recorder.stream(broker, connection, "server"))
        left = mqtt_packets(recorder.stream(broker, connection, "service"))
        packets = [(packet.last, 0, packet) for packet in came if packet.type == PUBLISH and packet.flags & 6]
        packets += [(packet.first, 1, packet) for packet in left if packet.type == PUBACK]
        open_payloads = {}
        for index, side, packet in sorted(packets, key=lambda entry: entry[:2]):
            if side == 0:
                message = parse_publish(packet)
                open_payloads[message.id] = message.payload
                continue
            payload = open_payloads.pop(puback_id(packet))
            properly = stored.get(payload_key(payload), len(recorder.events)) < index
            (proper if properly else early).append(payload)
    return Acknowledgements(proper, early)


def wait_for_connection(recorder, link, after=0, timeout=10):
    """The next connection on which a CONNECT was sent, counted behind number `after`."""
    def found():
        for connection in recorder.connections(link):
            if connection > after and any(packet.type == CONNECT
                                          for packet in mqtt_packets(recorder.stream(link, connection, "service"))):
                return connection
        return None

    return wait_until(found, timeout, f"a connection on {link} after number {after}")
