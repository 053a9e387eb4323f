"""Sees when messages have become durable: a change stream, which tells only of what a majority has committed.

    watch.py URI DATABASE COLLECTION EVERY EXPECTED FILE

Of the documents inserted it follows each whose payload.sequence is a multiple of EVERY, and takes the monotonic time when it is told
of one. It says "ready" once the stream stands, ends after EXPECTED events or on SIGTERM, and leaves in FILE what it saw: pairs of
native 64-bit numbers, sequence and nanoseconds.
"""

import array
import signal
import sys
import time

import pymongo

stopping = []


def watch(collection, every, expected, seen):
    pipeline = [{"$match": {"operationType": "insert", "fullDocument.payload.sequence": {"$mod": [every, 0]}}},
                {"$project": {"sequence": "$fullDocument.payload.sequence"}}]
    with collection.watch(pipeline, max_await_time_ms=200) as stream:
        print("ready", flush=True)
        while not stopping and len(seen) < 2 * expected:
            change = stream.try_next()
            if change is not None:
                seen.append(change["sequence"])
                seen.append(time.monotonic_ns())


def main():
    uri, database, name, every, expected, path = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    seen = array.array("q")
    with pymongo.MongoClient(uri) as client:
        watch(client[database][name], int(every), int(expected), seen)
    with open(path, "wb") as file:
        seen.tofile(file)


if __name__ == "__main__":
    main()
