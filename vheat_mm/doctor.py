"""``python -m vheat_mm.doctor``: the environment check of :mod:`vheat_mm.apis.doctor`."""

import sys

from vheat_mm.apis.doctor import main

if __name__ == '__main__':
    sys.exit(main())
