#!/bin/sh
# A complete round on this machine: operator, deploy, job, log, status and result. Everything is removed at the end.
# `cortex` must be on the PATH; `make demo` puts it there.
set -eu

examples=$(cd "$(dirname "$0")" && pwd)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/cortex-demo.XXXXXX")
operator=
export CORTEX_CLI_CONFIG_DIR="$scratch/config"

finish() {
    code=$?
    trap - EXIT INT TERM
    if [ -n "$operator" ]; then
        kill -TERM "$operator" 2> /dev/null || true
        wait "$operator" || true
    fi
    rm -rf "$scratch"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

show() {
    echo "\$ $*"
    "$@"
}

fail() {
    echo "demo: $1" >&2
    cat "$scratch/operator.log" >&2
    exit 1
}

echo "\$ cortex serve --port 0 --data-dir $scratch/data &"
cortex serve --port 0 --data-dir "$scratch/data" > "$scratch/operator.out" 2> "$scratch/operator.log" &
operator=$!
endpoint=
tries=0
while [ -z "$endpoint" ]; do
    kill -0 "$operator" 2> /dev/null || fail "the operator ended before it was ready:"
    [ "$tries" -lt 300 ] || fail "the operator was not ready within a minute:"
    tries=$((tries + 1))
    sleep 0.2
    endpoint=$(sed -n 's/^Cortex operator listening on //p' "$scratch/operator.out")
done
cat "$scratch/operator.out"

show cortex env configure demo --operator-endpoint "$endpoint"
show cortex deploy "$examples/iris/cortex.yaml"

echo "\$ cortex submit iris --config '{\"C\": 0.5}' -o json"
submitted=$(cortex submit iris --config '{"C": 0.5}' -o json)
echo "$submitted"
job=$(echo "$submitted" | sed -n 's/.*"job_id": *"\([^"]*\)".*/\1/p')

show cortex logs iris "$job"
show cortex get iris "$job"
cortex get iris "$job" -o json | grep -q '"status": *"status_succeeded"' || fail "the job did not succeed:"
