"""A process beside each of several: where that one is aborted, the last line written to stdin goes to stderr.

Python's faulthandler writes to the same stdin when a process is aborted, so the end of the input tells what has happened.
A process that ends otherwise, or is killed, leaves this one silent. Started by endings.py, without any package.
"""

import sys

if __name__ == "__main__":
    words, aborted, _ = sys.stdin.buffer.read().partition(b"Fatal Python error: Aborted")
    if aborted:
        print("error:", words.decode(errors="replace").splitlines()[-1], file=sys.stderr)
