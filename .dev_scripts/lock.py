"""Take a file lock on a descriptor inherited from a shell script, waiting for whoever has it.

    exec 9>some.lock && python lock.py 9 'what it guards'

The lock belongs to the open file, so it is held after this process and released when the script ends,
however it ends. (flock(1) does the same, but macOS has none.)
"""

import fcntl
import sys


def main() -> None:
    descriptor, name = int(sys.argv[1]), sys.argv[2]
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f'      another set-up holds {name}: waiting until it ends', flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


if __name__ == '__main__':
    main()
