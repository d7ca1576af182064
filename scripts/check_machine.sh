#!/bin/sh
# Says everything that the machine lacks, at once, before anything is installed.
PYTHON=${PYTHON:-python3}
missing=""
for tool in git g++ make; do
    command -v "$tool" >/dev/null 2>&1 || missing="$missing\n  $tool (Debian: apt-get install git g++ make)"
done
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    missing="$missing\n  Python 3.11 or newer as '$PYTHON'; another one is named by: make setup PYTHON=python3.12"
else
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || missing="$missing\n  the Python headers in $headers (Debian: apt-get install python3-dev)"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || missing="$missing\n  the venv module (Debian: apt-get install python3-venv)"
fi
if [ -n "$missing" ]; then
    printf 'posttrain cannot be set up; missing:%b\n' "$missing" >&2
    exit 1
fi
