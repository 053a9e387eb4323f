"""Sees when messages have become durable: a change stream, which tells only of what a majority has committed.

    watch.py URI DATABASE COLLECTION FIELD EVERY EXPECTED FILE

Of the documents inserted it follows each whose FIELD (payload.sequence) is a multiple of EVERY, and takes the monotonic time when it
is told of one. It says "ready" once the stream stands, ends after EXPECTED events, or on SIGTERM when no more come, and leaves in FILE
what it saw: pairs of native 64-bit numbers, sequence and nanoseconds. EXPECTED 0: nobody knows how many there will be.
"""

import array
import signal
import sys
import time

import pymongo

stopping = []


def watch(collection, field, every, expected, seen):
    pipeline = [{"$match": {"operationType": "insert", f"fullDocument.{field}": {"$mod": [every, 0]}}},
                {"$project": {"sequence": f"$fullDocument.{field}"}}]
    with collection.watch(pipeline, max_await_time_ms=200) as stream:
        print("ready", flush=True)
        while not expected or len(seen) < 2 * expected:
            ending = bool(stopping)  # as it was before asking: what was stored by then is told of
            change = stream.try_next()
            if change is not None:
                seen.append(int(change["sequence"]))
                seen.append(time.monotonic_ns())
            elif ending:
                break


def main():
    uri, database, name, field, every, expected, path = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    seen = array.array("q")
    with pymongo.MongoClient(uri) as client:
        watch(client[database][name], field, int(every), int(expected), seen)
    with open(path, "wb") as file:
        seen.tofile(file)


if __name__ == "__main__":
    main()
