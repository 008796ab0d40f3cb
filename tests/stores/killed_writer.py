"""Programs for test_writer.py, run as processes of their own: writers that are killed.

`python -m tests.stores.killed_writer commit FOLDER` writes the store of PLAN; it prints a line when it begins.

`python -m tests.stores.killed_writer crash-points FOLDER STEP` does, for n = 1, 1 + STEP, ...: write the store in a
forked process that kills itself at its nth call to the disk, let a second process resume, print "n id". It ends with
the first n that is never reached.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores.objects import LocalObjects
from tests.stores.build import make_plan, write_into

PLAN = make_plan(n_samples=5, n_tokens=2, samples_per_unit=3, rows_per_chunk=2, layers=(("blocks.0", "float16", 3),))
CALLS = ("fsync", "link", "unlink", "rename", "replace", "mkdir")


def crash_points(folder: Path, step: int) -> None:
    n, reached = 1 - step, True
    while reached:
        n += step
        store, result = folder / str(n), folder / f"{n}.id"
        reached = _in_a_fork(lambda n=n, store=store: _write_killed_at(store, n)) == -signal.SIGKILL
        status = _in_a_fork(lambda store=store, to=result: to.write_text(write_into(LocalObjects(store), PLAN)))
        _say(f"{n} {result.read_text() if status == 0 else f'resuming failed: {status}'}")


def _write_killed_at(folder: Path, n: int) -> None:
    n_calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    write_into(LocalObjects(folder), PLAN)


def _in_a_fork(work: Callable[[], object]) -> int:
    """Do work in a forked process; return its exit code, minus the signal where one killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "commit":
        _say("begins")
        write_into(LocalObjects(where), PLAN)
    else:
        crash_points(where, int(sys.argv[3]))
