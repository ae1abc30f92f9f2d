#!/bin/sh
# The guest's init: makes a root that can be written to out of the shared one, mounts what a machine has mounted, and goes on with
# run.sh, under systemd if so asked.
#
#   init.sh MODULES JOB REPOSITORY plain|systemd [POLICY]     as `machine.py` gives them on the kernel's command line; paths of the shared root
#
# Written for few processes, since each costs 30 ms under emulation. When it fails the kernel panics, QEMU ends, and the caller shows this console.
set -eu
modules=$1 job=$2 repository=$3 kind=$4 policy=${5-}
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

mount -t proc proc /proc
read -r release </proc/sys/kernel/osrelease
insmod "$modules/$release/kernel/fs/overlayfs/overlay.ko"
insmod "$modules/$release/kernel/drivers/block/virtio_blk.ko"
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/whole /mnt/disk
tar -xf "$job/project.tar" -C /mnt/upper
mount -t overlay -o "lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work" overlay /mnt/root
mount --bind /mnt/root /mnt/whole
umount /proc

cd /mnt/root
mkdir -p usr/lib/modules
# The kernel loads the rest of its modules from here by itself, when they are asked for.
mount --bind "$modules" usr/lib/modules
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
mount -t securityfs -o nosuid,nodev,noexec securityfs sys/kernel/security
mount -t devtmpfs -o nosuid,mode=755 devtmpfs dev
mkdir dev/pts dev/shm dev/mqueue
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs dev/shm
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs run
# An overlay cannot be another one's upper layer: containers are made on a file system like a node's, empty at the start.
mount -t ext4 dev/vda /mnt/disk
mkdir /mnt/disk/tmp /mnt/disk/var-tmp /mnt/disk/var-lib /mnt/disk/var-lib/systemd
chmod 1777 /mnt/disk/tmp /mnt/disk/var-tmp
mount --bind /mnt/disk/tmp tmp
mount --bind /mnt/disk/var-tmp var/tmp
mount --bind /mnt/disk/var-lib var/lib
umount /mnt/disk
# The project may be in one of these.
if [ ! -d ".$repository" ]; then
    mkdir -p ".$repository"
    mount --bind "/mnt/whole$repository" ".$repository"
fi
mkdir -p run/lock
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
: >etc/fstab
printf 'tare-guest\n' >etc/hostname
pivot_root . mnt
cd /
umount /mnt/mnt/whole
# From here on the shared root is /mnt.
job=/mnt$job here=/mnt$repository/scripts/vm
# What others keep in /var/lib is there to be read. Tare's own is not, so that tests begin without; nor what skopeo keeps, a database that the
# node's may be writing to.
set --
for entry in /mnt/var/lib/*; do
    case $entry in
        */tare* | */systemd | */containers) ;;
        *) set -- "$@" "$entry" ;;
    esac
done
ln -s "$@" var/lib/
ulimit -Hn 524288

if [ "$policy" ]; then
    # Under systemd, that loads it. All that runs is in the kernel's domain then, and files have no labels but what a mount gives them.
    mount --bind "/mnt$policy" /etc/selinux
    [ "$kind" = systemd ] || load_policy -i
fi

case $kind in
    plain)
        printf 'tare-guest\n' >/proc/sys/kernel/hostname
        mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
        mount -t mqueue mqueue /dev/mqueue
        ip link set lo up
        exec /bin/sh "$here/run.sh" "$job"
        ;;
    systemd)
        units=/run/systemd/system
        mkdir -p "$units"
        cat >"$units/tare-guest.service" <<UNIT
[Unit]
Description=What the guest was booted for
Requires=dbus.socket
After=dbus.socket basic.target

[Service]
Type=oneshot
ExecStart=/bin/sh $here/run.sh $job
Environment=PATH=$PATH HOME=$HOME LANG=$LANG
TimeoutStartSec=infinity
Delegate=yes
UNIT
        # What this machine's installed packages would start by themselves has no place in the guest.
        for unit in timers.target systemd-timesyncd.service systemd-journal-flush.service systemd-firstboot.service; do
            ln -s /dev/null "$units/$unit"
        done
        exec /lib/systemd/systemd --unit=tare-guest.service --show-status=yes
        ;;
esac
