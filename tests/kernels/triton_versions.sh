#!/usr/bin/env bash
# Compiles every kernel under each release of Triton that is supported, the oldest and the newest, and checks the code
# and what the launchers find in the cache.
#   tests/kernels/triton_versions.sh [PYTHON]
# A release that PYTHON does not have is installed beside it (some 700 MB, from the package index) and removed after.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
beside=
failed=0
trap 'rm -rf "$beside"' EXIT
unset TRITON_INTERPRET
installed=$("$python" -c "import triton; print(triton.__version__)")
for release in 3.6.0 3.7.1; do
    printf '== Triton %s\n' "$release"
    path=${PYTHONPATH:-}
    if [ "$installed" != "$release" ]; then
        beside=$(mktemp -d)
        "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$beside" "triton==$release"
        path=$beside:$path
    fi
    PYTHONPATH=$path "$python" -c "import sys, triton; sys.exit(triton.__version__ != '$release')"
    PYTHONPATH=$path "$python" -m pytest tests/kernels/test_compiled.py tests/kernels/test_ahead.py || failed=1
    rm -rf "$beside"
done
exit $failed
