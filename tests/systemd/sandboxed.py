"""Runs a command with only the system calls named in a file, and without memory that is both written and executed.

    python sandboxed.py FILE COMMAND…

As systemd does for SystemCallFilter= and MemoryDenyWriteExecute=: systemd.exec(5), seccomp_rule_add(3), prctl(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS = 38
PR_SET_MDWE = 65
MDWE_REFUSE_EXEC_GAIN = 1
SCMP_ACT_ALLOW = 0x7FFF0000
SCMP_ACT_ERRNO = 0x00050000
UNKNOWN_CALL = -1  # __NR_SCMP_ERROR: a call of another architecture, or a newer kernel


def main(list_file: str, command: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    seccomp.seccomp_load.argtypes = [ctypes.c_void_p]
    seccomp.seccomp_rule_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint]
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    context = seccomp.seccomp_init(SCMP_ACT_ERRNO | errno.EPERM)
    for name in Path(list_file).read_text().split():
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number != UNKNOWN_CALL:
            assert seccomp.seccomp_rule_add(context, SCMP_ACT_ALLOW, number, 0) == 0, name
    assert seccomp.seccomp_load(context) == 0
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
