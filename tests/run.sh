#!/usr/bin/env bash
# All checks: lint, format, types, tests; in the environment of recipes/make_env.sh, which it makes if need be.
#
#   bash tests/run.sh [arguments for pytest]      e.g.  bash tests/run.sh tests/tools -k doctor
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

bash recipes/make_env.sh || exit
readonly BIN=$PWD/.venv/bin
failed=()

check() { # title, command...
    local title=$1 start=$SECONDS
    shift
    echo "== $title"
    "$@" || failed+=("$title")
    echo "-- $title: $((SECONDS - start)) s"
}

check "ruff check" "$BIN/ruff" check .
check "ruff format" "$BIN/ruff" format --check .
check "shellcheck" "$BIN/shellcheck" recipes/*.sh tests/*.sh .ci/run
check "mypy" "$BIN/mypy"
# Three processes keep two cores busy while servers start. A file stays together: its tests share servers and engines.
check "pytest" "$BIN/pytest" -n 3 --dist loadfile "$@"

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "All checks passed in $SECONDS s."
