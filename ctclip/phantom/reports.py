"""Write the radiology report of a phantom: three hospitals, and their mistakes on demand.

What is drawn, what the report says and what the label table holds are three different things, as
in real data. Labels come from the report; each departure of the report from the truth is recorded.
"""

import dataclasses
import functools
import importlib.resources
from typing import Any

import numpy as np
import yaml

from ctclip.findings import FINDINGS
from ctclip.phantom.anatomy import ALL_LOBES, LOBES
from ctclip.phantom.lesions import Lesion

STYLES = ("exhaustive", "terse", "slices")
"""Explicit negatives in full sentences; impression only; image numbers and other words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How hospitals write, and how often they err. All error rates are 0 by default."""

    styles: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of patients whose hospital writes exhaustively, tersely, by slice number."""

    omission: float = 0.0
    """Chance that a drawn finding is not reported, whatever its size."""

    small_miss: float = 0.0
    """Chance that a nodule or node is overlooked as its size goes to 0."""

    small_miss_mm: float = 4.0
    """That chance falls by e per this many mm."""

    hedge: float = 0.0
    """Chance that a reported finding is called only possible (the label stays 1)."""

    false_mention: float = 0.0
    """Chance that an absent finding is reported as present."""

    contradiction: float = 0.0
    """Chance that the impression denies a finding that the findings section affirms."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "styles":
                if min(value) < 0 or sum(value) <= 0:
                    raise ValueError(f"styles must be three shares of positive sum, got {value}")
            elif field.name == "small_miss_mm":
                if value <= 0:
                    raise ValueError(f"small_miss_mm must be positive, got {value}")
            elif not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be a rate between 0 and 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Statement:
    """What one report says about one finding, beside what was drawn."""

    finding: str
    drawn: bool
    says: str
    """``affirmed``, ``hedged``, ``negated`` or ``absent``."""

    error: str = ""
    """``omission``, ``small miss``, ``hedge``, ``false mention``, ``contradiction`` or empty."""

    @property
    def label(self) -> int:
        """CT-RATE's convention: mentioned as present is 1, negated or absent is 0."""
        return int(self.says in ("affirmed", "hedged"))


@dataclasses.dataclass(frozen=True)
class Report:
    """Both sections, the hospital's style, and a statement per finding."""

    findings: str
    impression: str
    style: str
    statements: tuple[Statement, ...]


@functools.cache
def _words(name: str) -> dict[str, Any]:
    text = importlib.resources.files("ctclip.phantom").joinpath(f"data/{name}.yaml")
    return yaml.safe_load(text.read_text(encoding="utf-8"))


def write_report(
    lesions: list[Lesion],
    image_numbers: list[int],
    config: ReportConfig,
    rng: np.random.Generator,
    style: str | None = None,
) -> Report:
    """Report one study.

    Args:
        lesions: What was drawn.
        image_numbers: Per lesion the axial image that shows it, 1 at the top.
        config: Styles and error rates.
        rng: The patient's generator for words.
        style: One of ``STYLES``; drawn from the config's shares when not given.

    Returns:
        The report and what it says about each of the 18 findings.
    """
    if style is None:
        shares = np.array(config.styles, float)
        style = STYLES[int(rng.choice(3, p=shares / shares.sum()))]
    drawn: dict[str, list[tuple[Lesion, int]]] = {name: [] for name in FINDINGS}
    for lesion, number in zip(lesions, image_numbers, strict=True):
        drawn[lesion.finding].append((lesion, number))
    statements = [_decide(name, drawn[name], config, style, rng) for name in FINDINGS]
    said = {s.finding: s for s in statements}
    shown = {n: drawn[n] or _imagined(n, rng) for n in FINDINGS if said[n].label}
    wording = _words("wording")
    kind = "img" if style == "slices" else "says"
    lines = {n: _line(wording[n][kind], shown[n], said[n], rng) for n in shown}
    denials = {
        name: _pick(rng, wording[name]["denies"])
        for name in FINDINGS
        if said[name].says == "negated"
    }
    impression = _impression(shown, said, style, rng)
    match style:
        case "exhaustive":
            findings = _exhaustive(lines, denials, rng)
        case "slices":
            order = list(rng.permutation(list(lines)))
            findings = " ".join([lines[n] for n in order] + list(denials.values()))
        case _:
            findings = ""
            impression = impression + list(denials.values())
    if not impression:
        impression = [_pick(rng, _words("phrases")["unremarkable"])]
    return Report(findings, _bullets(impression, rng), style, tuple(statements))


def _decide(
    name: str,
    drawn: list[tuple[Lesion, int]],
    config: ReportConfig,
    style: str,
    rng: np.random.Generator,
) -> Statement:
    # One number per possible error, always drawn: a rate changes one error and nothing else.
    omit, small, hedge, false, contradict, deny = rng.random(6)
    if drawn:
        size = max(lesion.size_mm for lesion, _ in drawn)
        if omit < config.omission:
            return Statement(name, True, "absent", "omission")
        if name in ("Lung nodule", "Lymphadenopathy") and small < config.small_miss * np.exp(
            -size / config.small_miss_mm
        ):
            return Statement(name, True, "absent", "small miss")
        if hedge < config.hedge:
            return Statement(name, True, "hedged", "hedge")
        error = "contradiction" if contradict < config.contradiction else ""
        return Statement(name, True, "affirmed", error)
    if false < config.false_mention:
        return Statement(name, False, "affirmed", "false mention")
    # Terse readers deny the little that the referrer asked about.
    share = {"exhaustive": 1.0, "slices": 0.35, "terse": 0.12}[style]
    denied = deny < share * float(_words("wording")[name]["denied"])
    return Statement(name, False, "negated" if denied else "absent")


def _imagined(name: str, rng: np.random.Generator) -> list[tuple[Lesion, int]]:
    """A lesion that only the report knows: small and in a random place."""
    lobe = ALL_LOBES[int(rng.integers(len(ALL_LOBES)))]
    side = "right" if lobe in LOBES["right"] else "left"
    places = {
        "Lymphadenopathy": "right paratracheal",
        "Coronary artery wall calcification": "left anterior descending",
    }
    kinds = {
        "Medical material": "central venous catheter",
        "Lung nodule": "solid",
        "Emphysema": "centrilobular",
        "Atelectasis": "linear",
        "Bronchiectasis": "cylindrical",
    }
    lesion = Lesion(
        finding=name,
        kind=kinds.get(name, "-"),
        side=side,
        lobe=places.get(name, lobe),
        size_mm=float(np.round(rng.uniform(4, 12), 0)),
        severity=0.1,
    )
    return [(lesion, int(rng.integers(10, 60)))]


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _size(mm: float, rng: np.random.Generator) -> str:
    if mm >= 20 and rng.random() < 0.3:
        return f"{mm / 10:.1f} cm"
    return f"{mm:.0f} mm" if mm >= 3 else f"{mm:.1f} mm"


def _severity(value: float, rng: np.random.Generator) -> str:
    if value < 0.25:
        return _pick(rng, ["minimal", "mild", "slight"])
    if value < 0.6:
        return _pick(rng, ["moderate", "mild to moderate"])
    return _pick(rng, ["marked", "severe", "extensive"])


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _where(lobes: list[str], rng: np.random.Generator) -> str:
    """Lobes in words, grouped the way readers group them."""
    pulmonary = [lobe for lobe in ALL_LOBES if lobe in lobes]
    if not pulmonary:
        return _join(lobes)
    if len(pulmonary) == 6:
        return _pick(rng, ["all lobes", "both lungs diffusely"])
    parts = []
    for pair, both in (
        (("right upper lobe", "left upper lobe"), "both upper lobes"),
        (("right lower lobe", "left lower lobe"), "both lower lobes"),
    ):
        if set(pair) <= set(pulmonary):
            parts.append(both)
            pulmonary = [lobe for lobe in pulmonary if lobe not in pair]
    return _join(parts + [f"the {lobe}" for lobe in pulmonary])


def _slots(drawn: list[tuple[Lesion, int]], rng: np.random.Generator) -> dict[str, str]:
    """Words for the slots of the wording file, from what was drawn."""
    main, number = max(drawn, key=lambda item: item[0].size_mm)
    sides = {lesion.side for lesion, _ in drawn}
    both = "both" in sides or {"left", "right"} <= sides
    side = main.side if main.side in ("left", "right") else "right"
    lobes = list(dict.fromkeys(part for lesion, _ in drawn for part in lesion.lobe.split("+")))
    if main.finding == "Lung nodule":
        lobes = [main.lobe]
    severity = _severity(max(lesion.severity for lesion, _ in drawn), rng)
    device = "device"
    if main.finding == "Medical material":
        device = _pick(rng, _words("phrases")["devices"][main.kind])
    dependent = _pick(rng, ["dependent", "compressive"])
    words = {
        "sev": severity,
        "where": _where(lobes, rng),
        "side": "both lungs" if both else f"the {side} lung",
        "lr": _pick(rng, ["bilaterally", "on both sides"]) if both else f"on the {side}",
        "size": _size(main.size_mm, rng),
        "n": str(number),
        "kind": main.kind,
        "dev": device,
        "atel": dependent if main.kind == "dependent" else _pick(rng, ["linear", "plate-like"]),
        "bron": main.kind if main.finding == "Bronchiectasis" else "cylindrical",
    }
    return words | {key.capitalize(): word[:1].upper() + word[1:] for key, word in words.items()}


_ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("airways", ()),
    ("vessels", ("Arterial wall calcification", "Medical material")),
    ("", ("Cardiomegaly", "Coronary artery wall calcification", "Pericardial effusion")),
    ("oesophagus", ("Hiatal hernia",)),
    ("", ("Lymphadenopathy",)),
    (
        "window",
        (
            "Emphysema",
            "Lung opacity",
            "Consolidation",
            "Lung nodule",
            "Mosaic attenuation pattern",
            "Bronchiectasis",
            "Peribronchial thickening",
            "Interlobular septal thickening",
            "Pulmonary fibrotic sequela",
            "Atelectasis",
        ),
    ),
    ("", ("Pleural effusion",)),
    ("abdomen", ()),
    ("bones", ()),
)
"""The order in which a report walks through the chest, with the normal sentence of each stop."""


def _exhaustive(lines: dict[str, str], denials: dict[str, str], rng: np.random.Generator) -> str:
    text: list[str] = []
    normal = _words("phrases")["normal"]
    for stop, names in _ORDER:
        hernia = stop == "oesophagus" and "Hiatal hernia" in lines
        if stop and not hernia and (stop == "window" or rng.random() < 0.85):
            text.append(_pick(rng, normal[stop]))
        shuffled = [names[i] for i in rng.permutation(len(names))]
        text += [lines[n] for n in shuffled if n in lines]
        text += [denials[n] for n in shuffled if n in denials]
    return " ".join(text)


def _impression(
    shown: dict[str, list[tuple[Lesion, int]]],
    said: dict[str, Statement],
    style: str,
    rng: np.random.Generator,
) -> list[str]:
    lines = []
    for name, lesions in shown.items():
        wording = _words("wording")[name]
        contradicted = said[name].error == "contradiction"
        # Impressions repeat what matters; the terse style has nothing else.
        if style == "terse" or not (contradicted or rng.random() < 0.25):
            lines.append(_line(wording["short"], lesions, said[name], rng))
        if contradicted:
            lines.append(_pick(rng, wording["denies"]))
    return [lines[i] for i in rng.permutation(len(lines))]


def _line(
    options: list[str],
    lesions: list[tuple[Lesion, int]],
    statement: Statement,
    rng: np.random.Generator,
) -> str:
    """One affirming sentence, hedged where the statement is."""
    sentence = _pick(rng, options).format(**_slots(lesions, rng))
    if statement.says != "hedged":
        return sentence
    return _pick(rng, _words("phrases")["hedges"]).format(sentence[:1].lower() + sentence[1:])


def _bullets(lines: list[str], rng: np.random.Generator) -> str:
    mark = _pick(rng, ["- ", "* ", ""])
    return ("\n" if mark else " ").join(f"{mark}{line}" for line in lines)
