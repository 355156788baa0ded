#!/usr/bin/env bash
# N separate Linux hosts on one machine, for real launches over several hosts.
#
#   hosts.sh up N [SLOTS]    make N hosts with SLOTS (1) in the hostfile for each; those of an earlier `up` are removed
#   hosts.sh down            remove every trace of them; nothing happens without any
#   hosts.sh reap PID        wait for the end of process PID, then down: also a killed test session leaves nothing
#   hosts.sh status          one line a host; exit code 0 only if all are up
#   hosts.sh run I CMD...    run CMD on host I, in this folder and with these variables; its exit code
#   hosts.sh pids I          the processes on host I, by their ids on this machine
#   hosts.sh link I up|down  plug or pull the network cable of host I
#   hosts.sh crash I         power host I off: the cable first, so that no FIN or RST leaves it, then kill all
#   hosts.sh boot I          switch it on again, with the same address and keys
#
# A host has its own network (eth0 with HOSTS_NET.I on a bridge that is in a namespace too, so this machine's network
# gets nothing), hostname, process ids (a `pkill -f` run there sees only that host), /dev/shm, /run, /etc/hosts and
# /etc/ssh, and an sshd as process 1. All other files are shared, as over NFS. Keys, hostfile and logs are in
# ${TMPDIR:-/tmp}/vidcls-hosts-$HOSTS_PREFIX. Needs root, iproute2, util-linux and openssh-server.
set -euo pipefail

: "${HOSTS_PREFIX:?host names are HOSTS_PREFIX1, HOSTS_PREFIX2 ...; another prefix is another set of hosts}"
HOSTS_NET=${HOSTS_NET:-10.77.0}      # a /24, only ever seen inside of the namespaces
STATE=${TMPDIR:-/tmp}/vidcls-hosts-$HOSTS_PREFIX
SWITCH=$HOSTS_PREFIX-sw              # the namespace that holds the bridge
READY_SECONDS=15

die() { echo "hosts.sh: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "needs root"
[[ $HOSTS_PREFIX =~ ^[a-z]{1,8}$ ]] || die "HOSTS_PREFIX: 1 to 8 letters a to z, not '$HOSTS_PREFIX'"
for program in ip nsenter unshare ssh-keygen flock; do command -v $program >/dev/null || die "no $program here"; done
SSHD=$(command -v sshd || echo /usr/sbin/sshd)
[ -x "$SSHD" ] || die "no sshd here (openssh-server)"

exists() { ip netns list | awk '{print $1}' | grep -qx "$1"; }
names() { ip netns list | awk '{print $1}' | grep -E "^${HOSTS_PREFIX}[0-9]+$" | sort -V || true; }

first_process() { # the sshd that is process 1 in the PID namespace of host $1
  local pid
  for pid in $(ip netns pids "$1" 2>/dev/null); do
    [ "$(awk '/^NSpid/ {print (NF > 2 ? $NF : 0)}' "/proc/$pid/status" 2>/dev/null)" = 1 ] && { echo "$pid"; return; }
  done
  return 1
}

kill_all() { # every process in one of our own namespaces, by its id, until none is left
  local left pid
  for _ in $(seq 100); do
    left=$(ip netns pids "$1" 2>/dev/null || true)
    [ -n "$left" ] || return 0
    for pid in $left; do kill -9 "$pid" 2>/dev/null || true; done
    sleep 0.05
  done
  die "processes on $1 will not die: $left"
}

on() { # run a command on host $1
  local first
  first=$(first_process "$1") || die "$1 is not up"
  shift
  exec nsenter -t "$first" -m -u -i -n -p --wd="$PWD" -- "$@"
}

boot() {
  local name=$1 number=${1#"$HOSTS_PREFIX"} try
  ip -n "$SWITCH" link set "p$number" up
  # `ip netns exec` lays /etc/netns/NAME over /etc; the rest of what a host has of its own comes from unshare.
  setsid ip netns exec "$name" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    /bin/sh -c 'hostname "$1"; mount -t tmpfs -o mode=1777,size=2g shm /dev/shm
                mount -t tmpfs -o mode=755 run /run; mkdir -p /run/sshd /run/lock
                exec "$2" -D -e -f /etc/ssh/sshd_config' sh "$name" "$SSHD" \
    </dev/null >>"$STATE/$name.log" 2>&1 9>&- &
  disown
  for try in $(seq $((READY_SECONDS * 20))); do
    ip netns exec "$name" bash -c "exec 3<>/dev/tcp/$HOSTS_NET.$number/22" 2>/dev/null && return 0
    sleep 0.05
  done
  tail -5 "$STATE/$name.log" >&2
  die "sshd on $name does not answer after $READY_SECONDS s"
}

write_ssh_config() { # of host $1 with address $2
  mkdir -p "/etc/netns/$1/ssh"
  cat >"/etc/netns/$1/ssh/sshd_config" <<END
ListenAddress $2
HostKey $STATE/$1.hostkey
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile $STATE/id.pub
StrictModes no
MaxStartups 100:30:200
AcceptEnv none
END
  cat >"/etc/netns/$1/ssh/ssh_config" <<END
Host $HOSTS_PREFIX* $HOSTS_NET.*
  User root
  IdentityFile $STATE/id
  IdentitiesOnly yes
  UserKnownHostsFile $STATE/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
END
}

up() {
  local count=$1 slots=$2 i name
  [[ $count =~ ^[0-9]+$ ]] && [ "$count" -ge 1 ] && [ "$count" -le 64 ] || die "up N, with N from 1 to 64"
  down
  mkdir -p "$STATE"
  chmod 700 "$STATE"
  trap 'trap - EXIT; echo "hosts.sh: no hosts, removing what was made" >&2; down' EXIT
  ssh-keygen -q -t ed25519 -N '' -C user -f "$STATE/id"
  ip netns add "$SWITCH"
  ip -n "$SWITCH" link add br0 type bridge
  ip -n "$SWITCH" link set br0 up
  ip -n "$SWITCH" link set lo up
  {
    echo "127.0.0.1 localhost"
    for i in $(seq "$count"); do echo "$HOSTS_NET.$i $HOSTS_PREFIX$i"; done
  } >"$STATE/hosts"
  for i in $(seq "$count"); do
    name=$HOSTS_PREFIX$i
    ssh-keygen -q -t ed25519 -N '' -C "$name" -f "$STATE/$name.hostkey"
    echo "$name,$HOSTS_NET.$i $(cut -d' ' -f1,2 "$STATE/$name.hostkey.pub")" >>"$STATE/known_hosts"
    write_ssh_config "$name" "$HOSTS_NET.$i"
    cp "$STATE/hosts" "/etc/netns/$name/hosts"
    ip netns add "$name"
    ip link add eth0 netns "$name" type veth peer name "p$i" netns "$SWITCH"
    ip -n "$SWITCH" link set "p$i" master br0 up
    ip -n "$name" link set lo up
    ip -n "$name" addr add "$HOSTS_NET.$i/24" dev eth0
    ip -n "$name" link set eth0 up
    echo "$name slots=$slots" >>"$STATE/hostfile"
  done
  for i in $(seq "$count"); do boot "$HOSTS_PREFIX$i"; done
  trap - EXIT
}

down() {
  local all name
  all="$(names) $(exists "$SWITCH" && echo "$SWITCH" || true)"
  for name in $all; do kill_all "$name"; done
  for name in $all; do ip netns del "$name"; done
  for name in /etc/netns/"$HOSTS_PREFIX"[0-9]*; do
    [[ ${name##*/} =~ ^${HOSTS_PREFIX}[0-9]+$ ]] && rm -rf "$name"
  done
  rmdir /etc/netns 2>/dev/null || true
  rm -rf "$STATE"
}

status() {
  local name first bad=0
  [ -n "$(names)" ] || { echo "no hosts"; return 1; }
  for name in $(names); do
    if first=$(first_process "$name"); then
      echo "$name up, process 1 is $first, $(ip netns pids "$name" | wc -l) processes"
    else
      echo "$name DOWN"
      bad=1
    fi
  done
  return $bad
}

command=${1:-}
shift || true
case $command in
  up | down) # one at a time
    exec 9<"$(dirname "$STATE")"
    flock -w 60 9 || die "another hosts.sh holds the lock"
    ;;
esac
case $command in
  up) up "${1:?up N [SLOTS]}" "${2:-1}" ;;
  down) down ;;
  reap)
    tail --pid="${1:?reap PID}" -f /dev/null
    exec bash "$0" down
    ;;
  status) status ;;
  run)
    number=${1:?run I CMD...}
    shift
    on "$HOSTS_PREFIX$number" "$@"
    ;;
  pids) ip netns pids "$HOSTS_PREFIX${1:?pids I}" ;;
  link) ip -n "$SWITCH" link set "p${1:?link I up|down}" "${2:?link I up|down}" ;;
  crash)
    ip -n "$SWITCH" link set "p${1:?crash I}" down
    kill_all "$HOSTS_PREFIX$1"
    ;;
  boot) first_process "$HOSTS_PREFIX${1:?boot I}" >/dev/null || boot "$HOSTS_PREFIX$1" ;;
  *)
    sed -n '2,18p' "$0"
    exit 2
    ;;
esac
