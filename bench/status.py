"""What a running mqtt2mongo says of itself over --http-listen, and rates taken from it."""

import json
import time
import urllib.error
import urllib.request

from harness import Failed

INTERVAL = 0.02  # seconds: seldom enough not to cost the service anything, often enough for what takes a second


class Status:
    """Reads /status.json of the service at 127.0.0.1:port."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}/status.json"

    def read(self):
        """The whole as a dict; {} while it does not answer."""
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return json.loads(answer.read())
        except (OSError, urllib.error.URLError, ValueError):
            return {}

    def counter(self, name, role="consumer"):
        return self.read().get("sums", {}).get(role, {}).get(name, 0)


def rate_until(run, counter, count, limit):
    """Wait until `counter()` is at `count`: messages a second, from when it first was not 0 until then."""
    deadline, first = time.monotonic() + limit, None
    while True:
        value, now = counter(), time.monotonic()
        if value and first is None:
            first = (now, value)
        if value >= count:
            break
        run.check_alive()
        run.look()
        if now > deadline:
            raise Failed(f"{run.name}: {value} of {count} within {limit} s\n{run.tail(10)}")
        time.sleep(INTERVAL)
    run.look()
    begun, already = first
    if already == count:
        raise Failed(f"{run.name}: all {count} at once: too few to measure")
    return (count - already) / (now - begun)
