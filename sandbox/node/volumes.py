"""A pod's volumes, environment and service-account token, made from what the API holds."""

from __future__ import annotations

import base64
import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sandbox.client import CONFIGMAPS, SECRETS, SERVICEACCOUNTS, Api, ApiError, Kind, Obj
from sandbox.controllers.objects import milli
from sandbox.node.mounts import Mount
from sandbox.node.node_status import ALLOCATABLE

_MODE = 0o644  # of files, unless the volume says otherwise


class NotReady(Exception):
    """A volume or variable cannot be made (yet); the text is kubelet's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine keeps what containers see of it."""

    root: Path  # the machine's directory

    @property
    def kmsg(self) -> Path:
        return self.root / "kmsg"

    @property
    def sysrq(self) -> Path:
        return self.root / "sysrq-trigger"

    @property
    def var_log(self) -> Path:
        return self.root / "var" / "log"

    def pod(self, uid: str) -> Path:
        return self.root / "pods" / uid

    def host_path(self, path: str) -> Path | None:
        """What stands for a path of the host; None: the sandbox has nothing for it."""
        if path == "/dev/kmsg":
            return self.kmsg
        if path == "/proc/sysrq-trigger":
            return self.sysrq
        if path == "/var/log" or path.startswith("/var/log/"):
            return self.var_log / path.removeprefix("/var/log").lstrip("/")
        return None


class Volumes:
    """Makes the volumes of one pod under the machine's directory."""

    def __init__(self, api: Api, place: Place, pod: Obj) -> None:
        self._api, self._place, self._pod = api, place, pod
        self._namespace: str = pod["metadata"]["namespace"]
        self._sources: dict[str, Path] = {}
        self.token_until: float | None = None  # when a service-account token must be renewed, epoch seconds

    async def prepare(self) -> None:
        """Make, or renew, all volumes. Raises `NotReady`."""
        self.token_until = None
        group = (self._pod["spec"].get("securityContext") or {}).get("fsGroup")
        for volume in self._pod["spec"].get("volumes") or []:
            try:
                source = self._sources[volume["name"]] = await self._one(volume)
            except ApiError as missing:
                raise NotReady(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {missing}') from missing
            if group is not None and "hostPath" not in volume:
                _give(source, int(group))

    @property
    def changeable(self) -> list[Obj]:
        """The volumes whose files follow a ConfigMap or Secret."""
        return [v for v in self._pod["spec"].get("volumes") or [] if "configMap" in v or "secret" in v]

    async def refresh(self) -> None:
        """Bring those up to date. Raises `NotReady`, or ApiError: then they stay as they are."""
        for volume in self.changeable:
            await self._one(volume)

    async def _one(self, volume: Obj) -> Path:
        name = volume["name"]
        here: Path = self._place.pod(self._pod["metadata"]["uid"]) / "volumes" / name
        if host := volume.get("hostPath"):
            return self._host(name, host)
        _make(here)
        if "emptyDir" in volume:
            return here
        if source := volume.get("configMap"):
            _follow(here, await self._items(CONFIGMAPS, source, source["name"]), source)
        elif source := volume.get("secret"):
            _follow(here, await self._items(SECRETS, source, source["secretName"]), source)
        elif source := volume.get("downwardAPI"):
            _write(here, self._downward(source), source)
        elif source := volume.get("projected"):
            for part in source.get("sources") or []:
                inner: Obj = next(iter(part.values()), {})
                _write(here, await self._projected(part), {**inner, "defaultMode": source.get("defaultMode", _MODE)})
        else:
            kind = next(iter(volume.keys() - {"name"}), "unnamed")
            raise NotReady(f'MountVolume.SetUp failed for volume "{name}" : the sandbox has no {kind} volumes')
        return here

    def _host(self, name: str, host: Obj) -> Path:
        source = self._place.host_path(host["path"])
        if source is None:
            raise NotReady(
                f'MountVolume.SetUp failed for volume "{name}" : hostPath {host["path"]} does not exist in the sandbox '
                "(it has /dev/kmsg, /proc/sysrq-trigger and /var/log)"
            )
        if host.get("type") == "DirectoryOrCreate":
            source.mkdir(parents=True, exist_ok=True)
        elif host.get("type") == "FileOrCreate" and not source.exists():
            source.touch()
        if not source.exists():
            raise NotReady(f'MountVolume.SetUp failed for volume "{name}" : hostPath type check failed: {host["path"]}')
        return source

    async def _projected(self, part: Obj) -> dict[str, bytes]:
        if source := part.get("serviceAccountToken"):
            return {source["path"]: await self._token(source)}
        if source := part.get("configMap"):
            return await self._items(CONFIGMAPS, source, source["name"])
        if source := part.get("secret"):
            return await self._items(SECRETS, source, source["name"])
        if source := part.get("downwardAPI"):
            return self._downward(source)
        raise NotReady(f"the sandbox has no projected {next(iter(part), 'empty')} volumes")

    async def _token(self, source: Obj) -> bytes:
        meta = self._pod["metadata"]
        wanted: Obj = {"expirationSeconds": int(source.get("expirationSeconds") or 3600)}
        wanted["audiences"] = [source["audience"]] if source.get("audience") else []
        wanted["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        body: Obj = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": wanted}
        account = self._pod["spec"].get("serviceAccountName") or "default"
        answer = await self._api.post(SERVICEACCOUNTS, account, "token", body, self._namespace)
        lifetime = wanted["expirationSeconds"]
        self.token_until = datetime.now(UTC).timestamp() + 0.8 * lifetime
        token: str = answer["status"]["token"]
        return token.encode()

    async def _items(self, kind: Kind, source: Obj, name: str) -> dict[str, bytes]:
        data = await self.data(kind, name, optional=bool(source.get("optional")))
        items = source.get("items")
        if items is None:
            return data
        missing = [item["key"] for item in items if item["key"] not in data]
        if missing and not source.get("optional"):
            raise NotReady(f"references non-existent key: {missing[0]}")
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data}

    async def data(self, kind: Kind, name: str, *, optional: bool) -> dict[str, bytes]:
        """The values of a ConfigMap or Secret."""
        try:
            found = await self._api.get(kind, name, self._namespace)
        except ApiError as error:
            if error.not_found and optional:
                return {}
            raise
        binary = found.get("binaryData") if kind is CONFIGMAPS else found.get("data")
        values = {key: base64.b64decode(value) for key, value in (binary or {}).items()}
        if kind is CONFIGMAPS:
            values |= {key: value.encode() for key, value in (found.get("data") or {}).items()}
        return values

    def _downward(self, source: Obj) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for item in source.get("items") or []:
            if ref := item.get("resourceFieldRef"):
                named = [c for c in self._pod["spec"]["containers"] if c["name"] == ref.get("containerName")]
                if not named:
                    raise NotReady(f"container {ref.get('containerName')!r} of a resourceFieldRef does not exist")
                files[item["path"]] = resource_value(named[0], ref).encode()
            else:
                files[item["path"]] = field_value(self._pod, item["fieldRef"]["fieldPath"], None).encode()
        return files

    def mounts(self, container: Obj) -> tuple[Mount, ...]:
        """What to bind into a container. Raises `NotReady` for what the sandbox does not have."""
        found = []
        for mount in sorted(container.get("volumeMounts") or [], key=lambda mount: str(mount["mountPath"])):
            source = self._sources.get(mount["name"])
            if source is None:
                raise NotReady(f'cannot find volume "{mount["name"]}" to mount into container "{container["name"]}"')
            if mount.get("subPathExpr"):
                raise NotReady(f'the sandbox has no subPathExpr (volume "{mount["name"]}"): use subPath')
            if sub := mount.get("subPath"):
                source /= sub
                if not source.exists():
                    source.mkdir(parents=True)
            found.append(Mount(str(source), mount["mountPath"], bool(mount.get("readOnly"))))
        return tuple(found)


def _make(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o777)  # any user may write, as in an emptyDir


def _give(directory: Path, group: int) -> None:
    """fsGroup: the volume and all in it belongs to the group, and what is made in it will."""
    with contextlib.suppress(OSError):  # in a user namespace there is one group only; the Event NotEnforced says so
        for path in (directory, *directory.rglob("*")):
            os.chown(path, -1, group, follow_symlinks=False)
            if path.is_dir():
                path.chmod(path.stat().st_mode | 0o2770)


def _follow(directory: Path, files: Mapping[str, bytes], source: Obj) -> None:
    """Exactly these files: what the source has lost goes."""
    _write(directory, files, source)
    for path in directory.rglob("*"):
        if path.is_file() and str(path.relative_to(directory)) not in files:
            path.unlink()


def _write(directory: Path, files: Mapping[str, bytes], source: Obj) -> None:
    """Each with its mode: its item's, else the source's `defaultMode`."""
    usual = int(source.get("defaultMode", _MODE))
    modes = {item["path"]: int(item["mode"]) for item in source.get("items") or [] if item.get("mode") is not None}
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and target.read_bytes() == content:
            continue
        fresh = target.with_name(f".{target.name}.new")
        fresh.write_bytes(content)
        fresh.chmod(modes.get(name, usual))
        fresh.replace(target)  # readers see the old or the new, never half


_MAP_FIELD = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


def field_value(pod: Obj, path: str, ip: str | None, host_ip: str = "") -> str:
    """The downward API's fields. Raises `NotReady` for one that does not exist."""
    meta, spec = pod["metadata"], pod["spec"]
    if matched := _MAP_FIELD.fullmatch(path):
        return str((meta.get(matched[1]) or {}).get(matched[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        values = meta.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))
    simple = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": ip or "",
        "status.podIPs": ip or "",
        "status.hostIP": host_ip,
        "status.hostIPs": host_ip,
    }
    if path not in simple:
        raise NotReady(f"unsupported fieldPath: {path}")
    return str(simple[path])


def resource_value(container: Obj, ref: Obj) -> str:
    """The downward API's resources: multiples of the divisor, rounded up; a limit that is not set is the node's."""
    group, _, name = ref["resource"].partition(".")
    resources = container.get("resources") or {}
    quantity = (resources.get(group) or {}).get(name)
    if quantity is None and group == "limits":
        quantity = ALLOCATABLE.get(name)
    divisor = ref.get("divisor") or "1"
    return str(-(-milli(quantity or 0) // (milli(divisor) or 1000)))


@dataclass(frozen=True, slots=True)
class Base:
    """What every container of the pod finds in its environment."""

    pod_ip: str
    host_ip: str
    variables: Mapping[str, str]


async def environment(volumes: Volumes, pod: Obj, container: Obj, base: Base) -> dict[str, str]:
    """A container's environment. Raises `NotReady` with kubelet's words."""
    values = {"PATH": os.environ.get("PATH", os.defpath), "HOSTNAME": pod["metadata"]["name"], **base.variables}
    for source in container.get("envFrom") or []:
        for kind, name in ((CONFIGMAPS, "configMapRef"), (SECRETS, "secretRef")):
            if ref := source.get(name):
                data = await _data(volumes, kind, ref)
                values |= {f"{source.get('prefix', '')}{key}": value.decode() for key, value in data.items()}
    for entry in container.get("env") or []:
        if "valueFrom" in entry:
            value = await _value(volumes, pod, container, entry["valueFrom"], base)
        else:
            value = expand(entry.get("value") or "", values)
        if value is not None:
            values[entry["name"]] = value
    return values


async def _value(volumes: Volumes, pod: Obj, container: Obj, source: Obj, base: Base) -> str | None:
    if ref := source.get("fieldRef"):
        return field_value(pod, ref["fieldPath"], base.pod_ip, base.host_ip)
    if ref := source.get("resourceFieldRef"):
        return resource_value(container, ref)
    for kind, word in ((CONFIGMAPS, "configMapKeyRef"), (SECRETS, "secretKeyRef")):
        if ref := source.get(word):
            data = await _data(volumes, kind, ref)
            if ref["key"] in data:
                return data[ref["key"]].decode()
            if ref.get("optional"):
                return None
            raise NotReady(
                f"couldn't find key {ref['key']} in {kind.kind} {pod['metadata']['namespace']}/{ref['name']}"
            )
    raise NotReady(f"the sandbox has no environment source {next(iter(source), '')}")


async def _data(volumes: Volumes, kind: Kind, ref: Obj) -> dict[str, bytes]:
    try:
        return await volumes.data(kind, ref["name"], optional=bool(ref.get("optional")))
    except ApiError as missing:
        raise NotReady(
            f'{kind.kind.lower()} "{ref["name"]}" not found' if missing.not_found else str(missing)
        ) from missing


_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][\w.-]*)\)")


def expand(text: str, values: Mapping[str, str]) -> str:
    """$(NAME) as Kubernetes expands it; unknown names stay as they are, $$ is a dollar."""
    return _REFERENCE.sub(lambda m: "$" if m[0] == "$$" else values.get(m[1], m[0]), text)
