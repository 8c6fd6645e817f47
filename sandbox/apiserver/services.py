"""Services: cluster IPs from 10.96.0.0/16, node ports from 30000–32767."""

from __future__ import annotations

import ipaddress
import secrets
from typing import TYPE_CHECKING

import orjson

from sandbox.apiserver import errors
from sandbox.client import ApiError, Obj

if TYPE_CHECKING:
    from sandbox.apiserver.core import Core

RANGE = ipaddress.ip_network("10.96.0.0/16")
API_SERVER_IP = "10.96.0.1"
NODE_PORTS = range(30000, 32768)


def _others(core: Core, obj: Obj) -> list[Obj]:
    me = (obj["metadata"]["namespace"], obj["metadata"]["name"])
    return [
        stored.obj["spec"]
        for stored in core.store.list("services")
        if (stored.obj["metadata"]["namespace"], stored.obj["metadata"]["name"]) != me
    ]


def allocate(core: Core, obj: Obj, old: Obj | None) -> None:
    spec = obj["spec"]
    if spec["type"] == "ExternalName":
        for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"):
            spec.pop(key, None)
        return
    others = _others(core, obj)
    address = spec.get("clusterIP")
    if not address:
        taken = {other.get("clusterIP") for other in others} | {API_SERVER_IP}
        while not address or address in taken:
            address = str(RANGE[secrets.randbelow(RANGE.num_addresses - 512) + 256])
        spec["clusterIP"] = address
    elif address not in ("None", API_SERVER_IP) and (old is None or old["spec"].get("clusterIP") != address):
        _check_address(obj, address, others)
    spec["clusterIPs"] = [spec["clusterIP"]]
    spec.setdefault("ipFamilies", ["IPv4"])
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    _node_ports(obj, others)


def _invalid(obj: Obj, field: str, value: object, why: str) -> ApiError:
    shown = orjson.dumps(value).decode()
    cause = errors.Cause("FieldValueInvalid", f"Invalid value: {shown}: {why}", field)
    return errors.invalid("", "Service", obj["metadata"]["name"], [cause])


def _check_address(obj: Obj, address: str, others: list[Obj]) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError as wrong:
        why = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
        raise _invalid(obj, "spec.clusterIPs[0]", address, why) from wrong
    if ipaddress.ip_address(address) not in RANGE:
        why = f"failed to allocate IP {address}: the provided network does not match the current range"
        raise _invalid(obj, "spec.clusterIPs", [address], why)
    if any(other.get("clusterIP") == address for other in others):
        raise _invalid(
            obj, "spec.clusterIPs", [address], f"failed to allocate IP {address}: provided IP is already allocated"
        )


def _node_ports(obj: Obj, others: list[Obj]) -> None:
    spec = obj["spec"]
    wants = spec["type"] == "NodePort" or (
        spec["type"] == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts", True)
    )
    if not wants:
        for port in spec.get("ports") or []:
            if spec["type"] == "ClusterIP":
                port.pop("nodePort", None)
        return
    taken = {port.get("nodePort") for other in others for port in other.get("ports") or []}
    for index, port in enumerate(spec.get("ports") or []):
        number = port.get("nodePort")
        if number:
            if number not in NODE_PORTS:
                why = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                raise _invalid(obj, f"spec.ports[{index}].nodePort", number, why)
            if number in taken:
                raise _invalid(obj, f"spec.ports[{index}].nodePort", number, "provided port is already allocated")
        else:
            number = next(n for n in (secrets.choice(NODE_PORTS) for _ in range(10**6)) if n not in taken)
            port["nodePort"] = number
        taken.add(number)


def keep_allocation(new: Obj, old: Obj) -> None:
    """A PUT that leaves out what was allocated keeps it."""
    spec, before = new.get("spec") or {}, old["spec"]
    if before.get("type") == "ExternalName" or spec.get("type", "ClusterIP") == "ExternalName":
        return
    for key in ("clusterIP", "clusterIPs"):
        if not spec.get(key) and key in before:
            spec[key] = before[key]
    if spec.get("type") not in ("NodePort", "LoadBalancer"):
        return
    known = {(port.get("port"), port.get("protocol")): port.get("nodePort") for port in before.get("ports") or []}
    for port in spec.get("ports") or []:
        number = known.get((port.get("port"), port.get("protocol", "TCP")))
        if not port.get("nodePort") and number:
            port["nodePort"] = number
