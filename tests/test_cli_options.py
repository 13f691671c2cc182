"""How the values of ``--cfg-options`` are read."""

import pytest
from tooling import CE, CHASE, load, roots

pytest.importorskip("mmseg")

from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import DictAction

from ohem_mm import cli


@pytest.fixture(autouse=True)  # hypothesis warns of one that a mark asks for
def _elsewhere(elsewhere):
    pass


def test_option_without_a_value(capsys):
    with pytest.raises(SystemExit, match="2"):
        load(CE, "train_cfg.max_iters")
    assert "expected KEY=VALUE, got 'train_cfg.max_iters'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("true", True),
        ("None", None),
        ("word", "word"),
        ("/data/Cam Vid/x", "/data/Cam Vid/x"),
        ("/data/o'neil (copy)", "/data/o'neil (copy)"),
        ("/data/x(1", "/data/x(1"),
        ("'a, b'", "a, b"),
        ("a,b", ["a", "b"]),
        ("a,", ["a"]),
        ("[]", []),
        ("[a b, 2,(3, [x])]", ["a b", 2, (3, ["x"])]),
        ("(1,)", (1,)),
        ("'[1,2]'", [1, 2]),
        ("['a,b', c]", ["a,b", "c"]),
        ("dict()", {}),
        ('[dict(type="FusedOhemHook")]', [{"type": "FusedOhemHook"}]),
        ("dict(type=X, thresh=dict(start=0.9), l=[1,2])",
         {"type": "X", "thresh": {"start": 0.9}, "l": [1, 2]}),
        ("{'a': [1, None]}", {"a": [1, None]}),
    ],
)  # fmt: skip
def test_values_on_the_command_line(text, value):
    assert cli.parse_value(text) == value
    assert type(cli.parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["[1,2", "(a", "dict(3)", "{x}"])
def test_values_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        load(CE, f"model.x={text}")
    assert f"--cfg-options model.x: {text!r} " in capsys.readouterr().err


@given(
    st.recursive(
        st.integers() | st.booleans() | st.none() | st.text("ab/ _", min_size=1).map(str.strip)
        .filter(bool),
        lambda inner: st.lists(inner, min_size=1) | st.lists(inner, min_size=1).map(tuple),
    ).filter(lambda value: isinstance(value, list | tuple))
)  # fmt: skip
def test_values_are_mmengines_where_there_are_no_blanks(value):
    def written(node):
        if isinstance(node, list | tuple):
            inner = ",".join(map(written, node))
            return f"[{inner}]" if isinstance(node, list) else f"({inner},)"
        return str(node)

    text = written(value)
    assert cli.parse_value(text) == value
    if " " not in text:
        assert DictAction._parse_iterable(text) == value


def test_a_hook_from_the_command_line():
    cfg = load(CE, "custom_hooks=[dict(type='FusedOhemHook')]")
    assert cfg.custom_hooks == [{"type": "FusedOhemHook"}]


def test_a_data_root_with_blanks(tmp_path):
    cfg = load(CHASE, f"data_root={tmp_path}/Cha se")
    assert set(roots(cfg)) == {f"{tmp_path}/Cha se"}
