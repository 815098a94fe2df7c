#!/usr/bin/env bash
# Builds what is shipped, into target/container: static programs for amd64 and arm64 with an SBOM each, SHA256SUMS, and an
# OCI archive of the image for both, which `podman load`, `skopeo copy` or `docker load` take.
#
#     deploy/container/build.sh                             # both architectures, as shipped
#     ARCHES=amd64 PROFILE=dev deploy/container/build.sh    # one, quickly
#
# It needs Rust, python3 and buildah; and for an architecture that is not this machine's, its C compiler (on Debian
# gcc-aarch64-linux-gnu and libc6-dev-arm64-cross, or gcc-x86-64-linux-gnu and libc6-dev-amd64-cross).
set -euo pipefail
cd "$(dirname "$0")/../.."

PROFILE="${PROFILE:-dist}"
ARCHES="${ARCHES:-amd64 arm64}"
IMAGE="${IMAGE:-localhost/sidebearer}"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)"
target="$(realpath -m "${CARGO_TARGET_DIR:-target}")"
out="${OUT:-$target/container}"
here=deploy/container
# The same commit gives the same bytes, whenever and wherever it is built with the same Rust and C compiler.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}"

die() {
    printf 'build.sh: %s\n' "$*" >&2
    exit 1
}

triple() {
    case "$1" in
        amd64) echo x86_64-unknown-linux-gnu ;;
        arm64) echo aarch64-unknown-linux-gnu ;;
        *) die "no such architecture: $1; there are amd64 and arm64" ;;
    esac
}

glibc() { echo '__GLIBC__.__GLIBC_MINOR__' | "$1" -E -P -include features.h - | tail -1 | tr -d ' '; }

rust() { rustc --version | cut -d' ' -f2; }

# This machine's own compiler where it will do: another linker for the same target would have cargo build its own tools anew.
compiler() {
    if [ "$1" = "$(rustc -vV | sed -n 's/^host: //p')" ]; then echo cc; else echo "${1/-unknown/}-gcc"; fi
}

# glibc for both: musl's allocator is slow with many threads. Linked statically, it still asks DNS as anywhere else.
compile() {
    local arch="$1" triple="$2" cc="$3" homes name
    homes="$PWD=/sidebearer ${CARGO_HOME:-$HOME/.cargo}=/cargo $target=/target"
    name="$(tr a-z- A-Z_ <<<"$triple")"
    export "CFLAGS_${triple//-/_}=$(printf -- '-ffile-prefix-map=%s ' $homes)"
    export "CARGO_TARGET_${name}_RUSTFLAGS=-C target-feature=+crt-static $(printf -- '--remap-path-prefix=%s ' $homes)"
    [ "$cc" = cc ] || export "CC_${triple//-/_}=$cc" "CARGO_TARGET_${name}_LINKER=$cc"
    cargo build --locked --bin sidebearer --profile "$PROFILE" --target "$triple" \
        --message-format json-render-diagnostics >"$out/context/compiled-$arch.json"
}

program() {
    local arch="$1" triple cc built to
    triple="$(triple "$arch")"
    cc="$(compiler "$triple")"
    command -v "$cc" >/dev/null || die "$cc is missing: install the C compiler for $arch"
    [ -d "$(rustc --print target-libdir --target "$triple")" ] || rustup target add "$triple"
    (compile "$arch" "$triple" "$cc")
    built="$target/$triple/${PROFILE/#dev/debug}/sidebearer"
    to="$out/sidebearer-$version-linux-$arch"
    install -D -m 755 "$built" "$out/context/$arch/sidebearer"
    install -m 755 "$built" "$to"
    cargo metadata --locked --format-version 1 --filter-platform "$triple" \
        | python3 "$here/sbom.py" "$out/context/compiled-$arch.json" "glibc@$(glibc "$cc")=LGPL-2.1-or-later" \
            "rust-std@$(rust)=MIT OR Apache-2.0" >"$to.cdx.json"
}

image() {
    local arch platforms=()
    for arch in $ARCHES; do platforms+=("linux/$arch"); done
    mkdir -p "$out/context/state/lib" "$out/context/state/run"
    # What has the name from before would get further images, or is no list of them.
    buildah manifest rm "$IMAGE:$version" >/dev/null 2>&1 || buildah rmi --force "$IMAGE:$version" >/dev/null 2>&1 || true
    buildah bud --isolation chroot --timestamp "$SOURCE_DATE_EPOCH" --platform "$(IFS=,; echo "${platforms[*]}")" \
        --label org.opencontainers.image.version="$version" --label org.opencontainers.image.licenses=Apache-2.0 \
        --manifest "$IMAGE:$version" --file "$here/Containerfile" "$out/context"
    buildah manifest push --all "$IMAGE:$version" "oci:$out/context/oci:$IMAGE:$version"
    # Packed here, so that the archive has no time of its own in it.
    tar -C "$out/context/oci" -cf "$out/sidebearer-$version.oci.tar" --sort=name --mtime="@$SOURCE_DATE_EPOCH" \
        --owner=0 --group=0 --numeric-owner blobs index.json oci-layout
}

rm -rf "$out"
mkdir -p "$out/context"
for arch in $ARCHES; do program "$arch"; done
image
(cd "$out" && sha256sum sidebearer-* >SHA256SUMS)
echo "image $IMAGE:$version for $ARCHES, in $out:"
ls "$out"
