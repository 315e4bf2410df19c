"""Every reason code that the package can give is explained in docs/data.md, and no other."""

import ast
import re
from pathlib import Path

import ctclip.data

POSITION = {"Note": 0, "_BadRow": 0, "refused": 1, "VolumeError": 1, "CorruptVolumeError": 1}
POSITION["Problem"] = 2


def codes_given():
    for module in Path(ctclip.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in POSITION and len(node.args) > POSITION[name]:
                code = node.args[POSITION[name]]
                if isinstance(code, ast.Constant):
                    yield code.value


def test_the_documentation_lists_every_reason_code():
    text = Path(__file__).parents[2].joinpath("docs/data.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", text))
    given = set(codes_given())
    assert len(given) > 80
    assert given - listed == set()
