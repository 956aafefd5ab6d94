#!/bin/sh
# Makes a plain Debian tree ($1) the firewall machine `fw1`: names, network, consoles, and the unit of the program
# that works in it. Everything else is as Debian ships it.
set -eu
root=$1

echo fw1 >"$root/etc/hostname"
cat >"$root/etc/hosts" <<END
127.0.0.1 localhost
127.0.1.1 fw1
END
cat >"$root/etc/fstab" <<END
/dev/vda / ext4 rw,errors=remount-ro 0 1
END
# Made anew at first boot.
: >"$root/etc/machine-id"

# Two network cards, told apart by their addresses.
cat >"$root/etc/systemd/network/10-public.network" <<END
[Match]
MACAddress=52:54:00:90:00:10
[Network]
Address=10.90.0.10/24
Address=fd90::10/64
IPv6AcceptRA=no
END
cat >"$root/etc/systemd/network/10-private.network" <<END
[Match]
MACAddress=52:54:00:91:00:10
[Network]
Address=10.91.0.1/24
Address=fd91::1/64
IPv6AcceptRA=no
END
cat >"$root/etc/sysctl.d/50-forward.conf" <<END
net.ipv4.ip_forward = 1
net.ipv6.conf.all.forwarding = 1
END

# The serial console logs root in, to look around. It is reached only through the host's serial option.
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
cat >"$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<END
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I linux
END

cat >"$root/etc/systemd/system/lab-guest.service" <<END
[Unit]
Description=The program that works while the machine moves
ConditionFileIsExecutable=/usr/local/bin/lab-guest
After=systemd-networkd.service
[Service]
ExecStart=/usr/local/bin/lab-guest
StandardOutput=journal+console
[Install]
WantedBy=multi-user.target
END

systemctl --root="$root" --quiet enable systemd-networkd.service lab-guest.service serial-getty@ttyS0.service
# Work that is none of this machine's, and slow where processors are emulated.
systemctl --root="$root" --quiet mask \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer systemd-networkd-wait-online.service getty@tty1.service

# Kernel and initrd as the package made them, at names that do not change.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
