#!/bin/sh
# Runs SCRIPT in a root made of IMAGE and the directories LOWERS; its changes are written to UPPER. It runs in
# its own mount, pid, uts and net namespaces, so that only UPPER remains. WORK is a scratch directory, SHARE
# is mounted as /run/share.
set -eu
mkdir -p "$WORK/image" "$WORK/root" "$WORK/work" "$UPPER"
mount -t squashfs -o ro,loop "$IMAGE" "$WORK/image"
options=lowerdir=${LOWERS:+$LOWERS:}$WORK/image,upperdir=$UPPER,workdir=$WORK/work
mount -t overlay -o "$options,volatile" overlay "$WORK/root" 2>/dev/null || mount -t overlay -o "$options" overlay "$WORK/root"
cd "$WORK/root"
hostname build
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir run/share run/lock
mount --bind "$SHARE" run/share
mount -t tmpfs -o mode=755 tmpfs dev
for device in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${device%:*}" c 1 "${device#*:}"; done
ln -s /proc/self/fd dev/fd
exec chroot . /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive sh -euc "$SCRIPT"
