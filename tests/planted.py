"""Faults planted in the source of kernels, for Triton's interpreter."""

import importlib
import inspect
import sys
import types

PACKAGE = "ohem_mm.ops.triton"


def plant(monkeypatch, folder, module, right, wrong):
    """Replace ``right`` by ``wrong`` in the kernels of a module, wherever they are used."""
    from triton.runtime.interpreter import InterpretedFunction

    original = importlib.import_module(f"{PACKAGE}.{module}")
    source = inspect.getsource(original)
    assert right in source, f"{right!r} is no longer in {module}.py"
    # Triton reads the source of a kernel from its file.
    path = folder / f"{module}.py"
    path.write_text(source.replace(right, wrong))
    faulty = types.ModuleType(original.__name__)
    faulty.__file__, faulty.__package__ = str(path), PACKAGE
    exec(compile(path.read_text(), str(path), "exec"), faulty.__dict__)
    users = [user for name, user in sys.modules.items() if name.startswith(PACKAGE)]
    for key, function in list(vars(original).items()):
        if isinstance(function, InterpretedFunction):
            for user in users:
                if vars(user).get(key) is function:
                    monkeypatch.setattr(user, key, vars(faulty)[key])
