#!/usr/bin/env bash
# Chromium for the test of the page, tests/test_tools/test_web_demo.py: Debian's own package, where none is here and
# this user may install it. Status 1, after a line on what to install, where there is none in the end.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "no browser for the test of the page: install Chromium ('apt install chromium' on Debian)" >&2
    exit 1
fi
echo "installing Chromium by apt-get, for the test of the page"
export DEBIAN_FRONTEND=noninteractive
options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120)
if ! log="$({ timeout 300 apt-get "${options[@]}" update &&
    timeout 900 apt-get "${options[@]}" install -y --no-install-recommends chromium; } 2>&1)"; then
    printf '%s\n' "$log" "Chromium could not be installed; without it the test of the page fails" >&2
    exit 1
fi
