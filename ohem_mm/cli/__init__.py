"""What the tools share: options, configs, checks and the process around it all.

The checks run before anything is built. A mistake that a user can make ends in one sentence
(:class:`UserError`) instead of a traceback from deep inside the framework.
"""

import sys

try:
    import mmengine.registry
    import mmengine.runner  # noqa: F401
except ImportError as error:
    print(
        f"error: the tools need mmengine and mmseg ({error}); "
        "install them with: pip install 'ohem-mm[mmseg]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from ohem_mm.cli.checks import (
    check_amp_device,
    check_checkpoint,
    check_datasets,
    check_hooks,
    check_losses,
    check_pretrained,
    check_work_dir,
    is_local,
)
from ohem_mm.cli.configs import (
    apply_options,
    iter_dicts,
    keep_two_checkpoints,
    load_config,
    type_name,
    use_amp,
    use_bf16,
    use_channels_last,
)
from ohem_mm.cli.options import (
    ConfigOptions,
    add_common_arguments,
    add_config_argument,
    add_config_options,
    parse_value,
)
from ohem_mm.cli.process import allow_mmengine_checkpoints, build_runner, is_first_rank, run
from ohem_mm.errors import UserError

__all__ = [
    "ConfigOptions",
    "UserError",
    "add_common_arguments",
    "add_config_argument",
    "add_config_options",
    "allow_mmengine_checkpoints",
    "apply_options",
    "build_runner",
    "check_amp_device",
    "check_checkpoint",
    "check_datasets",
    "check_hooks",
    "check_losses",
    "check_pretrained",
    "check_work_dir",
    "is_first_rank",
    "is_local",
    "iter_dicts",
    "keep_two_checkpoints",
    "load_config",
    "parse_value",
    "run",
    "type_name",
    "use_amp",
    "use_bf16",
    "use_channels_last",
]
