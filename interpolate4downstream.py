#!/usr/bin/env python3
"""The command ``interpolate4downstream`` (:mod:`vheat_mm.apis.interpolate4downstream`) without an installation."""

import sys

from vheat_mm.apis.interpolate4downstream import main

if __name__ == '__main__':
    sys.exit(main())
