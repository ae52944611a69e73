#!/bin/sh
# Installs edge-llm from this folder, with no network: sh install.sh [FOLDER], by default /opt/edge-llm.
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
target=${1:-/opt/edge-llm}
python=${PYTHON:-python3}

fail() { echo "install.sh: $1" >&2; exit 1; }

command -v sha256sum >/dev/null || fail "sha256sum is missing: install coreutils"
(cd "$kit" && sha256sum --quiet -c SHA256SUMS) || fail "the kit is damaged: copy it again"
[ "$(uname -m)" = "@ARCH@" ] || fail "this kit is for @ARCH@, and this machine is $(uname -m)"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "there is no $python: set PYTHON"
case " @PYTHONS@ " in
    *" $version "*) ;;
    *) fail "this kit has wheels for Python @PYTHONS@, and $python is $version: set PYTHON, or make a kit with --python $version" ;;
esac
[ ! -e "$target" ] || fail "$target exists already: remove it, or name another folder"
echo "installing into $target with Python $version"
mkdir -p "$target"
# A failed installation leaves nothing behind.
trap 'rm -rf "$target"' EXIT
"$python" -m venv "$target/venv" || fail "$python cannot make environments: install its venv package (python3-venv)"
# With a provider's own onnxruntime in extra/ (a Jetson's), that one is installed, and the kit's is not.
if ls "$kit"/extra/*.whl >/dev/null 2>&1; then
    "$target/venv/bin/python" -m pip install -q --no-index --find-links "$kit/wheels" "$kit"/extra/*.whl 'edge-llm[signing]'
else
    "$target/venv/bin/python" -m pip install -q --no-index --find-links "$kit/wheels" 'edge-llm[cpu,signing]'
fi
cp -R "$kit/bundle" "$target/bundle"
"$target/venv/bin/edge-llm" prepare --bundle "$target/bundle" --set "cache_dir=\"$target/cache\""
trap - EXIT
echo "done. To look at it:  $target/venv/bin/edge-llm doctor --bundle $target/bundle --host BROKER"
echo "To serve:             $target/venv/bin/edge-llm serve --bundle $target/bundle --host BROKER"
