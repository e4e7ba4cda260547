"""Execute another program that dies with its supervisor: ``python -I -S leash.py SUPERVISOR_PID COMMAND ARG...``.

On Linux the kernel is asked to send SIGKILL when the parent ends (prctl PR_SET_PDEATHSIG); the setting survives
exec, so it works for any program, such as the embedded server. SIGKILL is safe here: what was
acknowledged is on disk. Elsewhere this is a plain exec. Run by path and without site, it costs some 15 ms; so it can
import nothing of ours, and does itself what protocol/preloaded.py (die_with) does for Python.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:  # it ended before the setting was made
            raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
