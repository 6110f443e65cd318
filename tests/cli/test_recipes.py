"""smelt recipes: all that ship are listed with their state, and a printed one is the recipe."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from smelt.cli import app
from smelt.passes import catalogue
from smelt.recipes import load, shipped


def smelt_(*words: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *words])


def test_lists_every_shipped_recipe_under_its_family() -> None:
    families: dict[str, set[str]] = {}
    members: set[str] = set()
    for line in smelt_().stdout.splitlines():
        if line.startswith(" "):
            members.add(line.split()[0])
        else:
            members = families.setdefault(line, set())
    expected: dict[str, set[str]] = {}
    for header in shipped():
        expected.setdefault(header.family, set()).add(header.name)
    assert families == expected


def test_json_tells_what_each_needs_and_whether_it_loads() -> None:
    told = {entry["name"]: entry for entry in json.loads(smelt_("--json").stdout)}
    assert told["none"]["needs"] == {"training": False, "calibration": "none", "images": False}
    assert {entry["state"] for entry in told.values()} == {"ready"}


def test_a_printed_recipe_loads_back_equal(tmp_path: Path) -> None:
    for header in shipped():
        (tmp_path / "r.yaml").write_text(smelt_(header.name).stdout)
        assert load(tmp_path / "r.yaml", catalogue()) == load(header.name, catalogue())


def test_set_shows_in_the_resolved_recipe() -> None:
    plain, changed = (
        json.loads(smelt_("none", "--json", *more).stdout) for more in ([], ["--set", "cache.insert.dtype=float16"])
    )
    assert changed["steps"] == [{"cache.insert": {**plain["steps"][0]["cache.insert"], "dtype": "float16"}}]
    assert plain["digest"] != changed["digest"]


def test_set_needs_a_name() -> None:
    result = smelt_("--set", "a.b=1")
    assert result.exit_code == 2 and "name it" in result.stderr
