#!/bin/sh
# Installs edge-llm from this folder, with no network.
#
#   sh install.sh [FOLDER]                             into FOLDER, by default /opt/edge-llm
#   sh install.sh --service [FOLDER] [-- SETTING ...]  and as a service of this machine; SETTINGs are those of
#                                                      `edge-llm install`, such as --host broker.local --node car7
#   sh install.sh --uninstall [FOLDER]                 removes both again
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

fail() { echo "install.sh: $1" >&2; exit 1; }

action=install
case "${1:-}" in
    --service|--uninstall) action=${1#--}; shift ;;
    --?*) fail "there is no $1: it is [--service|--uninstall] [FOLDER] [-- SETTING ...]" ;;
esac
target=/opt/edge-llm
if [ $# -gt 0 ] && [ "$1" != -- ]; then target=$1; shift; fi
if [ "${1:-}" = -- ]; then shift; fi
[ "$action" != install ] || [ $# -eq 0 ] || fail "settings are for a service: give --service first"
program=$target/venv/bin/edge-llm

if [ "$action" = uninstall ]; then
    [ -x "$program" ] || fail "nothing was installed into $target by this kit"
    # First, since it needs the program; should it fail, everything stays.
    if [ -e "$target/service" ]; then "$program" install --uninstall --yes "$@"; fi
    rm -rf "$target/venv" "$target/bundle" "$target/cache" "$target/service"
    rmdir "$target" 2>/dev/null || echo "kept: $target, which holds files that are not from the kit"
    echo "removed"
    exit
fi

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
target=$(cd "$target" && pwd)
program=$target/venv/bin/edge-llm
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
if [ "$action" = service ]; then
    # The units lie in edge_llm's wheel. The service packs the weights at its first start, into its own cache folder.
    # A machine that has its config file already takes the bundle from there.
    [ -e /etc/edge-llm/config.toml ] || set -- --bundle "$target/bundle" "$@"
    "$program" install --yes "$@"
    : >"$target/service"
    trap - EXIT
    exit
fi
"$program" prepare --bundle "$target/bundle" --set "cache_dir=\"$target/cache\""
trap - EXIT
echo "done. To look at it:  $program doctor --bundle $target/bundle --host BROKER"
echo "To serve:             $program serve --bundle $target/bundle --host BROKER"
echo "As a service:         sudo $program install --bundle $target/bundle --host BROKER"
