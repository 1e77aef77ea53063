#!/usr/bin/env bash
# Make .venv from the lock; what it does is in infra/setup/. Safe to run again: what is there already is not done twice.
# Needs Python 3.11 or newer, with its headers, and a C++ compiler.
set -euo pipefail
unset CDPATH PYTHONSAFEPATH
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || {
    echo "error: there is no $python. Install Python 3.11 or newer, or set PYTHON=/path/to/python3.11." >&2
    exit 2
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: posttrain needs Python 3.11 or newer; $python is $("$python" -V). Set PYTHON=/path/to/python3.11." >&2
    exit 2
}
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || command -v "${compiler%% *}" >/dev/null || {
    echo "error: no C++ compiler: llama.cpp and some packages are compiled here. Install g++ or clang++, or set CXX." >&2
    exit 2
}
exec "$python" -m infra.setup
