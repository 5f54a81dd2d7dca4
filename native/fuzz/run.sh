#!/bin/sh
# Fuzzes every target for SECONDS (default 60), one per processor at a time; prints executions and seed; fails on a crash.
#   native/fuzz/run.sh [SECONDS [TARGET...]]
# Stable toolchain, no cargo-fuzz: the coverage pass is switched on by compiler flags. Findings stay in findings/.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- ring channel_messages gpadl nvsp rndis door vmm
host=$(rustc -vV | sed -n 's/^host: //p')
# --target keeps the flags away from build scripts.
RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
 -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
 -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --quiet --locked --target "$host"
mkdir -p findings
# New inputs go to a directory of this run, so that the committed corpus stays small.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fuzz() {
    mkdir -p "$work/$1"
    "target/$host/release/$1" "$work/$1" "corpus/$1" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 \
        -max_len=4096 -print_final_stats=1 -artifact_prefix="findings/$1-" >"$work/$1.log" 2>&1 && status=0 || status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$1.log")
    seed=$(sed -n 's/^INFO: Seed: *//p' "$work/$1.log")
    edges=$(sed -n 's/.*cov: \([0-9]*\).*/\1/p' "$work/$1.log" | tail -n 1)
    if [ "$status" -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        echo "fuzz $1: ${runs} executions, ${edges:-0} edges, seed ${seed}, no finding"
    else
        echo "fuzz $1: FAILED after ${runs:-0} executions, seed ${seed:-unknown}, status $status"
        tail -n 40 "$work/$1.log"
        touch "$work/failed"
    fi
}

started=0
for target; do
    fuzz "$target" &
    started=$((started + 1))
    if [ $((started % $(nproc))) -eq 0 ]; then wait; fi
done
wait
[ ! -e "$work/failed" ]
