"""The code blocks of docs/ecosystem.md run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GUIDE = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S), ids=lambda code: code.splitlines()[0]
)
def test_code_block(code, tmp_path, monkeypatch, capsys):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/ecosystem.md", "exec"), {"__name__": "guide"})
    assert capsys.readouterr().out
