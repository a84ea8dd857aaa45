"""Records of a sensitivity analysis (`graphprune.passes.structural.sensitivity` makes them).

A group is sensitive where its error is far above the median of its role; such groups are spared.
Of the others a recipe takes, role by role, the cut that adds the least error for the time that it
saves, as long as all cuts together stay below a limit. Together means the root of the sum of
squares: errors of single cuts are taken as independent, which is a guess, and the order of
magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import final

from graphprune.pipeline.events import JSON
from graphprune.report.charts import TITLES, short_names

_FAR = 2.0  # times the median of its role, from which a group is spared
_TOLERATED = 0.2  # relative error of the outputs, of all cuts of a recipe together
_PASSES = {"head": "prune-heads", "kv_group": "prune-heads", "neuron": "prune-neurons"}


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """One group cut alone.

    Attributes:
        group: its id.
        role: its role.
        size: units it has.
        kept: units that stayed.
        ratio: fraction that was asked to go.
        error: relative error of the model's outputs, |y' - y| / |y| over all calibration rows.
    """

    group: str
    role: str
    size: int
    kept: int
    ratio: float
    error: float


@final
@dataclass(frozen=True, slots=True)
class Time:
    """All groups of a role cut at one ratio, in ONNX Runtime, beside the dense model."""

    role: str
    ratio: float
    ms: float
    dense_ms: float


@final
@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Costs of all groups and times of all roles.

    Attributes:
        score: how units were chosen; `compensation` is how the error was compensated.
        samples: calibration samples that the outputs were compared on.
        costs: one for every group and ratio, in execution order.
        times: one for every role and ratio; empty without a clock.
        skipped: group id -> why it could not be looked at.
    """

    score: str
    compensation: str
    samples: int
    costs: tuple[Cost, ...]
    times: tuple[Time, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, JSON]:
        """Plain data."""
        data: dict[str, JSON] = asdict(self)
        return {**data, "costs": list(data["costs"]), "times": list(data["times"])}

    @property
    def ratios(self) -> list[float]:
        """The ratios that were looked at, ascending."""
        return sorted({c.ratio for c in self.costs})

    @property
    def middle(self) -> float:
        """The ratio nearest to one half, at which groups and roles are compared."""
        return min(self.ratios, key=lambda ratio: abs(ratio - 0.5))

    def sensitive(self) -> dict[str, list[Cost]]:
        """The groups of each role to spare, the most sensitive first, at the middle ratio."""
        found: dict[str, list[Cost]] = {}
        for role in self._roles():
            mine = sorted(self._at(role, self.middle), key=lambda c: -c.error)
            limit = _FAR * median(c.error for c in mine)
            # Of two groups each is far from the other.
            far = [c for c in mine if c.error > limit] if len(mine) > 2 else []
            found[role] = far
        return found

    def conclusion(self) -> list[str]:
        """What to cut first and what to spare, in sentences."""
        order = sorted(self._roles(), key=self._price)
        names = [TITLES.get(role, role).lower() for role in order]
        lines = [f"Cut {names[0]} first: {self._figures(order[0])}."]
        lines += [
            f"Then {name}: {self._figures(role)}."
            for name, role in zip(names[1:], order[1:], strict=True)
        ]
        sensitive = self.sensitive()
        for name, role in zip(names, order, strict=True):
            mine = self._at(role, self.middle)
            errors = [c.error for c in mine]
            if far := sensitive[role]:
                short = short_names([c.group for c in mine])
                spared = ", ".join(f"{short[c.group]} ({c.error:.3f})" for c in far)
                lines.append(
                    f"Among the {name}, spare {spared}: the median error is {median(errors):.3f}."
                )
            elif len(mine) > 2:
                lines.append(
                    f"Among the {name}, no layer stands out: errors are {min(errors):.3f} to "
                    f"{max(errors):.3f}."
                )
        return lines

    def recipe(self) -> tuple[list[JSON], str]:
        """Passes for a recipe, and in a sentence what they are expected to do to the outputs.

        Where no cut stays below the limit, the mildest one is taken, and the sentence says it.
        """
        chosen = self._chosen()
        error = self._together(chosen)
        said = f"Together these cuts are expected to move the outputs by about {error:.2f}"
        if error > _TOLERATED:
            said += f", more than {_TOLERATED:g}: add --distill or finetune to recover"
        return self._steps(chosen), f"{said} (relative, a rough sum of single cuts)."

    def _steps(self, chosen: Mapping[str, float]) -> list[JSON]:
        sensitive = self.sensitive()
        steps: list[JSON] = []
        for role, ratio in chosen.items():
            options: dict[str, JSON] = {"ratio": ratio, "score": self.score}
            if spared := [c.group.partition("[")[0] for c in sensitive[role]]:
                options["ignore"] = spared
            name = _PASSES.get(role, "prune-axis")
            if name == "prune-axis":
                options["role"] = role
            steps.append({name: options})
        return steps

    def _chosen(self) -> dict[str, float]:
        """Role -> ratio, by steps that each add the least squared error for the time saved."""
        chosen: dict[str, float] = {}
        while options := [
            {**chosen, role: larger[0]}
            for role in self._roles()
            if (larger := [r for r in self.ratios if r > chosen.get(role, 0.0)])
        ]:
            within = [trial for trial in options if self._together(trial) <= _TOLERATED]
            if not within:
                # Something has to go: the mildest cut.
                return chosen or min(options, key=self._together)
            chosen = min(within, key=lambda trial: self._added(chosen, trial))
        return chosen

    def _added(self, chosen: Mapping[str, float], trial: Mapping[str, float]) -> float:
        gain = sum(self._saved(role, ratio) for role, ratio in trial.items())
        gain -= sum(self._saved(role, ratio) for role, ratio in chosen.items())
        error = self._together(trial) ** 2 - self._together(chosen) ** 2
        return error / max(gain, 1e-6)

    def _together(self, chosen: Mapping[str, float]) -> float:
        """Expected error of the cuts of all groups that are not spared."""
        spared = {c.group for costs in self.sensitive().values() for c in costs}
        return math.hypot(
            *(
                c.error
                for role, ratio in chosen.items()
                for c in self._at(role, ratio)
                if c.group not in spared
            )
        )

    def _price(self, role: str) -> float:
        """Error for what is saved, at the middle ratio."""
        error = fmean(c.error for c in self._at(role, self.middle))
        return error / max(self._saved(role, self.middle), 1e-6)

    def _saved(self, role: str, ratio: float) -> float:
        """Fraction of the dense time that a role's cut saves; the ratio itself without times."""
        times = [t for t in self.times if t.role == role and t.ratio == ratio]
        return 1 - times[0].ms / times[0].dense_ms if times else ratio

    def _figures(self, role: str) -> str:
        """What a role's cut costs and saves at the middle ratio, in words."""
        error = fmean(c.error for c in self._at(role, self.middle))
        text = (
            f"at {100 * self.middle:g} % removed, one layer's cut moves the outputs by "
            f"{error:.3f} on average"
        )
        if any(t.role == role for t in self.times):
            saved = self._saved(role, self.middle)
            text += f", and all of them together save {100 * saved:.0f} % of the time"
        return text

    def _roles(self) -> list[str]:
        return list(dict.fromkeys(c.role for c in self.costs))

    def _at(self, role: str, ratio: float) -> list[Cost]:
        return [c for c in self.costs if c.role == role and c.ratio == ratio]
