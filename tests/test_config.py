import subprocess
import sys
from pathlib import Path

import pytest

from ohem_mm import config
from ohem_mm.config import UnknownConfigError, config_path, list_configs

NAME = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    [NAME, f"{NAME}.py", f"configs/{NAME}", f"configs/{NAME}.py", f"ohem_mm::{NAME}"],
)
def test_every_spelling_gives_the_same_file_from_any_directory(name):
    path = config_path(name)
    assert path.is_absolute()
    assert path.is_file()
    assert path.as_posix().endswith(f"configs/{NAME}.py")


def test_list_holds_every_config_and_no_fragment():
    names = list_configs()
    assert NAME in names
    assert names == sorted(set(names))
    assert not any("_base_" in name or name.endswith(".py") for name in names)
    assert all(config_path(name).is_file() for name in names)


def test_existing_file_wins_over_a_shipped_one(tmp_path):
    mine = tmp_path / f"{NAME}.py"
    mine.parent.mkdir()
    mine.write_text("")
    assert config_path(f"{NAME}.py") == mine
    assert config_path(str(mine)) == mine
    assert config_path(f"ohem_mm::{NAME}.py") != mine


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("quickstart/unet-tiny_1xb4-ohm-1k_scenes-96x192", NAME),
        ("unet-tiny_1xb4-ohem-1k_scenes-96x192.py", NAME),  # the folder is missing
        ("ohem_mm::quikstart/unet-tiny_1xb4-ohem-1k_scenes-96x192", NAME),
        ("chase_db1/unet", "chase_db1/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128"),
        ("tools/tran.py", "tools/train.py"),
    ],
)
def test_unknown_name_lists_the_nearest(typo, nearest):
    with pytest.raises(UnknownConfigError) as caught:
        config_path(typo)
    message = str(caught.value)
    assert repr(typo) in message
    assert f"the nearest names are: {nearest}" in message
    assert isinstance(caught.value, FileNotFoundError)


def test_what_tools_share_is_no_tool():
    with pytest.raises(UnknownConfigError) as caught:
        config_path("tools/launch.sh")
    assert "_launch" not in str(caught.value)
    assert config_path("tools/_launch.sh").is_file()


def test_name_close_to_nothing():
    with pytest.raises(UnknownConfigError, match="no name is close to it"):
        config_path("zzz/0123")


def test_a_folder_is_no_config():
    with pytest.raises(UnknownConfigError):
        config_path("quickstart")


def test_wheel_layout(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "ohem_mm"
    for relative in ("configs/a/b.py", "configs/_base_/c.py", "tools/train.py"):
        file = package / ".mim" / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    assert list_configs() == ["a/b"]
    assert config_path("a/b") == package / ".mim/configs/a/b.py"
    assert config_path("tools/train.py") == package / ".mim/tools/train.py"


def test_command_line(capsys):
    assert config.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list_configs()
    assert config.main([NAME]) == 0
    assert capsys.readouterr().out.strip() == str(config_path(NAME))
    assert config.main(["tools/train.py"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "train.py"
    assert config.main(["quickstrat/x"]) == 2
    assert capsys.readouterr().err.startswith("error: no config is called 'quickstrat/x'")
    with pytest.raises(SystemExit, match="2"):
        config.main([])


def test_module_needs_no_mmengine():
    code = (
        "import sys; sys.modules['mmengine'] = None; import ohem_mm.config as c; print(c.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ohem_mm.config", done.stderr
