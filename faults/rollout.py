"""Releases: the workload under test is rolled over while users are served."""

from __future__ import annotations

import json
from dataclasses import dataclass

from faults.base import ROLLED, Newborn, Plan, Roll, Undo, View, check_radius
from gameday.cluster import Obj, Workload
from gameday.errors import ExperimentError, TargetError
from gameday.kinds import DEPLOYMENTS
from gameday.model import FaultFacts


@dataclass(frozen=True, slots=True)
class RollingUpdate:
    """The engines' Deployment gets a new pod template: an annotation of ours, and `image` where one is given.

    Its own strategy decides how the pods are replaced. The undo takes exactly that back, which rolls the pods once
    more; the former ReplicaSet is used again. `image` of a version that cannot start is a bad release.
    """

    lasting: float
    image: str = ""

    @property
    def one_shot(self) -> bool:
        return False

    def __post_init__(self) -> None:
        if self.image != self.image.strip() or " " in self.image:
            raise ExperimentError(f"{self.image!r} is no image reference.")

    def plan(self, view: View) -> Plan:
        owner = _deployment(view)
        pods = tuple(pod for pod in view.ready if _owned(pod.owner, owner.name))
        check_radius(view, pods[: max(1, owner.max_unavailable)], what=f"The rollout of {owner.name}, by its strategy,")
        container, image = next(iter(owner.images.items()))
        patch: Obj = {"metadata": {"annotations": {ROLLED: view.token}}}
        ours: dict[str, str] = {"token": view.token}
        if self.image:
            patch["spec"] = {"containers": [{"name": container, "image": self.image}]}
            ours |= {"container": container, "image": self.image, "was": image}
        what = f"the image {self.image}" if self.image else "the same image"
        return Plan(
            facts=FaultFacts(
                name="rolling update",
                title=f"{owner.name} is rolled over to {what}: {len(pods)} pod(s), by its own strategy",
                one_shot=False,
                lasting=self.lasting,
                pods=tuple(sorted(pod.key for pod in pods)),
                fidelity=("Real: the Deployment's pod template is changed, as a release does; it is changed back.",),
            ),
            acts=(Roll(owner.name, view.namespace, owner.uid, patch, Newborn(owner.name, lasting=not self.image)),),
            undos=(
                Undo(
                    verb="template",
                    what="rollout",
                    name=owner.name,
                    kind=DEPLOYMENTS.kind,
                    namespace=view.namespace,
                    uid=owner.uid,
                    value=json.dumps(ours, sort_keys=True),
                ),
            ),
            in_turn=max(1, owner.max_unavailable),
            settles=(owner.name,),
        )


def _owned(owner: str, deployment: str) -> bool:
    """Whether a ReplicaSet's name (`NAME-HASH`) is that of this Deployment."""
    return owner.startswith("ReplicaSet/") and owner.removeprefix("ReplicaSet/").rsplit("-", 1)[0] == deployment


def _deployment(view: View) -> Workload:
    """The one Deployment that most ready engines belong to."""
    found = [(sum(_owned(pod.owner, one.name) for pod in view.ready), one.name, one) for one in view.workloads]
    owned = sorted((count, name, one) for count, name, one in found if count and one.images)
    if not owned:
        raise TargetError(f"No Deployment owns a ready pod of {view.selector!r}: there is nothing to roll out.")
    return owned[-1][2]
