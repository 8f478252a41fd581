#!/bin/sh
# Builds an image and uses it as a hospital would: with an unknown user, read-only root, no network, 64 MB /dev/shm.
# `make image-test` calls this. Stops at the first failed check. Environment variables, besides those of build.sh:
#   TARGET       gpu (default) or cpu; `make image-test` tests both
#   TEST_IMAGE   name of the image to make; default: znormseg:image-test, for cpu znormseg:image-test-cpu
#   BASE_IMAGE   default: that of the Dockerfile if docker builds, else "debootstrap"
#   RUNNER       auto (default), docker, podman, or emulated (unshare, bind mounts, chroot; needs root and buildah)
# In the output, "ok" marks a passed check, "note" a fact.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$here/lib.sh"

TARGET=${TARGET:-gpu}
case "$TARGET" in
    gpu) IMAGE=${TEST_IMAGE:-znormseg:image-test} ;;
    cpu) IMAGE=${TEST_IMAGE:-znormseg:image-test-cpu} ;;
    *) fail "TARGET=$TARGET: use gpu or cpu" ;;
esac
RUNNER=${RUNNER:-auto}
runner_flags='' run_flags=''
caller=1234
ok() { printf 'ok    %s\n' "$*"; }
note() { printf 'note  %s\n' "$*"; }
broken() {
    printf 'FAIL  %s\n' "$*"
    exit 1
}

# ---- the image's config -----------------------------------------------------------------------------------------

# config NAME: prints a field of the image's config, one value per line.
config() {
    case "$1" in
        User | WorkingDir) template="{{println .$1}}" ;;
        *) template="{{range .$1}}{{println .}}{{end}}" ;;
    esac
    case "$ENGINE" in
        buildah) buildah inspect --type image --format "{{with .OCIv1.Config}}$template{{end}}" "$IMAGE" ;;
        *) "$ENGINE" image inspect --format "{{with .Config}}$template{{end}}" "$IMAGE" ;;
    esac | sed '/^$/d'
}

# Prints the complete config and history.
inspect() {
    case "$ENGINE" in
        buildah) buildah inspect --type image "$IMAGE" ;;
        *)
            "$ENGINE" image inspect "$IMAGE"
            "$ENGINE" history --no-trunc --format '{{.CreatedBy}}' "$IMAGE"
            ;;
    esac
}

identity() {
    case "$ENGINE" in
        buildah) buildah inspect --type image --format '{{.FromImageID}}' "$IMAGE" 2>/dev/null || : ;;
        *) "$ENGINE" image inspect --format '{{.Id}}' "$IMAGE" 2>/dev/null || : ;;
    esac
}

megabytes() {
    case "$ENGINE" in
        buildah)
            # buildah prints the size as "1.86 GB"; the manifest has the exact sizes of the layers.
            buildah inspect --type image --format '{{.Manifest}}' "$IMAGE" |
                tr ',' '\n' | sed -n '/layers/,$ s/.*"size":\([0-9]*\).*/\1/p'
            ;;
        *) "$ENGINE" image inspect --format '{{.Size}}' "$IMAGE" ;;
    esac | awk '{ sum += $1 } END { printf "%.0f", sum / 1e6 }'
}

# ---- ways to run ------------------------------------------------------------------------------------------------

# in_image TMP USER PROGRAM ARGUMENTS...: TMP is tmpfs, or as-is for the image's /tmp; USER "" is the image's user;
# PROGRAM "" is the image's entry point.
in_image() {
    tmp=$1 as=$2 program=$3
    shift 3
    if [ "$RUNNER" = emulated ]; then
        [ -n "$program" ] || program=$(config Entrypoint)
        [ -n "$as" ] && as=$as:$as || as=$(config User)
        "$here/emulate.sh" "$rootfs" "$work/data" "$as" "$(config WorkingDir)" "$work/env" "$tmp" "$program" "$@"
        return
    fi
    tmpfs='--tmpfs /tmp:exec'
    [ "$tmp" = tmpfs ] || tmpfs=
    # shellcheck disable=SC2086 # each may be several words or none
    "$RUNNER" $runner_flags run --rm $run_flags --network none --read-only $tmpfs --shm-size 64m \
        --security-opt no-new-privileges --cap-drop ALL ${as:+--user "$as:$as"} ${program:+--entrypoint "$program"} \
        --volume "$work/data:/data" "$IMAGE" "$@"
}

# Run as a user unknown to the image: `znormseg ARGUMENTS...`, and other programs.
znormseg() { in_image tmpfs "$caller" '' "$@"; }
tool() { in_image tmpfs "$caller" "$@"; }
# Runs as root, with the image's own /tmp, to look for leftovers of the build.
look() { in_image as-is 0 "$@"; }

choose_runner() {
    case "$ENGINE,$RUNNER" in
        docker,auto | docker,docker) RUNNER=docker ;;
        docker,*) fail "RUNNER=$RUNNER cannot see an image that docker built" ;;
        *,auto) if have podman && podman_runs; then RUNNER=podman; else RUNNER=emulated; fi ;;
        *,podman) podman_runs || fail "podman cannot run a container here" ;;
        *,emulated) ;;
        *) fail "RUNNER=$RUNNER with ENGINE=$ENGINE; allowed are auto, podman, emulated" ;;
    esac
    case "$RUNNER" in
        docker | podman)
            note "runner: $RUNNER${runner_flags:+ $runner_flags}${run_flags:+ $run_flags}; nothing is emulated:" \
                "read-only root, no network, 64 MB /dev/shm, uid $caller, no capabilities are the engine's own"
            ;;
        emulated)
            [ "$(id -u)" = 0 ] || fail "no engine here runs containers, and emulating one needs root"
            have buildah || fail "no engine here runs containers, and emulating one needs buildah to mount the image"
            container=$(buildah from --pull-never "$IMAGE")
            rootfs=$(buildah mount "$container")
            note "runner: none; emulated is the container: unshare (mount, net, pid, ipc, uts), root bind-mounted" \
                "read-only, tmpfs on /tmp and (64 MB) /dev/shm, chroot to uid $caller, setpriv --no-new-privs"
            config Env >"$work/env"
            note "real are the image's files, its ENV, ENTRYPOINT, USER and WORKDIR"
            ;;
    esac
}

# Whether podman can run this image; inside some virtual machines it can only with limits that it need not raise.
podman_runs() {
    # Like docker: do not add the user of --user to /etc/passwd, and mount only the requested tmpfs.
    plain='--passwd=false --read-only-tmpfs=false'
    for runner_flags in '' '--runtime runc'; do
        for limits in '' ' --ulimit nofile=1024:1024 --ulimit nproc=1024:1024'; do
            # shellcheck disable=SC2086
            if podman $runner_flags run --rm --network none $plain $limits --entrypoint true "$IMAGE" \
                >/dev/null 2>&1; then
                run_flags=$plain$limits
                return 0
            fi
        done
    done
    runner_flags='' run_flags=''
    return 1
}

undo() {
    if [ "${RUNNER:-}" = docker ] || [ "${RUNNER:-}" = podman ]; then
        # Only uid 1234 or root can remove what uid 1234 wrote.
        [ ! -d "$work/data" ] || tool sh -c 'rm -rf /data/*' >/dev/null 2>&1 || :
    fi
    [ -z "${container:-}" ] || buildah rm "$container" >/dev/null 2>&1 || :
}

# ---- build ------------------------------------------------------------------------------------------------------

choose_engine
make_work
mkdir "$work/data"
chmod 777 "$work/data"
given="${PIP_CERT:-} ${PIP_FIND_LINKS:-} ${PIP_INDEX_URL:-} ${TORCH_INDEX:-} ${http_proxy:-} ${https_proxy:-}"

# Put marks into everything that is passed to the build, and look for them in the image afterwards.
canary=canary-$$-$(date +%s)
: >"$work/data/canaries"
if have openssl && openssl req -x509 -newkey rsa:2048 -nodes -keyout /dev/null -subj "/CN=$canary" -days 1 \
    -out "$work/canary.pem" 2>/dev/null; then
    trusted=${PIP_CERT:-/etc/ssl/certs/ca-certificates.crt}
    if [ -f "$trusted" ]; then
        cat "$trusted" "$work/canary.pem" >"$work/trusted.pem"
        PIP_CERT=$work/trusted.pem
        sed -n '3,5p' "$work/canary.pem" >>"$work/data/canaries"
    fi
fi
if [ -z "${PIP_INDEX_URL:-}" ]; then
    PIP_INDEX_URL=https://user:$canary@pypi.org/simple
fi
no_proxy=${no_proxy:+$no_proxy,}$canary.invalid
echo "$canary" >>"$work/data/canaries"
case "$PIP_INDEX_URL" in
    https://pypi.org/*) ;;
    *) echo "$PIP_INDEX_URL" >>"$work/data/canaries" ;;
esac
export PIP_CERT PIP_INDEX_URL no_proxy

if [ -z "${BASE_IMAGE:-}" ] && [ "$ENGINE" != docker ]; then
    BASE_IMAGE=debootstrap
fi
if [ "${BASE_IMAGE:-}" = debootstrap ]; then
    BASE_IMAGE=$(ENGINE=$ENGINE "$here/base.sh")
fi
note "target: $TARGET; engine: $("$ENGINE" --version | head -n 1); base: ${BASE_IMAGE:-as in Dockerfile}"
before=$(identity)
started=$(date +%s)
if ! ENGINE=$ENGINE TARGET=$TARGET IMAGE=$IMAGE BASE_IMAGE=${BASE_IMAGE:-} "$here/build.sh" >"$work/build.log" 2>&1; then
    tail -n 40 "$work/build.log"
    broken "the build; above are the last lines of its log"
fi
# The image of the previous test has lost its name and would never be removed.
[ -z "$before" ] || [ "$before" = "$(identity)" ] || "$ENGINE" rmi "$before" >/dev/null 2>&1 || :
ok "built $IMAGE in $(($(date +%s) - started)) s: $(megabytes) MB uncompressed"

# ---- what is in the image ---------------------------------------------------------------------------------------

[ "$(config Entrypoint)" = znormseg ] || broken "ENTRYPOINT is $(config Entrypoint)"
case "$(config WorkingDir)" in
    '' | / | /app | /app/*) broken "WORKDIR is $(config WorkingDir)" ;;
esac
case "$(config User)" in
    '' | root* | 0 | 0:*) broken "USER is '$(config User)'" ;;
esac
ok "ENTRYPOINT $(config Entrypoint), WORKDIR $(config WorkingDir), USER $(config User)"

wanted=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../pyproject.toml")
inspect >"$work/inspect"
grep -qF "\"org.opencontainers.image.version\": \"$wanted\"" "$work/inspect" || broken "no label says version $wanted"
ok "labels: version $wanted, revision $(sed -n 's/.*"org.opencontainers.image.revision": "\(.*\)".*/\1/p' "$work/inspect" | head -n 1)"

for value in $given; do
    if [ "$value" != https://pypi.org/simple ] && grep -qF -e "$value" "$work/inspect"; then
        broken "config or history names $value"
    fi
done
if grep -qF -f "$work/data/canaries" "$work/inspect"; then
    broken "config or history holds what the build was handed: $(grep -F -f "$work/data/canaries" "$work/inspect")"
fi
ok "config and history hold no certificate, index address, wheel folder or proxy setting of the build"

choose_runner

# search PATTERN_FILE: prints the files of the image that contain a line of the pattern file.
search() {
    look find / -xdev -type f -not -path '/proc/*' -not -path '/sys/*' -not -path '/data/*' \
        -exec grep -lF -f "/data/$1" '{}' + 2>/dev/null || :
}
echo 'Name: znormseg' >"$work/data/control"
search control | grep -q . || broken "the search through the image's files finds nothing at all"
found=$(search canaries)
[ -z "$found" ] || broken "left in the image by the build: $found"
left='/etc/pip.conf /etc/xdg/pip /root/.pip /root/.config /root/.cache /mnt/* /src /wheel /out /tmp/* /run/znormseg*'
# shellcheck disable=SC2016
found=$(look sh -c 'for f in $1 $(find / -xdev -name "torch*.whl"); do [ ! -e "$f" ] || echo "$f"; done' sh "$left") ||
    broken "the search through the image's files does not run"
[ -z "$found" ] || broken "left in the image by the build: $found"
ok "$(wc -l <"$work/data/canaries") marks handed to the build are in no file of the image; no pip settings, no wheels"

cat "$here/../constraints.txt" >"$work/data/constraints.txt"
[ -n "${TORCH_INDEX:-}" ] || cat "$here/constraints.txt" >>"$work/data/constraints.txt"
look python -c '
import importlib.metadata as m, re, sys
name = lambda text: re.sub("[-_.]+", "-", text).lower()
lines = [line.split("==") for line in open("/data/constraints.txt").read().splitlines() if "==" in line]
pins = {name(n): v for n, v in lines}
have = {name(d.metadata["Name"]): d.version for d in m.distributions()}
wrong = [f"{n} {v}, not {pins[n]}" for n, v in have.items() if n in pins and v.split("+")[0] != pins[n]]
sys.exit("; ".join(wrong)) if wrong else None
rest = ", ".join(f"{n} {v}" for n, v in sorted(have.items()) if n not in pins)
print(len(have), "packages; in neither file:", rest)
' >"$work/pins" || broken "versions differ from constraints.txt or docker/constraints.txt"
ok "versions are those of constraints.txt and docker/constraints.txt"
note "$(cat "$work/pins")"

if [ "$TARGET" = cpu ]; then
    found=$(look python -c '
import importlib.metadata as m, torch
print(torch.version.cuda or "", *[d.metadata["Name"] for d in m.distributions() if d.metadata["Name"].startswith("nvidia")])')
    [ -z "$found" ] || broken "a CPU image with CUDA: $found"
    ok "torch without CUDA, no CUDA libraries"
else
    # A launcher of Triton: a shared library that is compiled into its cache, then loaded from there.
    tool python -c '
import importlib.machinery, importlib.util, os, pathlib, subprocess, sysconfig
folder = pathlib.Path(os.environ["TRITON_CACHE_DIR"]); folder.mkdir(parents=True)
source, library = folder / "probe.c", folder / "probe.so"
source.write_text("""#include <Python.h>
static struct PyModuleDef probe = {PyModuleDef_HEAD_INIT, "probe"};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }
""")
subprocess.run(["gcc", source, "-shared", "-fPIC", "-I" + sysconfig.get_path("include"), "-o", library], check=True)
loader = importlib.machinery.ExtensionFileLoader("probe", str(library))
importlib.util.module_from_spec(importlib.util.spec_from_loader("probe", loader))
' || broken "what gcc compiles into Triton's cache cannot be loaded from there"
    ok "gcc compiles against Python.h into Triton's cache, and Python loads the result from there"
fi

# ---- the container ----------------------------------------------------------------------------------------------

name=$(in_image tmpfs '' id -u) || broken "the image does not run"
[ "$name" != 0 ] || broken "without --user it runs as root"
ok "without --user it runs as uid $name"

[ "$(tool id -u):$(tool id -g)" = "$caller:$caller" ] || broken "uid and gid are not $caller"
! tool getent passwd "$caller" >/dev/null || broken "/etc/passwd knows uid $caller; this test wants an unknown one"
[ "$(tool sed -n 's/^CapEff:[[:space:]]*0*//p' /proc/self/status)" = "" ] || broken "uid $caller has capabilities"
ok "uid and gid $caller, unknown to /etc/passwd, no capabilities"

# -writable asks the kernel, which denies it on a read-only file system whatever the mode.
found=$(tool find / -xdev -writable -not -type l -not -path '/proc/*' -not -path '/dev/*' \
    -not -path /tmp -not -path /data 2>/dev/null | head -n 5)
[ -z "$found" ] || broken "writable in the image: $found"
for folder in / /etc /opt/venv /workspace /root /var/tmp; do
    ! tool touch "$folder/znormseg-test" 2>/dev/null || broken "could write in $folder"
done
tool sh -c 'touch /data/probe /tmp/probe /dev/shm/probe && rm /data/probe' ||
    broken "/data, /tmp or /dev/shm is not writable"
ok "read-only root: nothing outside /data, /tmp and /dev/shm is writable"

tool python -c '
import socket, sys
devices = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
if devices != ["lo"]: sys.exit(f"network devices {devices}")
try: socket.create_connection(("192.0.2.1", 443), 3)
except OSError as error: print(error)
else: sys.exit("connected")
' >"$work/network" || broken "there is a network"
ok "no network: only lo; connecting fails with \"$(cat "$work/network")\""

shm=$(tool python -c 'import os; s = os.statvfs("/dev/shm"); print(s.f_blocks * s.f_frsize // 2**20)') ||
    broken "there is no /dev/shm"
[ "$shm" = 64 ] || broken "/dev/shm has $shm MiB"
ok "/dev/shm has $shm MiB"

tool python -W error::UserWarning -c '
import getpass, os, pathlib
from torch._inductor.runtime.cache_dir_utils import cache_dir
for name in "HOME XDG_CACHE_HOME MPLCONFIGDIR NILEARN_DATA TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR".split():
    folder = pathlib.Path(os.environ[name]); folder.mkdir(parents=True, exist_ok=True); (folder / "probe").touch()
assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"], cache_dir()
print(getpass.getuser(), os.environ["HOME"])
' >"$work/home" || broken "a cache folder cannot be written, or torch does not take it"
ok "user name and HOME: $(cat "$work/home"); HOME and the caches of torch, Triton, matplotlib, nilearn are writable"

# ---- the program ------------------------------------------------------------------------------------------------

# step WORDS COMMAND...: runs and times one command of znormseg; prints its messages only if it fails.
step() {
    words=$1
    shift
    start=$(date +%s)
    if ! "$@" >"$work/out" 2>&1; then
        tail -n 40 "$work/out"
        broken "$words"
    fi
    ok "$words ($(($(date +%s) - start)) s)"
}

version=$(znormseg --version) || broken "--version: $version"
wanted=$(sed -n 's/^version = "\(.*\)"/znormseg \1/p' "$here/../pyproject.toml")
[ "$version" = "$wanted" ] || broken "--version: $version, not $wanted"
ok "--version: $version"
step "data phantom: six cases at 4 mm" znormseg data phantom /data/cases --count 6 --spacing-mm 4
step "train: 20 steps" znormseg train /data/cases /data/run --set 'network.channels=[4, 8]' \
    --set network.residual_units=1 --set 'training.patch_voxels=[16, 16, 16]' --set training.batch_size=1 \
    --set training.steps=20 --set training.validations=1 --set runtime.device=cpu
step "predict: six cases" znormseg predict /data/run /data/cases /data/out --device cpu
[ "$(find "$work/data/out" -name '*.nii.gz' | wc -l)" = 6 ] || broken "predict wrote $(ls "$work/data/out")"
step "evaluate" znormseg evaluate /data/out /data/cases --out /data/scores.csv
[ -s "$work/data/scores.csv" ] || broken "evaluate wrote no scores"

step "serve: one job, with a read-only root and no network" tool sh -c '
set -e
echo "correct horse battery" | znormseg serve user add ann --role admin --data /data/service
ZNORMSEG_TOKEN=$(znormseg serve token add ann --data /data/service)
export ZNORMSEG_TOKEN
znormseg serve --data /data/service --model /data/run --reserve-gb 0 & server=$!
for _ in $(seq 120); do
    python -c "import urllib.request as u; u.urlopen(\"http://127.0.0.1:8000/api/v1/ready\")" 2>/dev/null && break
    sleep 1
done
case=$(ls -d /data/cases/* | head -n 1)
znormseg remote submit http://127.0.0.1:8000 "$case" --watch /data/served
kill -TERM $server
wait $server
cmp /data/served/*.nii.gz "/data/out/$(basename "$case").nii.gz"'

rm -f "$work/data/canaries" "$work/data/control" "$work/data/constraints.txt"
if [ "$RUNNER" = podman ] && [ "$(id -u)" != 0 ]; then
    # Rootless podman maps the uid; it is 1234 only inside the container.
    found=$(tool find /data -mindepth 1 -not -uid "$caller") || broken "cannot list /data"
else
    found=$(find "$work/data" -mindepth 1 -not -uid "$caller")
fi
[ -z "$found" ] || broken "not the caller's: $found"
ok "all $(find "$work/data" -type f | wc -l) files written belong to uid $caller"
note "image $IMAGE: $(megabytes) MB; to remove it and its base: $ENGINE rmi $IMAGE${BASE_IMAGE:+ $BASE_IMAGE}"
