#!/usr/bin/env bash
# Installs the service alone into a new environment and serves from it: no torch, READY in time, in bounded memory.
#
#   tests/install_check.sh REPOSITORY     a model repository; `make install-check` gives it the demo's
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$(realpath "$1")
folder=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt .
cd "$folder"
for module in torch onnx sklearn; do
    if venv/bin/python -c "import $module" 2>/dev/null; then
        echo "install-check: $module came along with the service" >&2
        exit 1
    fi
done

venv/bin/convoy serve --repository "$repository" --port 0 --http-port 0 --log-format json 2>log &
server=$!
for _ in $(seq 100); do
    grep -q '"event": "ready"' log && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
ready=$(grep '"event": "ready"' log || { cat log >&2; exit 1; })
address=$(venv/bin/python -c 'import json, sys; print(json.loads(sys.argv[1])["grpc"])' "$ready")
venv/bin/convoy models --server "$address" >/dev/null
# The figures that matter are those of an idle machine; these bounds only catch what went badly wrong.
venv/bin/python - "$ready" <<'PY'
import json, sys
ready = json.loads(sys.argv[1])
print(f"install-check: ready after {ready['startup_seconds']} s with {ready['rss_mib']} MiB, without torch")
sys.exit(ready["startup_seconds"] > 10 or ready["rss_mib"] > 250)
PY
kill -TERM "$server"
wait "$server"
if venv/bin/convoy train nowhere 2>message; then exit 1; fi
grep -qF "pip install '.[training]'" message
