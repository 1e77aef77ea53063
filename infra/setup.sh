#!/usr/bin/env bash
# Make .venv from the lock: Python packages, llama.cpp built with only the parts we use, and llama.cpp's converter.
# Needs Python 3.11 or newer and a C++ compiler. Safe to run again; what is there already is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: posttrain needs Python 3.11 or newer; $python is $("$python" -V). Set PYTHON=/path/to/python3.11." >&2
    exit 2
}
command -v "${CXX:-c++}" >/dev/null || {
    echo "error: no C++ compiler: llama.cpp is built here. Install g++ or clang++, or set CXX." >&2
    exit 2
}

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input --quiet)

# llama.cpp's tools, tests, server and vision parts are not used; without them the build takes minutes, not a quarter
# of an hour. pip keeps the built wheel in its cache, so the next .venv takes it from there.
export CMAKE_ARGS="${CMAKE_ARGS:-} -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF"
echo "installing $(grep -c '==' requirements.lock) packages into .venv (llama.cpp is compiled the first time: some minutes)"
"${pip[@]}" install --no-deps -r requirements.lock
# The lock holds what every machine needs. A build of torch for GPUs needs NVIDIA's libraries too, and says which.
"${pip[@]}" install --constraint requirements.lock "$(grep '^torch==' requirements.lock)"
"${pip[@]}" install --no-deps --no-build-isolation -e .
"${pip[@]}" check

# The converter to GGUF and the gguf library it needs come only with the source package of llama-cpp-python.
version=$(sed -n 's/^llama_cpp_python==//p' requirements.lock)
share=.venv/share/posttrain/llama.cpp
if [ "$(cat "$share/VERSION" 2>/dev/null)" != "$version" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "${pip[@]}" download --no-deps --no-binary llama-cpp-python -d "$scratch" "llama-cpp-python==$version"
    tar -xzf "$scratch"/llama_cpp_python-*.tar.gz -C "$scratch"
    source=("$scratch"/llama_cpp_python-*/vendor/llama.cpp)
    rm -rf "$share"
    mkdir -p "$share"
    cp -r "${source[0]}"/{convert_hf_to_gguf.py,conversion,gguf-py,LICENSE} "$share"/
    echo "$version" >"$share/VERSION"
fi
# Not among the other packages: where accelerate finds DeepSpeed it imports it in every training.
beside=.venv/share/posttrain/deepspeed
if ! cmp -s infra/deepspeed.lock "$beside/LOCK"; then
    rm -rf "$beside"
    DS_BUILD_OPS=0 "${pip[@]}" install --no-deps --no-build-isolation --target "$beside" -r infra/deepspeed.lock
    cp infra/deepspeed.lock "$beside/LOCK"
fi
touch .venv/.ready
