"""How a worker takes turns: it warms up, says so, then runs for as long as it is told to, one line of JSON for each turn.

Between turns a worker waits for a line on its standard input and uses no processor.
"""

import json
import resource
import sys
import time
from collections.abc import Callable


def serve(run: Callable[[], int], num_params: int, versions: dict[str, str]) -> None:
    """Call run() for each turn; it returns when its work is done, with the number of images that it worked on."""
    run()
    _say({"event": "first", "num_params": num_params, "versions": versions})
    began = time.perf_counter()
    run()
    once = time.perf_counter() - began
    _say({"event": "ready"})
    for line in sys.stdin:
        calls = max(1, round(float(line) / once))
        began = time.perf_counter()
        images = sum(run() for _ in range(calls))
        _say({"event": "turn", "images_per_second": images / (time.perf_counter() - began)})
    _say({"event": "end", "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)
