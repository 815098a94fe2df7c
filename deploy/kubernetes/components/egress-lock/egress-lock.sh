#!/bin/sh
# Closes a network namespace to everybody in it but the sidecar: agents reach this machine's own addresses and, by the sidecar,
# what its `unmatched: deny` leaves of the world.
#
# Run once as root with NET_ADMIN in the namespace to be locked, before the agents start; again changes nothing. It fails
# unless every rule stands, so that what waits for it does not start. Its settings are variables:
#
#   SIDECAR_UID       who may go out; 2102 when unset. No agent may have this uid, or be able to take it
#   AGENT_UIDS        who may not, as `1000 1001`; everybody else when unset
#   PROXY_YAML        the sidecar's configuration, refused unless it says `unmatched: deny`; not looked at when unset
#   DNS               name servers that they may ask, as `10.96.0.10 fd00::a`, or `resolv.conf` for those of that file
#   TRANSPARENT_PORT  the port of `transparent` in proxy.yaml, 127.0.0.1 and [::1], where their connections are led
#   REDIRECT_PORTS    which connections; `80,443` when unset
set -eu

SIDECAR_UID=${SIDECAR_UID:-2102}
AGENT_UIDS=${AGENT_UIDS:-}
PROXY_YAML=${PROXY_YAML:-}
DNS=${DNS:-}
TRANSPARENT_PORT=${TRANSPARENT_PORT:-}
REDIRECT_PORTS=${REDIRECT_PORTS:-80,443}
# What no process has sent: the kernel's own answers, and the last words of sockets that are closed.
NOBODY='-m owner ! --uid-owner 0-4294967294'

say() { printf 'egress-lock: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# The first variant that works here: which of them do is the kernel's affair.
working() {
    for tool in "$1" "$1-nft" "$1-legacy"; do
        if "$tool" -w 10 -t filter -n -L OUTPUT >/dev/null 2>&1; then
            echo "$tool"
            return
        fi
    done
    return 1
}

name_servers() {
    case $DNS in
        resolv.conf) sed -n 's/^nameserver[[:space:]]\{1,\}\([^[:space:]%]*\).*/\1/p' /etc/resolv.conf ;;
        *) for server in $DNS; do echo "$server"; done ;;
    esac
}

# Rules of the filter table, for IPv4 or IPv6.
lock() {
    echo "*filter"
    echo ":SIDEBEARER - [0:0]"
    echo "-A SIDEBEARER -m owner --uid-owner $SIDECAR_UID -j RETURN"
    echo "-A SIDEBEARER -o lo -j RETURN"
    # A redirected connection has been given its way out before: it still names that interface.
    [ -z "$TRANSPARENT_PORT" ] ||
        echo "-A SIDEBEARER -p tcp -d $here --dport $TRANSPARENT_PORT -m conntrack --ctstate DNAT -j RETURN"
    # Answers to who came from outside, as probes do. What an agent has begun itself is none of them.
    echo "-A SIDEBEARER -m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN"
    echo "-A SIDEBEARER $NOBODY -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
    # Without its neighbours nobody is reached over IPv6 (RFC 4861), the sidecar neither. The kernel asks for them itself.
    [ "$family" = 4 ] || for type in 133 134 135 136 143; do
        echo "-A SIDEBEARER $NOBODY -p icmpv6 --icmpv6-type $type -j RETURN"
    done
    name_servers | while read -r server; do
        case $server in
            *[!0-9a-fA-F.:]*) die "\`$server\` is not the address of a name server" ;;
            *:*) [ "$family" = 6 ] || continue ;;
            *) [ "$family" = 4 ] || continue ;;
        esac
        echo "-A SIDEBEARER -p udp -d $server --dport 53 -j RETURN"
        echo "-A SIDEBEARER -p tcp -d $server --dport 53 -j RETURN"
    done
    for who in ${AGENT_UIDS:-everybody}; do
        if [ "$who" = everybody ]; then owner=""; else owner="-m owner --uid-owner $who"; fi
        echo "-A SIDEBEARER $owner -p tcp -j REJECT --reject-with tcp-reset"
        echo "-A SIDEBEARER $owner -j REJECT --reject-with $prohibited"
    done
    echo "COMMIT"
}

# Rules of the nat table.
redirect() {
    echo "*nat"
    echo ":SIDEBEARER - [0:0]"
    echo "-A SIDEBEARER -m owner --uid-owner $SIDECAR_UID -j RETURN"
    echo "-A SIDEBEARER -o lo -j RETURN"
    for who in ${AGENT_UIDS:-everybody}; do
        if [ "$who" = everybody ]; then owner=""; else owner="-m owner --uid-owner $who"; fi
        echo "-A SIDEBEARER $owner -p tcp -m multiport --dports $REDIRECT_PORTS -j REDIRECT --to-ports $TRANSPARENT_PORT"
    done
    echo "COMMIT"
}

# All rules of a table at once, and then the jump to them, before any other.
install() {
    table=$1
    "$tables-restore" -w 10 --noflush || return 1
    "$tables" -w 10 -t "$table" -C OUTPUT -j SIDEBEARER 2>/dev/null ||
        "$tables" -w 10 -t "$table" -I OUTPUT 1 -j SIDEBEARER
}

close() {
    family=$1 here=$2 prohibited=$3
    rules=$(lock)
    echo "$rules" | install filter || die "the rules for IPv$family could not be installed: does the container have NET_ADMIN?"
    [ -n "$TRANSPARENT_PORT" ] || return 0
    redirect | install nat && return
    [ "$family" = 6 ] || die "connections cannot be redirected here; without TRANSPARENT_PORT they are only refused"
    say "IPv6 connections cannot be redirected here: they are refused, and agents use IPv4"
}

# Also where it is off: an interface may have it while `all` says otherwise, and another may get it later.
has_ipv6() { [ -e /proc/net/if_inet6 ] || grep -qsx 0 /proc/sys/net/ipv6/conf/*/disable_ipv6; }

# Otherwise agents go wherever they like, by asking the sidecar.
denies_strangers() { grep -Eq '^unmatched:[[:space:]]+deny[[:space:]]*(#.*)?$' "$PROXY_YAML"; }

for number in $SIDECAR_UID $AGENT_UIDS $TRANSPARENT_PORT; do
    case $number in *[!0-9]*) die "\`$number\` is not a number" ;; esac
done
case $REDIRECT_PORTS in *[!0-9,]*) die "REDIRECT_PORTS are numbers with commas: \`80,443\`" ;; esac
[ "$SIDECAR_UID" != 0 ] || die "the sidecar runs as root, and so could the agent: give it a uid of its own"
for agent in $AGENT_UIDS; do
    [ "$agent" != "$SIDECAR_UID" ] || die "the agent has the sidecar's uid $agent: rules cannot tell them apart"
done
[ -z "$PROXY_YAML" ] || denies_strangers ||
    die "$PROXY_YAML does not say \`unmatched: deny\`: the sidecar would take agents wherever they ask to go"

# IPv6 first: what is locked halfway is not left open by the other half.
if has_ipv6; then
    tables=$(working ip6tables) || die "there is IPv6 and no ip6tables that works: agents would go out by it"
    close 6 ::1 icmp6-adm-prohibited
fi
tables=$(working iptables) || die "there is no iptables that works: run it in an image that has one, with NET_ADMIN"
close 4 127.0.0.1 icmp-admin-prohibited
say "locked: only uid $SIDECAR_UID goes out${TRANSPARENT_PORT:+, and connections to $REDIRECT_PORTS are led to port $TRANSPARENT_PORT}"
