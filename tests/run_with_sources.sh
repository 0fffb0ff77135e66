#!/usr/bin/env bash
# The tests with another vLLM's Python files, on the compiled operators of the installed CPU build: servers, engines,
# parsers. In the environment of recipes/make_env.sh, which stays as it is; tests of kernels know no vLLM and are left
# out.
#
#   pip download --no-deps vllm==0.33.0 && unzip -q vllm-0.33.0-*.whl 'vllm/*.py' -d DIR
#   bash tests/run_with_sources.sh DIR [arguments for pytest]
set -euo pipefail
if (($# < 1)) || [[ ! -f $1/vllm/_version.py ]]; then
    echo "expected a folder with an unpacked wheel of vLLM, that is with vllm/_version.py; got ${1:-none}" >&2
    exit 2
fi
sources=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly BIN=$PWD/.venv/bin
overlay=$(mktemp -d)
trap 'rm -rf "$overlay"' EXIT

cp -r "$sources/vllm" "$overlay/"
installed=$("$BIN/python" -c 'import importlib.util; print(importlib.util.find_spec("vllm").submodule_search_locations[0])')
(cd "$installed" && find . -name '*.so' -print0 | tar --create --null --files-from -) | tar --extract -C "$overlay/vllm"
# A CPU build says so in its version; vLLM looks for it in the code and in the metadata.
version=$(sed -n "s/^__version__ = version = '\(.*\)'/\1/p" "$overlay/vllm/_version.py")+cpu
sed -i "s/^__version__ = version = .*/__version__ = version = '$version'/" "$overlay/vllm/_version.py"
mkdir "$overlay/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$version" >"$overlay/vllm-$version.dist-info/METADATA"
# What 0.33 requires and 0.32 did not, of what a CPU needs.
"$BIN/python" -m pip install --quiet --no-deps --target "$overlay" orjson

echo "vLLM $version: names and signatures"
"$BIN/pytest" tests/plugin/test_vllm_versions.py "--vllm-sources=$sources"
echo "vLLM $version: the other tests"
PYTHONPATH=$overlay:$PWD "$BIN/pytest" -n 3 --dist loadfile --ignore tests/kernels \
    --ignore tests/plugin/test_vllm_versions.py "$@"
