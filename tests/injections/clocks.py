"""A wall clock that jumps."""

import os
import re
import subprocess
import sys
from pathlib import Path

from injections.bench import EVERY, Bench, different_runs, finish, newest
from injections.endings import error_line
from injections.table import Broken, Fault, NotInjected, Outcome, require

# Every tenth of a second the wall clock is another one; the monotonic clock is left alone.
JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static int (*next_clock)(clockid_t, struct timespec *);

static long jump(void) {
  static const long seconds[] = {0, 86400, -86400, -3600};
  struct timespec now;
  if (!next_clock) next_clock = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  next_clock(CLOCK_MONOTONIC, &now);
  return seconds[(now.tv_sec * 10 + now.tv_nsec / 100000000) % 4];
}

int clock_gettime(clockid_t id, struct timespec *now) {
  long seconds = jump();
  int status = next_clock(id, now);
  if (status == 0 && id == CLOCK_REALTIME) now->tv_sec += seconds;
  return status;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec precise;
  int status = clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return status;
}

time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}
"""
LIMIT = 15  # seconds for the storage
MOST = 10  # starts
PROBE = "import time; t = [(time.sleep(0.02), time.time())[1] for _ in range(30)]; print(max(t) - min(t) > 9e4)"


def jumping(bench: Bench, folder: Path) -> Outcome:
    library = folder / "clock.so"
    (folder / "clock.c").write_text(JUMPING_CLOCK)
    command = ["cc", "-shared", "-fPIC", "-o", library, folder / "clock.c", "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInjected("there is no C compiler for the library that makes it jump") from error
    environment = {"LD_PRELOAD": str(library)}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=os.environ | environment, capture_output=True, text=True)
    if probe.stdout.strip() != "True":
        raise NotInjected("the system doesn't load the library that makes it jump")
    workdir = folder / "run"
    _, hung = until_done(bench, workdir, {"train.num-steps": 3 * EVERY}, environment)
    for age, step in enumerate((EVERY, 2 * EVERY, 3 * EVERY)):  # the newest looks the oldest
        os.utime(workdir / "checkpoints" / str(step), (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    errors, hung_again = until_done(bench, workdir, {}, environment)
    begun = [int(step) for step in re.findall(r"from step (\d+)", errors)]
    require(bool(begun) and min(begun) == 3 * EVERY, errors)
    require(newest(workdir) > 3 * EVERY, f"newest checkpoint {newest(workdir)}")
    require(not (unlike := different_runs(workdir, bench.trained)), f"differs: {unlike[:3]}")
    stops = hung + hung_again
    what = f"the storage hung, {stops} times, and the run was ended after {LIMIT} s and started again; " if stops else ""
    lost = "the steps since the last save" if stops else "nothing"
    return Outcome(f"{what}resumed from the highest step, not from the newest file; end bit-equal", lost)


def until_done(bench: Bench, workdir: Path, changes: dict[str, int], environment: dict[str, str]) -> tuple[str, int]:
    """Train, again where the storage has hung: what all starts wrote to stderr, and how often it was started again.

    TensorStore's pool of threads waits by the wall clock: where that steps back within such a wait, work is left to lie.
    """
    errors = ""
    for hung in range(MOST):
        running = bench.train(workdir, {"train.storage-timeout": LIMIT} | changes, **environment)
        status = running.wait()
        errors += running.errors
        if status == 0:
            finish(running)
            return errors, hung
        error_line(running, f"has not ended after {LIMIT} s: the storage hangs")
    raise Broken(f"the storage hung {MOST} times")


FAULTS = (
    Fault(
        "clock-jumps",
        "LD_PRELOAD: the wall clock jumps by -1 day ... +1 day ten times a second; times of the checkpoints reversed",
        "the run goes on, or ends by its limit of time for the storage, and the same command goes on",
        jumping,
    ),
)
