"""Tools as modules, to be called in this process."""

import importlib.util

from ohem_mm.config import config_path


def load_tool(name):
    """``tools/{name}.py``."""
    spec = importlib.util.spec_from_file_location(name, config_path(f"tools/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
