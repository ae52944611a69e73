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
# Of the settings, those of --root: where the machine's / is.
root=
previous=
for setting; do
    case "$setting" in --root=*) root=${setting#--root=} ;; esac
    [ "$previous" != --root ] || root=$setting
    previous=$setting
done
units=$root/etc/systemd/system
record=$root/etc/edge-llm/install.json

# Whether the service of this machine is the program of this folder, however it has become one.
serves() {
    grep -qF -e "ExecStart=$program " -e "ExecStart=\"$program\" " "$units/edge-llm.service.d/10-machine.conf" 2>/dev/null
}

remove_service() { "$program" install --uninstall --yes ${root:+--root "$root"}; }

if [ "$action" = uninstall ]; then
    [ -e "$target/.edge-llm-kit" ] || fail "nothing was installed into $target by this kit"
    target=$(cd "$target" && pwd)
    program=$target/venv/bin/edge-llm
    # First, since it needs the program; where a unit stays, everything does. An image names a program of its own.
    if serves || { [ -n "$root" ] && [ -e "$record" ]; }; then
        remove_service || [ ! -e "$units/edge-llm.service" ] || fail "the service stays, and so does $target"
    fi
    rm -rf "$target/venv" "$target/bundle" "$target/cache"
    rm "$target/.edge-llm-kit"
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
new_record=$record
[ ! -e "$record" ] || new_record=
# A failed or interrupted installation leaves nothing behind. A service that was there before stays, unless its units
# have come to name the program that goes.
undo() {
    if serves || [ -e "$new_record" ]; then remove_service || :; fi
    rm -rf "$target"
}
trap undo EXIT
# Without these some shells end at once.
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
# What --uninstall knows the folder by.
: >"$target/.edge-llm-kit"
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
    trap - EXIT
    exit
fi
"$program" prepare --bundle "$target/bundle" --set "cache_dir=\"$target/cache\""
trap - EXIT
echo "done. To look at it:  $program doctor --bundle $target/bundle --host BROKER"
echo "To serve:             $program serve --bundle $target/bundle --host BROKER"
echo "As a service:         sudo $program install --bundle $target/bundle --host BROKER"
