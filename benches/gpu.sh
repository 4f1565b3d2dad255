#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: the kernels' tests compiled, then every benchmark.
#   benches/gpu.sh                        results in gpu-results/
#   OUT=DIR WHEELS=DIR benches/gpu.sh     results in DIR; what Python lacks is installed from the wheels, offline
# Its time is shared out: tests, the two programs at 7B, the benchmarks. ONLY="train engine" runs these parts alone
# (tests, train, engine, benches, library) and gives them all of it.
# No step stops those after it. Stopped half-way, it leaves the results of the steps that ended. PYTHON names another
# interpreter than python3, SECONDS_IN_ALL another bound than 570.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-gpu-results}
python=${PYTHON:-python3}
ends=$((SECONDS + ${SECONDS_IN_ALL:-570}))
mkdir -p "$out"
out=$(cd "$out" && pwd)
parts=$(mktemp -d)
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MPLBACKEND=Agg
unset TRITON_INTERPRET LLAVA_KERNELS
child=
failed=0
trap 'rm -rf "$parts"' EXIT
trap 'trap "" INT TERM; [ -z "$child" ] || kill "$child" 2>/dev/null; echo "stopped" >>"$out/summary.txt"; exit 130' INT TERM

# wanted PART: whether it is to be run.
wanted() { [[ " ${ONLY:-tests train engine benches library} " == *" $1 "* ]]; }

# step NAME SECONDS LOG COMMAND...: at most so long, its output appended to the log, a line in the summary.
step() {
    local name=$1 limit=$2 log=$out/$3 began=$SECONDS verdict=pass left=$((ends - SECONDS))
    shift 3
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        verdict="left out, no time"
        failed=1
    else
        printf '\n== %s: %s\n' "$name" "$*" >>"$log"
        timeout -k 10 "$limit" "$@" >>"$log" 2>&1 &
        child=$!
        wait "$child"
        case $? in
        0) ;;
        124 | 137) verdict="FAIL, longer than $limit s" failed=1 ;;
        5) verdict="nothing to run" ;; # pytest found no test
        *) verdict=FAIL failed=1 ;;
        esac
        child=
    fi
    printf '%5d s  %-36s %s\n' $((SECONDS - began)) "$name" "$verdict" | tee -a "$out/summary.txt"
}

# The benchmarks' JSON files as one, written anew after each, so that an interruption loses one file's at most.
gather() {
    "$python" - "$out/benches.json" "$parts"/*.json <<'PYTHON'
import json, os, sys

target, *parts = sys.argv[1:]
runs = [json.load(open(part)) for part in parts if os.path.exists(part) and os.path.getsize(part)]
if runs:
    whole = {**runs[-1], "benchmarks": [benchmark for run in runs for benchmark in run["benchmarks"]]}
    with open(target + ".part", "w") as file:
        json.dump(whole, file, indent=1)
    os.replace(target + ".part", target)
PYTHON
}

rm -f "$out"/{summary.txt,versions.json,benches.json,engine_7b.json,train_7b.json} \
    "$out"/{install,tests,benches,engine,train,library}.log
if [ -n "${WHEELS:-}" ]; then
    step "wheels of $WHEELS" 120 install.log "$python" -m pip install -q --no-index --no-deps --no-compile \
        --target "$parts/site" "$WHEELS"/*.whl
    export PYTHONPATH=$PYTHONPATH:$parts/site
fi
if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "torch finds no GPU" | tee -a "$out/summary.txt" >&2
    exit 1
fi
"$python" - "$out/versions.json" <<'PYTHON'
import json, platform, subprocess, sys

import torch
import triton


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


versions = {
    "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "cuda": torch.version.cuda,
    "torch": torch.__version__,
    "triton": triton.__version__,
    "python": platform.python_version(),
    "commit": said("git", "rev-parse", "HEAD"),
    "changed_files": len((said("git", "status", "--porcelain") or "").splitlines()),
}
json.dump(versions, open(sys.argv[1], "w"), indent=1)
print(versions)
PYTHON

# Several at once where pytest-xdist is: most of a test's time is compiling.
workers=$("$python" -c "import xdist, os; print('-n', min(8, os.cpu_count()))" 2>/dev/null)
all=$ends
left=$((all - SECONDS))
if wanted tests; then
    [ -n "${ONLY:-}" ] || ends=$((SECONDS + left * 2 / 5))
    step "no wait for the device in a training step" 60 tests.log "$python" -m pytest -p no:cacheprovider \
        tests/train/test_step.py -k "no_wait_for_a_gpu"
    for file in tests/kernels/test_*.py tests/engine/test_graphs.py; do
        [ "$file" != tests/kernels/test_compiled.py ] || continue # needs no GPU
        # shellcheck disable=SC2086
        step "$file" 120 tests.log "$python" -m pytest -p no:cacheprovider $workers "$file"
    done
    ends=$all
fi
if wanted train; then
    limit=$((left / 4))
    [ -z "${ONLY:-}" ] || limit=$left
    step "training at the shapes of LLaVA-7B" "$limit" train.log \
        "$python" -m benches.train_7b --out "$out" --budget "$limit"
fi
if wanted engine; then
    step "engine at the shapes of LLaVA-7B" 150 engine.log "$python" -m benches.engine_7b --json "$out/engine_7b.json"
fi
if wanted benches; then
    for file in benches/bench_*.py; do
        step "$file" 90 benches.log "$python" -m pytest -p no:cacheprovider --benchmark-only \
            --benchmark-json="$parts/$(basename "$file" .py).json" "$file"
        gather
    done
fi
if wanted library && command -v cmake >/dev/null; then
    step "C library" 200 library.log bash -c "cmake -S . -B '$parts/build' -DPython3_EXECUTABLE=\$(command -v '$python') &&
        cmake --build '$parts/build' && ctest --test-dir '$parts/build' --output-on-failure &&
        '$parts/build/kernels/llava_kernels_example'"
fi
printf '%5d s  in all\n' "$SECONDS" | tee -a "$out/summary.txt"
exit $failed
