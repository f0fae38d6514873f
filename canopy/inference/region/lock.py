"""One lock per run: two drivers at one folder would do everything twice.

The kernel's lock (`flock`) ends with its process, whatever ended it. On file systems of several machines it
may hold on one of them only, so the lock file also says who holds it, and is touched while it is held.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

from canopy.errors import InputError, OutputError

RENEW_S = 15.0
# A holder on another machine that was not heard of for this long is taken for dead.
STALE_S = 120.0


class HeldError(InputError):
    """Another process is at work in a run's folder."""


class RunLock:
    """Hold `path` while a run is driven; a context manager.

    Raises HeldError, on entering, when another process holds it; the message says which.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._stop = threading.Event()

    def __enter__(self) -> RunLock:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=self.path) from error
        try:
            if _is_taken(handle, self.path):
                raise HeldError(
                    f"another run is at work here ({describe_holder(self.path)})",
                    where=self.path.parent,
                    remedy="wait for it, or stop it first; --status shows how far it is",
                )
            text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        threading.Thread(target=self._renew, name="canopy-lock", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stop.set()
        if self._handle is not None:
            # Emptied, not removed: removing would let a third process lock a file that is no longer there.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _is_taken(handle: int, path: Path, look: bool = False) -> bool:
    """Whether another process holds a lock, whose kernel's part is taken here if not.

    With `look` that part is shared with all who only look.
    """
    asked = False
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        asked = True
    except ImportError:  # not on this system: the file's words have to do
        pass
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            return True
    holder = read_holder(path)
    # For processes of this machine the kernel has just answered, if it could be asked.
    foreign = not asked or holder.get("host") != socket.gethostname()
    return bool(holder) and foreign and _is_fresh(path)


def _is_fresh(path: Path) -> bool:
    """Whether the holder that a lock names was heard of a moment ago."""
    return time.time() - path.stat().st_mtime < STALE_S


def is_held(path: Path) -> bool:
    """Whether another process holds a lock; takes nothing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_taken(handle, path, look=True)
    finally:
        os.close(handle)


def read_holder(path: Path) -> dict[str, object]:
    """Who holds (or held) a lock: host, pid, since; empty when nobody."""
    try:
        found = json.loads(path.read_text(encoding="utf-8") or "{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def live_holder(path: Path) -> dict[str, object]:
    """Who holds a lock, as `read_holder`; empty also when its process was killed and could not clear it."""
    holder = read_holder(path)
    if not holder:
        return {}
    try:
        # Elsewhere than on POSIX, signal 0 is no question: Windows has it for Ctrl-C.
        if os.name == "posix" and holder.get("host") == socket.gethostname():
            os.kill(int(str(holder["pid"])), 0)
        elif not _is_fresh(path):
            return {}
    except PermissionError:  # it lives, and is another user's
        return holder
    except (OSError, KeyError, ValueError):
        return {}
    return holder


def describe_holder(path: Path) -> str:
    """`process 123 on host x`, as far as the lock file says."""
    holder = read_holder(path)
    return f"process {holder['pid']} on {holder['host']}" if holder else "its process is not known"
