"""PersistentVolumeClaims on a cluster without storage: they wait, say why, and go when no pod uses them.

Follows the persistentvolume and pvc-protection controllers of Kubernetes 1.36. Pods that need a claim stay Pending: see
the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.client import PODS, EventType, Key, Obj
from sandbox.controllers.catalog import CLAIMS
from sandbox.controllers.objects import deleting, finalizers, finished, namespace
from sandbox.controllers.work import Controller

PROTECTION = "kubernetes.io/pvc-protection"


def claims_of(pod: Obj) -> Iterator[str]:
    """The names of the claims that a pod's volumes are."""
    for volume in pod["spec"].get("volumes") or ():
        if claim := volume.get("persistentVolumeClaim"):
            yield claim["claimName"]


def unbound(pod: Obj, claims: dict[Key, Obj]) -> str:
    """Why a pod's claims keep it from being scheduled; "" when they do not."""
    waits = False
    for claim in claims_of(pod):
        found = claims.get((namespace(pod), claim))
        if found is None:
            return f'persistentvolumeclaim "{claim}" not found'
        if deleting(found):
            return f'persistentvolumeclaim "{claim}" is being deleted'
        waits |= (found.get("status") or {}).get("phase") != "Bound"
    return "pod has unbound immediate PersistentVolumeClaims" if waits else ""


class Claims(Controller):
    name = "persistentvolume-binder"
    source = "persistentvolume-controller"

    def setup(self) -> None:
        self.claims = self.watch_own(CLAIMS)
        self.pods = self.shared.caches.of(PODS)
        self.pods.subscribe(self._pod_changed)

    def _pod_changed(self, type: EventType, pod: Obj, old: Obj | None) -> None:
        if type == "DELETED" or finished(pod):
            for claim in claims_of(pod):
                self.queue.add((namespace(pod), claim))

    async def reconcile(self, key: Key) -> None:
        claim = self.claims.objects.get(key)
        if claim is None:
            return
        if deleting(claim):
            users = [p for p in self.pods.by("namespace", key[0]) if key[1] in claims_of(p) and not finished(p)]
            if PROTECTION in finalizers(claim) and not users:
                kept = [entry for entry in finalizers(claim) if entry != PROTECTION]
                await self.shared.patch(CLAIMS, claim, {"metadata": {"finalizers": kept}})
            return
        if kind := claim["spec"].get("storageClassName"):
            text = f'storageclass.storage.k8s.io "{kind}" not found'
            self.record(claim, CLAIMS, "Warning", "ProvisioningFailed", text)
        else:
            text = "no persistent volumes available for this claim and no storage class is set"
            self.record(claim, CLAIMS, "Normal", "FailedBinding", text)
