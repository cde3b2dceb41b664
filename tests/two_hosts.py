"""Two "hosts" on this machine: network namespaces with names, addresses and a hosts file each, joined by a link.

    with two_hosts(debian=True) as hosts:
        first = hosts.start(0, ["bash", "launch/multinode.sh", ...], cwd=folder, env=variables)

Needs root and iproute2. `debian`: the hosts file gives a host's own name the loopback address 127.0.1.1, as Debian and
Ubuntu do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("nodea", "nodeb")
ADDRESSES = ("10.213.48.1", "10.213.48.2")
WHY_NOT = "network namespaces need root and iproute2 (ip, unshare)"


def possible() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"lpt-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Hosts:
    """`keys` is a folder that stands in for ~/.ssh on both hosts, where they run sshd; `second` is what a shell does
    first on the second one, to what that one sees."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    keys: Path | None = None
    second: str = ":"

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host; `options` are those of Popen."""
        own = f'mkdir -p "$HOME"/.ssh; mount --bind {self.keys} "$HOME"/.ssh; ' if self.keys is not None else ""
        own += f"{self.second}; " * host
        inside = ["sh", "-c", f'{own}hostname {NAMES[host]}; exec "$@"', "sh", *command]
        start = ["ip", "netns", "exec", self.namespaces[host], "unshare", "--uts", "--mount", *inside]
        return subprocess.Popen(start, text=True, **options)

    def cut(self, host: int) -> None:
        """The host disappears from the network."""
        _ip("-n", self.namespaces[host], "link", "set", self.interfaces[host], "down")


@contextlib.contextmanager
def two_hosts(debian: bool = False, ssh: Path | None = None, second: str = ":") -> Iterator[Hosts]:
    """`ssh` is a folder for keys: then both hosts run sshd, and reach each other without a password. `second` is a
    command that a shell runs before all others on the second host: a mount, say, that only that one sees."""
    of_run = f"lpt-{os.getpid()}"
    keys = None if ssh is None else ssh / "keys"
    hosts = Hosts((f"{of_run}-a", f"{of_run}-b"), (f"lpa{os.getpid()}", f"lpb{os.getpid()}"), keys, second)
    try:
        for namespace, name in zip(hosts.namespaces, NAMES, strict=True):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
            own = [f"127.0.1.1 {name}"] if debian else []
            others = [one for one in zip(ADDRESSES, NAMES, strict=True) if not debian or one[1] != name]
            known = [f"{address} {other}" for address, other in others]
            folder = Path("/etc/netns") / namespace  # `ip netns exec` lays it over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *own, *known]) + "\n")
        first, second = hosts.namespaces
        ends = [hosts.interfaces[0], "netns", first, "type", "veth", "peer", "name", hosts.interfaces[1]]
        _ip("link", "add", *ends, "netns", second)
        for namespace, interface, address in zip(hosts.namespaces, hosts.interfaces, ADDRESSES, strict=True):
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
            _ip("-n", namespace, "link", "set", interface, "up")
        if ssh is not None:
            _start_sshd(hosts, ssh)
        yield hosts
    finally:
        for namespace in hosts.namespaces:
            inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
            for pid in inside:  # started here, and still there
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _start_sshd(hosts: Hosts, folder: Path) -> None:
    """An sshd on every host, which ends with its namespace."""
    assert hosts.keys is not None
    hosts.keys.mkdir(mode=0o700)
    for name in (folder / "host_key", hosts.keys / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(name)], check=True)
    shutil.copy(hosts.keys / "id_ed25519.pub", hosts.keys / "authorized_keys")
    quiet = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    (hosts.keys / "config").write_text(quiet)
    lines = [f"HostKey {folder / 'host_key'}", f"AuthorizedKeysFile {hosts.keys / 'authorized_keys'}", "PidFile none"]
    lines += ["StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no", "UsePAM no"]
    (folder / "sshd.conf").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    for host in (0, 1):
        hosts.start(
            host, ["/usr/sbin/sshd", "-D", "-f", str(folder / "sshd.conf"), "-E", str(folder / f"sshd-{host}.log")]
        )
    time.sleep(1)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
