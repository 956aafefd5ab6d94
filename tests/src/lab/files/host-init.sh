#!/bin/busybox sh
# The first program of a host of the lab: finds its root (the tree all hosts share, read only, under a file system in
# memory that takes what is written) and hands over to busybox's init there.
export PATH=/bin
/bin/busybox mkdir -p /dev /proc /sys /tree /over /new
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

fail() {
    echo "lab: $1" >/dev/console
    poweroff -f
}

while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
done </modules/order

options=trans=virtio,version=9p2000.L,msize=262144
mount -t 9p -o "ro,$options,cache=loose" tree /tree || fail "no tree"
mount -t tmpfs over /over
mkdir /over/changed /over/work
mount -t overlay -o lowerdir=/tree,upperdir=/over/changed,workdir=/over/work root /new || fail "no root"
# These two change while the host runs.
mkdir -p /new/opt/godwit/bin /new/opt/godwit/host
mount -t 9p -o "ro,$options,cache=mmap" bin /new/opt/godwit/bin || fail "no programs"
mount -t 9p -o "ro,$options,cache=mmap" host /new/opt/godwit/host || fail "no settings"

for directory in dev proc sys; do mount --move "/$directory" "/new/$directory"; done
echo '::sysinit:/bin/sh /opt/godwit/host/boot' >/new/etc/inittab
exec switch_root /new /bin/busybox init
