#!/bin/sh
# Makes a host of the lab what it is for: names, network, sshd, and its share of NFS. Ends by writing
# /run/lab/ready, or /run/lab/failed.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
settings=/opt/godwit/host
# NAME, ROLE, NFS_VERSION, NICS (lines of "LINK-LAYER-ADDRESS NAME MTU ADDRESS BRIDGE"), TAPS ("NAME BRIDGE").
. "$settings/settings"

main() {
    set -eu
    mount -t tmpfs tmp /tmp
    mkdir -p /run/sshd /run/godwit /run/lock /dev/pts /dev/shm
    mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs shm /dev/shm
    chmod 1777 /tmp /dev/shm
    ln -sf /proc/self/fd /dev/fd

    hostname "$NAME"
    cp "$settings/hosts" /etc/hosts
    echo "$NAME" >/etc/hostname
    cp "$settings/machine-id" /etc/machine-id
    : >/etc/fstab

    network
    install -d -m 700 /root/.ssh
    install -m 600 "$settings/authorized_keys" /root/.ssh/authorized_keys
    install -m 600 "$settings/host_key" /etc/ssh/lab_host_key
    /usr/sbin/sshd -f "$settings/sshd_config"
    "$ROLE"
}

network() {
    modprobe -a virtio_net virtio_rng bridge tun
    ip link set lo up
    # A bridge, or a host's own link, answers ARP only for the addresses it has.
    sysctl -q net.ipv4.conf.all.arp_ignore=1
    echo "$NICS" | while read -r mac nic mtu address bridge; do
        device=$(ip -o link | grep -F "$mac" | cut -d' ' -f2 | tr -d ':')
        ip link set "$device" name "$nic" mtu "$mtu"
        if [ "$bridge" != - ]; then
            # No spanning tree and no delay, so that a tap forwards at once.
            ip link add "$bridge" type bridge stp_state 0 forward_delay 0 mcast_snooping 0
            ip link set "$bridge" up
            ip link set "$nic" master "$bridge"
        fi
        ip link set "$nic" up
        [ "$address" = - ] || ip address add "$address/24" dev "$nic"
    done
    echo "$TAPS" | while read -r tap bridge; do
        [ -n "$tap" ] || continue
        ip tuntap add "$tap" mode tap vnet_hdr
        ip link set "$tap" master "$bridge"
        ip link set "$tap" up
    done
}

# Shared storage: the kernel's NFS server on a disk of its own. The root cannot be exported, as no server can give
# file handles for an overlay; so the disk is NFSv4's root (fsid=0), holds the path that clients know, and is bound there
# on this host, too, for NFSv3.
storage() {
    modprobe -a virtio_blk ext4 nfsd lockd
    mkdir -p /export /srv/godwit
    mount -t ext4 /dev/vda /export
    mount --bind /export/srv/godwit /srv/godwit
    mount -t nfsd nfsd /proc/fs/nfsd
    mkdir -p /run/rpc_pipefs /run/rpcbind /var/lib/nfs/sm /var/lib/nfs/v4recovery
    mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs
    # The shortest that the kernel takes: locks and opens wait this long for clients after a restart, those of NFSv4 for
    # both.
    echo 10 >/proc/fs/nfsd/nfsv4leasetime
    echo 10 >/proc/fs/nfsd/nfsv4gracetime
    echo 10 >/proc/sys/fs/nfs/nlm_grace_period
    rpcbind -w
    rpc.statd --no-notify
    nfsdcld || true
    options=rw,sync,no_root_squash,no_subtree_check
    echo "/export 10.92.0.0/24($options,fsid=0)" >/etc/exports
    echo "/srv/godwit 10.92.0.0/24($options)" >>/etc/exports
    exportfs -ra
    rpc.nfsd 8
    rpc.mountd
}

# Runs machines.
kvm() {
    modprobe -a kvm-amd nfsv4
    [ -c /dev/kvm ] || { echo "no /dev/kvm" >&2; exit 1; }
    if [ "$NFS_VERSION" = 3 ]; then
        modprobe nfsv3
        rpcbind -w
        rpc.statd --no-notify
    fi
    mkdir -p /srv/godwit
    mount -t nfs -o "vers=$NFS_VERSION,hard,proto=tcp" storage:/srv/godwit /srv/godwit
    # Until locks can be had.
    flock --shared /srv/godwit/fw1/vmlinuz true
}

mount -t tmpfs run /run
mkdir -p /run/lab
# The subshell is no condition, in which `set -e` would mean nothing.
(main) 2>/run/lab/boot.log
if [ $? = 0 ]; then
    echo "lab: $NAME is ready" >/dev/console
    cut -d' ' -f1 /proc/uptime >/run/lab/ready
else
    cat /run/lab/boot.log >/dev/console
    mv /run/lab/boot.log /run/lab/failed
fi
