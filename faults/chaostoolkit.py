"""A team's own Chaos Toolkit experiment as a fault: its method does the harm, its rollbacks take it back."""

from __future__ import annotations

from dataclasses import dataclass

from faults.base import Call, Plan, Undo, View
from gameday import activities
from gameday.errors import TargetError
from gameday.model import FaultFacts


@dataclass(frozen=True, slots=True)
class ChaosToolkit:
    """`experiment` is the canonical JSON of the file (`activities.Own.text`), without the values of its secrets.

    Its targets are its own: no blast radius can be computed, only its namespaces are held to the allow-list. Without
    rollbacks it is one-shot: there is nothing to heal, and whatever it leaves behind is an ERROR.
    """

    experiment: str
    lasting: float

    @property
    def one_shot(self) -> bool:
        return not activities.of_text(self.experiment).rollbacks

    def plan(self, view: View) -> Plan:
        own = activities.of_text(self.experiment)
        if not view.ready:
            raise TargetError(f"No ready pod matches {view.selector!r} in {view.namespace}: nothing can be tested.")
        acts = tuple(
            Call(f"{number + 1}. {one.name}", self.experiment, number, one.action)
            for number, one in enumerate(own.method)
        )
        undos = (Undo("rollback", "rollbacks", own.title, value=self.experiment),) if own.rollbacks else ()
        return Plan(
            facts=FaultFacts(
                name="Chaos Toolkit experiment",
                title=own.title,
                one_shot=self.one_shot,
                lasting=self.lasting,
                pods=(),  # nobody knows before it acts
                fidelity=(
                    "Whatever its actions do; they choose their targets themselves.",
                    "Its effect is proven by what is seen to change of the engines: pods, endpoints, nodes, "
                    "connections to them; or by the probes that it names as proof.",
                ),
            ),
            acts=acts,
            undos=undos,
            cluster_wide=True,
        )
