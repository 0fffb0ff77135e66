#!/usr/bin/env bash
# From nothing to a served DeepSeek-V3.2 on a CPU: makes the environment, starts `vllm serve` with the small
# trained model of eval/small_model, has it call tools, reason and find a needle, prints what streams back, stops.
#
#   bash recipes/quickstart.sh [--keep] [--port N]
#
#   --keep    leave the server running, and print how to stop it
#   --port N  serve on port N instead of a free one
#
# Needs what recipes/make_env.sh needs, and 4 GB of free memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MODEL=eval/small_model/checkpoint MODEL_NAME=small-dsv32
keep=false port=
while (($#)); do
    case $1 in
        --keep) keep=true ;;
        --port) port=${2:?--port needs a number} && shift ;;
        --port=*) port=${1#*=} ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        *) echo "quickstart: unknown argument $1; it takes --keep and --port N" >&2 && exit 2 ;;
    esac
    shift
done

bash recipes/make_env.sh
readonly BIN=$PWD/.venv/bin
# A proxy of the user's must not stand between us and this machine.
export no_proxy="127.0.0.1,localhost${no_proxy:+,$no_proxy}" NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"

healthy() {
    "$BIN/python" - "$port" 2>/dev/null <<'PY'
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.exit(opener.open(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).status != 200)
PY
}
if [[ -n $port ]] && healthy; then
    echo "quickstart: http://127.0.0.1:$port answers already: stop that server, or give another port" >&2
    exit 1
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/vllm-dsv32.XXXXXX")
readonly log=$work/server.log
server=

stop_server() {
    [[ -n $server ]] && kill -TERM "$server" 2>/dev/null || return 0
    local seconds
    for ((seconds = 0; seconds < 30; seconds++)); do
        kill -0 "$server" 2>/dev/null || break
        sleep 1
    done
    # The server is the leader of its own process group; what of it is left by now does not stop by itself.
    kill -KILL -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=
}

finish() {
    local status=$?
    trap - EXIT INT TERM
    stop_server
    if ((status > 128)); then
        echo "quickstart: interrupted" >&2
        rm -rf "$work"
    elif ((status)); then
        if [[ -s $log ]]; then
            echo "---- the last lines of $log" >&2
            tail -n 30 "$log" >&2
        fi
        echo "quickstart: failed; the log is kept in $work" >&2
    else
        rm -rf "$work"
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -z $port ]]; then
    port=$("$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
serve=(
    "$BIN/vllm" serve "$PWD/$MODEL" --served-model-name "$MODEL_NAME" --host 127.0.0.1 --port "$port"
    --tokenizer-mode deepseek_v32 --tool-call-parser deepseek_v32 --enable-auto-tool-choice
    --reasoning-parser deepseek_v3 --dtype float32 --max-model-len 17408 --max-num-seqs 4
)
echo "Starting: vllm serve ${serve[*]:2}"
echo "Log: $log"
start=$SECONDS
set -m # gives the server a process group of its own, out of reach of Ctrl-C
# One GiB of KV cache is plenty for this model; vLLM would take half of the memory.
VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} "${serve[@]}" >"$log" 2>&1 &
server=$!
set +m

fail_if_ended() {
    kill -0 "$server" 2>/dev/null && return
    echo "quickstart: the server ended before it was ready" >&2
    exit 1
}
until healthy; do
    fail_if_ended
    if ((SECONDS - start > 300)); then
        echo "quickstart: the server was not ready within 300 s" >&2
        exit 1
    fi
    sleep 1
done
fail_if_ended # or another server, started meanwhile, is what answers
echo "Ready after $((SECONDS - start)) s on http://127.0.0.1:$port"
echo
PYTHONPATH=$PWD/eval "$BIN/python" -m small_model.demo --base-url "http://127.0.0.1:$port/v1"

if $keep; then
    trap - EXIT INT TERM
    disown "$server"
    echo "Serving on http://127.0.0.1:$port/v1 as $MODEL_NAME; log in $work."
    echo "Stop it with: kill $server"
else
    stop_server
    echo "Stopped."
fi
