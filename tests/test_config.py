from dataclasses import dataclass, field

import pytest

from ctclip import config


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        config.require_in(self, "optim.", 0, 1, "betas", ends="[)")


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 10
    note: str | None = None
    optim: Optim = field(default_factory=Optim)


def test_yaml_and_overrides_fill_the_dataclass(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\noptim:\n  betas: [0.8, 0.9]\n")

    run = config.load(Run, path, ["optim.lr=2e-4"])

    assert run == Run(steps=5, optim=Optim(lr=2e-4, betas=(0.8, 0.9)))


def test_to_dict_and_from_dict_are_inverse():
    run = Run(steps=3, note="x", optim=Optim(lr=0.5))

    assert config.from_dict(Run, config.to_dict(run)) == run


def test_a_saved_config_loads_back(tmp_path):
    run = Run(steps=7)
    config.save(run, tmp_path / "c.yaml")

    assert config.load(Run, tmp_path / "c.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown config key optim.lrr; did you mean optim.lr\?"),
        ("step=1", r"unknown config key step; did you mean steps\?"),
        ("steps=many", r"steps: .*integer.*'many'"),
        ("optim=3", "optim: .*3"),
        ("note=2024", "note: .*string, got 2024; in quotes it is text: '\"2024\"'$"),
        ("steps=true", "^command line: steps: expected a number, got True$"),
        ("optim.lr=yes", "optim.lr: expected a number, got True"),
        ("optim.betas=[0.9,false]", "optim.betas: expected a number, got False"),
        ("optim.lr=-1", r"^command line: optim: lr must be positive, got -1.0$"),
        (
            "optim.betas=[0.9,1.0]",
            r"^command line: optim.betas must be in \[0, 1\), got \(0.9, 1.0\)$",
        ),
        (
            "optim.betas=[.nan,0.9]",
            r"^command line: optim.betas must be finite, got \(nan, 0.9\)$",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(override, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load(Run, None, [override])


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(config.ConfigError, match="nowhere.yaml does not exist"):
        config.load(Run, tmp_path / "nowhere.yaml")


def test_a_broken_yaml_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1, 2")

    with pytest.raises(config.ConfigError, match="bad.yaml: not a readable config"):
        config.load(Run, path)


def test_a_number_in_quotes_is_text():
    assert config.load(Run, None, ['note="2024"']).note == "2024"


def test_a_list_is_no_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("- steps: 5\n")

    with pytest.raises(config.ConfigError, match=r"run.yaml: expected a mapping of keys"):
        config.load(Run, path, ["steps=3"])


def test_values_of_flags_win_and_are_never_parsed():
    run = config.load(Run, None, ["note=from override"], values={"note": "effusion: [large"})

    assert run.note == "effusion: [large"
