"""What scripts/demo needs of Python: free ports, a replica set of one, a look at what was stored."""

import socket
import sys
import time

import pymongo
from bson import json_util


def free_port(preferred):
    """The preferred port if nothing has it on loopback (0: any), else one that is free."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise SystemExit("no free port on 127.0.0.1")


def initiate(port, seconds):
    """Make the mongod at this port a replica set of one and wait until it takes writes."""
    deadline = time.monotonic() + seconds
    with pymongo.MongoClient("127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=500) as client:
        while True:
            try:
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]})
                break
            except pymongo.errors.OperationFailure as error:
                if error.code == 23:  # already initialized
                    break
                raise
            except pymongo.errors.ConnectionFailure:
                if time.monotonic() > deadline:
                    raise SystemExit(f"mongod on port {port} does not answer") from None
        while not client.admin.command("hello")["isWritablePrimary"]:
            if time.monotonic() > deadline:
                raise SystemExit(f"mongod on port {port} does not become primary")
            time.sleep(0.05)


def show(uri, database, collection, documents):
    """Print the newest documents and the count; fail when there is none."""
    with pymongo.MongoClient(uri, serverSelectionTimeoutMS=5000) as client:
        stored = client[database][collection]
        options = json_util.JSONOptions(json_mode=json_util.JSONMode.RELAXED)
        for document in stored.find().sort("_id", pymongo.DESCENDING).limit(documents):
            print(json_util.dumps(document, indent=2, json_options=options))
        count = stored.count_documents({})
        print(f"{count} documents in {database}.{collection}")
        if count == 0:
            raise SystemExit(1)


def main(command, *arguments):
    if command == "port":
        print(free_port(int(arguments[0])))
    elif command == "initiate":
        initiate(int(arguments[0]), float(arguments[1]))
    elif command == "show":
        show(arguments[0], arguments[1], arguments[2], int(arguments[3]))
    else:
        raise SystemExit(f"unknown command: {command}")


if __name__ == "__main__":
    main(*sys.argv[1:])
