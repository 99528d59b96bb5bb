#!/bin/sh
# PID 1 of a new container until that container's own init takes over: mounts what it needs, then becomes it.
# Started by launcher.py in new net, uts, ipc, mount, pid and cgroup namespaces. Standard input: one line once
# the network cards are there. Standard output: "ready" once the namespaces are, "mounted" at the end. Standard
# error: the console.
#   ROOT      mount point of the new root         NAME     host name
#   IMAGES    loop devices of squashfs images     LOWERS   directories above them, topmost first
#   UPPER, WORK   the overlay's writable side     BINDS    file of lines: ro|rw source target
#   DEVICES   further nodes: name:c|b:major:minor:mode
set -eu
echo ready

hostname "$NAME"
lower=$LOWERS
number=0
for device in $IMAGES; do
    mkdir -p "$ROOT.image$number"
    mount -t squashfs -o ro,nodev "$device" "$ROOT.image$number"
    lower=${lower:+$lower:}$ROOT.image$number
    number=$((number + 1))
done
# Nothing of a lab has to survive a power cut, so nothing is synced (volatile) where the kernel can.
options=lowerdir=$lower,upperdir=$UPPER,workdir=$WORK
mount -t overlay -o "$options,volatile" overlay "$ROOT" 2>/dev/null || mount -t overlay -o "$options" overlay "$ROOT"
cd "$ROOT"

mount -t proc -o nosuid,nodev,noexec proc proc
# Only the network's part of /proc/sys belongs to this container, the rest is the machine's.
mount --bind proc/sys proc/sys
mount --bind proc/sys/net proc/sys/net
mount -o remount,bind,ro proc/sys
if [ -e proc/sysrq-trigger ]; then
    mount --bind proc/sysrq-trigger proc/sysrq-trigger
    mount -o remount,bind,ro proc/sysrq-trigger
fi
# Likewise /sys. Read-only, it tells networkd and udev not to wait for device events.
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
mount --bind sys/devices/virtual/net sys/devices/virtual/net
mount -o remount,bind,ro sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=755,nosuid tmpfs dev
mkdir dev/pts dev/shm dev/net dev/virtio-ports
for device in null:c:1:3:666 zero:c:1:5:666 full:c:1:7:666 random:c:1:8:666 urandom:c:1:9:666 tty:c:5:0:666 \
    net/tun:c:10:200:666 fuse:c:10:229:666 loop-control:c:10:237:660 $DEVICES; do
    IFS=: read -r name kind major minor mode <<END
$device
END
    mknod -m "$mode" "dev/$name" "$kind" "$major" "$minor"
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm

while read -r access source target; do
    if [ -d "$source" ]; then
        mkdir -p "$ROOT$target"
    elif [ ! -e "$ROOT$target" ]; then
        mkdir -p "$(dirname "$ROOT$target")"
        : >"$ROOT$target"
    fi
    mount --bind "$source" "$ROOT$target"
    [ "$access" = rw ] || mount -o remount,bind,ro "$ROOT$target"
done <"$BINDS"

read -r go
[ "$go" = go ]
mkdir run/.old
echo mounted
exec </dev/null >&2
pivot_root . run/.old
cd /
# What belongs to the whole machine stays out of reach: its clock, its kernel's modules.
exec setpriv --bounding-set=-sys_time,-sys_module \
    /usr/bin/env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /bin/sh -c 'umount -l /run/.old && rmdir /run/.old && exec /sbin/init'
