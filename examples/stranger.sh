#!/usr/bin/env bash
# The whole way of a checkpoint, from the Hub to a server, in the Python environment that is active:
#
#   examples/stranger.sh org/model you/model-triton [TARGET [PACKAGE]]
#
# TARGET is triton if not given; PACKAGE is what pip installs: a wheel, a checkout or, if not given,
# ctconvert. The push needs a token: `hf auth login` or HF_TOKEN.
set -euo pipefail
model=$1 name=$2 target=${3:-triton} package=${4:-ctconvert}
here=$(cd "$(dirname "$0")" && pwd)
port=${PORT:-8765}
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT

if python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'; then
  serve=vllm
else
  serve=transformers
  package="${package}[transformers]"
fi
python -m pip install -q "$package"

ctconvert inspect "$model" --target "$target"
ctconvert doctor "$model" --target "$target"
ctconvert repack "$model" "$work/out" --target "$target"
ctconvert verify "$work/out" --against "$model" --kernels
ctconvert push "$work/out" "$name"
ctconvert verify "$name" --against "$model"

prompt="The three laws of thermodynamics say that"
if [ "$serve" = transformers ]; then
  python "$here/generate.py" "$name" "$prompt" --tokens 8
else
  VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server \
    --model "$name" --enforce-eager --max-model-len 512 --port "$port" >"$work/server.log" 2>&1 &
  server=$!
  until curl -sf "localhost:$port/health"; do
    kill -0 "$server" || { tail -n 20 "$work/server.log" >&2; exit 1; }
    sleep 1
  done
  curl -sf "localhost:$port/v1/completions" -H 'Content-Type: application/json' \
    -d "{\"model\": \"$name\", \"prompt\": \"$prompt\", \"max_tokens\": 8, \"temperature\": 0}"
  echo
fi
echo "ok: $name is on the Hub, and $serve answers with it"
